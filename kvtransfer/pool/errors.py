"""What a pool raises. Both are defects of the caller or of the pool, never a full pool (that is a None)."""

from pdserve.core.errors import InternalError


class PoolError(InternalError):
    """An illegal move: names the owner, the block, its state and what would have been legal."""


class IntegrityError(InternalError):
    """The pool's books contradict each other; the message says which two and by how much."""
