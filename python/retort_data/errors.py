"""The one error of this package."""


class ShardError(ValueError):
    """The file is no shard, was damaged, or is of a newer version."""
