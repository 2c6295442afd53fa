"""Bearer tokens: the file's grammar, the check, and that nothing shows a token."""

import ast
import hashlib
import inspect
import textwrap
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError, Unauthenticated
from pdserve.core.security import tokens
from pdserve.core.security.tokens import TokenTable, bearer_token, read_token

ALICE = "alice-token-0123456789"
BOB = "bob-token-abcdefghijkl"


@pytest.fixture
def table(tmp_path: Path) -> TokenTable:
    """Alice in plain text, Bob hashed."""
    path = tmp_path / "tokens"
    path.write_text(
        f"# who may call\n\nalice:{ALICE}\nbob:sha256:{hashlib.sha256(BOB.encode()).hexdigest()}\n"
    )
    return TokenTable.load(path)


@pytest.mark.parametrize(("name", "token"), [("alice", ALICE), ("bob", BOB)])
def test_a_token_names_its_owner_whether_the_file_has_it_plain_or_hashed(
    table: TokenTable, name: str, token: str
) -> None:
    assert table.check(f"Bearer {token}") == name
    assert table.check(f"bearer  {token} ") == name


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {ALICE}",
        ALICE,
        f"Bearer {ALICE[:-1]}",
        f"Bearer {ALICE}x",
        "Bearer alice",
        f"Bearer {hashlib.sha256(BOB.encode()).hexdigest()}",
        "Bearer \udcff\u00fc",
    ],
)
def test_anything_else_is_refused_without_being_repeated(table: TokenTable, header: str | None) -> None:
    with pytest.raises(Unauthenticated) as refused:
        table.check(header)
    assert refused.value.http_status == 401
    assert refused.value.grpc_code == 16
    assert ALICE[:8] not in refused.value.message


def test_every_entry_is_compared_in_constant_time_whichever_matches(
    table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    real = tokens.hmac.compare_digest

    def counting(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return real(left, right)

    monkeypatch.setattr(tokens.hmac, "compare_digest", counting)
    for header in (f"Bearer {ALICE}", f"Bearer {BOB}"):
        table.check(header)
    with pytest.raises(Unauthenticated):
        table.check("Bearer x")
    assert compared == [(32, 32)] * 6


def test_the_check_compares_digests_with_nothing_but_compare_digest() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(TokenTable.check)))
    compares = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert all(text.endswith("is None") for text in compares), compares
    (loop,) = (node for node in ast.walk(tree) if isinstance(node, ast.For))
    assert not [node for node in ast.walk(loop) if isinstance(node, ast.Break | ast.Return)]


def test_nothing_shows_a_token(table: TokenTable) -> None:
    own = table.with_token("supervisor", "s3cret-of-the-supervisor")
    assert own.check("Bearer s3cret-of-the-supervisor") == "supervisor"
    for shown in (repr(own), str(own), repr(own._entries)):
        assert "alice" in shown
        for secret in (ALICE, BOB, "s3cret", hashlib.sha256(ALICE.encode()).hexdigest()):
            assert secret not in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no token"),
        ("# nothing\n", "holds no token"),
        ("justatokenwithoutname1234", "line 1"),
        (f"ok:{ALICE}\n:tokentokentokentoken", "line 2"),
        ("al ice:tokentokentokentoken", "line 1"),
        ("alice:short-secret", "has 12 characters"),
        ("alice:has spaces has spaces", "letters"),
        ("alice:sha256:1234-secret", "malformed"),
        ("alice:md5:" + "0" * 64, "malformed"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line_and_without_its_secrets(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        TokenTable.load(path)
    for secret in ("justatoken", "secret", ALICE, "tokentoken", "has spaces has"):
        assert secret not in refused.value.message


def test_a_file_that_is_not_there_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the tokens file"):
        TokenTable.load(tmp_path / "none")


def test_a_callers_token_file_holds_one_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(ALICE + "\n")
    assert read_token(path) == ALICE
    path.write_text(f"{ALICE}\n{BOB}\n")
    with pytest.raises(ConfigError) as refused:
        read_token(path)
    assert ALICE not in refused.value.message


def test_a_header_is_split_as_http_says() -> None:
    assert bearer_token("BEARER abc") == "abc"
    assert bearer_token("Token abc") is None
