"""Lists of any length and content: the memory and the turns that they take."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable

import pytest
from support.helpers import counted_turns
from support.runtimes import WIRE, wire
from support.servers import answering, http_answer, served

from bctrl_async import BctrlResponseError, Runtime
from bctrl_async._http.lists import parse_runtimes
from bctrl_async._http.response import (
    DECODE_ERRORS,
    decode_runtime,
    unreadable,
    with_body,
)
from bctrl_async._kinds import Failure, Kind

MIB = 1024 * 1024
Listed = list[Runtime | BctrlResponseError] | BctrlResponseError


def hostile_body(begin: bytes, item: bytes, end: bytes, size: int = 2 * MIB) -> bytes:
    return begin + item * (size // len(item)) + end


Parts = tuple[bytes, bytes, bytes]
NUMBERS = (b'{"runtimes":[', b"0,", b"0]}")
HOSTILE = {
    "numbers": NUMBERS,
    "objects": (b'{"runtimes":[', b"{},", b"{}]}"),
    "nesting": (b'{"runtimes":[', b"[", b""),
    "one item": (b'{"runtimes":[{"a":[', b"{},", b"{}]}]}"),
    "backslashes": (b'{"runtimes":["', b"\\\\", b'"]}'),
    "unfinished string": (b'{"runtimes":["', b"a", b""),
    "fields": (b'{"runtimes":[{', b'"id":{},', b'"id":0}]}'),
    "beside the list": (b'{"runtimes":[],"a":[', b"{},", b"{}]}"),
    "no object": (b"[", b"{},", b"{}]"),
}
"""Bodies of a repeated item, beside which nothing can be read."""


def parse_in_turns(body: bytes) -> tuple[Listed, int]:
    """Return the list, and the number of turns that it took."""
    turns, count = parse_runtimes(body), 1
    try:
        while True:
            turns.send(None)
            count += 1
    except StopIteration as finished:
        parsed: Listed = finished.value
        return parsed, count
    except DECODE_ERRORS as error:
        problem = unreadable(200, "the body", "list of runtimes", error).error()
        assert isinstance(problem, BctrlResponseError)
        return problem, count


def parse(items: list[object]) -> Listed:
    return parse_in_turns(json.dumps({"runtimes": items}).encode())[0]


def peak_of(parse: Callable[[], object]) -> int:
    """Return the most bytes that were allocated at a time."""
    tracemalloc.start()
    try:
        parse()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class TestBounds:
    @pytest.mark.parametrize("parts", HOSTILE.values(), ids=HOSTILE)
    def test_a_hostile_list_takes_few_turns_and_little_memory(
        self, parts: Parts
    ) -> None:
        """Fault: 8 KB of gzip, `{"runtimes":[0,0,…]}`, took 4.1 GB and 27 s."""
        body = hostile_body(*parts)
        parsed, turns = parse_in_turns(body)

        assert turns <= 6
        errors = parsed if isinstance(parsed, list) else [parsed]
        assert len(errors) < 2
        assert not any(
            isinstance(item, Runtime) or len(str(item)) > 400 for item in errors
        )
        assert peak_of(lambda: parse_in_turns(body)) < 36 * len(body)

    def test_a_list_of_more_items_than_runtimes_fit_in_it_takes_no_memory(self) -> None:
        body = hostile_body(*NUMBERS, size=64 * MIB)
        error, _ = parse_in_turns(body)

        assert isinstance(error, BctrlResponseError)
        assert "it has more than 4,000,000 commas" in error.summary
        assert peak_of(lambda: parse_in_turns(body)) < MIB

    def test_a_list_of_more_halves_of_characters_than_texts_is_one_error(self) -> None:
        """Fault: 79 KB of gzip held the event loop for two seconds."""
        odd, halves = wire(driver="\ud800"), b'{"driver":"%b"}' % (b"\\ud800" * 40_000)
        few, _ = parse_in_turns(b'{"runtimes":[%b]}' % b",".join([odd, *[halves] * 2]))
        many, _ = parse_in_turns(
            b'{"runtimes":[%b]}' % b",".join([odd, *[halves] * 30])
        )

        assert isinstance(few, list)
        assert isinstance(few[0], Runtime)
        assert isinstance(many, BctrlResponseError)
        assert many.summary == "the server answered 200, but the body is not JSON"

    def test_a_long_list_in_another_encoding_is_one_error(self) -> None:
        body = json.dumps({"runtimes": [WIRE] * 1_000}).encode("utf-16")
        whole, _ = parse_in_turns(body)
        error, _ = parse_in_turns(
            json.dumps({"runtimes": [WIRE] * 4_000}).encode("utf-16")
        )

        assert isinstance(whole, list)
        assert isinstance(error, BctrlResponseError)

    async def test_it_may_have_64_mib_and_not_a_byte_more(self) -> None:
        longest = b'{"runtimes":[]}'.ljust(64 * MIB)
        whole, longer = (
            http_answer("200 OK", gzip.compress(body, 1), "Content-Encoding: gzip")
            for body in (longest, longest + b" ")
        )
        async with served(answering(whole, longer)) as session:
            assert await session.list_runtimes("ws-1") == []
            with pytest.raises(BctrlResponseError, match="has more than 64 MiB"):
                await session.list_runtimes("ws-1")

    def test_only_the_first_mib_of_a_blank_list_is_searched_for_a_page(self) -> None:
        """Fault: a blank body of 64 MiB was searched in one turn, for 0.2 s."""
        failure = Failure(kind=Kind.UNREADABLE, summary="it is not JSON", status=200)

        def kind(body: bytes) -> Kind:
            return with_body(failure, "", body, "Bearer k").kind

        assert kind(b" " * 2 * MIB + b"<") is Kind.UNREADABLE
        assert kind(b" " * (MIB - 1) + b"<") is Kind.PAGE

    def test_beside_a_hundred_invalid_runtimes_the_valid_ones_are_kept(self) -> None:
        parsed = parse([0, WIRE] * 100)

        assert isinstance(parsed, list)
        assert parsed[1::2] == [decode_runtime(wire())] * 100
        assert str(parsed[198]).startswith(
            "the server answered 200, but runtimes[198] is not a valid Runtime: "
        )

    def test_a_list_with_more_invalid_runtimes_is_one_error(self) -> None:
        error = parse([WIRE] + [0] * 101)

        assert isinstance(error, BctrlResponseError)
        assert error.summary == (
            "the server answered 200, but the body is not a valid list of runtimes: "
            "more than 100 runtimes in it are invalid; the last: Expected `object`, "
            "got `int`"
        )

    def test_a_runtime_of_more_than_256_kib_costs_only_itself(self) -> None:
        parsed = parse(
            [WIRE | {"driver": "d" * size} for size in (200_000, 400_000, 200_000)]
        )

        assert isinstance(parsed, list)
        first, error, last = parsed
        assert first == last == decode_runtime(wire(driver="d" * 200_000))
        assert isinstance(error, BctrlResponseError)
        assert (
            "runtimes[1] is not a valid Runtime: it has more than 256 KiB"
            in error.summary
        )
        assert error.alias == "crm"


def test_other_tasks_run_while_a_long_list_is_decoded() -> None:
    body = b'{"runtimes":[' + b",".join([wire()] * 10_000) + b"]}"

    listed, turns = parse_in_turns(body)

    assert isinstance(listed, list)
    assert len(listed) == 10_000
    assert turns > len(body) / (64 * 1024)


async def test_other_tasks_run_while_a_long_list_is_unpacked() -> None:
    body = gzip.compress(hostile_body(*NUMBERS, size=8 * MIB))
    async with served(http_answer("200 OK", body, "Content-Encoding: gzip")) as session:
        problem = pytest.raises(BctrlResponseError, match="more than 4,000,000 commas")
        with counted_turns() as turns, problem:
            await session.list_runtimes("ws-1", on_unreadable=repr)

    assert turns() > 8 * MIB / (512 * 1024)
