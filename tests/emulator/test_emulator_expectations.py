"""`Emulator.assert_stopped` and `Emulator.assert_not_stopped`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator, Fault, Reply


@pytest.fixture(autouse=True)
def _runtimes(emulator: Emulator) -> None:
    for alias in ("mail", "web", "note"):
        emulator.add_runtime("ws-1", alias)
    emulator.add_runtime("ws-1", "old", status="stopped")


def difference(check: Callable[..., None], *aliases: str, **only: bool) -> list[str]:
    """Return the lines of a check of runtimes in `ws-1` that must fail."""
    with pytest.raises(AssertionError) as caught:
        check("ws-1", *aliases, **only)
    first, *lines = str(caught.value).splitlines()
    assert first == "the stops are not as expected:"
    return [line.removeprefix("  ") for line in lines]


async def stop(session: BctrlSession, *targets: str) -> None:
    pairs = [
        (workspace_id, alias) for workspace_id, alias in (t.split("/") for t in targets)
    ]
    # One after the other, so that they are received in order.
    await session.stop_runtimes(pairs, concurrency=1, verify=False)


async def test_stopped_runtimes_are_as_expected(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.inject(Fault.DROP_AFTER, alias="crm")
    await stop(session, "ws-1/crm", "ws-1/mail")
    emulator.assert_stopped("ws-1", "mail", "mail")
    emulator.assert_stopped("ws-1", "crm", "mail", only=True)
    emulator.assert_not_stopped("ws-1", "web", "note")


@pytest.mark.usefixtures("pauses")
async def test_a_difference_has_a_line_for_each_runtime(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.inject(Fault.RATE_LIMITED, alias="crm")
    emulator.poison("ws-1", "mail", Fault.DROP_BEFORE)
    emulator.inject(Reply(200, takes_effect=False), alias="web")
    emulator.inject(Fault.FAILED, alias="note")
    await stop(
        session, *(f"ws-1/{alias}" for alias in ("crm", "mail", "web", "note", "webb"))
    )
    await stop(session, "ws-2/nota")

    aliases = ["crm", "mail", "web", "note", "old", "nope"]
    assert difference(emulator.assert_stopped, *aliases, *aliases, only=True) == [
        "- 'mail' in 'ws-1': active; answered not at all (drop_before) 4 times",
        "- 'web' in 'ws-1': active; answered 200 (a Reply)",
        "- 'note' in 'ws-1': failed; answered 200 (failed)",
        "- 'old' in 'ws-1': stopped; no stop received",
        "- 'nope' in 'ws-1': never added; no stop received",
        "+ 'webb' in 'ws-1': never added; answered 404",
        "+ 'nota' in 'ws-2': never added; answered 404",
    ]
    assert difference(emulator.assert_not_stopped, *aliases) == [
        "+ 'crm' in 'ws-1': stopped; answered 429 (rate_limited), 200",
        "+ 'note' in 'ws-1': failed; answered 200 (failed)",
        "+ 'nope' in 'ws-1': never added; no stop received",
    ]


async def test_with_only_a_stop_of_another_runtime_is_a_difference_whatever_its_answer(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.inject(Reply(403), alias="mail")
    await stop(session, "ws-1/crm", "ws-1/mail", "ws-1/old")
    emulator.assert_stopped("ws-1", "crm", "old")
    # It had stopped before.
    emulator.assert_not_stopped("ws-1", "old")
    assert difference(emulator.assert_stopped, "crm", "old", only=True) == [
        "+ 'mail' in 'ws-1': active; answered 403 (a Reply)"
    ]


async def test_a_runtime_that_is_added_again_is_active_and_can_be_stopped_again(
    emulator: Emulator, session: BctrlSession
) -> None:
    await stop(session, "ws-1/crm")
    emulator.add_runtime("ws-1", "crm")
    emulator.assert_not_stopped("ws-1", "crm")
    [line] = difference(emulator.assert_stopped, "crm")
    assert line == "- 'crm' in 'ws-1': active; answered 200"
    await stop(session, "ws-1/crm")
    emulator.assert_stopped("ws-1", "crm")


def test_a_long_difference_is_cut_and_names_are_shown_as_python_would(
    emulator: Emulator,
) -> None:
    aliases = ["\x1b[2J", *(f"a{number}" for number in range(99))]
    lines = difference(emulator.assert_stopped, *aliases)
    assert lines[0] == r"- '\x1b[2J' in 'ws-1': never added; no stop received"
    assert (len(lines), lines[-1]) == (21, "- and 80 more")


@pytest.mark.parametrize("name", ["assert_stopped", "assert_not_stopped"])
def test_the_traceback_ends_in_the_test(emulator: Emulator, name: str) -> None:
    with pytest.raises(AssertionError) as caught:
        getattr(emulator, name)("ws-1", "nope")
    assert [entry.ishidden(caught) for entry in caught.traceback] == [False, True]
