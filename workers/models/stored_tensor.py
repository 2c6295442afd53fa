"""What a file's header says of one tensor."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, not read."""

    name: str
    """Hugging Face's name."""
    shape: tuple[int, ...]
    """Outermost first."""
    kind: str
    """Element type, as the format names it: BF16, F32, Q4_K, …"""
    num_bytes: int
    """In the file."""
