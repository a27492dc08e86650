"""Version 2: six codecs in one schema, head and tail in lists of their own, ids by rank in a table of the
row group's frequent tokens."""

import numpy as np
import pyarrow as pa

from .errors import ShardError
from .rows import COARSE_TOLERANCE, MASS_TOLERANCE, Runs
from .rows import COLUMNS as EVERY_VERSION
from .targets import SparseTargets

COLUMNS = EVERY_VERSION | {
    "id_table": (pa.uint32(), True),
    "head_size": (pa.uint32(), True),
    "head_delta": (pa.uint32(), True),
    "head_q": (pa.uint8(), True),
    "head_logprob": (pa.float32(), True),
    "tail_size": (pa.uint32(), True),
    "tail_delta": (pa.uint32(), True),
    "tail_count": (pa.uint8(), True),
    "tail_q": (pa.uint8(), True),
    "max_logprob": (pa.float32(), True),
    "tail_mass": (pa.float32(), True),
    "label_logprob": (pa.float32(), True),
    "log_sum_exp": (pa.float32(), True),
}
# Nats below the maximum, by byte: sixteenths down to 8, eighths down to 16, quarters.
BELOW_MAX = np.concatenate((
    [0],
    (np.arange(128) + 0.5) / 16,
    8 + (np.arange(64) + 0.5) / 8,
    16 + (np.arange(63) + 0.5) / 4,
))
# Below what float32 resolves beside one.
LEAST_MASS = 1e-6
# What rounding to a byte can have done to the head's sum.
MAX_FACTOR = np.exp(1 / 8)
# How much less than the most likely token another one has at least, relatively; more than float32 rounds.
BELOW_TOP = 1 - 1e-6


def id_table(rows, vocab_size):
    """uint32, the tokens of the lowest ranks, from a row group's first rows. ShardError if a token is
    not in the vocabulary or there twice."""
    table = rows.values["id_table"][: rows.lengths["id_table"][0]]
    if (table >= vocab_size).any():
        outside = table[table >= vocab_size][0]
        raise ShardError(f"{rows.path}: its id table has token {outside}, outside the vocabulary of {vocab_size}")
    tokens, uses = np.unique(table, return_counts=True)
    if (uses > 1).any():
        raise ShardError(f"{rows.path}: its id table has token {tokens[uses > 1][0]} twice")
    return table


def decode(rows, format, table, begins):
    """SparseTargets of all positions of `rows`, which are the first of their row group if it `begins`
    with them. ShardError names row and position."""
    stray = rows.lengths["id_table"] > 0
    stray[0] &= not begins
    rows.check_rows(stray, lambda r: "it has an id table, but is not the first of its row group")
    head, tail = (Runs(rows.take(name, rows.positions.sizes)) for name in ("head_size", "tail_size"))
    heads, tails = rows.positions.sum(head.sizes), rows.positions.sum(tail.sizes)
    floats = rows.floats(format)
    log_sum_exps = rows.take("log_sum_exp", rows.positions.sizes * len(format.temperatures))
    log_sum_exps = log_sum_exps.reshape(len(head), len(format.temperatures))
    least, most = _log_sum_exp_bounds(format)
    unfit = ~((log_sum_exps >= least) & (log_sum_exps <= most)).all(1)
    rows.check(unfit, lambda n: f"its log-sum-exps are {log_sum_exps[n].tolist()}")

    head_ids = _ids(rows, format, table, head, rows.take("head_delta", heads))
    tail_ids = _ids(rows, format, table, tail, rows.take("tail_delta", tails))
    position = np.concatenate((head.of, tail.of))
    ids = np.concatenate((head_ids, tail_ids))
    key = position * format.vocab_size + ids
    order = np.argsort(key)
    position, ids, key = position[order], ids[order], key[order]
    twice = key[1:] == key[:-1]
    rows.check(twice, lambda e: f"token {ids[e]} is in its support twice", position)

    maxima, tail_mass, labels = floats
    of_head = _head(rows, format, head, head_ids, heads, maxima, tail_mass)
    of_tail = _tail(rows, format, tail, tails, maxima, tail_mass)
    mass, logprobs = (np.concatenate(parts)[order].astype(np.float32) for parts in zip(of_head, of_tail))
    return SparseTargets(
        offsets=head.offsets + tail.offsets,
        ids=ids,
        logprobs=logprobs,
        mass=mass,
        is_head=order < len(head_ids),
        residual=tail_mass if format.codec == "top_k_tail" else np.zeros(len(head), np.float32),
        tail_mass=tail_mass,
        label_logprobs=labels,
        log_sum_exps=log_sum_exps,
        temperatures=format.temperatures,
        vocab_size=format.vocab_size,
    )


def _log_sum_exp_bounds(format):
    """float64 [temperatures] each: a sum of p^(1/T) lies between 1, all mass on one token, and that of an
    even distribution."""
    temperatures = np.array(format.temperatures, np.float64)
    even = (1 - 1 / temperatures) * np.log(format.vocab_size)
    slack = MASS_TOLERANCE * (1 + 1 / temperatures) + np.abs(even) * 1e-5
    return np.minimum(even, 0) - slack, np.maximum(even, 0) + slack


def _ids(rows, format, table, runs, deltas):
    """int64 [E]: undoes differences and ranks."""
    ranks = runs.cumsum(deltas)
    ids = ranks - len(table)
    outside = ids >= format.vocab_size
    rows.check(outside, lambda e: f"rank {ranks[e]} is outside the vocabulary of {format.vocab_size}", runs.of)
    ranked = ids < 0
    ids[ranked] = table[ranks[ranked]]
    return ids


def _head(rows, format, head, ids, entries, maxima, tail_mass):
    """float64 [E] each: mass and log-probability of the heads' entries."""
    rows.check(
        (head.sizes > format.head) | ((head.sizes == 0) & (format.head > 0)),
        lambda n: f"its head has {head.sizes[n]} entries, the codec {format.codec} has 1 to {format.head}",
    )
    bytes_are_stored = format.quantiser == "u8"
    q = rows.take("head_q", entries * bytes_are_stored)
    exact = rows.take("head_logprob", entries * (not bytes_are_stored))
    if bytes_are_stored:
        logprobs = maxima.astype(np.float64)[head.of] - BELOW_MAX[q]
        top = q == 0
        tops = head.sum(top)
        wrong = (tops != 1) & (head.sizes > 0)
        rows.check(wrong, lambda n: f"{int(tops[n])} of its tokens are marked as the most likely, not one")
    else:
        logprobs = exact.astype(np.float64)
        wrong = ~(np.isfinite(logprobs) & (logprobs <= MASS_TOLERANCE))
        rows.check(wrong, lambda e: f"token {ids[e]} has log-probability {exact[e]:g}", head.of)
        best = logprobs == head.max(logprobs)[head.of]
        # Of equals the smallest id, which is the largest when counted from the end.
        from_end = np.where(best, format.vocab_size - ids, 0)
        top = best & (from_end == head.max(from_end)[head.of])
        likeliest, largest = head.sum(logprobs * top), maxima.astype(np.float64)
        apart = np.abs(likeliest - largest) > COARSE_TOLERANCE * np.abs(largest) + MASS_TOLERANCE
        rows.check(
            apart & (head.sizes > 0),
            lambda n: f"its likeliest token has log-probability {likeliest[n]:g}, its largest is {largest[n]:g}",
        )

    mass = np.exp(logprobs)
    top_mass = head.sum(mass * top)
    rest = head.sum(mass) - top_mass
    wanted = 1 - tail_mass.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Rounding is spread over the others first: the largest is the best known. But no factor lifts
        # another token to the first place.
        most = np.fmin(MAX_FACTOR, BELOW_TOP * top_mass / head.max(mass * ~top))
        scale = np.maximum(np.minimum((wanted - top_mass) / rest, most), 1 / MAX_FACTOR)
        scale = np.where(rest > 0, scale, 1)
        whole = top_mass + rest * scale
        every = np.where(wanted > LEAST_MASS, wanted / whole, 1)
    # The largest is kept to a part in 256 of itself, which is a larger part of a small mass.
    coarse = np.maximum(COARSE_TOLERANCE, np.minimum(np.expm1(np.abs(maxima.astype(np.float64)) / 256), 0.2))
    wrong = (head.sizes > 0) & (np.abs(whole - wanted) > coarse * wanted + LEAST_MASS)
    rows.check(wrong, lambda n: f"its head's masses sum to {whole[n]:.6f}, its tail has {tail_mass[n]:.6f}")
    factor = np.where(top, 1, scale[head.of]) * every[head.of]
    return mass * factor, logprobs + np.log(factor)


def _tail(rows, format, tail, entries, maxima, tail_mass):
    """float64 [E] each: mass and log-probability of the tails' entries."""
    count = rows.take("tail_count", entries * format.has_counts)
    q = rows.take("tail_q", entries * (format.tail_logprob is None))
    rows.check(count == 0, lambda e: "a tail entry was drawn 0 times", tail.of)
    if not format.has_counts:
        count = np.ones(len(tail.of), np.uint8)
    drawn, mass = tail.sum(count), tail_mass.astype(np.float64)
    if format.codec == "threshold":
        # Of a tail lighter than the threshold there is at most one sample, which weighs that much.
        fits = (drawn <= format.draws) & ((drawn > 0) | (mass <= format.threshold * (1 + COARSE_TOLERANCE)))
        mass = np.maximum(mass, format.threshold)
    else:
        fits = drawn == format.draws
        if format.codec == "head_draws":
            fits |= (drawn == 0) & (mass <= MASS_TOLERANCE)
    rows.check(
        ~fits,
        lambda n: f"its tail has {int(drawn[n])} draws and mass {tail_mass[n]:g}, which {format.codec} cannot have",
    )
    mass = mass[tail.of] * count / drawn[tail.of]
    if format.tail_logprob is None:
        return mass, maxima.astype(np.float64)[tail.of] - BELOW_MAX[q]
    return mass, np.full(len(mass), format.tail_logprob)
