"""The option `--shard` of the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import outcomes_of, save, stop_piped
from helpers import Command

from bctrl_async.emulator import Emulator
from bctrl_async.shards import shard_of

SHARDS = ("1/4", "2/4", "3/4", "4/4")
ALIASES = [f"r{number}" for number in range(120)]
LIST = "".join(f"ws,{alias}\n" for alias in ALIASES)
"""More than the targets that are checked before the first request."""


def aliases_of(shard: str) -> list[str]:
    return [alias for alias in ALIASES if shard_of(("ws", alias), 4) == int(shard[0])]


pytestmark = pytest.mark.usefixtures("emulator_environment")


@pytest.fixture(autouse=True)
def _runtimes(emulator: Emulator) -> None:
    for alias in ALIASES:
        emulator.add_runtime("ws", alias)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "all.csv"
    save(file, LIST)
    return file


async def test_the_shards_of_a_file_together_give_each_line_one_outcome(
    command: Command, emulator: Emulator, path: Path
) -> None:
    save(path, f"{LIST}<p>\n")
    rejected = 0
    for shard in SHARDS:
        code, out, _ = await command("stop", "--from", path, "--shard", shard, "-o", "json")
        outcomes = outcomes_of(out)
        stopped = [str(each["alias"]) for each in outcomes if each["result"] == "stopped"]
        assert sorted(stopped) == sorted(aliases_of(shard))
        assert {each["index"] for each in outcomes} == {*range(len(outcomes))}
        assert code == len(outcomes) - len(stopped)
        rejected += code
    assert rejected == 1
    assert {emulator.received["ws", alias] for alias in ALIASES} == {1}


async def test_a_pipe_and_aliases_are_divided_as_a_file(command: Command, path: Path) -> None:
    args = ("--shard", "2/4", "--dry-run", "-o", "json")
    for given in (("--from", path), ("ws", *ALIASES)):
        code, out, _ = await command("stop", *given, *args)
        assert (code, [o["alias"] for o in outcomes_of(out)]) == (0, aliases_of("2/4"))
    assert (await stop_piped(LIST, *args))[:2] == (0, out)


async def test_a_shard_without_targets_is_not_an_error(command: Command, path: Path) -> None:
    code, out, _ = await command("stop", "--from", path, "--shard", "7/999983")
    assert code == 0
    assert out.startswith("0 of 0 no longer running after ")
    found = await command("stop", "ws", "--all", "--yes", "--shard", "7/999983")
    assert found == (0, "", "Nothing to stop: no runtime of ws in shard 7/999983 matches\n")


async def test_a_line_after_which_nothing_is_read_fails_every_shard(
    command: Command, emulator: Emulator, path: Path
) -> None:
    text = f'{LIST}ws,"open\nws,lost\n'
    save(path, text)
    for shard in SHARDS:
        code, _, err = await command("stop", "--from", path, "--shard", shard)
        assert code == 2
        assert "on line 121 is not a target: a quote is missing" in err
    assert emulator.requests == []
    failed, out, err = await stop_piped(text, "--shard", "2/4")
    assert failed == 1
    assert "on line 121 is not a target: a quote is missing" in err
    assert "the input was not read to its end" in out
