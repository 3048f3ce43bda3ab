"""A few cases of `differential.py`, and proofs that it finds differences."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from differential import FAULTS, Difference, compare
from fuzz.answers import TIMEOUT, Case, Packet, Stop, plain, runtime
from fuzz.exchange import run
from support.ways import long_way

CASES = range(0, 400, 20)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (
    len(runtime("r0")),
    runtime("r0"),
)


@pytest.mark.parametrize("first", CASES)
def test_mutated_answers_have_the_same_effect_on_both_ways(first: int) -> None:
    for number in range(first, first + CASES.step):
        compare(1, number)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_of_the_ways_is_found(fault: str) -> None:
    def compare_all() -> None:
        for number in range(1000):
            compare(1, number, fault)

    with pytest.raises(Difference, match=r"(?s)long way: .*fast path: "):
        compare_all()


@pytest.mark.parametrize("way", [nullcontext, long_way])
@pytest.mark.parametrize("cut", [0, 20, 60])
def test_an_answer_that_comes_with_the_timeout_is_in_time_or_is_not(
    way: type[nullcontext[None]], cut: int
) -> None:
    """The ways differ in the step of the event loop in which they set the timer.

    Fault: the answer is left on the connection, for the next request.
    """
    results = set()
    for microseconds in range(-150, 50):
        delay = TIMEOUT + microseconds * 1e-6
        packets = [Packet(0.5, ANSWER[:cut]), Packet(delay - 0.5, ANSWER[cut:])]
        if not cut:
            packets = [Packet(delay, ANSWER)]
        stops = [Stop(packets, None, 0.0, None), Stop([plain("r1")], None, 0.0, None)]
        with way():
            seen = run(Case([], b"", b"", stops, observed=False, closed=None))
        assert seen.complaints == []
        assert seen.results[1].startswith("Runtime(")
        results.add(seen.results[0].partition("(")[0].partition(":")[0])
    assert results == {"Runtime", "BctrlTimeoutError"}
