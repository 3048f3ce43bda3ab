"""Damaged and crafted journals: an error that leaves the file unchanged, never a wrong resume."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtimes import runtime

from bctrl_async import BctrlConfigError, BctrlError, RuntimeRef, StopOutcome, StopResult
from bctrl_async.journal import Journal, read_journal

SERVER = "https://api.test/v1"
MIB = 1 << 20
RESULTS = {
    "r0": StopResult.STOPPED,
    "r1": StopResult.UNKNOWN,
    "r2": StopResult.ALREADY_STOPPED,
    "r3": StopResult.REJECTED,
    "r4": StopResult.ACCEPTED,
    "r5": StopResult.NOT_SENT,
}
SETTLED = {"r0", "r2"}


def write(path: Path) -> bytes:
    journal = Journal(path, SERVER)
    for index, (alias, result) in enumerate(RESULTS.items()):
        target = RuntimeRef("ws-1", alias)
        journal.write(StopOutcome(index=index, target=target, result=result))
    journal.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "stops.jsonl"


@pytest.fixture(scope="module")
def intact(path: Path) -> bytes:
    # Not to the file that the tests damage, in any order.
    return write(path.with_name("intact.jsonl"))


def settled(path: Path, data: bytes) -> set[tuple[str, str]]:
    """Resume from these bytes; if they are rejected, check that the file is unchanged."""
    path.write_bytes(data)
    try:
        journal = Journal(path, SERVER)
    except BctrlConfigError:
        assert path.read_bytes() == data
        return set()
    journal.close()
    return {(target.alias, outcome.result) for target, outcome in journal.not_running.items()}


TRUE = {(alias, RESULTS[alias]) for alias in SETTLED}


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_changed_byte_settles_a_target(path: Path, intact: bytes, data: st.DataObject) -> None:
    """Fault: one flipped bit turned `unknown` into another alias or result, never asked again."""
    damaged = bytearray(intact)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(intact) - 1))] = data.draw(st.integers(0, 255))

    assert settled(path, bytes(damaged)) <= TRUE


def test_no_flipped_bit_settles_a_target(path: Path, intact: bytes) -> None:
    """Fault: a flipped bit in an alias made another runtime count as settled."""
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 1

        assert settled(path, bytes(damaged)) <= TRUE, position


@pytest.mark.parametrize("field", ["x", "error"])
def test_deep_nesting_is_a_damaged_line(path: Path, intact: bytes, field: str) -> None:
    """Fault: the parser's RecursionError left the library."""
    first = intact.index(b"\n") + 1
    line = b'{"%b":%b%b}\n' % (field.encode(), b"[" * 100_000, b"]" * 100_000)
    path.write_bytes(intact[:first] + line + intact[first:])

    with pytest.raises(BctrlConfigError, match="line 2 is damaged"):
        Journal(path, SERVER)


def test_a_line_over_1_mib_is_not_read_whole(path: Path, intact: bytes) -> None:
    """Fault: a file of one endless line was read into memory before it was rejected."""
    path.write_bytes(intact)
    with path.open("ab") as file:
        for _ in range(64):
            file.write(b"x" * MIB)
    tracemalloc.start()
    try:
        with pytest.raises(BctrlConfigError, match="line 8 is longer than 1 MiB"):
            Journal(path, SERVER)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
    assert path.stat().st_size == len(intact) + 64 * MIB


def test_a_first_line_over_1_mib_is_not_read_whole(path: Path) -> None:
    path.write_bytes(b'{"journal":"bctrl_async"' + b" " * MIB)

    with pytest.raises(BctrlConfigError, match="line 1 is longer than 1 MiB"):
        Journal(path, SERVER)


def test_a_tail_of_nul_after_a_power_failure_is_cut_off(path: Path, intact: bytes) -> None:
    path.write_bytes(intact[:-7] + b"\0" * 3 * MIB)
    journal = Journal(path, SERVER)
    journal.close()

    kept = intact[: intact[:-1].rindex(b"\n") + 1]
    assert path.read_bytes().startswith(kept)
    assert b"\0" not in path.read_bytes()
    assert {target.alias for target in journal.not_running} == SETTLED


@pytest.mark.parametrize("result", [StopResult.REJECTED, StopResult.ACCEPTED])
def test_an_outcome_with_endless_texts_leaves_a_readable_line(
    path: Path, result: StopResult
) -> None:
    """Fault: a journal could hold a line that no run would read again."""
    path.unlink(missing_ok=True)
    target = RuntimeRef("w" * MIB, "é" * MIB)
    error = BctrlError("e" * MIB, code="c" * MIB)
    journal = Journal(path, SERVER)
    journal.write(StopOutcome(index=0, target=target, result=result, error=error))
    journal.close()

    assert path.stat().st_size < 4000
    read = read_journal(path)
    assert read is not None
    [kept] = read.outcomes
    assert kept == RuntimeRef("w" * 1000 + "…", "é" * 1000 + "…")


def test_an_endless_description_leaves_the_names_of_its_runtime(path: Path) -> None:
    """Fault: the entry was of a target with a shortened name, and the target had none."""
    path.unlink(missing_ok=True)
    described = msgspec.structs.replace(runtime(status="active"), driver="d" * MIB)
    target = RuntimeRef("ws-1", "crm")
    journal = Journal(path, SERVER)
    journal.write(
        StopOutcome(index=0, target=target, result=StopResult.ACCEPTED, runtime=described)
    )
    journal.close()

    read = read_journal(path)
    assert read is not None
    assert read.outcomes.keys() == {target}
