"""The option `--output`: JSON Lines for programs, and a list as CSV."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from conftest import KEY
from helpers import BOUND, Command
from runtimes import runtime
from warm_server import program

from bctrl_async.cli._list import print_csv
from bctrl_async.cli._output import Output
from bctrl_async.emulator import Emulator, Fault


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator, tmp_path: Path) -> None:
    for alias in "ab":
        emulator.add_runtime("ws", alias)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)


def save(text: str) -> None:
    Path("list.csv").write_text(text, "utf-8")


async def test_csv_of_list_can_be_stopped(command: Command, emulator: Emulator) -> None:
    code, out, _ = await command("list", "--output", "csv", "ws")
    header, *rows = out.splitlines()
    assert header == "workspace_id,alias,status,kind,created_at"
    assert [row.split(",")[:3] for row in rows] == [["ws", "a", "active"], ["ws", "b", "active"]]
    assert code == 0
    save(out)
    await command("stop", "--from", "list.csv")
    assert {emulator.status("ws", alias) for alias in "ab"} == {"stopped"}


async def test_csv_of_an_empty_list_has_its_header(command: Command) -> None:
    _, out, _ = await command("list", "-o", "csv", "--kind", "desktop", "ws")
    assert out == "workspace_id,alias,status,kind,created_at\n"


@pytest.mark.parametrize("name", ["stop", "get", "report"])
async def test_json_is_the_only_form_for_programs_of_other_commands(
    command: Command, name: str
) -> None:
    code, out, err = await command(name, "-o", "csv", "ws", "a")
    assert 'invalid value "csv" for -o. Choose from: "table", "json"' in err
    assert (code, out) == (2, "")


@pytest.mark.parametrize("alias", [" a", "a ", "#a", "[a", 'a"b', "a,b"])
async def test_any_name_comes_back_from_csv(
    command: Command, capfd: pytest.CaptureFixture[str], alias: str
) -> None:
    print_csv(Output(), "#ws", [runtime(alias=alias)])
    save(capfd.readouterr().out)
    _, out, _ = await command("stop", "--dry-run", "--from", "list.csv")
    assert json.loads(out) == {"workspace_id": "#ws", "alias": alias}


def test_a_row_is_one_line_without_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    print_csv(Output(), "w\ns", [runtime(alias="a\x1b[31m\x9b")])
    assert capfd.readouterr().out.splitlines()[1].startswith("w\\ns,a\\x1b[31m\\x9b,stopped,")


async def test_lines_are_written_as_outcomes_arrive(emulator: Emulator) -> None:
    """A line can be read while the run goes on: the server holds back the other answer."""
    emulator.inject(Fault.HANG, alias="b")
    process = await asyncio.create_subprocess_exec(
        *(*program(), "stop", "-o", "json", "ws", "a", "b"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(BOUND):
            assert json.loads(await process.stdout.readline())["alias"] == "a"
    finally:
        process.kill()
        await process.wait()


def test_json_is_ascii_on_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    Output().print_object({"a": "\u202e\n"})
    assert capfd.readouterr().out == '{"a": "\\u202e\\n"}\n'
