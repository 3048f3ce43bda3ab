"""Runtimes on the wire: decoded leniently and encoded unchanged."""

import copy
import pickle
from enum import StrEnum
from typing import cast

import msgspec
import pytest
import runtimes
from hypothesis import example, given
from hypothesis import strategies as st

from bctrl_async import StopResult
from bctrl_async.models import (
    LaunchMode,
    Runtime,
    RuntimeKind,
    RuntimeRef,
    RuntimeStatus,
)
from bctrl_async.outcomes import result_of

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
PLACES = {
    RuntimeStatus.ACTIVE: (False, StopResult.ACCEPTED),
    RuntimeStatus.STOPPED: (True, StopResult.STOPPED),
    RuntimeStatus.FAILED: (True, StopResult.ACCEPTED),
}
"""For each status, whether it is final, and the result of a stop that is answered with it."""

every_enum = pytest.mark.parametrize("enum", [RuntimeKind, RuntimeStatus, LaunchMode])


class TestOpenEnum:
    @every_enum
    def test_an_unknown_value_is_kept_and_not_cached(self, enum: type[StrEnum]) -> None:
        """Fault: a new enum value breaks every call (apify-client-python#931)."""
        known, member = list(enum), enum("paused")

        assert isinstance(member, enum)
        assert member.value == member.name == str(member) == f"{member}" == "paused"
        assert repr(member) == f"<{enum.__name__}.paused: 'paused'>"
        assert member != enum("moved")
        assert {member, enum("paused"), "paused"} == {"paused"}
        assert (list(enum), "paused" in enum.__members__) == (known, False)

    @every_enum
    @pytest.mark.parametrize("value", ["paused", "", "\x1b]0;title"])
    def test_a_value_survives_pickling_and_copying(self, enum: type[StrEnum], value: str) -> None:
        for member in (enum(value), *enum):
            twins = [pickle.loads(pickle.dumps(member, protocol)) for protocol in range(6)]  # noqa: S301
            for twin in (*twins, copy.copy(member), copy.deepcopy(member)):
                assert twin == member
                assert type(twin) is enum

    @every_enum
    def test_a_value_that_is_not_text_is_rejected(self, enum: type[StrEnum]) -> None:
        for value in (None, 1, b"active"):
            with pytest.raises(ValueError, match="is not a valid"):
                enum(cast("str", value))

    def test_a_runtime_that_stopped_or_failed_no_longer_runs(self) -> None:
        assert {status: status.is_final for status in RuntimeStatus} == {
            status: is_final for status, (is_final, _) in PLACES.items()
        }
        assert not RuntimeStatus("paused").is_final

    def test_each_status_has_its_result_of_a_stop(self) -> None:
        assert PLACES.keys() == set(RuntimeStatus)
        for status, (_, result) in PLACES.items():
            assert result_of(runtimes.runtime(status)) is result
        assert result_of(runtimes.runtime("paused")) is StopResult.ACCEPTED

    @every_enum
    @given(value=st.text())
    @example(value="\x1b]0;title\x07")
    @example(value="\u202egnipeels")
    def test_the_name_and_the_repr_of_an_unknown_value_are_printable(
        self, enum: type[StrEnum], value: str
    ) -> None:
        """Fault: `ascii` of a member shows its name, and so an escape sequence of the server."""
        member = enum(value)

        assert f"{member.name}{member!r}".isprintable()
        assert member.value == value


class TestStructs:
    """What is decoded from the wire is compared with the contract in `http/test_contract.py`."""

    def test_encoding_restores_the_wire_format_also_of_unknown_values(self) -> None:
        assert msgspec.json.decode(msgspec.json.encode(RUNTIME)) == WIRE

    def test_a_runtime_is_hashable_and_survives_pickling(self) -> None:
        assert {pickle.loads(pickle.dumps(RUNTIME)), copy.deepcopy(RUNTIME)} == {RUNTIME}  # noqa: S301

    @pytest.mark.parametrize("struct", [RUNTIME, RUNTIME.summary])
    def test_a_struct_cannot_be_changed(self, struct: msgspec.Struct) -> None:
        for field in struct.__struct_fields__:
            with pytest.raises(AttributeError, match="immutable"):
                setattr(struct, field, None)

    def test_a_reference_equals_a_plain_tuple(self) -> None:
        assert RuntimeRef("ws-1", "crm") == ("ws-1", "crm")
        assert RuntimeRef._fields == ("workspace_id", "alias")
