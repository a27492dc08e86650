"""The teacher's full distributions, in PyTorch and f32.

A distribution is 49,152 numbers, those of 300,000 positions 59 GB. So what is kept is the last hidden state,
576 numbers of f32 a position, and the head is multiplied again wherever the distribution is wanted: the very
same logits for a fifth of the work.
"""

import os

import numpy
import torch
from transformers import AutoModelForCausalLM

# Rows of one file; what is lost when the work is stopped.
ROWS = 8


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def batch(rows):
    """Token ids of rows padded to one `[b, t]`, and indices into its flattened positions: of those that predict the
    targets, in the order of rows. Padding stands behind, where a causal model does not see it."""
    inputs = [row["token_ids"][:-1] for row in rows]
    width = max(map(len, inputs))
    ids_bt = torch.tensor([ids + [0] * (width - len(ids)) for ids in inputs])
    positions = [
        torch.arange(row["prompt_tokens"] - 1, len(ids)) + i * width for i, (row, ids) in enumerate(zip(rows, inputs))
    ]
    return ids_bt, torch.cat(positions)


def target_hidden(model, rows):
    """Hidden states `[m, h]` that predict the rows' targets, after the last norm."""
    ids_bt, positions_m = batch(rows)
    hidden_bth = model.model(input_ids=ids_bt, use_cache=False).last_hidden_state
    return hidden_bth.flatten(0, 1)[positions_m]


class Cache:
    """The teacher's hidden states of a list of rows, in files of ROWS rows."""

    def __init__(self, folder, rows):
        self.folder, self.rows = folder, rows

    def path(self, block):
        return os.path.join(self.folder, f"{block:05}.npy")

    @torch.no_grad()
    def fill(self, model, say):
        """Computes what is not there yet."""
        os.makedirs(self.folder, exist_ok=True)
        for start in range(0, len(self.rows), ROWS):
            path = self.path(start // ROWS)
            if os.path.exists(path):
                continue
            rows = self.rows[start : start + ROWS]
            hidden = [target_hidden(model, [row]).numpy() for row in rows]
            with open(path + ".part", "wb") as file:
                numpy.save(file, numpy.concatenate(hidden))
            os.replace(path + ".part", path)
            say(f"teacher: {start + len(rows)} of {len(self.rows)} rows")

    def of(self, number):
        """`[m, h]` of one row."""
        block = number // ROWS
        before = sum(map(targets, self.rows[block * ROWS : number]))
        hidden = numpy.load(self.path(block), mmap_mode="r")[before : before + targets(self.rows[number])]
        return torch.from_numpy(numpy.array(hidden))


def targets(row):
    return len(row["token_ids"]) - row["prompt_tokens"]
