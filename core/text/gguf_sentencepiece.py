"""A fast tokenizer out of a SentencePiece vocabulary in GGUF metadata, as Gemma's files have it."""

from typing import Final

from tokenizers import Tokenizer, decoders, models, normalizers

from pdserve.core.errors import ConfigError
from pdserve.core.gguf_header import GgufHeader

SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""How the vocabulary writes a space."""


def sentencepiece_tokenizer(metadata: GgufHeader) -> Tokenizer:
    """Byte-fallback BPE over the file's pieces; spaces are kept as they are, none is put in front.

    Special tokens and what goes around a text are the caller's to add.
    Raises ConfigError when the header lacks pieces or scores, or their numbers differ.
    """
    pieces = metadata.strings("tokenizer.ggml.tokens")
    scores = metadata.numbers("tokenizer.ggml.scores")
    if not pieces or len(pieces) != len(scores):
        raise ConfigError(
            f"{metadata.path} has {len(pieces)} tokens and {len(scores)} scores; a SentencePiece tokenizer "
            "needs one score for each token: download the file again"
        )
    unknown = metadata.integer("tokenizer.ggml.unknown_token_id")
    known = unknown is not None and 0 <= unknown < len(pieces)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: token_id for token_id, piece in enumerate(pieces)},
            merges=_merges(pieces, scores),
            unk_token=pieces[unknown] if known and unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best; BPE wants the pairs in that order."""
    ids = {piece: token_id for token_id, piece in enumerate(pieces)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, score in zip(pieces, scores, strict=True):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
