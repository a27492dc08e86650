"""Distributions over a vocabulary, of which a few entries are kept."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class SparseTargets:
    """P distributions, in the manner of a CSR matrix.

    offsets         int64 [P + 1]; position p has the entries offsets[p] to offsets[p + 1]
    ids             int64 [E], strictly rising within a position
    logprobs        float32 [E], natural; in the head the logarithm of the mass
    mass            float32 [E], what a loss is to use; with `residual` it sums to 1 a position, but for a
                    bare top-k, which lost the rest, and for a threshold's tails lighter than it, which
                    do so in expectation
    is_head         bool [E]; the others are samples of the tail
    residual        float32 [P], mass that all tokens outside the support have together; 0 unless the
                    codec is top_k_tail
    tail_mass       float32 [P], 1 minus the head's true mass
    label_logprobs  float32 [P], of the token that follows
    log_sum_exps    float32 [P, temperatures], log of the sum of p^(1/temperature) over the vocabulary
    temperatures    besides 1, those that at_temperature takes
    vocab_size      V
    """

    offsets: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    mass: np.ndarray
    is_head: np.ndarray
    residual: np.ndarray
    tail_mass: np.ndarray
    label_logprobs: np.ndarray
    log_sum_exps: np.ndarray
    temperatures: tuple
    vocab_size: int

    def __len__(self):
        return len(self.offsets) - 1

    def at(self, position):
        """Token ids and target mass of one position."""
        entries = slice(self.offsets[position], self.offsets[position + 1])
        return self.ids[entries], self.mass[entries]

    def dense(self):
        """float32 [P, V], the target mass, 0 where nothing is kept; the residual is no token's. For
        looking, not for training."""
        full = np.zeros((len(self), self.vocab_size), np.float32)
        full[self.positions(), self.ids] = self.mass
        return full

    def positions(self):
        """int64 [E]: the position of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def between(self, start, stop):
        """Those of the positions `start` to `stop`; the arrays are views."""
        entries = slice(self.offsets[start], self.offsets[stop])
        return replace(
            self,
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
            **{name: getattr(self, name)[entries] for name in ("ids", "logprobs", "mass", "is_head")},
            **{
                name: getattr(self, name)[start:stop]
                for name in ("residual", "tail_mass", "label_logprobs", "log_sum_exps")
            },
        )

    def at_temperature(self, temperature):
        """The targets of p^(1/temperature), normalised over the whole vocabulary.

        A head's entry has its exact mass. A sample drawn in proportion to p stands for p^(1/T) with
        weight p^(1/T - 1), which keeps the expectation. ValueError for a temperature that the shard was
        not captured for. The result has no other temperatures.
        """
        if temperature == 1:
            return self
        if temperature not in self.temperatures:
            known = ", ".join(f"{value:g}" for value in (1, *self.temperatures))
            raise ValueError(f"the targets were captured for the temperatures {known}, not {temperature:g}")
        log_sum = self.log_sum_exps[:, self.temperatures.index(temperature)].astype(np.float64)
        position, before = self.positions(), self.logprobs.astype(np.float64)
        logprobs = before / temperature - log_sum[position]
        # A sample's weight is its share of the draws over its probability.
        mass = np.where(self.is_head, np.exp(logprobs), self.mass * np.exp(logprobs - before))
        kept = np.bincount(position, mass, len(self))
        head = np.bincount(position, mass * self.is_head, len(self))
        return replace(
            self,
            logprobs=logprobs.astype(np.float32),
            mass=mass.astype(np.float32),
            residual=np.where(self.residual > 0, np.maximum(1 - kept, 0), 0).astype(np.float32),
            tail_mass=np.maximum(1 - head, 0).astype(np.float32),
            label_logprobs=(self.label_logprobs / temperature - log_sum).astype(np.float32),
            log_sum_exps=self.log_sum_exps[:, :0],
            temperatures=(),
        )
