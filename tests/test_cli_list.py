"""The commands `list` and `get`: ages, order, limits and fields of runtimes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from unittest.mock import Mock

import pytest
from conftest import KEY
from helpers import Command
from runtimes import runtime

from bctrl_async import BctrlResponseError, RuntimeFilter
from bctrl_async.cli._list import FoundRuntimes
from bctrl_async.emulator import Emulator


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    now = datetime.now(UTC)
    for alias, kind, status, age in (
        ("new", "browser", "active", timedelta(hours=-1)),
        ("old", "desktop", "active", timedelta(days=3, hours=4, seconds=30)),
        ("mid", "browser", "stopped", timedelta(hours=2, minutes=5, seconds=30)),
    ):
        created_at = (now - age).isoformat()
        emulator.add_runtime("ws", alias, kind=kind, status=status, created_at=created_at)
    emulator.add_runtime("ws", "odd", kind="browser", created_at="long ago")
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)


async def test_the_table_shows_ages_and_ends_with_their_number_on_stderr(command: Command) -> None:
    assert await command("list", "ws") == (
        0,
        (
            "STATUS   KIND     AGE   ALIAS\n"
            "active   browser  0s    new\n"
            "active   desktop  3d4h  old\n"
            "stopped  browser  2h5m  mid\n"
            "active   browser  ?     odd\n"
        ),
        "4 runtimes\n",
    )


@pytest.mark.parametrize(
    ("key", "aliases"),
    [
        ("age", ["old", "mid", "new", "odd"]),
        ("alias", ["mid", "new", "odd", "old"]),
        ("status", ["new", "old", "odd", "mid"]),
        ("kind", ["new", "mid", "odd", "old"]),
    ],
)
async def test_sort_orders_the_runtimes(command: Command, key: str, aliases: list[str]) -> None:
    _, out, _ = await command("list", "--sort", key, "ws")
    assert [line.split()[-1] for line in out.splitlines()[1:]] == aliases


@pytest.mark.parametrize("output", ["table", "json"])
async def test_a_limit_says_how_many_it_leaves_out(command: Command, output: str) -> None:
    code, out, err = await command("list", "--sort", "age", "--limit", "2", "-o", output, "ws")
    assert "old" in out
    assert "odd" not in out
    assert (code, err) == (0, "4 runtimes, 2 shown\n")


async def test_a_runtime_whose_age_cannot_be_read_is_an_error_if_it_may_run(
    command: Command, emulator: Emulator
) -> None:
    """Fault: --older-than passed over it, and the command exited with 0."""
    emulator.add_runtime("ws", "gone", status="stopped", created_at="long ago")
    code, out, err = await command("list", "ws", "--older-than", "2h", "-o", "json")
    assert [json.loads(line)["alias"] for line in out.splitlines()] == ["old", "mid"]
    assert err == (
        "bctrl-async: error: could not list 'odd': its age cannot be read: 'long ago' "
        "is not an ISO 8601 date and time with a UTC offset. Stop it by its alias, or select it "
        "without its age\n"
    )
    assert code == 1

    code, _, err = await command("list", "ws", "--older-than", "2h", "--kind", "desktop")
    assert (code, err) == (0, "1 runtime\n")


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
    assert lines[10:-1] == ([f"bctrl-async: error: {rest} cannot be read"] if rest else [])
    assert code == 1


async def test_a_limit_of_0_and_an_unknown_key_are_usage_errors(command: Command) -> None:
    code, _, err = await command("list", "--limit", "0", "ws")
    assert (code, "--limit" in err) == (2, True)
    code, _, err = await command("list", "--sort", "size", "ws")
    assert code == 2
    assert 'invalid value "size" for --sort. Choose from: "age", "alias", "status", "kind"' in err


async def test_get_shows_the_fields_of_a_runtime(command: Command, emulator: Emulator) -> None:
    runtime = emulator.runtimes["ws", "mid"]
    code, out, err = await command("get", "ws", "mid")
    fields = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert fields["alias"] == "mid"
    assert fields["status"] == "stopped"
    assert fields["id"] == runtime["id"]
    assert fields["age"] == "2h5m"
    assert fields["browserRunning"] == "no"
    assert (code, err) == (0, "")
    assert [request.method for request in emulator.requests] == ["GET"]


async def test_get_of_an_unknown_runtime_exits_with_1_and_says_what_to_check(
    command: Command,
) -> None:
    code, out, err = await command("get", "ws", "nobody")
    assert err.startswith("bctrl-async: error: could not get 'nobody': ")
    assert err.endswith("Check the workspace id, the alias and the base URL\n")
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_the_question_counts_runtimes_that_are_rejected(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Mock(readline=lambda: "n"))
    odd = BctrlResponseError("odd")
    found = FoundRuntimes("ws", RuntimeFilter(), "http://127.0.0.1:9/v1")
    found.add([runtime("active"), odd, runtime("odd")])
    assert not found.confirm()
    assert "2 browser; 1 cannot be read\nStop 2 runtimes?" in capsys.readouterr().err
