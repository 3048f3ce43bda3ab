"""The commands `list` and `get`: filters, order, ages and fields of runtimes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from commands import outcomes_of
from helpers import Command

from bctrl_async.emulator import Emulator, Reply

CREATED = "2026-01-01T00:00:00.000Z"


@pytest.fixture(autouse=True)
def _runtimes(emulator: Emulator, emulator_environment: None) -> None:
    del emulator_environment
    now = datetime.now(UTC)
    for alias, kind, status, age in (
        ("new", "browser", "active", timedelta(hours=-1)),
        ("old one", "desktop", "active", timedelta(days=3, hours=4, seconds=30)),
        ("日本", "spreadsheet", "stopped", timedelta(hours=2, minutes=5, seconds=30)),
    ):
        created_at = (now - age).isoformat()
        emulator.add_runtime("ws", alias, kind=kind, status=status, created_at=created_at)
    emulator.add_runtime("ws", "odd", created_at="long ago")


async def test_the_table_shows_ages_and_ends_with_their_number_on_stderr(command: Command) -> None:
    assert await command("list", "ws") == (
        0,
        (
            "STATUS   KIND         AGE   ALIAS\n"
            "active   browser      0s    new\n"
            "active   desktop      3d4h  old one\n"
            "stopped  spreadsheet  2h5m  日本\n"
            "active   browser      ?     odd\n"
        ),
        "4 runtimes\n",
    )


async def test_a_line_is_never_cut_or_broken_in_a_pipe(
    command: Command, emulator: Emulator
) -> None:
    emulator.add_runtime("long", "x" * 200, created_at="?")
    _, out, _ = await command("list", "long")
    assert out.splitlines()[1] == f"active  browser  ?    {'x' * 200}"


async def test_a_long_cell_moves_its_row_and_no_other(command: Command, emulator: Emulator) -> None:
    """Fault: a status was cut, and another padded the whole table to a megabyte."""
    runtime = emulator.runtimes["ws", "odd"]
    listed = [dict(runtime) | {"kind": kind} for kind in ("k", "k" * 40, "日" * 15)]
    emulator.inject(Reply(200, body={"runtimes": listed}), method="GET")
    _, out, _ = await command("list", "ws")
    assert [line.removeprefix("active  ") for line in out.splitlines()[1:]] == [
        f"k{' ' * 27}  ?    odd",
        f"{'k' * 40}  ?    odd",
        f"{'日' * 15}  ?    odd",
    ]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("", ["new", "old one", "日本", "odd"]),
        ("--status any", ["new", "old one", "日本", "odd"]),
        ("--status active", ["new", "old one", "odd"]),
        ("--kind browser --status active", ["new", "odd"]),
        ("--older-than 1.5d --kind desktop", ["old one"]),
        ("--older-than 90000d --kind desktop", []),
        ("--alias o*", ["old one", "odd"]),
    ],
)
async def test_list_filters_runtimes_and_prints_json_for_from(
    command: Command, tmp_path: Path, options: str, found: list[str]
) -> None:
    code, out, err = await command("list", "-o", "json", "ws", *options.split())
    assert [line["alias"] for line in outcomes_of(out)] == found
    assert (code, err) == (0, "")

    file = tmp_path / "found.jsonl"
    file.write_text(out)
    _, out, _ = await command("stop", "--dry-run", "--allow-empty", "--from", file)
    assert outcomes_of(out) == [{"workspace_id": "ws", "alias": alias} for alias in found]


@pytest.mark.parametrize("name", ["list", "get"])
async def test_json_keeps_the_field_names_of_the_api(
    command: Command, emulator: Emulator, name: str
) -> None:
    emulator.add_runtime("one", "a")
    _, out, _ = await command(name, "-o", "json", "one", *["a"] * (name == "get"))
    assert outcomes_of(out) == [
        {
            "workspace_id": "one",
            "alias": "a",
            "status": "active",
            "kind": "browser",
            "created_at": CREATED,
            "runtime": emulator.runtimes["one", "a"],
        }
    ]


async def test_a_runtime_whose_age_cannot_be_read_is_an_error_if_it_may_run(
    command: Command, emulator: Emulator
) -> None:
    emulator.add_runtime("ws", "gone", status="stopped", created_at="long ago")
    code, out, err = await command("list", "ws", "--older-than", "2h", "-o", "json")
    assert [line["alias"] for line in outcomes_of(out)] == ["old one", "日本"]
    assert err == (
        "bctrl-async: error: could not list 'odd': its age cannot be read: 'long ago' "
        "is not an ISO 8601 date and time with a UTC offset. Stop it by its alias, or select it "
        "without its age\n"
    )
    assert code == 1


@pytest.mark.parametrize(
    ("number", "rest"), [(10, None), (11, "1 more runtime"), (12, "2 more runtimes")]
)
async def test_ten_errors_are_printed_and_the_others_counted(
    command: Command, emulator: Emulator, number: int, rest: str | None
) -> None:
    for index in range(number):
        emulator.add_runtime("other", f"r{index}", created_at="long ago")
    code, _, err = await command("list", "other", "--older-than", "2h")
    lines = err.splitlines()
    assert sum("its age cannot be read" in line for line in lines) == 10
    assert lines[10:-1] == ([f"bctrl-async: error: could not list {rest}"] if rest else [])
    assert code == 1


async def test_get_shows_the_fields_of_a_runtime(command: Command, emulator: Emulator) -> None:
    code, out, err = await command("get", "ws", "日本")
    fields = dict(line.split(maxsplit=1) for line in out.splitlines())
    runtime = emulator.runtimes["ws", "日本"]
    expected = {name: runtime[name] for name in ("id", "alias", "status", "kind", "createdAt")}
    assert fields.items() >= {**expected, "age": "2h5m", "browserRunning": "no"}.items()
    assert (code, err, [request.method for request in emulator.requests]) == (0, "", ["GET"])


async def test_several_runtimes_are_shown_and_each_that_is_missing_is_an_error(
    command: Command,
) -> None:
    code, out, err = await command("get", "ws", "odd", "nobody", "new", "odd")
    assert out.count("alias ") == 2
    assert "\n\n" in out
    assert err.startswith("bctrl-async: error: could not get 'nobody': ")
    assert (code, err.count("\n")) == (1, 1)
    _, out, _ = await command("get", "ws", "odd", "new", "-o", "json")
    assert [line["alias"] for line in outcomes_of(out)] == ["odd", "new"]
