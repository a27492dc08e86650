"""A few rows of a shard, each column's lists laid end to end, so that one pass of numpy decodes them all.

R rows, N target positions of all of them.
"""

from functools import cached_property

import numpy as np
import pyarrow as pa

from .errors import ShardError

# Columns of every version: type, and whether it is a list's.
COLUMNS = {
    "row_id": (pa.string(), False),
    "row": (pa.uint64(), False),
    "tags": (pa.string(), True),
    "token_ids": (pa.uint32(), True),
    "target_mask": (pa.bool_(), True),
    "finish_reason": (pa.string(), False),
}
# Mass that may be left to no tail entry, and the most that rounding may add to a whole.
MASS_TOLERANCE = 1e-3
# How far the stored top and tail may miss their sum: version 2 rounds both to eight bits.
COARSE_TOLERANCE = 0.02


class Runs:
    """How E entries, laid end to end, fall into runs.

    sizes    int64 [runs]
    offsets  int64 [runs + 1]; run r has the entries offsets[r] to offsets[r + 1]
    of       int64 [E], the run of each entry
    """

    def __init__(self, sizes):
        self.sizes = sizes.astype(np.int64)
        self.offsets = np.concatenate(([0], np.cumsum(self.sizes)))

    def __len__(self):
        return len(self.sizes)

    @cached_property
    def of(self):
        return np.repeat(np.arange(len(self)), self.sizes)

    def sum(self, values):
        """float64 [runs]"""
        return np.bincount(self.of, values, len(self))

    def cumsum(self, values):
        """int64 [E], beginning anew in each run"""
        running = np.cumsum(values, dtype=np.int64)
        before = np.concatenate(([0], running))[self.offsets[:-1]]
        return running - before[self.of]

    def max(self, values):
        """[runs] of what values hold; 0 where there are none"""
        found, filled = np.zeros(len(self), values.dtype), self.sizes > 0
        if filled.any():
            found[filled] = np.maximum.reduceat(values, self.offsets[:-1][filled])
        return found


class Rows:
    """What a record batch holds; on the way in, tokens and masks are checked.

    row_ids    list of R
    values     by column, numpy, the lists of all rows end to end
    lengths    by column, int64 [R]
    positions  Runs of N over R
    """

    def __init__(self, path, batch, vocab_size):
        self.path = path
        self.batch = batch
        self.row_ids = batch.column("row_id").to_pylist()
        self.values, self.lengths = {}, {}
        for name, column in zip(batch.schema.names, batch.columns):
            flat = column.flatten() if pa.types.is_list(column.type) else column
            if column.null_count or flat.null_count:
                raise ShardError(f"{path}: column {name} has nulls")
            if flat is not column and not pa.types.is_string(flat.type):
                self.values[name] = flat.to_numpy(zero_copy_only=False)
                self.lengths[name] = np.diff(column.offsets.to_numpy()).astype(np.int64)
        self.tokens = Runs(self.lengths["token_ids"])
        tokens, mask = self.values["token_ids"], self.take("target_mask", self.tokens.sizes)
        self.check_rows(
            self.tokens.sum(tokens >= vocab_size) > 0, lambda r: f"a token lies outside the vocabulary of {vocab_size}"
        )
        first = self.tokens.offsets[:-1][self.tokens.sizes > 0]
        marked = np.zeros(len(self.tokens), bool)
        marked[self.tokens.sizes > 0] = mask[first]
        self.check_rows(marked, lambda r: "its first token is a target, which nothing predicts")
        self.positions = Runs(self.tokens.sum(mask))

    def take(self, name, expected):
        """The values of a column that must have `expected` [R] a row."""
        found = self.lengths[name]
        self.check_rows(found != expected, lambda r: f"{name} has {found[r]} values, not {int(expected[r])}")
        return self.values[name]

    def check_rows(self, wrong, why):
        """ShardError at the first of `wrong` [R]; `why` says it from the row's index."""
        if wrong.any():
            r = int(wrong.argmax())
            raise ShardError(f"{self.path}: row {self.row_ids[r][:80]!r}: {why(r)}")

    def check(self, wrong, why, of=None):
        """ShardError at the first of `wrong`, [N], or [E] with `of`, the position of each entry; `why`
        says it from the index there."""
        if wrong.any():
            at = int(wrong.argmax())
            n = at if of is None else int(of[at])
            r = int(self.positions.of[n])
            p = n - int(self.positions.offsets[r])
            raise ShardError(f"{self.path}: row {self.row_ids[r][:80]!r}, position {p}: {why(at)}")

    def floats(self, format):
        """max_logprob, tail_mass and label_logprob, float32 [N] each, as every version has them."""
        maxima, tail_mass, labels = (
            self.take(name, self.positions.sizes) for name in ("max_logprob", "tail_mass", "label_logprob")
        )
        for what, values in (("largest", maxima), ("label's", labels)):
            wrong = ~(np.isfinite(values) & (values <= MASS_TOLERANCE))
            self.check(wrong, lambda n: f"its {what} log-probability is {values[n]:g}")
        if format.codec != "random":
            # The most likely of V tokens has a probability of at least 1/V; of those drawn, any.
            least = -(np.log(format.vocab_size) * (1 + COARSE_TOLERANCE) + MASS_TOLERANCE)
            self.check(
                maxima < least,
                lambda n: f"its largest log-probability is {maxima[n]:g} with a vocabulary of {format.vocab_size}",
            )
        self.check(~((tail_mass >= 0) & (tail_mass <= 1)), lambda n: f"its tail has mass {tail_mass[n]:g}")
        return maxima, tail_mass, labels
