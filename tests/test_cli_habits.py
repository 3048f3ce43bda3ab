"""What every shell user types: lists of aliases, patterns, several names, a workspace once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Command

from bctrl_async.emulator import Emulator


@pytest.fixture(autouse=True)
def _runtimes(
    monkeypatch: pytest.MonkeyPatch,
    emulator: Emulator,
    emulator_environment: None,
    tmp_path: Path,
) -> None:
    del emulator_environment
    for alias in ("ci-1", "ci-2", "crm"):
        emulator.add_runtime("ws", alias)
    emulator.add_runtime("other", "crm")
    monkeypatch.chdir(tmp_path)


def save(name: str, text: str) -> None:
    Path(name).write_text(text, "utf-8")


def aliases_of(out: str) -> list[str]:
    return [json.loads(line)["alias"] for line in out.splitlines()]


@pytest.mark.parametrize(
    "text",
    [
        "ci-1\ncrm\n",
        "Alias\nci-1\n\n# note\ncrm\n",
        '"ci-1"\ncrm',
        '{"alias": "ci-1"}\n["ws", "crm"]',
    ],
)
@pytest.mark.parametrize("given", ["argument", "variable"])
async def test_a_list_of_aliases_is_of_the_workspace(
    command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, text: str, given: str
) -> None:
    save("aliases.txt", text)
    if given == "variable":
        monkeypatch.setenv("BCTRL_WORKSPACE", "ws")
    place = ["ws"] * (given == "argument")
    code, _, _ = await command("stop", *place, "--from", "aliases.txt")
    assert (code, emulator.received) == (0, {("ws", "ci-1"): 1, ("ws", "crm"): 1})


async def test_a_list_of_aliases_needs_a_workspace(command: Command, emulator: Emulator) -> None:
    save("aliases.txt", "ci-1\ncrm\n")
    code, _, err = await command("stop", "--from", "aliases.txt")
    assert (
        "on line 1 is not a target: a list of aliases needs WORKSPACE. Nothing was stopped" in err
    )
    assert code == 2
    assert not emulator.requests


async def test_a_target_of_another_workspace_than_the_given_one_is_refused(
    command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("pairs.csv", "ws,ci-1\nother,crm\n")
    code, _, err = await command("stop", "ws", "--from", "pairs.csv")
    assert "'other,crm' on line 2 is not a target: it names another workspace than ws" in err
    assert (code, emulator.requests) == (2, [])
    # A variable says only where aliases are.
    monkeypatch.setenv("BCTRL_WORKSPACE", "ws")
    assert (await command("stop", "--from", "pairs.csv"))[0] == 0


async def test_a_report_of_a_list_of_aliases_names_their_workspace(command: Command) -> None:
    save("aliases.txt", "ci-1\ncrm\n")
    await command("stop", "ws", "--from", "aliases.txt", "--journal", "j.jsonl")
    args = ("report", "j.jsonl", "--from", "aliases.txt")
    assert (await command(*args, "--workspace", "ws"))[0] == 0
    assert (await command(*args))[0] == 2


async def test_a_list_of_the_api_is_a_list_of_targets(command: Command, emulator: Emulator) -> None:
    runtimes = [emulator.runtimes["ws", alias] for alias in ("ci-1", "crm")]
    save("list.json", json.dumps({"runtimes": runtimes}))
    code, out, _ = await command("stop", "--dry-run", "--from", "list.json")
    assert (code, aliases_of(out)) == (0, ["ci-1", "crm"])


async def test_a_pattern_selects_aliases(command: Command, emulator: Emulator) -> None:
    _, out, _ = await command("list", "ws", "--alias", "ci-*", "-o", "json")
    assert aliases_of(out) == ["ci-1", "ci-2"]
    code, _, _ = await command("stop", "ws", "--all", "-y", "--alias", "*-[2-9]")
    assert (code, emulator.received) == (0, {("ws", "ci-2"): 1})


async def test_several_runtimes_are_shown_and_each_that_is_missing_is_an_error(
    command: Command,
) -> None:
    code, out, err = await command("get", "ws", "crm", "nobody", "ci-1", "crm")
    assert out.count("alias ") == 2
    assert "\n\n" in out
    assert err.startswith("bctrl-async: error: could not get 'nobody': ")
    assert (code, err.count("\n")) == (1, 1)
    _, out, _ = await command("get", "ws", "crm", "ci-1", "-o", "json")
    assert aliases_of(out) == ["crm", "ci-1"]
    assert (await command("get", "ws", ".."))[0] == 2
