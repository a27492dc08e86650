"""Distributions over a vocabulary, of which a few entries are kept."""

from dataclasses import dataclass

import numpy as np

FINE_STEPS = 128  # bytes 1 to 128 count sixteenths of a nat, the others quarters
# What rounding to a byte can have done to the head's sum.
MAX_FACTOR = np.exp(1 / 8)


@dataclass(frozen=True)
class SparseTargets:
    """P distributions, in the manner of a CSR matrix.

    offsets         int64 [P + 1]; position p has the entries offsets[p] to offsets[p + 1]
    ids             int64 [E], rising within a position
    logprobs        float32 [E], natural, at temperature 1
    mass            float32 [E], what a loss is to use; sums to 1 a position
    is_head         bool [E]; the others are samples of the tail
    tail_mass       float32 [P], 1 minus the head's true mass
    label_logprobs  float32 [P], of the token that follows
    vocab_size      V
    """

    offsets: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    mass: np.ndarray
    is_head: np.ndarray
    tail_mass: np.ndarray
    label_logprobs: np.ndarray
    vocab_size: int

    def __len__(self):
        return len(self.offsets) - 1

    def at(self, position):
        """Token ids and target mass of one position."""
        entries = slice(self.offsets[position], self.offsets[position + 1])
        return self.ids[entries], self.mass[entries]

    def dense(self):
        """float32 [P, V], the target mass, 0 where nothing is kept. For looking, not for training."""
        full = np.zeros((len(self), self.vocab_size), np.float32)
        full[self.positions(), self.ids] = self.mass
        return full

    def positions(self):
        """int64 [E]: the position of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


def decode(columns, draws, vocab_size):
    """The columns of one row, numpy arrays, as SparseTargets; nothing is checked."""
    sizes = columns["support_size"].astype(np.int64)
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    position = np.repeat(np.arange(len(sizes)), sizes)
    running = np.cumsum(columns["support_delta"].astype(np.int64))
    before = np.concatenate(([0], running))[offsets[:-1]]
    ids = running - before[position]

    q = columns["logprob_q"].astype(np.float64)
    below = np.where(q <= FINE_STEPS, (q - 0.5) / 16, 8 + (q - 128.5) / 4)
    top = columns["logprob_q"] == 0
    # In double precision: the factor is a small difference of large masses.
    max_logprob, tail_mass = (columns[name].astype(np.float64) for name in ("max_logprob", "tail_mass"))
    logprobs = max_logprob[position] - np.where(top, 0, below)

    drawn = columns["count"].astype(np.float64)
    is_head = drawn == 0
    unscaled = np.exp(logprobs)
    rest = np.bincount(position, unscaled * (is_head & ~top), len(sizes))
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = (1 - tail_mass - np.exp(max_logprob)) / rest
    factor = np.where(rest > 0, np.clip(factor, 1 / MAX_FACTOR, MAX_FACTOR), 1)
    head = np.where(top, unscaled, unscaled * factor[position])
    tail = tail_mass[position] * drawn / max(draws, 1)
    mass = np.where(is_head, head, tail).astype(np.float32)
    return SparseTargets(
        offsets,
        ids,
        logprobs.astype(np.float32),
        mass,
        is_head,
        columns["tail_mass"],
        columns["label_logprob"],
        vocab_size,
    )
