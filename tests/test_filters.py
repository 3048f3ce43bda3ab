"""Filters for runtimes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
import runtimes
from hypothesis import given, settings
from hypothesis import strategies as st

from bctrl_async import BctrlConfigError, Runtime, RuntimeFilter, RuntimeKind

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def runtime(
    *, status: str = "active", kind: str = "browser", created_at: str = "2026-01-01T10:00:00.000Z"
) -> Runtime:
    changes = {"kind": RuntimeKind(kind), "created_at": created_at}
    return msgspec.structs.replace(runtimes.runtime(status), **changes)


@pytest.mark.parametrize(
    ("status", "has_ended"),
    [("active", False), ("paused", False), ("stopped", True), ("failed", True)],
)
def test_a_filter_matches_what_has_not_ended_any_status_or_a_given_one(
    status: str, *, has_ended: bool
) -> None:
    assert RuntimeFilter()(runtime(status=status)) is not has_ended
    assert RuntimeFilter(status="any")(runtime(status=status))
    assert RuntimeFilter(status=status)(runtime(status=status))
    assert not RuntimeFilter(status="other")(runtime(status=status))


def test_a_kind_can_be_unknown_to_the_contract() -> None:
    assert RuntimeFilter(kind="browser")(runtime())
    assert RuntimeFilter(kind=RuntimeKind.BROWSER)(runtime())
    assert RuntimeFilter(kind="hologram")(runtime(kind="hologram"))
    assert not RuntimeFilter(kind="desktop")(runtime())


def test_all_conditions_must_hold() -> None:
    both = RuntimeFilter(kind="browser", older_than=3600)

    assert both.decide(runtime(), NOW)
    assert not both.decide(runtime(kind="desktop"), NOW)


@pytest.mark.parametrize(
    ("older_than", "matches"),
    [(7199, True), (7200, False), (0.5, True), (timedelta(hours=1), True), (timedelta(1), False)],
)
@pytest.mark.parametrize(
    "created_at",
    ["2026-01-01T10:00:00.000Z", "2026-01-01T10:00:00+00:00", "2026-01-01 05:00:00-05:00"],
)
def test_older_is_strictly_older_whatever_the_offset(
    created_at: str, older_than: float | timedelta, *, matches: bool
) -> None:
    created = runtime(created_at=created_at)
    assert RuntimeFilter(older_than=older_than).decide(created, NOW) is matches


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
        "2020-01-01T00:00:00",  # Of which zone?
        "2020-13-01T00:00:00Z",
        "Wed, 01 Jan 2020 00:00:00 GMT",
    ],
)
def test_a_time_that_cannot_be_read_matches_no_age(created_at: str) -> None:
    """The contract gives `createdAt` no format: a conforming server sends any text."""
    assert not RuntimeFilter(older_than=1).decide(runtime(created_at=created_at), NOW)
    assert RuntimeFilter().decide(runtime(created_at=created_at), NOW)


@settings(max_examples=30)
@given(st.text() | st.datetimes().map(str) | st.datetimes(timezones=st.timezones()).map(str))
def test_no_text_raises(created_at: str) -> None:
    RuntimeFilter(older_than=1).decide(runtime(created_at=created_at), NOW)


@pytest.mark.parametrize(
    "older_than", [0, -1, True, float("nan"), float("inf"), "2h", timedelta(0), timedelta(-1)]
)
def test_an_invalid_age_is_rejected(older_than: object) -> None:
    with pytest.raises(BctrlConfigError, match=r"^invalid older_than ") as caught:
        RuntimeFilter(older_than=older_than)  # type: ignore[arg-type]  # on purpose

    assert caught.value.argument == "older_than"


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        (
            {"status": "actve"},
            ["unknown status 'actve' in a filter: this version knows active, stopped, failed, any"],
        ),
        (
            {"kind": "desktp"},
            ["unknown kind 'desktp' in a filter: this version knows browser, desktop, spreadsheet"],
        ),
        ({"status": "active", "kind": "desktop"}, []),
        ({"status": "any"}, []),
    ],
)
def test_a_value_that_is_unknown_is_logged_since_it_may_be_mistyped(
    caplog: pytest.LogCaptureFixture, values: dict[str, str], lines: list[str]
) -> None:
    RuntimeFilter(**values)  # type: ignore[arg-type]  # No age is among them.
    assert caplog.messages == lines
