"""What a shard's metadata say of its soft targets."""

import math
import re
from dataclasses import dataclass

import numpy as np

from .errors import ShardError

# The newest that is read.
SCHEMA_VERSION = 2
QUANTISERS = {
    1: {"u8-step-1/16-to-8-then-1/4-nat-below-max": "u8"},
    2: {"u8-step-1/16-to-8-1/8-to-16-1/4-nat-below-max": "u8", "f32": "f32"},
}
# Codecs with the numbers that each has.
CODECS = {
    "full": (),
    "top_k": ("head",),
    "top_k_tail": ("head",),
    "head_draws": ("head", "draws"),
    "threshold": ("threshold",),
    "random": ("draws",),
}
# Bounds of a codec's numbers; pure sampling has at least one draw.
BOUNDS = {"head": (1, 1024), "draws": (0, 255), "threshold": (1 / 1024, 0.5)}
TEMPERATURES = (0.05, 20)
MAX_TEMPERATURES = 8
MAX_VOCABULARY = 1 << 24
MAX_VALUE_BYTES = 16 << 10
# A real number in decimal, as Rust reads one; float() takes more: underscores, spaces, other digits, nan.
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Format:
    """How a shard keeps distributions.

    version       of the format, 1 or 2
    codec         "full", "top_k", "top_k_tail", "head_draws", "threshold" or "random"
    head          most entries of a head
    draws         most samples of a tail; for "head_draws" and "random" their number
    threshold     probability from which a token is in the head; None but for "threshold"
    quantiser     "u8" or "f32": the heads' log-probabilities
    temperatures  besides 1, rising; those of log_sum_exps
    tail_logprob  mean log-probability of the tails' entries, nats; None where each is stored
    vocab_size    V
    """

    version: int
    codec: str
    head: int
    draws: int
    threshold: float | None
    quantiser: str
    temperatures: tuple
    tail_logprob: float | None
    vocab_size: int

    @property
    def has_counts(self):
        """Whether a sample can be drawn more than once."""
        return self.codec in ("head_draws", "random")


def ordered_keys(version, codec):
    """Keys without "retort.", in the order in which the content's hash takes them."""
    keys = "schema_version job shard epoch split engine engine_version dtype teacher_sha256 tokenizer_sha256 "
    keys += "chat_template_sha256 vocab_size"
    after = "capture_temperature seed prompt_set_sha256 mode sampling_json quantiser"
    if version > 1:
        after += " codec temperatures tail_logprobs work_sha256"
    return [*keys.split(), *CODECS[codec], *after.split()]


def parse(path, pairs):
    """The format that the metadata `pairs` describe, all text. ShardError names the key at fault."""

    def text(key):
        if f"retort.{key}" not in pairs:
            raise ShardError(f"{path}: its metadata lacks retort.{key}")
        return pairs[f"retort.{key}"]

    def require(holds, key, why):
        if not holds:
            raise ShardError(f"{path}: retort.{key} is {text(key)[:80]!r}: {why}")

    def whole(key, least, most):
        value = text(key)
        digits = value.isascii() and value.isdigit() and len(value) <= 20
        require(digits and least <= int(value) <= most, key, f"it must be a whole number from {least} to {most}")
        return int(value)

    def real(key, value):
        require(REAL.fullmatch(value), key, "it holds no number")
        return float(value)

    if "retort.schema_version" not in pairs:
        raise ShardError(f"{path}: a Parquet file, but none of retort's: it has no retort.schema_version")
    version = text("schema_version")
    require(version.isascii() and version.isdigit(), "schema_version", "it must be a whole number")
    if len(version) > 9 or int(version) > SCHEMA_VERSION:
        raise ShardError(
            f"{path}: schema version {version[:80]!r}, this reader knows up to {SCHEMA_VERSION}: upgrade retort-data"
        )
    version = whole("schema_version", 1, SCHEMA_VERSION)
    codec = text("codec") if version > 1 else "head_draws"
    require(codec in CODECS, "codec", f"not one of {', '.join(CODECS)}")
    for key in ordered_keys(version, codec):
        require(len(text(key).encode()) <= MAX_VALUE_BYTES, key, f"it takes more than {MAX_VALUE_BYTES} bytes")
    for key, bits in (("shard", 32), ("epoch", 64), ("seed", 64)):
        whole(key, 0, 2**bits - 1)
    require(text("split") in ("train", "held_out"), "split", "it must be train or held_out")
    require(real("capture_temperature", text("capture_temperature")) == 1, "capture_temperature", "only 1 is stored")
    quantiser = QUANTISERS[version].get(text("quantiser"))
    require(quantiser is not None, "quantiser", f"not known in version {version}")
    vocab_size = whole("vocab_size", 1, MAX_VOCABULARY)

    numbers = {"head": 0, "draws": 0}
    for key in CODECS[codec]:
        least, most = BOUNDS[key]
        if key == "threshold":
            numbers[key] = real(key, text(key))
            require(least <= numbers[key] <= most, key, f"it must lie between {least} and {most}")
        else:
            numbers[key] = whole(key, max(least, codec == "random"), most)
    if codec == "full":
        numbers["head"] = vocab_size
    if codec == "threshold":
        # How many tokens can have so much each; rounding may let one more in.
        many = math.floor(1 / numbers["threshold"] * (1 + 1e-6))
        numbers["head"] = numbers["draws"] = min(max(many, 1), BOUNDS["head"][1])

    temperatures, tail_logprob = (), None
    if version > 1:
        parts = [part for part in text("temperatures").split(",") if part]
        temperatures = tuple(real("temperatures", part) for part in parts)
        least, most = TEMPERATURES
        rising = all(a < b for a, b in zip(temperatures, temperatures[1:]))
        require(
            len(parts) <= MAX_TEMPERATURES and rising and all(least <= t <= most and t != 1 for t in temperatures),
            "temperatures",
            f"at most {MAX_TEMPERATURES}, rising, from {least} to {most}, without 1",
        )
        if text("tail_logprobs") != "stored":
            with np.errstate(over="ignore"):
                tail_logprob = float(np.float32(real("tail_logprobs", text("tail_logprobs"))))
            good = math.isfinite(tail_logprob) and tail_logprob <= 0
            require(good, "tail_logprobs", "a mean log-probability is finite and not above 0")
            require(not temperatures, "tail_logprobs", "temperatures other than 1 need the tail's log-probabilities")
    return Format(
        version=version,
        codec=codec,
        head=min(numbers["head"], vocab_size),
        draws=numbers["draws"],
        threshold=numbers.get("threshold"),
        quantiser=quantiser,
        temperatures=temperatures,
        tail_logprob=tail_logprob,
        vocab_size=vocab_size,
    )
