"""Version 1: head and tail in one list of entries by rising id, with a count that is 0 in the head."""

import numpy as np
import pyarrow as pa

from .rows import COLUMNS as EVERY_VERSION
from .rows import MASS_TOLERANCE, Runs
from .targets import SparseTargets

COLUMNS = EVERY_VERSION | {
    "support_size": (pa.uint16(), True),
    "support_delta": (pa.uint32(), True),
    "count": (pa.uint8(), True),
    "logprob_q": (pa.uint8(), True),
    "max_logprob": (pa.float32(), True),
    "tail_mass": (pa.float32(), True),
    "label_logprob": (pa.float32(), True),
}
# Nats below the maximum, by byte: 1 to 128 count sixteenths, the others quarters.
BELOW_MAX = np.concatenate(([0], (np.arange(128) + 0.5) / 16, 8 + (np.arange(127) + 0.5) / 4))
# What rounding to a byte can have done to the head's sum.
MAX_FACTOR = np.exp(1 / 8)


def decode(rows, format):
    """SparseTargets of all positions of `rows`. ShardError names row and position."""
    support = Runs(rows.take("support_size", rows.positions.sizes))
    entries = rows.positions.sum(support.sizes)
    delta, count, q = (rows.take(name, entries) for name in ("support_delta", "count", "logprob_q"))
    maxima, tail_mass, labels = rows.floats(format)

    ids = support.cumsum(delta)
    first = np.arange(len(ids)) == support.offsets[:-1][support.of]
    rows.check((delta == 0) & ~first, lambda e: f"token {ids[e]} is in its support twice", support.of)
    outside = ids >= format.vocab_size
    rows.check(outside, lambda e: f"token {ids[e]} is outside the vocabulary of {format.vocab_size}", support.of)
    top, is_head = q == 0, count == 0
    tops, heads, drawn = support.sum(top), support.sum(is_head), support.sum(count)
    rows.check(tops != 1, lambda n: f"{int(tops[n])} of its tokens are marked as the most likely, not one")
    rows.check(top & ~is_head, lambda e: "a tail entry is marked as its most likely", support.of)
    rows.check(
        (heads < 1) | (heads > format.head),
        lambda n: f"its head has {int(heads[n])} entries, the header says 1 to {format.head}",
    )
    rows.check(
        (drawn != format.draws) & ~((drawn == 0) & (tail_mass <= MASS_TOLERANCE)),
        lambda n: f"its tail has {int(drawn[n])} draws and mass {tail_mass[n]:g}, the header says {format.draws} draws",
    )

    # In double precision: the factor is a small difference of large masses.
    logprobs = maxima.astype(np.float64)[support.of] - BELOW_MAX[q]
    tails = tail_mass.astype(np.float64)
    mass = np.exp(logprobs)
    rest = support.sum(mass * (is_head & ~top))
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = (1 - tails - np.exp(maxima.astype(np.float64))) / rest
    factor = np.where(rest > 0, np.clip(factor, 1 / MAX_FACTOR, MAX_FACTOR), 1)[support.of]
    factor = np.where(is_head & ~top, factor, 1)
    mass = np.where(is_head, mass * factor, tails[support.of] * count / max(format.draws, 1))
    whole = support.sum(mass * is_head) + tails
    rows.check(np.abs(whole - 1) > MASS_TOLERANCE, lambda n: f"its masses sum to {whole[n]:.6f}")
    return SparseTargets(
        offsets=support.offsets,
        ids=ids,
        logprobs=(logprobs + np.log(factor)).astype(np.float32),
        mass=mass.astype(np.float32),
        is_head=is_head,
        residual=np.zeros(len(support), np.float32),
        tail_mass=tail_mass,
        label_logprobs=labels,
        log_sum_exps=np.zeros((len(support), 0), np.float32),
        temperatures=(),
        vocab_size=format.vocab_size,
    )
