"""The input of a bulk stop: its iterables and its targets."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter, UserList
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sized
from typing import cast
from uuid import UUID

import pytest
from support.helpers import Bulk, await_batch, read_all, until

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RuntimeRef,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async.bulk._input import Target, Targets
from bctrl_async.emulator import Emulator, Reply

PAIRS = [("ws-1", "a"), ("ws-1", "b"), ("ws-1", "c")]
REFS = [RuntimeRef(*pair) for pair in PAIRS]
WORKSPACE = UUID("0190b5f0-0000-7000-8000-000000000001")
STOPPED, INVALID = StopResult.STOPPED, StopResult.INVALID


@pytest.fixture(autouse=True)
def _runtimes(emulator: Emulator) -> None:
    for name in ("a", "b", "c"):
        emulator.add_runtime("ws-1", name)
    emulator.add_runtime(str(WORKSPACE), "a")


def untyped(*items: object) -> Targets:
    """Return items of any type, as an untyped program passes them."""
    return cast("Targets", list(items))


async def stop_all(bulk: Bulk, targets: Targets) -> list[StopOutcome]:
    """Stop the targets, and return the outcomes in the order of the input."""
    outcomes: list[StopOutcome] = []
    batch = bulk.session.stop_runtimes(targets, on_outcome=outcomes.append)
    assert batch.total == (len(targets) if isinstance(targets, Sized) else None)
    assert batch.read == 0
    report = await batch
    assert report.counts == Counter(outcome.result for outcome in outcomes)
    # The end of an input without a length shows how many there were.
    assert batch.total == report.total == len(outcomes)
    outcomes.sort(key=lambda outcome: outcome.index)
    assert [outcome.index for outcome in outcomes] == list(range(len(outcomes)))
    return outcomes


async def async_generator() -> AsyncIterator[Target]:
    for pair in PAIRS:
        await asyncio.sleep(0)
        yield pair


class SizedStream:
    """An async iterable with a length."""

    def __len__(self) -> int:
        return len(PAIRS)

    def __aiter__(self) -> AsyncIterator[Target]:
        return async_generator()


INPUTS: dict[str, Callable[[], Targets]] = {
    "a list": PAIRS.copy,
    "a zip": lambda: zip(["ws-1"] * 3, "abc", strict=True),
    "an async generator": async_generator,
    "an async iterable with a length": SizedStream,
}


@pytest.mark.parametrize("case", INPUTS)
async def test_every_target_is_stopped_once_from(bulk: Bulk, case: str) -> None:
    outcomes = await stop_all(bulk, INPUTS[case]())

    assert [outcome.result for outcome in outcomes] == [STOPPED] * 3
    assert [outcome.target.alias for outcome in outcomes] == ["a", "b", "c"]
    assert Counter(outcome.target for outcome in outcomes) == bulk.emulator.received


async def test_an_empty_input_has_no_outcomes_and_is_ok(bulk: Bulk) -> None:
    report = await bulk.session.stop_runtimes([])

    assert (report.ok, report.total, report.counts) == (True, 0, Counter())


async def test_what_a_list_of_a_workspace_gives_can_be_stopped(bulk: Bulk) -> None:
    listed = await bulk.session.list_runtimes("ws-1")
    outcomes = await stop_all(bulk, listed)

    assert [outcome.result for outcome in outcomes] == [STOPPED] * len(listed)
    assert [outcome.target.alias for outcome in outcomes] == [
        runtime.alias for runtime in listed
    ]


VALID_TARGETS: dict[str, tuple[object, str]] = {
    "a tuple": (("ws-1", "a"), "ws-1"),
    "a ref": (RuntimeRef("ws-1", "a"), "ws-1"),
    "a UserList": (UserList(("ws-1", "a")), "ws-1"),
    "values of a dict": ({"workspace": "ws-1", "alias": "a"}.values(), "ws-1"),
    "a tuple with a UUID": ((WORKSPACE, "a"), str(WORKSPACE)),
}


@pytest.mark.parametrize(
    ("item", "workspace_id"), VALID_TARGETS.values(), ids=VALID_TARGETS
)
async def test_any_pair_of_texts_is_a_target(
    bulk: Bulk, item: object, workspace_id: str
) -> None:
    (outcome,) = await stop_all(bulk, untyped(item))

    assert outcome.target == RuntimeRef(workspace_id, "a")
    assert type(outcome.target) is RuntimeRef
    assert {type(text) for text in outcome.target} == {str}
    assert (outcome.result, outcome.attempts, outcome.error) == (STOPPED, 1, None)
    assert outcome.runtime is not None
    assert outcome.elapsed > 0
    assert bulk.emulator.received == {(workspace_id, "a"): 1}


SINGLE = "a single target. Pass a list, such as [('ws-1', 'crm')]"


class TestInvalidInput:
    @pytest.mark.parametrize(
        ("given", "kind"),
        [
            ("ws-1", "str"),
            ({"ws-1": "a"}, "dict"),
            (async_generator, "function"),
            (("ws-1", "a"), SINGLE),
            ((UUID(int=1), "a"), SINGLE),
            (RuntimeRef("ws-1", "a"), SINGLE),
        ],
    )
    def test_what_is_not_iterable_is_rejected_at_once(
        self, given: object, kind: str
    ) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            BctrlSession("key").stop_runtimes(cast("Targets", given))

        assert caught.value.argument == "targets"
        assert str(caught.value) == (
            "invalid targets: expected an iterable or async iterable of (workspace id, "
            f"alias), not {kind}"
        )

    @pytest.mark.parametrize("first", [None, {"ws-1": "a"}, ("ws-1", "a", "b"), b"ab"])
    async def test_a_first_item_of_another_type_is_an_error(
        self, bulk: Bulk, first: object
    ) -> None:
        batch = bulk.session.stop_runtimes(untyped(first, ("ws-1", "b")))
        with pytest.raises(BctrlConfigError) as caught:
            await batch

        assert str(caught.value) == (
            "invalid targets: expected an iterable or async iterable of (workspace id, "
            f"alias); the first item is {first!r}. Pass pairs, such as [('ws-1', "
            "'crm')]; nothing was stopped"
        )
        assert bulk.emulator.requests == []
        assert not batch.report.ok
        assert batch.report.total == batch.report.counts.total() == 2


class Unprintable:
    def __repr__(self) -> str:
        raise LookupError


class Detached(UserList[str]):
    """A lazily loaded row of a database that is gone."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self._error = error

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[str]:
        raise self._error("detached")


NO_TARGETS: list[tuple[object, RuntimeRef, str]] = [
    # The item, the target of its outcome, and the start of its error.
    (3, RuntimeRef("", "3"), "invalid target 3: expected (workspace id, alias)"),
    ("ab", RuntimeRef("", "ab"), "invalid target 'ab'"),
    (b"ab", RuntimeRef("", "b'ab'"), "invalid target b'ab'"),
    ({"b", "a"}, RuntimeRef("", "{'a', 'b'}"), "invalid target {'a', 'b'}"),
    (
        {"b": 1, "a": 2},
        RuntimeRef("", "{'a': 2, 'b': 1}"),
        "invalid target {'a': 2, 'b': 1}",
    ),
    (
        ("ws", "a", "b"),
        RuntimeRef("", "('ws', 'a', 'b')"),
        "invalid target ('ws', 'a', 'b')",
    ),
    ((1, "a"), RuntimeRef("1", "a"), "invalid target (1, 'a')"),
    (
        ("ws", UUID(int=5)),
        RuntimeRef("ws", str(UUID(int=5))),
        "invalid target ('ws', UUID(",
    ),
    (
        ("", "a"),
        RuntimeRef("", "a"),
        "stop of 'a' in workspace '': workspace id is empty",
    ),
    (
        ("ws", ".."),
        RuntimeRef("ws", ".."),
        "stop of '..' in workspace 'ws': alias '..' could be",
    ),
    (
        ("ws", "\ud800"),
        RuntimeRef("ws", "\ud800"),
        r"stop of '\ud800' in workspace 'ws': alias",
    ),
]


class TestInvalidTarget:
    async def invalid(self, bulk: Bulk, item: object) -> tuple[StopOutcome, str]:
        """Stop two targets with an item between them; return its outcome and error."""
        first, outcome, last = await stop_all(
            bulk, untyped(("ws-1", "a"), item, ("ws-1", "b"))
        )
        # A crashed worker warns when it is collected, so collect it in this test.
        gc.collect()

        assert (outcome.result, outcome.attempts, outcome.runtime) == (INVALID, 0, None)
        assert type(outcome.error) is BctrlConfigError
        assert (first.result, last.result) == (STOPPED, STOPPED)
        assert bulk.emulator.received == {("ws-1", "a"): 1, ("ws-1", "b"): 1}
        return outcome, str(outcome.error)

    @pytest.mark.parametrize(
        ("item", "target", "text"), NO_TARGETS, ids=[row[2] for row in NO_TARGETS]
    )
    async def test_it_is_invalid_and_the_others_are_stopped(
        self, bulk: Bulk, item: object, target: RuntimeRef, text: str
    ) -> None:
        outcome, error = await self.invalid(bulk, item)

        assert error.startswith(text)
        assert outcome.target == target

    @pytest.mark.parametrize(
        "item",
        [
            iter(("ws-1", "a")),
            Unprintable(),
            Detached(LookupError),
            Detached(asyncio.CancelledError),
            ("ws-1", Detached(LookupError)),
            list(range(10**5)),
            ("ws-1", ["x" * 10**6]),
        ],
        ids=lambda item: type(item).__name__,
    )
    async def test_it_may_be_large_or_fail_when_it_is_read(
        self, bulk: Bulk, item: object
    ) -> None:
        outcome, error = await self.invalid(bulk, item)

        assert len(error) < 200
        assert len(str(outcome.target)) < 200

    async def test_the_text_of_a_value_error_is_the_reason(self, bulk: Bulk) -> None:
        error = ValueError("row 7 has one column")
        # It may be the first item.
        (outcome,) = await stop_all(bulk, untyped(error))

        assert str(outcome.error) == (
            "invalid target ValueError('row 7 has one column'): row 7 has one column"
        )
        assert outcome.error is not None
        assert outcome.error.__cause__ is error


class InputError(Exception):
    """Raised by an input of these tests."""


def failing(error: BaseException) -> Iterator[Target]:
    yield from PAIRS
    raise error


async def failing_async(error: BaseException) -> AsyncIterator[Target]:
    for pair in PAIRS:
        yield pair
    raise error


class TestFailedInput:
    @pytest.mark.parametrize("make", [failing, failing_async])
    # `Task.result` of a cancelled task raises CancelledError, and `athrow` may raise
    # GeneratorExit.
    @pytest.mark.parametrize(
        "error", [InputError("row 4"), asyncio.CancelledError(), GeneratorExit()]
    )
    @pytest.mark.parametrize("run", [await_batch, read_all])
    async def test_its_error_is_raised_after_the_outcomes_of_the_targets_read(
        self,
        bulk: Bulk,
        make: Callable[[BaseException], Targets],
        error: BaseException,
        run: Callable[[StopBatch], Coroutine[object, object, None]],
    ) -> None:
        stopped: list[RuntimeRef] = []
        batch = bulk.session.stop_runtimes(
            make(error), on_outcome=lambda outcome: stopped.append(outcome.target)
        )
        with pytest.raises((InputError, BctrlError)) as caught:
            await run(batch)

        if isinstance(error, InputError):
            assert caught.value is error
        else:
            assert caught.value.__cause__ is error
            assert str(caught.value) == f"the input raised {type(error).__name__}"
        assert (
            str(batch.report.ended_early) == f"the input raised {type(error).__name__}"
        )
        assert sorted(stopped) == REFS
        assert batch.report.counts == {STOPPED: 3}
        assert (batch.report.total, batch.report.failures, batch.report.ok) == (
            3,
            (),
            False,
        )

    async def test_it_is_not_read_again(self, bulk: Bulk) -> None:
        results: Iterator[Target | InputError] = iter(
            [PAIRS[0], InputError(), PAIRS[1]]
        )

        def read() -> Target:
            result = next(results)
            if isinstance(result, InputError):
                raise result
            return result

        with pytest.raises(InputError):
            await bulk.session.stop_runtimes(iter(read, None), concurrency=3)

        assert bulk.emulator.received == {PAIRS[0]: 1}

    def test_an_error_of_iter_is_raised_at_once(self) -> None:
        class Broken:
            def __iter__(self) -> Iterator[Target]:
                raise InputError("no cursor")

        with pytest.raises(InputError, match="no cursor"):
            BctrlSession("key").stop_runtimes(Broken())


async def test_a_slow_generator_holds_up_neither_requests_nor_an_end(
    bulk: Bulk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a hundred items were read before a request, whatever the deadline."""
    monkeypatch.setattr("bctrl_async.bulk._input._MAX_BLOCKING", -1.0)

    def cursor() -> Iterator[Target]:
        while not bulk.emulator.requests:
            yield PAIRS[0]
        asyncio.get_running_loop().call_soon(batch.stop_reading)
        yield PAIRS[1]
        raise AssertionError

    batch = bulk.session.stop_runtimes(cursor(), concurrency=100)
    assert (await batch).total < 100


@pytest.mark.parametrize("concurrency", [1, 100])
@pytest.mark.parametrize("status", [429, 503])
async def test_a_throttled_stop_is_retried_while_an_input_has_no_next_item(
    bulk: Bulk, status: int, concurrency: int
) -> None:
    """Fault: its worker waited for the next item of a queue."""
    bulk.emulator.inject(Reply(status))

    async def queue() -> AsyncIterator[Target]:
        yield PAIRS[0]
        await until(lambda: len(bulk.emulator.requests) == 2)

    report = await bulk.session.stop_runtimes(queue(), concurrency=concurrency)
    assert report.counts == {STOPPED: 1}


async def test_a_list_that_is_read_no_further_is_let_go(session: BctrlSession) -> None:
    ended = []

    class Lines(UserList[RuntimeRef]):
        def __iter__(self) -> Iterator[RuntimeRef]:
            try:
                yield from self.data
            finally:
                ended.append(True)

    batch = session.stop_runtimes(Lines(REFS))
    batch.stop_reading()
    await batch
    assert ended == [True]
