"""The member table names members and never uses a name twice."""

import pytest

from pdserve.cluster.members import MemberTable
from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Role


def test_members_are_numbered_by_role() -> None:
    table = MemberTable()
    added = [table.add(role, "m").worker for role in (Role.PREFILL, Role.DECODE, Role.DECODE, Role.MIXED)]
    assert added == ["prefill-0", "decode-0", "decode-1", "mixed-0"]
    assert [member.worker for member in table.all()] == added


def test_a_name_is_never_used_twice() -> None:
    table = MemberTable()
    first = table.add(Role.DECODE, "m")
    table.discard(first.worker)
    assert table.add(Role.DECODE, "m").worker == "decode-1"


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    table = MemberTable()
    with pytest.raises(InvalidRequest, match="members are none"):
        table.get("decode-7")
    table.add(Role.DECODE, "m")
    with pytest.raises(InvalidRequest, match="'decode-7': members are decode-0"):
        table.get("decode-7")


def test_pools_are_keyed_by_model() -> None:
    table = MemberTable()
    one, other = table.add(Role.DECODE, "a"), table.add(Role.DECODE, "b")
    assert table.models() == ("a", "b")
    assert table.pool("a") == (one,)
    assert table.pool("b") == (other,)
    assert table.pool("c") == ()
