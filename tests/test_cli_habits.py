"""What every shell user types: lists of aliases, patterns, several names, a workspace once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import outcomes_of
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


def save(text: str) -> str:
    Path("list").write_text(text, "utf-8")
    return "list"


def aliases_of(out: str) -> list[object]:
    return [fields["alias"] for fields in outcomes_of(out)]


@pytest.mark.parametrize(
    "text", ["ci-1\ncrm\n", "Alias\nci-1\n\n# note\ncrm\n", '{"alias": "ci-1"}\n["ws", "crm"]']
)
@pytest.mark.parametrize("given", ["argument", "variable"])
async def test_a_list_of_aliases_is_of_the_workspace(
    command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, text: str, given: str
) -> None:
    if given == "variable":
        monkeypatch.setenv("BCTRL_WORKSPACE", "ws")
    place = ["ws"] * (given == "argument")
    code, _, _ = await command("stop", *place, "--from", save(text))
    assert (code, emulator.received) == (0, {("ws", "ci-1"): 1, ("ws", "crm"): 1})


@pytest.mark.parametrize(
    ("place", "text", "said"),
    [
        ([], "ci-1\ncrm\n", "on line 1 is not a target: a list of aliases needs WORKSPACE"),
        (
            ["ws"],
            "ws,ci-1\nother,crm\n",
            "'other,crm' on line 2 is not a target: it names another workspace than ws",
        ),
    ],
)
async def test_a_list_that_does_not_fit_the_workspace_is_refused(
    command: Command, emulator: Emulator, place: list[str], text: str, said: str
) -> None:
    code, _, err = await command("stop", *place, "--from", save(text))
    assert f"{said}. Nothing was stopped" in err
    assert (code, emulator.requests) == (2, [])


async def test_the_variable_says_only_where_aliases_are(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCTRL_WORKSPACE", "ws")
    assert (await command("stop", "--from", save("ws,ci-1\nother,crm\n")))[0] == 0


async def test_a_report_of_a_list_of_aliases_names_their_workspace(command: Command) -> None:
    await command("stop", "ws", "--from", save("ci-1\ncrm\n"), "--journal", "j.jsonl")
    args = ("report", "j.jsonl", "--from", "list")
    assert (await command(*args, "--workspace", "ws"))[0] == 0
    assert (await command(*args))[0] == 2


async def test_a_list_of_the_api_is_a_list_of_targets(command: Command, emulator: Emulator) -> None:
    runtimes = [emulator.runtimes["ws", alias] for alias in ("ci-1", "crm")]
    listed = save(json.dumps({"runtimes": runtimes}))
    code, out, _ = await command("stop", "--dry-run", "--from", listed)
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
