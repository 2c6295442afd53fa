"""How much memory a new process may still take on this machine."""

from pathlib import Path

_ROOT = Path("/")
_NO_LIMIT = 1 << 60
"""The kernel's numbers for "no limit" lie above it."""


def available_memory(root: Path = _ROOT) -> int:
    """Bytes: what the kernel calls available, or less where a control group allows less.

    Caches of files that can be dropped count as available. `root` is the file system's, for tests.
    """
    return min(_of_machine(root), *(_of_group(root, *names) for names in _GROUPS))


_GROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Control groups of version 2 and 1: limit, use, and the name of droppable cache in memory.stat."""


def _of_machine(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return _NO_LIMIT


def _of_group(root: Path, limit_name: str, used_name: str, cache_name: str) -> int:
    base = root / "sys/fs/cgroup"
    try:
        limit = (base / limit_name).read_text().strip()
        used = int((base / used_name).read_text())
        stat = (base / used_name).with_name("memory.stat").read_text()
    except (OSError, ValueError):
        return _NO_LIMIT  # no such version here, or no group of our own
    if limit == "max" or int(limit) >= _NO_LIMIT:
        return _NO_LIMIT
    cached = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line).get(cache_name, "0")
    return max(0, int(limit) - used + int(cached))
