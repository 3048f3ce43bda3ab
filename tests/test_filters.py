"""Filters for runtimes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st
from support import runtimes

from bctrl_async import BctrlConfigError, Runtime, RuntimeFilter, RuntimeKind
from bctrl_async.filters import Selection

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
TEN = "2026-01-01T10:00:00.000Z"


def runtime(
    status: str = "active", kind: str = "browser", created_at: str = TEN
) -> Runtime:
    changes = {"kind": RuntimeKind(kind), "created_at": created_at}
    return msgspec.structs.replace(runtimes.runtime(status), **changes)


CONDITIONS: dict[str, tuple[dict[str, Any], list[Runtime], list[Runtime]]] = {
    # The arguments of the filter, what it matches at noon, and what not.
    "by default what has not ended": (
        {},
        [runtime("active"), runtime("paused")],
        [runtime("stopped"), runtime("failed")],
    ),
    "any status": ({"status": "any"}, [runtime("active"), runtime("stopped")], []),
    "one status": ({"status": "failed"}, [runtime("failed")], [runtime("active")]),
    "one kind": ({"kind": RuntimeKind.BROWSER}, [runtime()], [runtime(kind="desktop")]),
    "a kind that this version does not know": (
        {"kind": "hologram"},
        [runtime(kind="hologram")],
        [runtime()],
    ),
    "what is older, whatever the offset": (
        {"older_than": 7199},
        [
            runtime(created_at=TEN),
            runtime(created_at="2026-01-01T10:00:00+00:00"),
            runtime(created_at="2026-01-01 05:00:00-05:00"),
        ],
        [runtime(created_at="2026-01-01T11:00:00Z")],
    ),
    "strictly older": ({"older_than": 7200}, [], [runtime(created_at=TEN)]),
    "a timedelta": (
        {"older_than": timedelta(hours=1)},
        [runtime(created_at=TEN)],
        [runtime(created_at="2026-01-01T11:00:01Z")],
    ),
    "both of two conditions": (
        {"kind": "browser", "older_than": 3600},
        [runtime()],
        [runtime(kind="desktop"), runtime(created_at="2026-01-01T11:59:00Z")],
    ),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_filter_matches(name: str) -> None:
    arguments, matching, others = CONDITIONS[name]
    decide = RuntimeFilter(**arguments).decide

    assert [decide(candidate, NOW) for candidate in matching] == [True] * len(matching)
    assert [decide(candidate, NOW) for candidate in others] == [False] * len(others)


def test_age_is_measured_by_the_clock_of_this_machine() -> None:
    old = RuntimeFilter(older_than=60)
    assert old(runtime())
    assert not old(runtime(created_at=datetime.now(UTC).isoformat()))


@pytest.mark.parametrize(
    "created_at",
    [
        "whenever",
        "1712010100000",  # Milliseconds, which Python reads as a day in 1712.
        "2020-01-01",
        "2020-01-01T00:00:00",  # It has no zone.
        "2020-13-01T00:00:00Z",
    ],
)
def test_a_time_that_cannot_be_read_matches_no_age(created_at: str) -> None:
    """The contract gives `createdAt` no format: a conforming server sends any text."""
    assert (
        RuntimeFilter(older_than=1).decide(runtime(created_at=created_at), NOW) is None
    )
    assert RuntimeFilter().decide(runtime(created_at=created_at), NOW)


@settings(max_examples=30)
@given(
    st.text()
    | st.datetimes().map(str)
    | st.datetimes(timezones=st.timezones()).map(str)
)
def test_no_text_raises(created_at: str) -> None:
    RuntimeFilter(older_than=1).decide(runtime(created_at=created_at), NOW)


@pytest.mark.parametrize(
    "older_than", [0, True, float("inf"), timedelta(0), timedelta(-1)]
)
def test_an_age_that_is_out_of_range_is_rejected(older_than: float | timedelta) -> None:
    with pytest.raises(BctrlConfigError, match=r"^invalid older_than ") as caught:
        RuntimeFilter(older_than=older_than)
    assert caught.value.argument == "older_than"


def test_a_value_that_is_unknown_is_logged_since_it_may_be_mistyped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    RuntimeFilter(status="active", kind="desktop")
    RuntimeFilter(status="any")
    assert caplog.messages == []

    RuntimeFilter(status="actve", kind="desktp")
    knows = "in a filter: this version knows"
    assert caplog.messages == [
        f"unknown status 'actve' {knows} active, stopped, failed, any",
        f"unknown kind 'desktp' {knows} browser, desktop, spreadsheet",
    ]


def test_a_later_list_selects_by_the_ages_of_the_first() -> None:
    """Fault: a runtime that reached the age during the run had "started since"."""
    first = Selection("ws-1", RuntimeFilter(older_than=3600))
    young = runtime(created_at=(first.at - timedelta(hours=1)).isoformat())
    later = first.anew()
    later.add([young])
    assert not later.items
