"""Sequences of many shards as padded arrays."""

import numpy as np

from .shard import open as open_shard


def batches(paths, rows=8, pad_id=0, check_content=True, temperature=1, split=None):
    """Dicts of numpy arrays, `rows` sequences each (the last may have fewer), in the order of the files.

    input_ids       int64 [b, t], padded behind with pad_id
    attention_mask  int64 [b, t]
    labels          int64 [b, t], the token where it is a target, else -100
    positions       int64 [n, 2], row and token whose logits the n-th target judges
    support_ids     int64 [n, k], padded with 0
    support_mass    float32 [n, k], padded with 0
    residual_mass   float32 [n], of all tokens outside the support together; 0 unless the codec is top_k_tail
    row_ids         list of b ids

    `split` is "train", "held_out" or "all": only shards of it are read. It may be left out where all are of one.
    The masses are those of `temperature`, see SparseTargets.at_temperature. Sequences without a target
    are left out. Errors: as `retort_data.open`; ValueError for a shard whose vocabulary or teacher is
    not that of those before it, of another split where none was asked for, or that was not captured for the temperature.
    """
    if split not in (None, "train", "held_out", "all"):
        raise ValueError(f"split is {split!r}; it must be train, held_out or all")
    waiting, seen, of = [], None, None
    for path in paths:
        with open_shard(path, check_content) as shard:
            own = shard.header["retort.split"]
            if split not in (None, "all", own):
                continue
            if split is None and of is not None and own != of[1]:
                raise ValueError(f"{shard.path} is of the split {own}, {of[0]} of {of[1]}: say which with split=")
            of = of or (shard.path, own)
            identity = {key: shard.header[f"retort.{key}"] for key in ("teacher_sha256", "tokenizer_sha256", "vocab_size")}
            if seen is not None and identity != seen[1]:
                differing = next(key for key in identity if identity[key] != seen[1][key])
                raise ValueError(
                    f"{shard.path} has {differing} {identity[differing]}, {seen[0]} has {seen[1][differing]}: "
                    "soft targets of different teachers do not mix"
                )
            if temperature not in (1, *shard.format.temperatures):
                raise ValueError(f"{shard.path} has no soft targets at temperature {temperature:g}")
            seen = seen or (shard.path, identity)
            for sequence in shard:
                if len(sequence.targets):
                    waiting.append(sequence)
                if len(waiting) == rows:
                    yield _pad(waiting, pad_id, temperature)
                    waiting = []
    if waiting:
        yield _pad(waiting, pad_id, temperature)


def _pad(sequences, pad_id, temperature):
    longest = max(len(sequence.token_ids) for sequence in sequences)
    widest = max(int(np.diff(sequence.targets.offsets).max()) for sequence in sequences)
    count = sum(len(sequence.targets) for sequence in sequences)
    shape = (len(sequences), longest)
    batch = {
        "input_ids": np.full(shape, pad_id, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
        "labels": np.full(shape, -100, np.int64),
        "positions": np.empty((count, 2), np.int64),
        "support_ids": np.zeros((count, widest), np.int64),
        "support_mass": np.zeros((count, widest), np.float32),
        "residual_mass": np.zeros(count, np.float32),
        "row_ids": [sequence.row_id for sequence in sequences],
    }
    done = 0
    for row, sequence in enumerate(sequences):
        tokens, targets = sequence.token_ids.astype(np.int64), sequence.targets.at_temperature(temperature)
        batch["input_ids"][row, : len(tokens)] = tokens
        batch["attention_mask"][row, : len(tokens)] = 1
        batch["labels"][row, : len(tokens)] = np.where(sequence.target_mask, tokens, -100)
        at = slice(done, done + len(targets))
        batch["positions"][at, 0] = row
        batch["positions"][at, 1] = np.flatnonzero(sequence.target_mask) - 1
        entry = np.arange(len(targets.ids)) - targets.offsets[targets.positions()]
        batch["support_ids"][done + targets.positions(), entry] = targets.ids
        batch["support_mass"][done + targets.positions(), entry] = targets.mass
        batch["residual_mass"][at] = targets.residual
        done = at.stop
    return batch
