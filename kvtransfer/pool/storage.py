"""The memory behind a KvPool: a sealed memfd that readers on this host may map, or a GPU's and a memfd."""

import fcntl
import mmap
import os
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pdserve.core.errors import ConfigError, Unavailable
from pdserve.core.types import BlockId
from pdserve.kvtransfer.gpu.base import Gpu
from pdserve.kvtransfer.gpu.cuda import open_gpu
from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.device_blocks import DeviceBlocks
from pdserve.kvtransfer.pool.header import EXPORTED_OFFSET, TOKEN_BYTES, PoolHeader
from pdserve.kvtransfer.pool.layout import KvLayout

Numbers = Sequence[int] | NDArray[np.int64]
"""Of blocks, rows or tokens."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvStorage:
    """Owns the bytes of one pool's blocks; whose they are is KvPool's business.

    On the CPU, `tensor`, `bytes_view` and `generations` are views of one memfd (see header.py). It is sealed
    against a change of size, so whoever maps it can never be killed by a missing page, and it has no name in
    the file system, so nothing is left behind by a SIGKILL. Pages are given by the kernel at first touch.
    On a GPU, `tensor` is one allocation there (`blocks_on_gpu`), the memfd has the generations, and the host
    sees bytes through `read_blocks` and `write_blocks`.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        device: torch.device | str = "cpu",
        *,
        gpu: Gpu | None = None,
    ) -> None:
        """`gpu`: that of `device`, opened here unless given.

        Raises ConfigError where there is no such device, or what is needed to use it.
        """
        self.layout = layout
        self.num_blocks = num_blocks
        gpu = gpu or _gpu_of(torch.device(device))
        self.device = torch.device("cpu") if gpu is None else gpu.device
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._fd: int | None = None
        self._map: mmap.mmap | None = None
        self._bytes: NDArray[np.uint8] | None = None
        self._tensor: torch.Tensor | None = None
        self._blocks_on_gpu: DeviceBlocks | None = None
        shape = (num_blocks, *layout.block_shape)
        header = PoolHeader(
            num_blocks, layout.block_bytes, layout.fingerprint(), self.token, on_host=gpu is None
        )
        self._fd = _sealed_memory(header.total_bytes)
        self._map = mmap.mmap(self._fd, header.total_bytes)
        packed = header.pack()
        self._map[: len(packed)] = packed
        self._generations = np.frombuffer(self._map, np.uint64, num_blocks, header.generations_offset)
        if gpu is not None:
            self._blocks_on_gpu = DeviceBlocks(gpu, num_blocks, layout.block_bytes)
            self._tensor = self._blocks_on_gpu.tensor(_DTYPES[layout.dtype], shape)
            return
        flat = np.frombuffer(self._map, np.uint8, num_blocks * layout.block_bytes, header.blocks_offset)
        self._bytes = flat.reshape(num_blocks, layout.block_bytes)
        self._tensor = torch.frombuffer(
            self._map,
            dtype=_DTYPES[layout.dtype],
            count=flat.size // layout.itemsize,
            offset=header.blocks_offset,
        ).view(shape)

    @property
    def tensor(self) -> torch.Tensor:
        """[num_blocks, num_layers, 2, num_kv_heads, block_tokens, head_dim] of the layout's dtype."""
        if self._tensor is None:
            raise Unavailable("this KV storage is closed; make a new one")
        return self._tensor

    @property
    def bytes_view(self) -> NDArray[np.uint8]:
        """[num_blocks, block_bytes] over the same memory; CPU only."""
        if self._bytes is None:
            raise Unavailable(
                f"KV storage on {self.device} has no mapped bytes (closed, or on a GPU): use read_blocks"
            )
        return self._bytes

    @property
    def on_host(self) -> bool:
        """Whether the blocks are in host memory, and open."""
        return self._bytes is not None

    @property
    def blocks_on_gpu(self) -> DeviceBlocks | None:
        """The blocks as a GPU's transports see them; None on the CPU and after close."""
        return self._blocks_on_gpu

    def settle(self) -> None:
        """Block until blocks that the engine has computed so far are in memory, for every reader."""
        if self._blocks_on_gpu is not None:
            self._blocks_on_gpu.settle()

    @property
    def generations(self) -> NDArray[np.uint64]:
        """[num_blocks], written by KvPool alone, read by every reader of the blocks."""
        return self._generations

    @property
    def fd(self) -> int | None:
        """The memfd, owned by this storage; None after close."""
        return self._fd

    def set_exported(self, exported: bool) -> None:
        """Tell processes that map the memory whether they may read it. No effect once closed."""
        if self._map is not None:
            self._map[EXPORTED_OFFSET] = int(exported)

    def readable(self, blocks: Sequence[BlockId]) -> tuple[NDArray[np.uint8], Sequence[int]]:
        """Host memory [n, block_bytes] and the rows in it that hold `blocks`: a copy only from a device."""
        if self._bytes is not None:
            return self._bytes, blocks
        return self.read_blocks(blocks), range(len(blocks))

    def read_blocks(self, blocks: Sequence[BlockId]) -> NDArray[np.uint8]:
        """A copy in host memory, [len(blocks), block_bytes]."""
        out = np.empty((len(blocks), self.layout.block_bytes), np.uint8)
        self.read_blocks_into(blocks, out)
        return out

    def read_blocks_into(self, blocks: Sequence[BlockId], out: NDArray[np.uint8]) -> None:
        """Copy blocks to `out`, host memory [len(blocks), block_bytes]."""
        if self._bytes is not None:
            copy_rows(self._bytes, blocks, out, range(len(blocks)))
        else:
            self._on_gpu().read_into(blocks, out)

    def write_blocks(self, blocks: Numbers, data: NDArray[np.uint8], rows: Numbers | None = None) -> None:
        """Copy rows of `data` (all, in order, unless told) to blocks that the caller owns.

        `data` is host memory [n, block_bytes]; one row per block.
        """
        chosen = range(len(blocks)) if rows is None else rows
        if self._bytes is not None:
            copy_rows(data, chosen, self._bytes, blocks)
        else:
            self._on_gpu().write([BlockId(int(block)) for block in blocks], data[list(chosen)])

    def write_and_digest_blocks(
        self,
        blocks: Numbers,
        data: NDArray[np.uint8],
        rows: Numbers,
        valid_tokens: Numbers,
    ) -> NDArray[np.uint64]:
        """As `write_blocks`, and the digests of what was written, in one pass over memory; CPU only.

        `valid_tokens` are those of each block; the result is [len(blocks), segments_per_block].
        """
        return load_kernel().copy_and_digest(
            data, _index(rows), self.bytes_view, _index(blocks), _index(valid_tokens), self.layout
        )

    def copy_blocks(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> None:
        """Copy whole blocks within the pool, pair by pair; on a device in the order of its stream.

        The caller owns the targets, and nobody writes the sources meanwhile.
        """
        for source, target in zip(sources, targets, strict=True):
            self.tensor[target].copy_(self.tensor[source])

    def close(self) -> None:
        """Give all memory back, also where a peer still maps it: it reads zeros, which is no generation.

        The address range goes with the last view that somebody keeps. Idempotent.
        """
        if self._map is not None:
            self._map.madvise(mmap.MADV_REMOVE)
        if self._fd is not None:
            os.close(self._fd)
        if self._blocks_on_gpu is not None:
            self._blocks_on_gpu.close()
        self._fd = self._map = self._bytes = self._tensor = self._blocks_on_gpu = None
        self._generations = np.zeros(self.num_blocks, np.uint64)

    def _on_gpu(self) -> DeviceBlocks:
        if self._blocks_on_gpu is None:
            raise Unavailable("this KV storage is closed; make a new one")
        return self._blocks_on_gpu


def copy_rows(
    source: NDArray[np.uint8], rows: Numbers, target: NDArray[np.uint8], target_rows: Numbers
) -> None:
    """target[target_rows[i]] = source[rows[i]]; raises IndexError for a row that is not there."""
    load_kernel().copy(source, _index(rows), target, _index(target_rows))


def _gpu_of(device: torch.device) -> Gpu | None:
    """None for the CPU."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ConfigError(f"a KV pool is on the cpu or on cuda, not on {device}")
    return open_gpu(device.index or 0)


def _index(numbers: Numbers) -> NDArray[np.int64]:
    return np.ascontiguousarray(numbers, np.int64)


def _sealed_memory(size: int) -> int:
    """A memfd of `size` bytes that can neither shrink nor grow; the caller owns it."""
    fd = os.memfd_create("pdserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd
