"""Runtimes on the wire: decoded leniently and encoded unchanged.

`http/test_contract.py` compares them with the contract.
"""

import copy
import pickle
from enum import StrEnum
from typing import cast

import msgspec
import pytest
from hypothesis import example, given, strategies as st
from support import runtimes

from bctrl_async import LaunchMode, Runtime, RuntimeKind, RuntimeRef, RuntimeStatus

WIRE: dict[str, object] = {
    **runtimes.WIRE,
    "kind": "hologram",
    "status": "paused",
    "summary": {
        "browserRunning": False,
        "currentDriver": "puppeteer",
        "defaultContextId": "context-1",
        "defaultPageId": "page-1",
        "launchMode": "ephemeral",
        "profileId": "0b7c7a0e-54a1-4c7a-9f6e-7d9f0a3c1f03",
        "storageWorkspace": "shared",
    },
}
RUNTIME = msgspec.json.decode(msgspec.json.encode(WIRE), type=Runtime)

every_enum = pytest.mark.parametrize("enum", [RuntimeKind, RuntimeStatus, LaunchMode])


class TestOpenEnum:
    @every_enum
    def test_an_unknown_value_is_kept_and_not_cached(self, enum: type[StrEnum]) -> None:
        """Fault: a new enum value breaks every call (apify-client-python#931)."""
        known, member = list(enum), enum("paused")

        assert isinstance(member, enum)
        assert member.value == member.name == str(member) == f"{member}" == "paused"
        assert repr(member) == f"<{enum.__name__}.paused: 'paused'>"
        assert {member, enum("paused"), "paused"} == {"paused"}
        assert (list(enum), "paused" in enum.__members__) == (known, False)

    @every_enum
    @pytest.mark.parametrize("value", ["paused", "", "\x1b]0;title"])
    def test_a_value_survives_pickling_and_copying(
        self, enum: type[StrEnum], value: str
    ) -> None:
        for member in (enum(value), *enum):
            dumps = [pickle.dumps(member, protocol) for protocol in range(6)]
            twins = [pickle.loads(dump) for dump in dumps]  # noqa: S301
            for twin in (*twins, copy.copy(member), copy.deepcopy(member)):
                assert twin == member
                assert type(twin) is enum

    @pytest.mark.parametrize("value", [None, 1, b"active"])
    def test_a_value_that_is_not_text_is_rejected(self, value: object) -> None:
        with pytest.raises(ValueError, match="is not a valid"):
            RuntimeStatus(cast("str", value))

    def test_a_runtime_that_stopped_or_failed_no_longer_runs(self) -> None:
        final = {
            status
            for status in (*RuntimeStatus, RuntimeStatus("paused"))
            if status.is_final
        }
        assert final == {"stopped", "failed"}

    @given(value=st.text())
    @example(value="\x1b]0;title\x07")
    @example(value="\u202egnipeels")
    def test_the_name_and_the_repr_of_an_unknown_value_are_printable(
        self, value: str
    ) -> None:
        """Fault: `ascii` of a member shows the server's escape sequences."""
        member = RuntimeStatus(value)
        assert f"{member.name}{member!r}".isprintable()
        assert member.value == value


class TestStructs:
    def test_encoding_restores_the_wire_format_also_of_unknown_values(self) -> None:
        assert msgspec.json.decode(msgspec.json.encode(RUNTIME)) == WIRE

    def test_a_runtime_is_hashable_and_survives_pickling(self) -> None:
        unpickled = pickle.loads(pickle.dumps(RUNTIME))  # noqa: S301

        assert {unpickled, copy.deepcopy(RUNTIME)} == {RUNTIME}

    @pytest.mark.parametrize("struct", [RUNTIME, RUNTIME.summary])
    def test_a_struct_cannot_be_changed(self, struct: msgspec.Struct) -> None:
        for field in struct.__struct_fields__:
            with pytest.raises(AttributeError, match="immutable"):
                setattr(struct, field, None)

    def test_a_reference_equals_a_plain_tuple(self) -> None:
        assert RuntimeRef(workspace_id="ws-1", alias="crm") == ("ws-1", "crm")
