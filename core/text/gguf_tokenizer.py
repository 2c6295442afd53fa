"""A fast tokenizer out of a GGUF file's metadata."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pdserve.core.errors import ConfigError, PdserveError
from pdserve.core.gguf_header import GgufHeader
from pdserve.core.text.gguf_sentencepiece import sentencepiece_tokenizer

_CONTROL_TOKEN: Final = 3
_USER_DEFINED_TOKEN: Final = 4
"""Values of `tokenizer.ggml.token_type` that matter here: parsed in text, and (control) skipped in output."""

_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class _PreTokenization:
    """How text is cut before the merges. `pattern` None is GPT-2's own."""

    pattern: str | None = None
    split_digits: bool = False
    normalize_nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2: Final = _PreTokenization()
_DIGITS: Final = _PreTokenization(split_digits=True)
_PRE_TOKENIZATIONS: Final[dict[str, _PreTokenization]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "olmo": _GPT2,
    # SmolLM's training split digits off first; transformers does not when it reads the GGUF, and that is the
    # reference outputs are compared with. They differ where spaces run up to a digit, and for ½, ² and alike.
    "smollm": _GPT2,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama-bpe": _PreTokenization(pattern=_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": _PreTokenization(pattern=_LLAMA3, ignore_merges=True, add_bos=True),
    "qwen2": _PreTokenization(pattern=_QWEN2, normalize_nfc=True),
    "deepseek-r1-qwen": _PreTokenization(pattern=_QWEN2, normalize_nfc=True),
}
"""By `tokenizer.ggml.pre`. A file whose name is not here is left to transformers."""


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """What a GGUF header says about text besides the tokenizer itself."""

    chat_template: str | None
    special_tokens: dict[str, str]
    eos_ids: frozenset[int]


def build_tokenizer(metadata: GgufHeader) -> Tokenizer | None:
    """The tokenizer that the header describes: byte-level BPE, or Gemma's; None where it is of another kind.

    Raises ConfigError when the header names such a tokenizer but its tables are missing or contradict.
    """
    try:
        return _build(metadata)
    except PdserveError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"no tokenizer can be built from {metadata.path}: {error}; download the file again"
        ) from error


def _build(metadata: GgufHeader) -> Tokenizer | None:
    if metadata.string("tokenizer.ggml.model") == "llama" and (
        metadata.string("general.architecture") == "gemma"  # which transformers cannot read
    ):
        tokenizer = sentencepiece_tokenizer(metadata)
        tokens = metadata.strings("tokenizer.ggml.tokens")
        _add_parsed_tokens(tokenizer, tokens, metadata.integers("tokenizer.ggml.token_type"))
        _set_template(tokenizer, tokens, metadata, _PreTokenization(add_bos=True))
        return tokenizer
    pre = _PRE_TOKENIZATIONS.get(metadata.string("tokenizer.ggml.pre") or "default")
    if metadata.string("tokenizer.ggml.model") != "gpt2" or pre is None:
        return None
    tokens = metadata.strings("tokenizer.ggml.tokens")
    merges = metadata.strings("tokenizer.ggml.merges")
    if not tokens or not merges:
        raise ConfigError(
            f"the GGUF header has {len(tokens)} tokens and {len(merges)} merges; a gpt2 tokenizer needs both"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=[_merge(line) for line in merges],
            ignore_merges=pre.ignore_merges,
        )
    )
    if pre.normalize_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    _add_parsed_tokens(tokenizer, tokens, metadata.integers("tokenizer.ggml.token_type"))
    _set_template(tokenizer, tokens, metadata, pre)
    return tokenizer


def read_vocabulary(metadata: GgufHeader) -> GgufVocabulary:
    """Chat template, named special tokens and end-of-sequence ids of the header."""
    tokens = metadata.strings("tokenizer.ggml.tokens")
    named: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.integer(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            named[f"{name}_token"] = tokens[token_id]
    ends = (metadata.integer(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return GgufVocabulary(
        chat_template=metadata.string("tokenizer.chat_template"),
        special_tokens=named,
        eos_ids=frozenset(
            token_id for token_id in ends if token_id is not None and 0 <= token_id < len(tokens)
        ),
    )


def load_with_transformers(path: Path) -> Tokenizer:
    """The tokenizer as transformers reads it from the file: slow, imports torch, knows every kind."""
    from transformers import AutoTokenizer

    try:
        wrapped = AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        backend = wrapped.backend_tokenizer
    except Exception as error:
        raise ConfigError(f"no tokenizer can be built from {path}: {error}") from error
    if not isinstance(backend, Tokenizer):
        raise ConfigError(f"{path} has no fast tokenizer; convert the model to a folder with tokenizer.json")
    return backend


def _merge(line: str) -> tuple[str, str]:
    left, _, right = line.partition(" ")
    return left, right


def _pre_tokenizer(pre: _PreTokenization) -> pre_tokenizers.PreTokenizer:
    if pre.pattern is not None:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre.split_digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return gpt2


def _add_parsed_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Tokens that are recognised in text as a whole; the control tokens among them are special."""
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL_TOKEN]
    plain = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])


def _set_template(
    tokenizer: Tokenizer, tokens: list[str], metadata: GgufHeader, pre: _PreTokenization
) -> None:
    """Put begin and end tokens around a text where the file (or, silent, its kind) asks for them."""
    add_bos = metadata.flag("tokenizer.ggml.add_bos_token")
    wanted = {
        "bos": pre.add_bos if add_bos is None else add_bos,
        "eos": bool(metadata.flag("tokenizer.ggml.add_eos_token")),
    }
    ids = {name: metadata.integer(f"tokenizer.ggml.{name}_token_id") for name in wanted if wanted[name]}
    around = {name: i for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}
    if not around:
        return
    single = [tokens[around["bos"]]] if "bos" in around else []
    single.append("$A")
    single += [tokens[around["eos"]]] if "eos" in around else []
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=single,
                pair=None,
                special_tokens=[(tokens[token_id], token_id) for token_id in sorted(set(around.values()))],
            ),
        ]
    )
