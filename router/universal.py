"""Which leading blocks everybody has: a shared system prompt says nothing about where a request belongs."""

import hashlib
from collections import Counter, deque
from collections.abc import Sequence

from pdserve.core.types import BlockName
from pdserve.kvtransfer.names import NAME_BYTES, pack_tokens


class UniversalPrefix:
    """Counts in how many of the recent distinct prompts each leading block occurs.

    Names are hash chains, so equal names mean equal prefixes and counts never grow with the depth.
    """

    def __init__(self, share: float, *, window: int = 256, minimum: int = 8, depth: int = 256) -> None:
        """`share`: a block in more than this part of the window is universal, from `minimum` prompts on.

        `depth` bounds the blocks that are counted per prompt.
        """
        self._share = share
        self._window = window
        self._minimum = minimum
        self._depth = depth
        self._recent: deque[tuple[BlockName, ...]] = deque()
        self._prompts: set[BlockName] = set()
        self._counts: Counter[BlockName] = Counter()

    def observe(self, chain: Sequence[BlockName]) -> None:
        """Count one prompt; one that is already in the window, or has no full block, changes nothing."""
        leading = tuple(chain[: self._depth])
        if not leading or leading[-1] in self._prompts:
            return
        if len(self._recent) == self._window:
            oldest = self._recent.popleft()
            self._prompts.discard(oldest[-1])
            self._counts.subtract(oldest)
            for name in oldest:
                if not self._counts[name]:
                    del self._counts[name]
        self._recent.append(leading)
        self._prompts.add(leading[-1])
        self._counts.update(leading)

    def length(self, chain: Sequence[BlockName]) -> int:
        """How many leading blocks of `chain` are universal."""
        bound = max(self._minimum, 1)
        for index, name in enumerate(chain):
            count = self._counts.get(name, 0)
            if count < bound or count <= self._share * len(self._recent):
                return index
        return len(chain)

    def ring_key(self, chain: Sequence[BlockName], tokens: Sequence[int]) -> bytes:
        """What places the prompt on the ring: its first block past the universal ones, 16 bytes.

        Without such a block (a short prompt, or nothing but universal blocks) the hash of all tokens.
        """
        start = self.length(chain)
        if start < len(chain):
            return chain[start]
        return hashlib.blake2b(pack_tokens(tokens), digest_size=NAME_BYTES).digest()
