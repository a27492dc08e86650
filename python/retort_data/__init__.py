"""Reads retort's soft-target shards (docs/formats/soft-targets.md) with pyarrow and numpy.

Shapes: T tokens of a sequence, P its target positions, E the entries of all their supports, V the
vocabulary; in a batch b rows, t tokens after padding, n target positions, k the widest support.
"""

from .batches import batches
from .errors import ShardError
from .header import Format
from .shard import Sequence, Shard, open
from .targets import SparseTargets

__all__ = ["Format", "Sequence", "Shard", "ShardError", "SparseTargets", "batches", "open"]
