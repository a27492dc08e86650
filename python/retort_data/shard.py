"""One shard: a Parquet file whose rows are sequences with their soft targets."""

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import header, v1, v2
from .errors import ShardError
from .rows import Rows
from .targets import SparseTargets

# Rows decoded at a time.
ROWS_AT_ONCE = 64
# What pyarrow raises for bytes that are not what they should be.
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)


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
    """An open file. Iterating reads a few rows at a time; `len` is not defined, `rows` is.

    header  the file's metadata, text by key ("retort.teacher_sha256")
    format  what they say of the distributions, a header.Format
    """

    def __init__(self, path, check_content=True):
        self.path = os.fspath(path)
        try:
            self._file = pq.ParquetFile(self.path)
        except UNREADABLE as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ShardError(f"{self.path}: no Parquet file: {error}") from error
        try:
            self.header = self._read_pairs()
            self.format = header.parse(self.path, self.header)
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
            for group in range(self._file.num_row_groups):
                yield from self._group(group)
        except UNREADABLE as error:
            raise ShardError(f"{self.path}: {error}") from error

    def _read_pairs(self):
        try:
            pairs = {key.decode(): value.decode() for key, value in (self._file.metadata.metadata or {}).items()}
        except UnicodeDecodeError as error:
            raise ShardError(f"{self.path}: its metadata are no text: {error}") from error
        return {key: value for key, value in pairs.items() if key.startswith("retort.")}

    def _check_schema(self):
        expected = v1.COLUMNS if self.format.version == 1 else v2.COLUMNS
        found = {}
        for field in self._file.schema_arrow:
            is_list = pa.types.is_list(field.type)
            found[field.name] = (field.type.value_type if is_list else field.type, is_list)
        for name in expected | found:
            if name not in found:
                raise ShardError(f"{self.path}: it has no column {name}")
            if name not in expected:
                raise ShardError(f"{self.path}: it has a column {name}, which version {self.format.version} has not")
            if found[name] != expected[name]:
                is_of, should_be = ("lists of " * is_list + str(kind) for kind, is_list in (found[name], expected[name]))
                raise ShardError(f"{self.path}: column {name} holds {is_of}, not {should_be}")

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
        for key in header.ordered_keys(self.format.version, self.format.codec):
            # Two attempts at one shard differ in it alone.
            if key != "epoch":
                for part in (f"retort.{key}", self.header[f"retort.{key}"]):
                    digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
        if digest.hexdigest() != wanted:
            raise ShardError(f"{self.path}: damaged: its content has sha256 {digest.hexdigest()}, not {wanted}")

    def _group(self, group):
        """The sequences of one row group, a version 2's first row of which carries its id table."""
        table = None
        for batch in self._file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group]):
            rows = Rows(self.path, batch, self.format.vocab_size)
            if self.format.version == 1:
                targets = v1.decode(rows, self.format)
            else:
                begins = table is None
                table = v2.id_table(rows, self.format.vocab_size) if begins else table
                targets = v2.decode(rows, self.format, table, begins)
            yield from _sequences(rows, targets)


def _sequences(rows, targets):
    tokens, positions = rows.tokens.offsets, rows.positions.offsets
    numbers, tags, reasons = (rows.batch.column(name).to_pylist() for name in ("row", "tags", "finish_reason"))
    for r, row_id in enumerate(rows.row_ids):
        yield Sequence(
            row_id=row_id,
            row=numbers[r],
            tags=tags[r],
            token_ids=rows.values["token_ids"][tokens[r] : tokens[r + 1]],
            target_mask=rows.values["target_mask"][tokens[r] : tokens[r + 1]],
            finish_reason=reasons[r],
            targets=targets.between(positions[r], positions[r + 1]),
        )


_builtin_open = open


def open(path, check_content=True):  # noqa: A001 - reads as retort_data.open
    """Opens a shard for reading. ShardError when it is none, was damaged (told from the hash in its
    metadata, unless check_content is false), or is of a newer version."""
    return Shard(path, check_content)
