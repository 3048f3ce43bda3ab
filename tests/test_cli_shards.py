"""The option `--shard` of the command."""

from __future__ import annotations

import json
from collections import Counter
from io import FileIO
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import KEY
from helpers import Command

from bctrl_async import RuntimeRef, StopResult
from bctrl_async.cli._lines import BadLine, Item
from bctrl_async.cli._targets import Shard
from bctrl_async.emulator import Emulator
from bctrl_async.shards import shard_of

COUNT = 4
ALIASES = [f"r{number}" for number in range(40)]
MORE = "".join(f"ws,more-{number}\n" for number in range(100))
"""More lines than are checked before the first request."""


def aliases_of(number: int) -> list[str]:
    return [alias for alias in ALIASES if shard_of(("ws", alias), COUNT) == number]


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    for alias in ALIASES:
        emulator.add_runtime("ws", alias)
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "all.csv"
    file.write_text("".join(f"ws,{alias}\n" for alias in ALIASES))
    return file


async def test_the_shards_of_a_file_together_stop_each_target_once(
    command: Command, emulator: Emulator, path: Path
) -> None:
    for number in range(1, COUNT + 1):
        shard = f"{number}/{COUNT}"
        code, out, _ = await command("stop", "--from", path, "--shard", shard, "-o", "json")
        outcomes = [json.loads(line) for line in out.splitlines()]

        assert code == 0
        assert sorted(o["alias"] for o in outcomes) == sorted(aliases_of(number))
        assert sorted(o["index"] for o in outcomes) == list(range(len(outcomes)))
    assert {emulator.received["ws", alias] for alias in ALIASES} == {1}


async def test_the_shard_of_a_pipe_is_that_of_a_file(
    command: Command, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(path, MORE)
    _, expected, _ = await command("stop", "--from", path, "--shard", "2/4", "--dry-run")

    with FileIO(path) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        code, out, _ = await command("stop", "--from", "-", "--shard", "2/4", "--dry-run")

    assert (code, out) == (0, expected)
    assert out.count("\n") > len(aliases_of(2))


async def test_aliases_on_the_command_line_are_divided_as_well(
    command: Command, emulator: Emulator
) -> None:
    code, out, _ = await command("stop", "--shard", "2/4", "ws", *ALIASES)

    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:-1]] == aliases_of(2)
    assert emulator.received.total() == len(aliases_of(2))


async def test_a_shard_without_runtimes_of_a_workspace_says_so(command: Command) -> None:
    # Of forty aliases, none is in most of a million shards.
    code, out, err = await command("stop", "ws", "--all", "--yes", "--shard", "7/999983")

    assert (code, out) == (0, "")
    assert err == "Nothing to stop: no runtime of ws in shard 7/999983 matches\n"


async def test_a_shard_without_targets_is_not_an_error(command: Command, path: Path) -> None:
    """Fault: the job of an empty shard fails, as if its input were empty."""
    code, out, _ = await command("stop", "--from", path, "--shard", "7/999983")

    assert code == 0
    assert out.startswith("0 of 0 no longer running after ")


async def test_an_input_that_is_not_targets_stops_nothing_in_any_shard(
    command: Command, emulator: Emulator, path: Path
) -> None:
    append(path, "<p>\n")
    for number in range(1, COUNT + 1):
        code, _, err = await command("stop", "--from", path, "--shard", f"{number}/{COUNT}")
        assert code == 2
        assert "'<p>' on line 41 is not a target" in err
    assert emulator.requests == []


async def test_a_later_line_that_is_not_a_target_is_rejected_in_one_shard(
    command: Command, path: Path
) -> None:
    """Fault: a bad line is in no shard, and nobody hears of it."""
    append(path, f"{MORE}<p>\n")
    results: Counter[str] = Counter()
    for number in range(1, COUNT + 1):
        shard = f"{number}/{COUNT}"
        _, out, _ = await command("stop", "--from", path, "--shard", shard, "-o", "json")
        results.update(json.loads(line)["result"] for line in out.splitlines())

    assert results[StopResult.REJECTED] == 1
    assert results.total() == 141


async def test_a_line_after_which_nothing_is_read_fails_every_shard(
    command: Command, emulator: Emulator, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a shard whose targets were below an open quote exits with 0."""
    append(path, f'{MORE}ws,"open\nws,lost\n')
    for number in range(1, COUNT + 1):
        code, _, err = await command("stop", "--from", path, "--shard", f"{number}/{COUNT}")
        assert code == 2
        assert "on line 141 is not a target: a quote is missing" in err
    assert emulator.requests == []

    monkeypatch.setattr("bctrl_async.cli._targets.stat", Mock(S_ISREG=lambda _: False))
    for number in range(1, COUNT + 1):
        code, out, err = await command("stop", "--from", path, "--shard", f"{number}/{COUNT}")
        assert code == 1
        assert "; nothing after it was read" in out + err
        assert "the input was not read to its end" in out


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("0/16", "'0/16' is not one of the shards 1/16 to 16/16"),
        ("17/16", "'17/16' is not one of the shards 1/16 to 16/16"),
        *((value, f"'{value}' is not a shard such as 3/16") for value in ("3/0", "3", "", "٣/٤")),
    ],
)
async def test_a_shard_that_does_not_exist_is_an_error(
    command: Command, emulator: Emulator, path: Path, value: str, reason: str
) -> None:
    code, _, err = await command("stop", "--from", path, f"--shard={value}")

    assert reason in err
    assert (code, emulator.requests) == (2, [])


def test_the_only_shard_keeps_every_item() -> None:
    items: list[Item] = [RuntimeRef("ws", "a"), BadLine("on line 1", "<p>", "it is neither")]
    assert [item for item in items if Shard(1, 1).keeps(item)] == items
