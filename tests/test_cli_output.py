"""The option `--output`: JSON and CSV for programs."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import KEY
from helpers import BOUND, Command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from warm_server import program

from bctrl_async import RuntimeRef
from bctrl_async.cli._items import to_item
from bctrl_async.cli._output import Output
from bctrl_async.cli._parser import TargetParser
from bctrl_async.cli._records import TARGET_COLUMNS, Records, target_fields
from bctrl_async.emulator import Emulator, Fault


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator, tmp_path: Path) -> None:
    for alias in "ab":
        emulator.add_runtime("ws", alias)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def save(name: str, text: str) -> None:
    Path(name).write_text(text, "utf-8")


def rows(out: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(out)))


async def test_csv_of_stop_has_a_row_for_each_target(command: Command) -> None:
    code, out, err = await command("stop", "-o", "csv", "--ignore-not-found", "ws", "a", "nobody")
    assert out.splitlines()[0] == (
        "index,workspace_id,alias,result,attempts,resumed,elapsed,at,runtime_status,"
        "error_type,error_status,error_code,error_request_id,error_may_have_stopped,error_message"
    )
    found = {row["alias"]: row for row in rows(out)}
    assert set(found) == {"a", "nobody"}
    assert found["a"]["workspace_id"] == "ws"
    assert found["a"]["result"] == found["a"]["runtime_status"] == "stopped"
    assert found["a"]["resumed"] == "false"
    assert found["a"]["error_type"] == found["a"]["error_message"] == ""
    assert found["nobody"]["result"] == "not_found"
    assert found["nobody"]["error_status"] == "404"
    assert found["nobody"]["error_code"] == "runtime.not_found"
    assert "No such workspace or alias" in found["nobody"]["error_message"]
    assert err.startswith("2 of 2 no longer running after ")
    assert code == 0


async def test_csv_of_a_run_can_be_the_input_of_the_next(
    command: Command, emulator: Emulator
) -> None:
    emulator.inject(*[Fault.SERVER_ERROR] * 4, alias="b")
    _, out, _ = await command("stop", "--no-verify", "-o", "csv", "ws", "a", "b")
    save("run.csv", out)
    code, out, _ = await command("stop", "--from", "run.csv")
    assert "2 of 2 no longer running" in out
    assert code == 0


async def test_csv_of_list_can_be_stopped(command: Command, emulator: Emulator) -> None:
    code, out, _ = await command("list", "--output", "csv", "ws")
    assert out.splitlines()[0] == "workspace_id,alias,status,kind,created_at,runtime_id"
    assert [(row["workspace_id"], row["alias"], row["status"]) for row in rows(out)] == [
        ("ws", "a", "active"),
        ("ws", "b", "active"),
    ]
    assert code == 0
    save("list.csv", out)
    await command("stop", "--from", "list.csv")
    assert {emulator.status("ws", alias) for alias in "ab"} == {"stopped"}


@pytest.mark.parametrize(
    ("args", "header"),
    [
        ("list -o csv --kind spreadsheet ws", "workspace_id,alias,status,"),
        ("stop -o csv --from empty --allow-empty", "index,workspace_id,alias,"),
        ("stop -o csv --from empty --allow-empty --dry-run", "workspace_id,alias\n"),
        ("report -o csv --from empty --allow-empty run.jsonl", "index,workspace_id,alias,"),
    ],
)
async def test_csv_without_rows_has_its_header(command: Command, args: str, header: str) -> None:
    await command("stop", "--journal", "run.jsonl", "ws", "a")
    save("empty", "")
    _, out, _ = await command(*args.split())
    assert out.startswith(header)
    if "report" not in args:
        assert out.count("\n") == 1


async def test_a_dry_run_prints_csv(command: Command) -> None:
    _, out, _ = await command("stop", "-o", "csv", "--dry-run", "ws", "a", " b", "#c", '{"d"')
    assert out == 'workspace_id,alias\nws,a\n"ws"," b"\n"ws","#c"\n"ws","{""d"""\n'


async def test_csv_of_a_report_names_the_journals(command: Command) -> None:
    for path in ("1.jsonl", "2.jsonl"):
        await command("stop", "--journal", path, "ws", "a")
    _, out, _ = await command("report", "-o", "csv", "1.jsonl", "2.jsonl")
    (row,) = rows(out)
    assert (row["index"], row["alias"], row["journals"]) == ("", "a", "1.jsonl;2.jsonl")


async def test_csv_of_a_journal_is_one_row(command: Command) -> None:
    await command("stop", "--journal", "1.jsonl", "ws", "a")
    _, out, _ = await command("journal", "show", "-o", "csv", "1.jsonl")
    (row,) = rows(out)
    assert (row["file"], row["targets"], row["counts_stopped"], row["counts_unknown"]) == (
        *("1.jsonl", "1", "1", "0"),
    )
    assert row["complete"] == "true"


async def test_an_unknown_format_is_a_usage_error_that_names_the_formats(command: Command) -> None:
    code, out, err = await command("list", "-o", "yaml", "ws")
    assert "'yaml' is not one of 'table', 'json', 'csv'" in err
    assert (code, out) == (2, "")


def as_csv(
    capfd: pytest.CaptureFixture[str], columns: tuple[str, ...], *records: Mapping[str, object]
) -> str:
    Records(Output(), columns, is_json=False).print_all(records)
    return capfd.readouterr().out


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(pairs=st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_any_name_that_can_be_stopped_comes_back_from_csv(
    capfd: pytest.CaptureFixture[str], pairs: list[tuple[str, str]]
) -> None:
    items = [to_item(1, "", *pair) for pair in pairs]
    targets = [item for item in items if isinstance(item, RuntimeRef)]
    out = as_csv(capfd, TARGET_COLUMNS, *map(target_fields, targets))
    parser = TargetParser()
    assert [*parser.feed(out.encode()), *parser.feed(b"")] == targets


@pytest.mark.parametrize("sign", ["=", "+", "-", "@"])
def test_a_cell_is_not_a_formula_but_a_name_is_exact(
    capfd: pytest.CaptureFixture[str], sign: str
) -> None:
    """Fault: a spreadsheet ran a text of the server that begins with an equals sign."""
    columns = (*TARGET_COLUMNS, "error.code")
    record = {"workspace_id": "-ws", "alias": "=1+1", "error": {"code": f"{sign}HYPERLINK(A1)"}}
    assert as_csv(capfd, columns, record).splitlines()[1] == f"-ws,=1+1,'{sign}HYPERLINK(A1)"


def test_a_row_is_one_line_without_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    columns = (*TARGET_COLUMNS, "status")
    record = {"workspace_id": "w\ns", "alias": "a\x1b[31m", "status": "s\nt\x9b\u202e"}
    assert as_csv(capfd, columns, record).splitlines()[1:] == ["w\\ns,a\\x1b[31m,s t\\x9b\\u202e"]


async def test_rows_are_written_as_outcomes_arrive(emulator: Emulator) -> None:
    """A row can be read while the run goes on: the server holds back the other answer."""
    emulator.inject(Fault.HANG, alias="b")
    process = await asyncio.create_subprocess_exec(
        *(*program(), "stop", "-o", "csv", "ws", "a", "b"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(BOUND):
            await process.stdout.readline()
            assert b"ws,a,stopped" in await process.stdout.readline()
    finally:
        process.kill()
        await process.wait()


def test_json_has_an_object_per_line(capfd: pytest.CaptureFixture[str]) -> None:
    Records(Output(), (), is_json=True).print_all([{"a": 1}, {"a": "\u202e"}])
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == [
        *({"a": 1}, {"a": "\u202e"}),
    ]
