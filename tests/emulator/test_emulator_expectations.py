"""`Emulator.assert_stopped` and `Emulator.assert_not_stopped`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import cast

import pytest

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator, Fault, Reply


@pytest.fixture(autouse=True)
def _runtimes(emulator: Emulator) -> None:
    for alias in ("mail", "web", "note"):
        emulator.add_runtime("ws-1", alias)


def difference(check: Callable[..., None], *args: str, only: bool = False) -> str:
    """Return the message of a check that must fail."""
    with pytest.raises(AssertionError) as caught:
        check(*args, **{"only": True} if only else {})
    return str(caught.value)


async def stop(session: BctrlSession, *targets: str) -> None:
    pairs = [cast("tuple[str, str]", text.split("/")) for text in targets]
    # One after the other, so that they are received in order.
    await session.stop_runtimes(pairs, concurrency=1, verify=False)


async def test_stopped_runtimes_are_as_expected(emulator: Emulator, session: BctrlSession) -> None:
    emulator.inject(Fault.DROP_AFTER, alias="crm")
    await stop(session, "ws-1/crm", "ws-1/mail")
    emulator.assert_stopped("ws-1", "crm", "mail")
    emulator.assert_stopped("ws-1", "crm", "mail", only=True)
    emulator.assert_stopped("ws-1", "mail", "mail")
    emulator.assert_not_stopped("ws-1", "web", "note")


async def test_a_difference_has_a_line_for_each_runtime(
    emulator: Emulator, session: BctrlSession, pauses: list[float]
) -> None:
    emulator.inject(Fault.RATE_LIMITED, alias="crm")
    emulator.poison("ws-1", "mail", Fault.SERVER_ERROR)
    await stop(session, "ws-1/crm", "ws-1/mail", "ws-1/webb", "ws-2/nota")
    assert pauses
    message = difference(emulator.assert_stopped, "ws-1", "crm", "mail", "web", "web", "nope")
    assert message == textwrap.dedent("""\
        the stops are not as expected:
          - 'mail' in 'ws-1': active; answered 500 (server_error) 4 times
          - 'web' in 'ws-1': active; no stop received
          - 'nope' in 'ws-1': never added; no stop received
          + 'webb' in 'ws-1': never added; answered 404
          + 'nota' in 'ws-2': never added; answered 404""")


async def test_with_only_a_stop_of_another_runtime_is_a_difference_whatever_its_answer(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.inject(Reply(403), alias="mail")
    await stop(session, "ws-1/crm", "ws-1/mail")
    emulator.assert_stopped("ws-1", "crm")
    assert difference(emulator.assert_stopped, "ws-1", "crm", only=True) == textwrap.dedent("""\
        the stops are not as expected:
          + 'mail' in 'ws-1': active; answered 403 (a Reply)""")


@pytest.mark.parametrize(
    ("answer", "described", "took_effect"),
    [
        (Fault.FAILED, "failed; answered 200 (failed)", True),
        (Reply(200, takes_effect=False), "active; answered 200 (a Reply)", False),
        (Fault.DROP_BEFORE, "active; answered not at all (drop_before) 4 times", False),
    ],
    ids=["failed", "without effect", "dropped"],
)
async def test_only_a_runtime_that_says_so_is_stopped(
    emulator: Emulator,
    session: BctrlSession,
    answer: Fault | Reply,
    *,
    described: str,
    took_effect: bool,
) -> None:
    emulator.poison("ws-1", "crm", answer)
    await stop(session, "ws-1/crm")
    assert described in difference(emulator.assert_stopped, "ws-1", "crm")
    if took_effect:
        assert described in difference(emulator.assert_not_stopped, "ws-1", "crm")
    else:
        emulator.assert_not_stopped("ws-1", "crm")


async def test_a_runtime_that_was_never_running_must_still_receive_a_stop(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.add_runtime("ws-1", "old", status="stopped")
    assert "stopped; no stop received" in difference(emulator.assert_stopped, "ws-1", "old")
    await stop(session, "ws-1/old")
    emulator.assert_stopped("ws-1", "old")
    # It had stopped before.
    emulator.assert_not_stopped("ws-1", "old")


async def test_a_runtime_that_is_added_again_is_active_and_can_be_stopped_again(
    emulator: Emulator, session: BctrlSession
) -> None:
    await stop(session, "ws-1/crm")
    emulator.add_runtime("ws-1", "crm")
    emulator.assert_not_stopped("ws-1", "crm")
    assert "active; answered 200" in difference(emulator.assert_stopped, "ws-1", "crm")
    await stop(session, "ws-1/crm")
    emulator.assert_stopped("ws-1", "crm")


async def test_a_runtime_that_must_not_be_stopped_must_be_there(
    emulator: Emulator, session: BctrlSession
) -> None:
    await stop(session, "ws-1/crm")
    message = difference(emulator.assert_not_stopped, "ws-1", "crm", "mial", "web")
    assert message == textwrap.dedent("""\
        the stops are not as expected:
          + 'crm' in 'ws-1': stopped; answered 200
          + 'mial' in 'ws-1': never added; no stop received""")


def test_a_long_difference_is_cut_and_names_are_shown_as_python_would(emulator: Emulator) -> None:
    aliases = ["\x1b[2J", *(f"a{number}" for number in range(99))]
    lines = difference(emulator.assert_stopped, "ws-1", *aliases).splitlines()
    assert lines[1] == r"  - '\x1b[2J' in 'ws-1': never added; no stop received"
    assert len(lines) == 22
    assert lines[-1] == "  - and 80 more"


@pytest.mark.parametrize("name", ["assert_stopped", "assert_not_stopped"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("ws-1",), "no alias is given: name the runtimes"),
        (("ws-1", ["crm"]), r"alias is \['crm'\]: give str, not list"),
        ((("ws-1", "crm"), "crm"), r"workspace_id is \('ws-1', 'crm'\): give str, not tuple"),
    ],
    ids=["none", "a list", "a target"],
)
def test_a_wrong_argument_is_an_error_with_advice(
    emulator: Emulator, name: str, args: tuple[object, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(emulator, name)(*args)


@pytest.mark.parametrize("name", ["assert_stopped", "assert_not_stopped"])
def test_the_traceback_ends_in_the_test(emulator: Emulator, name: str) -> None:
    with pytest.raises(AssertionError) as caught:
        getattr(emulator, name)("ws-1", "nope")
    assert [entry.ishidden(caught) for entry in caught.traceback] == [False, True]
