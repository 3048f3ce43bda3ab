"""The command: run in this process for its texts, in others for signals and terminals."""

import asyncio
import json
import os
import re
import signal
import stat
import sys
from collections.abc import Callable
from functools import partial
from io import FileIO
from pathlib import Path

import pytest
from commands import (
    NOTICE,
    Terminal,
    begin_to_end,
    finish,
    outcomes_of,
    results_of,
    start,
    until,
    without_notices,
    without_times,
    write,
)
from helpers import BOUND, Command, HoldingEmulator, pass_time
from journal_lines import read_lines
from warm_server import program

from bctrl_async import (
    BctrlSession,
    RuntimeRef,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async.cli import (
    _output,
    _progress,
    _run,
)
from bctrl_async.emulator import Fault
from bctrl_async.journal import Journal

pty = pytest.importorskip("pty", reason="signals and terminals are tested where there are any")

KEY = "emulator-key"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCTRL_API_KEY", KEY)


@pytest.fixture
def emulator(holding: HoldingEmulator) -> HoldingEmulator:
    return holding


@pytest.fixture
def pass_time_in_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], object]:
    """Return a function that lets time pass in the bulk stop of a command in this process."""
    loops: list[asyncio.AbstractEventLoop] = []
    run_with_progress = _run.run_with_progress

    async def record_loop(batch: StopBatch, output: _output.Output) -> bool:
        loops.append(asyncio.get_running_loop())
        return await run_with_progress(batch, output)

    monkeypatch.setattr(_run, "run_with_progress", record_loop)
    return lambda seconds: loops[-1].call_soon_threadsafe(pass_time, seconds)


def fill(file: Path, text: str) -> None:
    file.write_text(text)


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    """A file with three targets."""
    file = tmp_path / "targets.csv"
    file.write_text("workspace_id,alias\nws,a\nws,b\nws,c\n")
    return file


# Input


async def test_json_prints_every_target_of_a_file(
    emulator: HoldingEmulator, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "targets"
    unknown = [f'{{"workspaceId": "ws", "alias": "x{number}"}}\n' for number in range(100)]
    file.write_text(f'["ws", "a"]\n{"".join(unknown)}nonsense\n')
    code, out, err = await command("stop", "-o", "json", "--from", file)
    found = {outcome["index"]: outcome for outcome in outcomes_of(out)}
    assert [(found[index]["alias"], found[index]["result"]) for index in (0, 100, 101)] == [
        ("a", "stopped"),
        ("x99", "not_found"),
        ("'nonsense' on line 102", "rejected"),
    ]
    assert err.startswith("1 of 102 no longer running, 100 unconfirmed, 1 invalid after ")
    assert code == 1
    assert emulator.status("ws", "a") == "stopped"


async def test_a_late_bad_line_is_shown_with_its_number_and_the_others_are_stopped(
    emulator: HoldingEmulator, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "targets"
    for number in range(100):
        emulator.add_runtime("ws", f"r{number}")
    many = b"".join(b"ws,r%d\r\n" % number for number in range(100))
    file.write_bytes(
        b"\xef\xbb\xbfworkspace_id,alias\r\n" + many + b"\r\na,b,c\r\nws,caf\xe9\r\nws,b\r\n"
    )
    code, out, err = await command("stop", "--from", file)
    bad, undecodable, account = out.splitlines()
    assert bad == (
        "'a,b,c' on line 103           rejected         invalid target 'a,b,c' on line 103: "
        "it has more columns than the first line"
    )
    assert undecodable.startswith("'ws,caf\N{REPLACEMENT CHARACTER}' on line 104 ")
    assert "  rejected  " in undecodable
    assert without_times(account) == (
        "101 of 103 no longer running, 2 invalid after 0.0 s: 101 stopped, 2 rejected"
    )
    assert (code, err) == (1, "")
    assert emulator.status("ws", "b") == "stopped"


async def test_after_ten_bad_lines_only_their_number_is_printed(
    emulator: HoldingEmulator, command: Command, tmp_path: Path
) -> None:
    """Fault: a file whose second half was garbage filled the screen, a line for each."""
    file = tmp_path / "targets"
    file.write_text("".join(f"ws,x{number}\n" for number in range(100)) + "nonsense\n" * 50)
    code, out, err = await command("stop", "--ignore-not-found", "--from", file)
    assert out.count("'nonsense' on line") == 2 * 10
    assert (code, err) == (1, "40 more invalid targets are not shown\n")
    assert emulator.received.total() == 100

    code, out, err = await command("stop", "--dry-run", "--from", file)
    assert err.count("nonsense") == 10
    assert err.endswith("Dry run: 100 to stop, 50 invalid\n")
    assert code == 1


async def test_a_fault_after_which_nothing_is_read_stops_nothing_of_a_file_and_ends_a_pipe(
    emulator: HoldingEmulator, command: Command, tmp_path: Path
) -> None:
    """Fault: the summary did not tell that half of the targets were never read."""
    file = tmp_path / "targets"
    many = "".join(f"ws,x{number}\n" for number in range(100))
    text = f'{many}ws,"runtime-of-a-customer\n{many.replace("x", "y")}'
    file.write_text(text)
    why = (
        " on line 101: a quote is missing, or a cell has several lines: export the two columns only"
    )
    for option in ((), ("--dry-run",)):
        refused, out, err = await command("stop", *option, "--from", file)
        assert (refused, out, err.count("\n")) == (2, "", 1)
        assert why.replace(":", " is not a target:", 1) in err
    assert emulator.requests == []

    # A busy machine would draw its progress.
    args = ("--ignore-not-found", "--quiet", "--from", "-")
    left = "; the input was not read to its end\n"
    code, out, err = await run_with_stdin(text, *args)
    line, account = out.splitlines(keepends=True)
    assert line.endswith(f"{why}; nothing after it was read\n")
    assert account.startswith("100 of 101 no longer running, 1 invalid after ")
    assert account.endswith(left)
    assert (code, err) == (1, "")
    assert {alias for _, alias in emulator.received} == {f"x{number}" for number in range(100)}

    code, out, _ = await run_with_stdin(text, "-o", "json", *args)
    (error,) = (found["error"] for found in outcomes_of(out) if found["result"] == "rejected")
    assert isinstance(error, dict)
    assert error["type"] == "BctrlConfigError"
    assert error["message"].endswith(f"{why}; nothing after it was read")
    assert code == 1

    code, _, err = await run_with_stdin(text, "--dry-run", "--from", "-")
    assert err.endswith(f"; nothing after it was read\nDry run: 100 to stop, 1 invalid{left}")
    assert code == 1


async def test_the_fault_that_ends_a_pipe_is_shown_below_any_number_of_bad_lines(
    emulator: HoldingEmulator,
) -> None:
    text = "ws,x\n" + "nonsense\n" * 50 + 'ws,"b\nws,c\n'
    why = " on line 52: a quote is missing, or a cell has several lines"
    args = ("--ignore-not-found", "--from", "-")
    _, out, err = await run_with_stdin(text, *args)
    assert out.count(why) == 1
    assert "40 more invalid targets are not shown\n" in err
    _, _, err = await run_with_stdin(text, "--dry-run", *args)
    assert err.count(why) == 1
    assert emulator.received == {("ws", "x"): 1}


INPUTS_THAT_ARE_NOT_TARGETS: dict[str, tuple[bytes, str]] = {
    "a PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "it is not UTF-8: save the file as UTF-8"),
    "HTML": (b"<!DOCTYPE html>\n<p>Log in, please", "line 1 is not a target: it is no header"),
    "HTML below blanks": (
        b"\n  <p>\n",
        "line 2 is not a target: it is no header",
    ),
    "HTML below a mark": (
        b"\xef\xbb\xbf\n<p>\n",
        "line 2 is not a target: it is no header",
    ),
    "an unclear delimiter": (b"ws;a,b\nws;c,d\n", "two delimiters fit: add a header"),
    "prose": (
        b"Good evening, all\nplease stop these:\nws,a\n",
        "it is no header and no pair",
    ),
    "UTF-16": ("ws,a\nws,b\n".encode("utf-16"), "it is not UTF-8: save the file as UTF-8"),
    "binary": (b"ws\0,a\0\nws\0,b\0\n", "it contains a control character"),
    "an .xlsx": (b"PK\x03\x04\x14", "it is no header and no pair"),
    "other columns": (b"runtime,host,cpu\nws,a,1\n", "it is no header and no pair"),
    "no alias": (b"workspace,host\nws,a\n", "the header has no column alias"),
    "no workspace": (b"host;name\nws;a\n", "the header has no column workspace_id"),
    "another object": (b'{"items": [["ws", "a"]]}\n', "the workspace id is missing"),
    "a broken line": (b"ws,a\nws,b\n\nws,c,d\nws,c\n", "'ws,c,d' on line 4 is not a target"),
    "Latin-1": (b"ws,a\nws,caf\xe9\n", "line 2 is not a target: it is not UTF-8"),
    "a note of two lines": (b'workspace,alias,note\nws,a,"x\ny"\n', "export the two columns only"),
    "pretty JSON": (
        b'{\n"workspace": "ws",\n"alias": "a"\n}\n{\n"workspace": "ws",\n"alias": "b"\n}\n',
        "JSON is a value on each line (jq -c), an array",
    ),
    "JSON below CSV": (b'ws,b\n{"workspace":"ws","alias":"a"}\n', "a quote is missing"),
}


@pytest.mark.parametrize(
    ("content", "reason"),
    INPUTS_THAT_ARE_NOT_TARGETS.values(),
    ids=INPUTS_THAT_ARE_NOT_TARGETS.keys(),
)
async def test_input_that_is_not_targets_is_reported_once_and_nothing_is_stopped(
    emulator: HoldingEmulator, command: Command, tmp_path: Path, content: bytes, reason: str
) -> None:
    """Fault: `--from` with an image printed a line for each of its lines, and sent some of them."""
    file = tmp_path / "file"
    file.write_bytes(content)
    code, out, err = await command("stop", "--from", file)
    assert reason in err
    assert err.count("\n") == err.count("Nothing was stopped") == 1
    assert err.removesuffix("\n").isprintable()
    assert (code, out) == (2, "")
    assert emulator.requests == []


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)], ids=["stop", "dry run"])
async def test_a_pipe_that_is_not_targets_is_reported_once_and_nothing_is_stopped(
    emulator: HoldingEmulator, dry_run: tuple[str, ...]
) -> None:
    code, out, err = await run_with_stdin("<!DOCTYPE html>\nws,a\n", *dry_run, "--from", "-")
    assert err.startswith("bctrl-async: error: stdin: '<!DOCTYPE html>' on line 1 is not a target:")
    assert err.count("\n") == 1
    assert (code, out) == (2, "")
    assert emulator.requests == []


@pytest.mark.parametrize("content", ["", "\n# none tonight\n", "workspace,alias\n", "[]"])
async def test_an_empty_input_exits_with_2_unless_allowed(
    emulator: HoldingEmulator, command: Command, tmp_path: Path, content: str
) -> None:
    """Fault: a pipe whose writer had failed before its first line was a success."""
    file = tmp_path / "targets"
    file.write_text(content)
    code, out, err = await command("stop", "--from", file)
    assert err == (
        f"bctrl-async: error: there are no targets in {file}. Add --allow-empty if that may be so\n"
    )
    assert (code, out) == (2, "")
    assert await run_with_stdin(content, "--from", "-") == (
        2,
        "",
        "bctrl-async: error: there are no targets in stdin. Add --allow-empty if that may be so\n",
    )

    for allowed in (
        await command("stop", "--allow-empty", "--from", file),
        await run_with_stdin(content, "--allow-empty", "--from", "-"),
    ):
        assert (allowed[0], without_times(allowed[1])) == (
            0,
            "0 of 0 no longer running after 0.0 s\n",
        )
    assert emulator.requests == []


async def run_with_stdin(content: str, *args: str) -> tuple[int | None, str, str]:
    process = await start(*program(), "stop", *args, stdin=asyncio.subprocess.PIPE)
    write(process, content)
    assert process.stdin is not None
    process.stdin.close()
    return await finish(process)


@pytest.mark.parametrize("name", ["stdin", "./stdin", "./-"])
async def test_only_a_dash_is_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Fault: a file with the name of stdin was not read, but stdin was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("ws,of-the-file\n")
    _, out, _ = await run_with_stdin("ws,of-stdin\n", "--dry-run", "--from", name)
    assert json.loads(out)["alias"] == "of-the-file"


async def test_a_pipe_is_not_read_to_its_end_where_a_folder_is_named_like_it(
    emulator: HoldingEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").mkdir()
    process = await start(*program(), "stop", "-q", "--from", "-", stdin=asyncio.subprocess.PIPE)
    write(process, "ws,a\n")
    await until(lambda: emulator.status("ws", "a") == "stopped")
    assert process.stdin is not None
    process.stdin.close()
    assert await finish(process) == (0, "", "")


async def test_a_line_of_a_slow_pipe_is_stopped_before_the_next_arrives(
    emulator: HoldingEmulator,
) -> None:
    process = await start(*program(), "stop", "-q", "--from", "-", stdin=asyncio.subprocess.PIPE)
    for alias in "abc":
        write(process, f"ws,{alias}\n")
        await until(lambda alias=alias: emulator.status("ws", alias) == "stopped")  # type: ignore[misc]
    assert process.returncode is None
    assert process.stdin is not None
    process.stdin.close()
    assert await finish(process) == (0, "", "")


async def test_stdin_can_be_a_file(emulator: HoldingEmulator, targets: Path) -> None:
    file = os.open(targets, os.O_RDONLY)
    process = await start(*program(), "stop", "-q", "--from", "-", stdin=file)
    os.close(file)
    assert await finish(process) == (0, "", "")
    assert emulator.received.total() == 3


async def test_targets_can_be_typed_without_a_progress_drawn_over_them(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: `--from -` waited for a terminal without a word."""
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.fd)
    process = await start(*program(), "stop", "--from", "-", **streams)
    await terminal.until("Reading targets from the terminal, a line each; end with Ctrl-D\n")
    os.write(terminal._master, b"ws,a\n")
    await until(lambda: emulator.status("ws", "a") == "stopped")
    os.write(terminal._master, b"ws,b\n\x04")
    assert (await finish(process))[0] == 0
    assert without_times(await terminal.rest()) == (
        "Reading targets from the terminal, a line each; end with Ctrl-D\n"
        "ws,a\nws,b\n"
        "2 of 2 no longer running after 0.0 s: 2 stopped\n"
    )


async def test_closed_stdin_is_a_usage_error() -> None:
    closing = ("/bin/sh", "-c", 'exec "$@" <&-', "sh")
    code, out, err = await finish(await start(*closing, *program(), "stop", "--from", "-"))
    assert err == ("bctrl-async: error: cannot read stdin: it is closed\n")
    assert (code, out) == (2, "")


@pytest.mark.parametrize(
    ("name", "why"), [("missing", "No such file or directory"), (".", "Is a directory")]
)
async def test_an_unreadable_file_is_a_usage_error(
    command: Command, tmp_path: Path, name: str, why: str
) -> None:
    code, out, err = await command("stop", "--from", tmp_path / name)
    assert err == f"bctrl-async: error: cannot read {tmp_path / name}: {why}\n"
    assert (code, out) == (2, "")


async def test_a_pipe_that_fails_later_exits_with_1(
    command: Command, targets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bctrl_async.cli._targets.stat.S_IFMT", lambda _: stat.S_IFIFO)
    with FileIO(targets, "w") as write_only:
        monkeypatch.setattr("sys.stdin", write_only)
        code, out, err = await command("stop", "--from", "-")
    assert err == "bctrl-async: error: cannot read all targets: Bad file descriptor\n"
    assert without_times(out) == (
        "0 of 0 no longer running after 0.0 s; the input was not read to its end\n"
    )
    assert code == 1


async def test_a_list_that_is_written_anew_while_it_is_stopped_is_stopped_as_it_was(
    emulator: HoldingEmulator, targets: Path
) -> None:
    """Fault: a part of a row was stopped."""
    emulator.held.add("a")
    process = await start(*program(), "stop", "-q", "--concurrency", "1", "--from", targets)
    await until(lambda: emulator.status("ws", "a") == "stopped")
    fill(targets, "ws,other")
    emulator.held.clear()
    code, _, err = await finish(process)
    assert (code, err) == (0, "")
    assert [request.alias for request in emulator.stops] == ["a", "b", "c"]


# Journal


async def test_the_same_command_resumes_from_its_journal(
    emulator: HoldingEmulator, command: Command, targets: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    emulator.inject(*[Fault.SERVER_ERROR] * 4, alias="b")
    args = ("stop", "--no-verify", "--journal", journal, "--from", targets)
    assert (await command(*args))[0] == 1
    assert KEY not in journal.read_text()
    emulator.received.clear()

    code, out, err = await command(*args, "-o", "json")

    assert emulator.received == {("ws", "b"): 1}
    resumed = {outcome["alias"]: outcome["resumed"] for outcome in outcomes_of(out)}
    assert resumed == {"a": True, "b": False, "c": True}
    assert set(results_of(out)) == {"stopped"}
    assert (code, without_times(err)) == (
        0,
        "3 of 3 no longer running after 0.0 s: 3 stopped; 2 from an earlier run, not sent again\n",
    )
    assert KEY not in journal.read_text()


async def test_a_journal_in_use_exits_with_75(
    emulator: HoldingEmulator, command: Command, tmp_path: Path
) -> None:
    """Fault: it is 2, and a supervisor gives up while a file server holds a dead client's lock."""
    path = tmp_path / "journal"
    journal = Journal(path, f"{emulator.url}/v1")
    code, out, err = await command("stop", "--journal", path, "ws", "a")
    journal.close()
    assert err.startswith(f"bctrl-async: error: the journal '{path}' is in use by another run. ")
    assert (code, out, err.count("\n")) == (75, "", 1)
    assert not emulator.requests


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
async def test_a_file_that_is_not_a_journal_of_this_server_exits_with_2_and_is_unchanged(
    emulator: HoldingEmulator, command: Command, tmp_path: Path, option: tuple[str, ...]
) -> None:
    foreign, elsewhere = tmp_path / "foreign", tmp_path / "elsewhere"
    foreign.write_text("workspace,alias\n")
    Journal(elsewhere, "https://other.test/v1").close()
    for path, why in [
        (foreign, "cannot be used: it is not a journal"),
        (elsewhere, "cannot be used: it is of another server, https://other.test/v1"),
    ]:
        before = path.read_bytes()
        code, out, err = await command("stop", *option, "--journal", path, "ws", "a")
        assert err.startswith(f"bctrl-async: error: the journal '{path}' ")
        assert why in err
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert path.read_bytes() == before
    assert not emulator.requests


# Dry run


async def test_a_dry_run_needs_no_key_and_prints_lines_for_from(
    emulator: HoldingEmulator,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    targets: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("BCTRL_API_KEY")
    code, out, err = await command("stop", "--dry-run", "--from", targets)
    assert outcomes_of(out) == [{"workspace_id": "ws", "alias": alias} for alias in "abc"]
    assert err == "Dry run: 3 to stop, 0 invalid\n"
    assert code == 0
    assert not emulator.requests

    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    again = tmp_path / "again"
    again.write_text(out)
    assert (await command("stop", "--from", again))[0] == 0
    assert {emulator.status("ws", alias) for alias in "abc"} == {"stopped"}


async def test_a_dry_run_with_invalid_targets_exits_with_1(
    emulator: HoldingEmulator,
) -> None:
    code, out, err = await run_with_stdin('ws,a\n"ws","日本"\nws,..', "--dry-run", "--from", "-")
    assert [outcome["alias"] for outcome in outcomes_of(out)] == ["a", "日本"]
    dots, account = err.splitlines()
    assert dots.startswith("bctrl-async: error: alias '..' ")
    assert account == "Dry run: 2 to stop, 1 invalid"
    assert code == 1
    assert not emulator.requests


async def test_a_dry_run_does_not_create_a_journal(
    emulator: HoldingEmulator, command: Command, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    code, _, err = await command("stop", "--dry-run", "--journal", journal, "ws", "a")
    assert (code, err) == (0, "Dry run: 1 to stop, 0 invalid\n")
    assert not journal.exists()
    assert not emulator.requests


# Limits


async def test_rate_limits_the_requests_per_second(
    emulator: HoldingEmulator, command: Command
) -> None:
    code, out, _ = await command("stop", "--rate", "10", "ws", "a", "b", "c")
    took = re.search(r"no longer running after (\d+\.\d+) s", out)
    assert took is not None
    assert float(took[1]) >= 0.17
    assert code == 0
    assert len(emulator.requests) == 3


async def test_the_deadline_aborts_the_run_and_exits_with_1(
    emulator: HoldingEmulator,
    command: Command,
    targets: Path,
    pass_time_in_run: Callable[[float], object],
) -> None:
    emulator.held.add("b")
    limits = ("--deadline", "50s", "--concurrency", "1")
    running = asyncio.create_task(command("stop", *limits, "--from", targets))
    await until(lambda: emulator.received["ws", "b"])
    pass_time_in_run(50)
    code, out, err = await running
    line, account = out.splitlines()
    assert line.startswith(f"{'ws b':28}  unknown          aborted before an answer: the deadline ")
    assert without_times(account) == (
        "1 of 3 no longer running, 2 unconfirmed after 0.0 s: 1 stopped, 1 not_sent, 1 unknown"
    )
    assert err == "bctrl-async: error: ended early: the deadline of 50s has passed\n"
    assert code == 1


# Signals


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("option", [(), ("-o", "json")])
async def test_the_first_ctrl_c_stops_reading_and_waits_for_requests_in_flight(
    emulator: HoldingEmulator, option: tuple[str, ...], signal_: signal.Signals
) -> None:
    emulator.held.add("b")
    args = ("stop", *option, "--concurrency", "1", "ws", "a", "b", "c", "d")
    process = await start(*program(), *args)
    await until(lambda: len(emulator.requests) == 2)

    said = await begin_to_end(process, signal_)
    assert said == f"1 of 4 sent, 1 in flight, {NOTICE}, 1 stopped\n"
    emulator.held.clear()
    code, out, err = await finish(process)

    if option:
        outcomes = outcomes_of(out)
        assert [outcome["index"] for outcome in outcomes] == [0, 1, 2, 3]
        assert [outcome["attempts"] for outcome in outcomes] == [1, 1, 0, 0]
        results = results_of(out)
    else:
        *lines, account = out.splitlines()
        results = [line.split()[1] for line in lines]
        assert without_times(account) == (
            "Interrupted: 2 of 4 no longer running, 2 unconfirmed after 0.0 s: "
            "2 stopped, 2 not_sent"
        )
    assert results == ["stopped", "stopped", "not_sent", "not_sent"]
    assert (code, bool(without_notices(err))) == (130, bool(option))
    assert len(emulator.requests) == 2


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("option", [(), ("-o", "json")])
async def test_the_second_ctrl_c_aborts_with_an_outcome_for_every_alias(
    emulator: HoldingEmulator, option: tuple[str, ...], signal_: signal.Signals
) -> None:
    emulator.held.add("b")
    args = ("stop", *option, "--concurrency", "1", "ws", "a", "b", "c", "d")
    process = await start(*program(), *args)
    await until(lambda: len(emulator.requests) == 2)

    await begin_to_end(process, signal_)
    process.send_signal(signal_)
    code, out, err = await finish(process)

    if option:
        outcomes = sorted(outcomes_of(out), key=lambda outcome: str(outcome["index"]))
        assert [outcome["index"] for outcome in outcomes] == [0, 1, 2, 3]
        assert [outcome["attempts"] for outcome in outcomes] == [1, 1, 0, 0]
        results = [str(outcome["result"]) for outcome in outcomes]
    else:
        *lines, account = out.splitlines()
        assert [line.split()[0] for line in lines] == ["a", "b", "c", "d"]
        results = [line.split()[1] for line in lines]
        assert without_times(account) == (
            "Interrupted: 1 of 4 no longer running, 3 unconfirmed after 0.0 s: "
            "1 stopped, 2 not_sent, 1 unknown"
        )
    assert results == ["stopped", "unknown", "not_sent", "not_sent"]
    assert (code, bool(without_notices(err))) == (130, bool(option))


@pytest.mark.parametrize("signals", [1, 2])
async def test_a_run_interrupted_by_ctrl_c_can_be_resumed(
    emulator: HoldingEmulator, command: Command, targets: Path, tmp_path: Path, signals: int
) -> None:
    journal = tmp_path / "journal"
    emulator.held.add("b")
    args = ("stop", "--journal", journal, "--concurrency", "1", "--from", targets)
    process = await start(*program(), *args)
    await until(lambda: len(emulator.requests) == 2)
    await begin_to_end(process)
    if signals == 2:
        process.send_signal(signal.SIGTERM)
    else:
        emulator.held.clear()
    code, out, err = await finish(process)
    emulator.held.clear()
    assert err.endswith("Run the same command again to resume\n")

    *lines, account = out.splitlines()
    result = "stopped" if signals == 1 else "unknown"
    assert [line.split()[:3] for line in lines] == [["ws", "b", "unknown"]] * (signals - 1)
    assert account.startswith(
        f"Interrupted: {3 - signals} of 3 no longer running, {signals} unconfirmed"
    )
    found = read_lines(journal.read_bytes()).entries
    noted = {line["alias"]: line["result"] for line in found}
    assert noted == {"a": "stopped", "b": result, "c": "not_sent"}
    assert code == 130

    assert (await command(*args))[0] == 0
    assert emulator.received == {("ws", "a"): 1, ("ws", "b"): signals, ("ws", "c"): 1}


async def test_ctrl_c_ends_the_wait_for_an_open_pipe(
    emulator: HoldingEmulator,
) -> None:
    process = await start(*program(), "stop", "--from", "-", stdin=asyncio.subprocess.PIPE)
    write(process, "ws,a\n")
    await until(lambda: emulator.status("ws", "a") == "stopped")
    process.send_signal(signal.SIGINT)
    code, out, err = await finish(process)
    assert without_times(out) == (
        "Interrupted: 1 of 1 no longer running after 0.0 s: 1 stopped; "
        "the input was not read to its end\n"
    )
    assert (code, without_notices(err)) == (130, "")


async def test_without_signal_handlers_cancellation_counts_as_an_interrupt(
    emulator: HoldingEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    emulator.held.add("a")
    shown: list[StopOutcome] = []

    async def stop() -> _run.FinishedRun:
        session = BctrlSession(KEY, base_url=emulator.url, max_connections=1)
        targets = [RuntimeRef("ws", "a"), RuntimeRef("ws", "b")]
        batch = partial(session.stop_runtimes, targets, on_outcome=shown.append)
        stopping = asyncio.create_task(_run.run_stops(session, batch, _output.Output()))
        await until(lambda: emulator.requests)
        stopping.cancel()
        return await stopping

    finished = await asyncio.to_thread(asyncio.run, stop())

    assert finished.interrupted
    assert [outcome.result for outcome in shown] == [StopResult.UNKNOWN, StopResult.NOT_SENT]
    assert finished.report.counts == {StopResult.UNKNOWN: 1, StopResult.NOT_SENT: 1}
    assert capfd.readouterr() == ("", "")


# Progress


async def test_progress_is_a_line_every_few_seconds_without_a_terminal(
    emulator: HoldingEmulator,
    command: Command,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_progress, "_LINE_EVERY", 0.05)
    emulator.held.add("b")
    running = asyncio.create_task(command("stop", "--concurrency", "1", "ws", "a", "b", "c"))
    err = ""
    async with asyncio.timeout(BOUND):
        while "1 of 3 done, 1 in flight, 1 stopped\n" not in err:
            await asyncio.sleep(0.01)
            err += capfd.readouterr().err
    emulator.held.clear()
    code, _, more = await running
    assert code == 0
    assert all(re.match(r"\d of 3 done, ", line) for line in (err + more).splitlines())


async def test_progress_is_dropped_if_stderr_is_closed(emulator: HoldingEmulator) -> None:
    emulator.held.add("a")
    closing = ("/bin/sh", "-c", 'exec "$@" 2>&-', "sh")
    # Started anew, since nothing shows when a signal that is forwarded has arrived.
    process = await start(*closing, sys.executable, "-m", "bctrl_async", "stop", "ws", "a")
    await until(lambda: emulator.requests)
    process.send_signal(signal.SIGINT)
    emulator.held.clear()
    code, out, err = await finish(process)
    assert re.fullmatch(
        r"a  stopped +0\.0 s\n(Interrupted: )?1 of 1 no longer running after 0\.0 s: 1 stopped\n",
        without_times(out),
    )
    assert (code, err) == (130 if "Interrupted" in out else 0, "")


async def test_the_progress_bar_disappears_at_the_end(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    emulator.held.add("b")
    terminal = Terminal()
    process = await start(
        *program(),
        *("stop", "--concurrency", "1", "ws", "a", "b", "c"),
        stdout=terminal.fd,
        stderr=terminal.fd,
    )
    await terminal.until_drawn("a  stopped .*\n1 of 3 ━.{72}\n1 in flight\n1 stopped")

    emulator.held.clear()
    await terminal.rest()

    assert [without_times(line) for line in terminal.screen] == [
        "a  stopped          0.0 s",
        "b  stopped          0.0 s",
        "c  stopped          0.0 s",
        "3 of 3 no longer running after 0.0 s: 3 stopped",
    ]
    async with asyncio.timeout(BOUND):
        assert await process.wait() == 0


async def test_quiet_draws_no_progress(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    emulator.held.add("a")
    terminal = Terminal()
    results = tmp_path / "results"
    with results.open("wb") as file:
        files = {"stdout": file.fileno(), "stderr": terminal.fd}
        process = await start(*program(), "stop", "-q", "-o", "json", "ws", "a", "b", **files)
    await until(lambda: '"alias": "b", "result": "stopped"' in results.read_text())
    # The bar would appear after 0.4 s.
    await asyncio.sleep(1)
    emulator.held.clear()
    assert await terminal.rest() == ""
    assert (await finish(process))[0] == 0
    assert results.read_text().count("\n") == 2


async def test_progress_goes_to_stderr_and_has_no_bar_for_a_pipe_of_targets(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    results = tmp_path / "results"
    with results.open("wb") as file:
        files = {"stdout": file.fileno(), "stderr": terminal.fd}
        process = await start(
            *program(), "stop", "--from", "-", stdin=asyncio.subprocess.PIPE, **files
        )
    write(process, "ws,a\nws,..\n")
    await terminal.until_drawn(r"(.*\n)*0 in flight\n1 stopped, 1 rejected")
    assert "━" not in terminal.text
    assert process.stdin is not None
    process.stdin.close()
    await terminal.rest()
    assert terminal.screen == [""]
    code, _, _ = await finish(process)
    line, account = results.read_text().splitlines()
    assert line.startswith("ws ..  ")
    assert (
        without_times(account)
        == "1 of 2 no longer running, 1 invalid after 0.0 s: 1 stopped, 1 rejected"
    )
    assert code == 1
    assert emulator.status("ws", "a") == "stopped"


async def test_nothing_is_drawn_beside_a_pipe_for_the_results(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: what `| jq` printed on the same terminal was erased when progress was drawn anew."""
    monkeypatch.setenv("TERM", "xterm")
    emulator.held.add("a")
    terminal = Terminal()
    process = await start(*program(), "stop", "-o", "json", "ws", "a", stderr=terminal.fd)
    await until(lambda: emulator.received["ws", "a"])
    process.send_signal(signal.SIGINT)
    await terminal.until(NOTICE)
    emulator.held.clear()
    code, out, _ = await finish(process)
    assert (json.loads(out)["result"], code) == ("stopped", 130)
    assert "\x1b" not in await terminal.rest()
    line, _ = terminal.text.splitlines()
    assert line.startswith("0 of 1 sent, 1 in flight")


@pytest.mark.parametrize(("kind", "draws"), [("pipe", False), ("file", True), ("closed", True)])
def test_progress_is_drawn_on_a_terminal_unless_stdout_is_a_pipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, *, draws: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    if kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(tmp_path / "results", os.O_CREAT | os.O_WRONLY)
    with os.fdopen(writer, "w") as stdout, os.fdopen(Terminal().fd, "w") as stderr:
        monkeypatch.setattr("sys.stdout", None if kind == "closed" else stdout)
        monkeypatch.setattr("sys.stderr", stderr)
        console, is_live = _output.Output().progress_console()
        assert (console.file, is_live) == (stderr, draws)


async def test_ctrl_c_on_a_terminal_announces_the_second_one_and_keeps_the_summary_intact(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    emulator.held.add("a")
    terminal = Terminal()
    process = await start(*program(), "stop", "ws", "a", stdout=terminal.fd, stderr=terminal.fd)
    await terminal.until("1 in flight")
    process.send_signal(signal.SIGINT)
    await terminal.until(f"1 in flight, {NOTICE}")
    process.send_signal(signal.SIGINT)
    await terminal.rest()
    first, *_, account = terminal.screen
    assert first.startswith("a  unknown ")
    assert (
        without_times(account)
        == "Interrupted: 0 of 1 no longer running, 1 unconfirmed after 0.0 s: 1 unknown"
    )
    async with asyncio.timeout(BOUND):
        assert await process.wait() == 130


async def test_an_early_ctrl_c_begins_a_new_line_for_the_summary(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(_progress, "_SHOW_AFTER", 3600)
    emulator.held.add("a")
    output = _output.Output()
    lines: list[object] = []
    monkeypatch.setattr(output, "progress_console", lambda: (output, True))
    monkeypatch.setattr(output, "end_line", lambda: lines.append("\n"))

    async with BctrlSession(KEY, base_url=emulator.url) as session:
        batch = session.stop_runtimes([("ws", "a")])
        running = asyncio.create_task(_run.run_with_progress(batch, output))
        await until(lambda: emulator.requests)
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: lines)
        emulator.held.clear()
        assert await running
    assert lines == ["\n"]
    assert batch.report.ok
