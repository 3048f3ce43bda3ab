"""Filters for runtimes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bctrl_async import BctrlConfigError, Runtime, RuntimeFilter, RuntimeKind, RuntimeStatus
from bctrl_async.filters import list_origin

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def runtime(
    *, status: str = "active", kind: str = "browser", created_at: str = "2026-01-01T10:00:00.000Z"
) -> Runtime:
    return Runtime(
        id=UUID(int=1),
        alias="crm",
        workspace_id=UUID(int=2),
        kind=RuntimeKind(kind),
        status=RuntimeStatus(status),
        driver="",
        created_at=created_at,
        updated_at="",
    )


@pytest.mark.parametrize("status", ["stopped", "failed", "paused"])
def test_the_default_status_is_active(status: str) -> None:
    other = runtime(status=status)

    assert RuntimeFilter()(runtime())
    assert not RuntimeFilter()(other)
    assert RuntimeFilter(status=status)(other)
    assert RuntimeFilter(status=None)(other)
    assert RuntimeFilter(status=None)(runtime())


def test_a_kind_can_be_unknown_to_the_contract() -> None:
    assert RuntimeFilter(kind="browser")(runtime())
    assert RuntimeFilter(kind=RuntimeKind.BROWSER)(runtime())
    assert RuntimeFilter(kind="hologram")(runtime(kind="hologram"))
    assert not RuntimeFilter(kind="desktop")(runtime())


def test_all_conditions_must_hold() -> None:
    both = RuntimeFilter(kind="browser", older_than=3600)

    assert both.matches(runtime(), NOW)
    assert not both.matches(runtime(kind="desktop"), NOW)
    assert not both.matches(runtime(created_at="2026-01-01T11:30:00Z"), NOW)


@pytest.mark.parametrize(
    ("older_than", "matches"),
    [(7199, True), (7200, False), (0.5, True), (timedelta(hours=1), True), (timedelta(1), False)],
)
def test_older_is_strictly_older(older_than: float | timedelta, *, matches: bool) -> None:
    assert RuntimeFilter(older_than=older_than).matches(runtime(), NOW) is matches


def test_age_is_measured_by_the_clock_of_this_machine() -> None:
    old = RuntimeFilter(older_than=60)

    assert old(runtime())
    assert not old(runtime(created_at=datetime.now(UTC).isoformat()))


@pytest.mark.parametrize(
    "created_at",
    [
        "",
        "whenever",
        "1712010100000",  # Milliseconds, which Python reads as a day in 1712.
        "20200101T000000Z",
        "2020-01-01",
        "2020-01-01T00:00:00",  # Of which zone?
        "2020-13-01T00:00:00Z",
        "Wed, 01 Jan 2020 00:00:00 GMT",
    ],
)
def test_a_time_that_cannot_be_read_matches_no_age(created_at: str) -> None:
    """The contract gives `createdAt` no format: a conforming server sends any text."""
    assert not RuntimeFilter(older_than=1).matches(runtime(created_at=created_at), NOW)
    assert RuntimeFilter().matches(runtime(created_at=created_at), NOW)


@pytest.mark.parametrize("created_at", ["2026-01-01T10:00:00+00:00", "2026-01-01 05:00:00-05:00"])
def test_an_offset_is_taken_into_account(created_at: str) -> None:
    assert RuntimeFilter(older_than=7199).matches(runtime(created_at=created_at), NOW)
    assert not RuntimeFilter(older_than=7201).matches(runtime(created_at=created_at), NOW)


@given(st.text() | st.datetimes().map(str) | st.datetimes(timezones=st.timezones()).map(str))
def test_no_text_raises(created_at: str) -> None:
    RuntimeFilter(older_than=1).matches(runtime(created_at=created_at), NOW)


@pytest.mark.parametrize(
    "older_than", [0, -1, True, float("nan"), float("inf"), "2h", timedelta(0), timedelta(-1)]
)
def test_an_invalid_age_is_rejected(older_than: object) -> None:
    with pytest.raises(BctrlConfigError, match=r"^invalid older_than ") as caught:
        RuntimeFilter(older_than=older_than)  # type: ignore[arg-type]  # on purpose

    assert caught.value.argument == "older_than"


def of_kind(kind: str) -> Callable[[Runtime], bool]:
    return lambda runtime: runtime.kind == kind


def test_the_origin_of_a_list_is_the_same_for_the_same_condition() -> None:
    hour = RuntimeFilter(older_than=timedelta(hours=1))
    assert list_origin("ws", hour) == list_origin("ws", RuntimeFilter(older_than=3600.0))
    assert list_origin("ws", of_kind("browser")) == list_origin("ws", of_kind("browser"))
    assert list_origin("ws", RuntimeFilter(status=None)) == "list of ws: all"


def test_the_origin_of_a_list_tells_its_condition_from_any_other() -> None:
    """Fault: a run with another function of the same name completed a journal."""
    conditions = [
        None,
        RuntimeFilter(),
        RuntimeFilter(kind="browser"),
        RuntimeFilter(older_than=1234567),
        RuntimeFilter(older_than=1234568),
        of_kind("browser"),
        of_kind("desktop"),
        lambda runtime: runtime.alias == "a",
        lambda runtime, alias="a": runtime.alias == alias,
        lambda runtime, alias="b": runtime.alias == alias,
        partial(RuntimeFilter.matches, now=NOW),
    ]
    origins = {list_origin(workspace, where) for where in conditions for workspace in "ab"}
    assert len(origins) == 2 * len(conditions)
