"""One shard: a Parquet file whose rows are sequences with their soft targets."""

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .targets import SparseTargets, decode

SCHEMA_VERSION = 1
QUANTISER = "u8-step-1/16-to-8-then-1/4-nat-below-max"
# Rows decoded at a time.
ROWS_AT_ONCE = 64
# In the order in which the content's hash takes them; the epoch is not part of it.
HEADER = (
    "schema_version job shard epoch split engine engine_version dtype teacher_sha256 tokenizer_sha256 "
    "chat_template_sha256 vocab_size head draws capture_temperature seed prompt_set_sha256 mode sampling_json quantiser"
).split()
NUMBERS = {
    "token_ids": pa.uint32(),
    "target_mask": pa.bool_(),
    "support_size": pa.uint16(),
    "support_delta": pa.uint32(),
    "count": pa.uint8(),
    "logprob_q": pa.uint8(),
    "max_logprob": pa.float32(),
    "tail_mass": pa.float32(),
    "label_logprob": pa.float32(),
}
OTHERS = {"row_id": pa.string(), "row": pa.uint64(), "finish_reason": pa.string()}


class ShardError(ValueError):
    """The file is no shard, was damaged, or is of a newer version."""


@dataclass(frozen=True)
class Sequence:
    """A prompt with its completion.

    token_ids    uint32 [T]
    target_mask  bool [T], true where the token is a target
    targets      of the P true ones; position p's distribution is the model's output one token earlier
    """

    row_id: str
    row: int
    tags: list
    token_ids: np.ndarray
    target_mask: np.ndarray
    finish_reason: str
    targets: SparseTargets


class Shard:
    """An open file. Iterating reads a few rows at a time; `len` is not defined, `rows` is."""

    def __init__(self, path, check_content=True):
        self.path = os.fspath(path)
        try:
            self._file = pq.ParquetFile(self.path)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ShardError(f"{self.path}: no Parquet file: {error}") from error
        try:
            self.header = self._read_header()
            self._check_schema()
            if check_content:
                self._check_content()
        except BaseException:
            self.close()
            raise

    @property
    def rows(self):
        return self._file.metadata.num_rows

    def close(self):
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __iter__(self):
        try:
            for batch in self._file.iter_batches(batch_size=ROWS_AT_ONCE):
                columns = {name: batch.column(name) for name in batch.schema.names}
                for at in range(batch.num_rows):
                    yield self._sequence(columns, at)
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"{self.path}: {error}") from error

    def _read_header(self):
        pairs = self._file.metadata.metadata or {}
        header = {key.decode(): value.decode() for key, value in pairs.items() if key.startswith(b"retort.")}
        version = header.get("retort.schema_version")
        if version is None:
            raise ShardError(f"{self.path}: a Parquet file, but none of retort's: it has no retort.schema_version")
        if not version.isdigit() or int(version) > SCHEMA_VERSION:
            raise ShardError(
                f"{self.path}: schema version {version}, this reader knows up to {SCHEMA_VERSION}: upgrade retort-data"
            )
        for key in HEADER:
            if f"retort.{key}" not in header:
                raise ShardError(f"{self.path}: its metadata lacks retort.{key}")
        if header["retort.quantiser"] != QUANTISER:
            raise ShardError(f"{self.path}: the quantiser {header['retort.quantiser']!r} is not known here")
        try:
            self.vocab_size, self.head, self.draws = (
                int(header[f"retort.{key}"]) for key in ("vocab_size", "head", "draws")
            )
        except ValueError as error:
            raise ShardError(f"{self.path}: its metadata holds no number: {error}") from error
        return header

    def _check_schema(self):
        schema = self._file.schema_arrow
        for name, kind in {**NUMBERS, **OTHERS, "tags": pa.string()}.items():
            index = schema.get_field_index(name)
            if index < 0:
                raise ShardError(f"{self.path}: it has no column {name}")
            found = schema.field(index).type
            found = found.value_type if pa.types.is_list(found) else found
            if found != kind:
                raise ShardError(f"{self.path}: column {name} holds {found}, not {kind}")

    def _check_content(self):
        wanted = self.header.get("retort.content_sha256")
        if wanted is None:
            return
        digest = hashlib.sha256()
        with _builtin_open(self.path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            left = file.tell() - int.from_bytes(file.read(4), "little")
            file.seek(0)
            while left > 0 and (piece := file.read(min(left, 1 << 20))):
                digest.update(piece)
                left -= len(piece)
        for key in HEADER:
            if key != "epoch":
                for part in (f"retort.{key}", self.header[f"retort.{key}"]):
                    digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
        if digest.hexdigest() != wanted:
            raise ShardError(f"{self.path}: damaged: its content has sha256 {digest.hexdigest()}, not {wanted}")

    def _sequence(self, columns, at):
        row_id = columns["row_id"][at].as_py()
        numbers = {name: columns[name][at].values.to_numpy(zero_copy_only=False) for name in NUMBERS}

        def require(holds, why):
            if not holds:
                raise ShardError(f"{self.path}: row {row_id!r}: {why}")

        mask, sizes = numbers["target_mask"], numbers["support_size"].astype(np.int64)
        require(len(mask) == len(numbers["token_ids"]), "target_mask and token_ids differ in length")
        require(not mask[:1].any(), "its first token is a target, which nothing predicts")
        for name in ("support_size", "max_logprob", "tail_mass", "label_logprob"):
            require(len(numbers[name]) == mask.sum(), f"{name} has {len(numbers[name])} values for {mask.sum()} targets")
        for name in ("support_delta", "count", "logprob_q"):
            require(len(numbers[name]) == sizes.sum(), f"{name} has {len(numbers[name])} values for {sizes.sum()} entries")
        require((numbers["token_ids"] < self.vocab_size).all(), "a token lies beyond the vocabulary")
        targets = decode(numbers, self.draws, self.vocab_size)
        self._check_targets(row_id, numbers, targets)
        return Sequence(
            row_id=row_id,
            row=columns["row"][at].as_py(),
            tags=columns["tags"][at].as_py(),
            token_ids=numbers["token_ids"],
            target_mask=mask,
            finish_reason=columns["finish_reason"][at].as_py(),
            targets=targets,
        )

    def _check_targets(self, row_id, numbers, targets):
        position, count = targets.positions(), len(targets)

        def per_position(values):
            return np.bincount(position, values, count)

        drawn = per_position(numbers["count"])
        heads = per_position(targets.is_head)
        first = np.zeros(len(position), bool)
        first[targets.offsets[:-1][np.diff(targets.offsets) > 0]] = True
        wrong = {
            "its ids do not rise": per_position((numbers["support_delta"] == 0) & ~first),
            "an id lies beyond the vocabulary": per_position(targets.ids >= self.vocab_size),
            "it has not one most likely token, in the head": np.abs(
                per_position((numbers["logprob_q"] == 0) & targets.is_head) - 1
            )
            + per_position((numbers["logprob_q"] == 0) & ~targets.is_head),
            f"its head has not 1 to {self.head} entries": (heads < 1) | (heads > self.head),
            f"its tail was not drawn {self.draws} times": (drawn != self.draws)
            & ~((drawn == 0) & (targets.tail_mass <= 1e-3)),
            "a number in it is not finite": ~np.isfinite(
                numbers["max_logprob"] + targets.tail_mass + targets.label_logprobs
            ),
            "a log-probability is above 0": (numbers["max_logprob"] > 1e-3) | (targets.label_logprobs > 1e-3),
        }
        if self.draws > 0:
            wrong["its masses do not sum to 1"] = np.abs(per_position(targets.mass) - 1) > 2e-3
        for why, at in wrong.items():
            if np.any(at):
                raise ShardError(f"{self.path}: row {row_id!r}, position {int(np.flatnonzero(at)[0])}: {why}")


_builtin_open = open


def open(path, check_content=True):  # noqa: A001 - reads as retort_data.open
    """Opens a shard for reading. ShardError when it is none, was damaged (told from the hash in its
    metadata, unless check_content is false), or is of a newer version."""
    return Shard(path, check_content)
