"""Runtimes that take their time to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.helpers import pass_time
from support.wire import GET, LIST, ask, path_of

from bctrl_async.emulator import Emulator, Fault, Reply

HOUR = 3600.0
"""The time of a stop: no machine is so slow that a test could take half of it."""
CRM = ("ws-1", "crm")


@pytest.fixture
async def slow() -> AsyncIterator[Emulator]:
    async with Emulator(port=0, stop_takes=HOUR) as emulator:
        for alias in ("crm", "mail", "web"):
            emulator.add_runtime("ws-1", alias)
        yield emulator


async def pass_and_settle(seconds: float) -> None:
    """Let time pass, and the timers that are due then fire."""
    pass_time(seconds)
    await asyncio.sleep(0.001)


async def test_a_runtime_is_active_until_its_stop_has_taken_its_time(
    slow: Emulator,
) -> None:
    stopped = await ask(slow)
    read, listed = await ask(slow, GET, "GET"), await ask(slow, LIST, "GET")

    assert (stopped.status, stopped.json["status"]) == (200, "active")
    assert stopped.json == read.json
    assert read.json in listed.json["runtimes"]  # type: ignore[operator]
    assert slow.status(*CRM) == "active"
    assert slow.ending == [CRM]

    # A second stop is accepted as well, and does not move the end.
    await pass_and_settle(HOUR / 2)
    again = await ask(slow)
    assert (again.status, again.json) == (200, stopped.json)
    await pass_and_settle(HOUR / 2)

    ended = await ask(slow, GET, "GET")
    assert ended.json["status"] == slow.status(*CRM) == "stopped"
    assert slow.runtimes[CRM]["summary"]["browserRunning"] is False
    assert slow.ending == []
    assert (await ask(slow)).status == 409
    assert slow.status("ws-1", "mail") == "active"


async def test_a_runtime_can_take_a_time_of_its_own(slow: Emulator) -> None:
    slow.add_runtime("ws-1", "quick", stop_takes=0)
    async with Emulator(port=0) as emulator:
        emulator.add_runtime("ws-1", "crm", stop_takes=HOUR)
        answers = [await ask(slow, path_of("ws-1", "quick")), await ask(emulator)]

    assert [answer.json["status"] for answer in answers] == ["stopped", "active"]
    # It takes its time no more once the emulator is closed.
    await pass_and_settle(HOUR)
    assert (emulator.status(*CRM), emulator.ending) == ("active", [CRM])


async def test_a_runtime_that_replaces_an_ending_runtime_has_a_stop_of_its_own(
    slow: Emulator,
) -> None:
    await ask(slow)
    slow.add_runtime(*CRM)
    assert slow.ending == []
    await pass_and_settle(HOUR / 2)
    await ask(slow)
    await pass_and_settle(HOUR / 2)
    # The time of the first stop is up.
    assert (slow.status(*CRM), slow.ending) == ("active", [CRM])
    await pass_and_settle(HOUR / 2)
    assert slow.status(*CRM) == "stopped"


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault.DROP_AFTER, "stopped"),
        (Fault.ACCEPTED, "stopped"),
        (Reply(502, takes_effect=True), "stopped"),
        (Fault.DROP_BEFORE, "active"),
        (Reply(200, takes_effect=False), "active"),
    ],
)
async def test_a_stop_whose_answer_is_faulty_takes_its_time_if_it_has_an_effect(
    slow: Emulator, fault: Fault | Reply, status: str
) -> None:
    slow.inject(fault)
    try:
        await ask(slow)
    except asyncio.IncompleteReadError:
        assert fault in {Fault.DROP_AFTER, Fault.DROP_BEFORE}
    assert slow.status(*CRM) == "active"
    await pass_and_settle(HOUR)
    assert slow.status(*CRM) == status


async def test_a_runtime_that_fails_ends_at_once_and_stays_failed(
    slow: Emulator,
) -> None:
    await ask(slow)
    slow.inject(Fault.FAILED)
    assert (await ask(slow)).json["status"] == slow.status(*CRM) == "failed"
    assert slow.ending == []
    await pass_and_settle(HOUR)
    assert slow.status(*CRM) == "failed"


async def test_a_runtime_that_is_ending_is_neither_stopped_nor_left_alone(
    slow: Emulator,
) -> None:
    await ask(slow)
    line = "{} 'crm' in 'ws-1': active, ending; answered 200"
    with pytest.raises(AssertionError) as caught:
        slow.assert_stopped(*CRM)
    assert line.format("-") in str(caught.value)
    with pytest.raises(AssertionError) as caught:
        slow.assert_not_stopped(*CRM)
    assert line.format("+") in str(caught.value)
    slow.assert_not_stopped("ws-1", "mail", "web")

    await pass_and_settle(HOUR)
    slow.assert_stopped(*CRM, only=True)
