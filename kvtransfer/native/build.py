"""A shared library out of one C++ file: compiled at first use, kept in the user's cache, checked when read.

An entry is the library followed by the SHA-256 of its bytes (a loader ignores what follows its sections), so
a damaged one is found before it is mapped and is built again. Entries are made beside their place and
renamed, so any number of processes may build at once; the last one wins, with the same content.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

COMPILER = "g++"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-fno-exceptions", "-fno-rtti")
TIMEOUT_S = 60.0

_HASH_BYTES = 32


class NativeUnavailable(Exception):
    """There is no native library on this machine, and why."""


def user_cache() -> Path:
    """This project's folder in the user's cache (XDG Base Directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "pdserve"


def build(source: Path, cache: Path, compiler: str = COMPILER) -> Path:
    """The library of `source`, from `cache` where it is there and whole, else compiled into it.

    Raises NativeUnavailable where there is no compiler, it fails, or the cache is not this user's own.
    """
    found = shutil.which(compiler)
    text = source.read_bytes()
    key = hashlib.sha256(b"\0".join((text, repr((FLAGS, found)).encode(), _machine()))).hexdigest()[:32]
    entry = cache / f"{source.stem}-{key}.so"
    _own(cache)
    if _is_whole(entry):
        return entry
    if found is None:
        raise NativeUnavailable(f"no compiler {compiler!r} on the PATH")
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
        made = Path(folder) / entry.name
        _compile(found, source, made)
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.replace(entry)
    return entry


def _compile(compiler: str, source: Path, target: Path) -> None:
    command = [compiler, *FLAGS, "-o", str(target), str(source)]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "it said nothing").strip().splitlines()
        raise NativeUnavailable(f"{compiler} failed with status {error.returncode}: {lines[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{compiler} took longer than {TIMEOUT_S} s") from error
    except OSError as error:
        raise NativeUnavailable(f"{compiler} cannot be run: {error}") from error


def _own(cache: Path) -> None:
    """Code is loaded from here: nobody else may write it."""
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = cache.stat()
    except OSError as error:
        raise NativeUnavailable(f"the cache {cache} cannot be made: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise NativeUnavailable(f"the cache {cache} may be written by others; make it yours: chmod go-w")


def _is_whole(entry: Path) -> bool:
    try:
        content = entry.read_bytes()
    except OSError:
        return False
    library, digest = content[:-_HASH_BYTES], content[-_HASH_BYTES:]
    return bool(library) and hashlib.sha256(library).digest() == digest


def _machine() -> bytes:
    """What -march=native depends on: one cache may be mounted on several machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("flags", "features", "cpu family", "model", "cpu part")
    facts = {line for line in lines if line.partition(":")[0].strip().lower() in wanted}
    return "\n".join((platform.machine(), *sorted(facts))).encode()
