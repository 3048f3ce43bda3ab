"""Lists of any length and content: the memory and the turns of the event loop that they take."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from runtimes import WIRE, wire
from servers import http_answer, served

from bctrl_async import BctrlResponseError, RetryPolicy, Runtime
from bctrl_async._http import lists
from bctrl_async._http.response import DECODE_ERRORS, decode_runtime, unreadable, unusable

AUTHORIZATION = "Bearer a-key-that-must-not-be-shown"
MIB = 1024 * 1024
VALID = wire()
# Bodies of the given item, beside which nothing can be read.
HOSTILE = {
    "numbers": (b'{"runtimes":[', b"0,", b"0]}"),
    "objects": (b'{"runtimes":[', b"{},", b"{}]}"),
    "nesting": (b'{"runtimes":[', b"[", b""),
    "one item": (b'{"runtimes":[{"a":[', b"{},", b"{}]}]}"),
    "backslashes": (b'{"runtimes":["', b"\\\\", b'"]}'),
    "unfinished string": (b'{"runtimes":["', b"a", b""),
    "fields": (b'{"runtimes":[{', b'"id":{},', b'"id":0}]}'),
    "beside the list": (b'{"runtimes":[],"a":[', b"{},", b"{}]}"),
    "no object": (b"[", b"{},", b"{}]"),
}


def hostile_body(name: str, size: int) -> bytes:
    begin, item, end = HOSTILE[name]
    return begin + item * (size // len(item)) + end


def parse_in_slices(
    body: bytes,
) -> tuple[list[Runtime | BctrlResponseError] | BctrlResponseError, int]:
    """Return the list, and the number of slices that it took."""
    slices, count = lists.parse_runtimes(body), 1
    try:
        while True:
            slices.send(None)
            count += 1
    except StopIteration as finished:
        parsed: list[Runtime | BctrlResponseError] = finished.value
        return parsed, count
    except DECODE_ERRORS as error:
        return unreadable(200, "the body", "list of runtimes", error), count


def parse(body: bytes) -> list[Runtime | BctrlResponseError] | BctrlResponseError:
    return parse_in_slices(body)[0]


def runtime_of(fields: object) -> Runtime:
    return decode_runtime(json.dumps(fields).encode())


def parse_at_once(body: bytes) -> list[Runtime | None] | None:
    """Return the runtimes, None in place of an invalid one, or None if the body is not a list."""
    try:
        items = json.loads(body)["runtimes"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(items, list):
        return None
    runtimes: list[Runtime | None] = []
    for item in items:
        try:
            runtimes.append(runtime_of(item))
        except (msgspec.MsgspecError, ValueError):
            runtimes.append(None)
    return runtimes


class TestBounds:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_hostile_list_takes_few_turns_and_memory_in_proportion_to_its_bytes(
        self, name: str
    ) -> None:
        """Fault: 8 KB on the wire, `{"runtimes":[0,0,…]}` as gzip, took 4.1 GB and 27 s."""
        body = hostile_body(name, 2 * MIB)
        tracemalloc.start()
        try:
            parsed, slices = parse_in_slices(body)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert slices <= 6
        errors = parsed if isinstance(parsed, list) else [parsed]
        assert len(errors) < 2
        assert not any(isinstance(item, Runtime) or len(str(item)) > 400 for item in errors)
        assert peak < 36 * len(body)

    def test_a_list_of_more_items_than_runtimes_fit_in_it_takes_no_memory(self) -> None:
        body = hostile_body("numbers", 64 * MIB)
        tracemalloc.start()
        try:
            error = parse(body)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert isinstance(error, BctrlResponseError)
        assert "it has more than 4,000,000 commas" in error.summary
        assert peak < MIB

    def test_only_the_first_mib_of_a_blank_list_is_searched_for_a_page(self) -> None:
        """Fault: a blank body of 64 MiB was searched in one turn of the event loop, for 0.2 s."""
        error = BctrlResponseError("it is not JSON", status=200)

        assert unusable(error, "", b" " * 2 * MIB + b"<", AUTHORIZATION) is error
        assert unusable(error, "", b" " * (MIB - 1) + b"<", AUTHORIZATION) is not error

    def test_beside_a_hundred_invalid_runtimes_the_valid_ones_are_kept(self) -> None:
        items = [0, WIRE] * 100
        parsed = parse(json.dumps({"runtimes": items}).encode())

        assert isinstance(parsed, list)
        assert parsed[1::2] == [runtime_of(WIRE)] * 100
        assert [str(error)[:48] for error in parsed[::2]] == [
            f"the server answered 200, but runtimes[{number}] is not a valid"[:48]
            for number in range(0, 200, 2)
        ]

    def test_a_list_with_more_invalid_runtimes_is_one_error(self) -> None:
        error = parse(json.dumps({"runtimes": [WIRE] + [0] * 101}).encode())

        assert isinstance(error, BctrlResponseError)
        assert error.summary == (
            "the server answered 200, but the body is not a valid list of runtimes: more than 100 "
            "runtimes in it are invalid; the last: Expected `object`, got `int`"
        )

    def test_a_runtime_of_more_than_256_kib_costs_only_itself(self) -> None:
        large = {**WIRE, "driver": "d" * 200_000}
        items = [large, {**WIRE, "driver": "d" * 400_000}, large]

        parsed = parse(json.dumps({"runtimes": items}).encode())

        assert isinstance(parsed, list)
        first, error, last = parsed
        assert first == last == runtime_of(large)
        assert isinstance(error, BctrlResponseError)
        assert "runtimes[1] is not a valid Runtime: it has more than 256 KiB" in error.summary
        assert error.alias == "crm"


texts = st.text(st.characters(codec=None), max_size=8)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner),
    max_leaves=6,
)
runtimes = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(["alias", "driver", "kind", "status", "createdAt"], texts)
).map(lambda fields: WIRE | fields)
bodies = st.builds(
    lambda members, escapes, encoding: json.dumps(members, ensure_ascii=escapes).encode(
        encoding, "surrogatepass"
    ),
    st.fixed_dictionaries(
        {"runtimes": st.lists(runtimes | json_values, max_size=4) | json_values},
        optional={"next": json_values},
    )
    | json_values,
    st.booleans(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)


@given(bodies, st.integers(1, 9))
@example(b'{"runtimes": [12.5e3, -0, true], "runtimes": [{}]} ', 1)
def test_slices_of_any_size_give_the_same_list(body: bytes, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "_SLICE", size)
        parsed, _ = parse_in_slices(body)

    expected = parse_at_once(body)
    if isinstance(parsed, BctrlResponseError):
        assert expected is None
    else:
        assert [item if isinstance(item, Runtime) else None for item in parsed] == expected


async def list_on(
    answer: bytes, on_unreadable: Callable[[BctrlResponseError], object] | None = None
) -> tuple[list[Runtime] | BctrlResponseError, int]:
    """List a workspace; return the result, and how often another task ran meanwhile."""
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with served(answer, retry=RetryPolicy(attempts=1)) as session:
        counting = asyncio.create_task(count_turns())
        try:
            return await session.list_runtimes("ws-1", on_unreadable=on_unreadable), turns
        except BctrlResponseError as error:
            return error, turns
        finally:
            counting.cancel()


class TestOnTheWire:
    async def test_other_tasks_run_while_a_long_list_is_decoded(self) -> None:
        body = b'{"runtimes":[' + b",".join([VALID] * 10_000) + b"]}"

        listed, turns = await list_on(http_answer("200 OK", body))

        assert isinstance(listed, list)
        assert len(listed) == 10_000
        assert turns > len(body) / (64 * 1024)

    async def test_other_tasks_run_while_a_long_list_is_unpacked(self) -> None:
        body = gzip.compress(hostile_body("numbers", 8 * MIB))
        errors: list[BctrlResponseError] = []

        error, turns = await list_on(
            http_answer("200 OK", body, "Content-Encoding: gzip"), on_unreadable=errors.append
        )

        assert "more than 4,000,000 commas" in str(error)
        assert errors == []
        assert turns > 8 * MIB / (512 * 1024)
