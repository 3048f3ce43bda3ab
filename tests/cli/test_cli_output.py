"""What the command prints: lines, JSON Lines, never raw, and what cannot be written."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
from commands import FULL, finish, outcomes_of, save, start, start_on_terminal, without_times
from helpers import Command, HoldingEmulator
from journal_lines import header_line
from servers import answering, http_answer, raw_server
from warm_server import program

from bctrl_async.cli import _app
from bctrl_async.emulator import Fault, Reply

FORBIDDEN = Reply(403, code="workspace.forbidden")
ADVICE = "Use a key with access to this workspace"
ONE_AT_A_TIME = ("stop", "--no-verify", "--concurrency", "1")


@pytest.fixture(autouse=True)
def _environment(holding: HoldingEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number in range(30):
        holding.add_runtime("ws", f"r{number}")
        holding.poison("ws", f"r{number}", FORBIDDEN if number % 3 else Fault.ACCEPTED)
    monkeypatch.chdir(tmp_path)
    save("all.csv", "".join(f"ws,r{number}\n" for number in range(30)))


async def test_every_alias_gets_an_aligned_line(holding: HoldingEmulator, command: Command) -> None:
    holding.inject(Fault.RATE_LIMITED, None, alias="b")
    holding.inject(Fault.UNKNOWN_VALUES, alias="c")
    holding.inject(Fault.MALFORMED_JSON, alias="日本")
    holding.add_runtime("ws", "日本")
    holding.add_runtime("ws", "d", status="stopped")

    options = ("--no-verify", "--ignore-not-found", "--concurrency", "1")
    code, out, err = await command("stop", *options, "ws", "a", "b", "c", "d", "日本", "nobody")
    assert without_times(out) == (
        "a       stopped          0.0 s\n"
        "b       stopped          0.0 s, 2 attempts\n"
        "c       accepted         0.0 s, status paused (unconfirmed)\n"
        "d       already_stopped  0.0 s\n"
        "日本    accepted         the server answered 200, but the body is not JSON\n"
        "nobody  not_found        0.0 s\n"
        "4 of 6 no longer running, 2 unconfirmed after 0.0 s: "
        "2 stopped, 2 accepted, 1 already_stopped, 1 not_found\n"
    )
    assert (code, err) == (1, "")


async def test_json_is_an_object_for_each_alias_in_ascii(
    holding: HoldingEmulator, command: Command
) -> None:
    holding.add_runtime("ws", "é")
    holding.inject(Fault.DROP_BEFORE, None, alias="é")
    aliases = ("é", "nobody", "..", "a\udcff")
    code, out, err = await command("stop", "-o", "json", "--ignore-not-found", "ws", *aliases)

    assert out.isascii()
    found = sorted(outcomes_of(out), key=lambda outcome: str(outcome["index"]))
    for outcome in found:
        assert isinstance(outcome.pop("elapsed"), float)
        age = datetime.now(UTC) - datetime.fromisoformat(str(outcome.pop("at")))
        assert timedelta() <= age < timedelta(minutes=1)
    stopped, missing, *invalid = found
    assert stopped.pop("runtime") == holding.runtimes["ws", "é"]
    assert (stopped["alias"], stopped["result"], stopped["attempts"]) == ("é", "stopped", 2)
    assert (missing["alias"], missing["result"], missing["ok"]) == ("nobody", "not_found", True)
    assert (missing["runtime"], missing["error"]) == (None, None)
    assert [(each["result"], each["attempts"]) for each in invalid] == [("rejected", 0)] * 2
    assert (code, without_times(err)) == (
        1,
        "2 of 4 no longer running, 2 invalid after 0.0 s: 1 stopped, 1 not_found, 2 rejected\n",
    )


async def test_the_json_of_a_list_can_be_stopped_whatever_its_names(
    holding: HoldingEmulator, command: Command, tmp_path: Path
) -> None:
    for alias in ('d"e', "f,g", "h; [i]", "日本", " j"):
        holding.add_runtime("other", alias)
    file = tmp_path / "list.jsonl"
    file.write_text((await command("list", "-o", "json", "other"))[1], "ascii")
    assert (await command("stop", "--from", file))[0] == 0
    stopped = {key for key, fields in holding.runtimes.items() if fields["status"] == "stopped"}
    assert stopped == {key for key in holding.runtimes if key[0] == "other"}


# Each reason is explained once


async def test_each_reason_gets_a_line_and_then_a_count(command: Command) -> None:
    code, out, err = await command(*ONE_AT_A_TIME, "--from", "all.csv", "--journal", "j.jsonl")
    first, second, *others, _ = out.splitlines()
    assert first.split()[:3] == ["ws", "r0", "accepted"]
    assert second.split()[:3] == ["ws", "r1", "rejected"]
    assert others == [
        "19 more rejected (403 workspace.forbidden): ws r2, ws r4, ws r5 and 16 more",
        "9 more accepted (status active): ws r3, ws r6, ws r9 and 6 more",
    ]
    assert out.count(ADVICE) == 1
    assert (code, err) == (1, "")
    assert others[0] in (await command("report", "j.jsonl"))[1]


async def test_reasons_that_differ_in_numbers_only_are_one(
    command: Command, holding: HoldingEmulator
) -> None:
    for number in range(3):
        holding.poison("ws", f"r{number}", Reply(403, code=f"quota.of_{number}"))
    _, out, _ = await command(*ONE_AT_A_TIME, "--from", "all.csv")
    assert "\n2 more rejected (403 quota.of_0): ws r1, ws r2\n" in out


async def test_every_alias_has_a_line_but_the_advice_stands_once(command: Command) -> None:
    aliases = ("r0", "r1", "r2", "r3", "r4")
    _, out, err = await command(*ONE_AT_A_TIME, "ws", *aliases)
    lines = out.splitlines()
    assert tuple(line.split()[0] for line in lines[:5]) == aliases
    assert "rejected         the server answered 403 workspace.forbidden" in lines[4]
    assert "status active (still running)" in lines[3]
    assert out.count(ADVICE) == 1
    assert err == ""


async def test_a_long_line_wraps_between_words_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: the reason of a target of a list had 33 columns of 80."""
    monkeypatch.setenv("TERM", "xterm")
    args = (*ONE_AT_A_TIME, "-q", "--from", "all.csv")
    process, terminal = await start_on_terminal(*args, streams=("stdout",))
    text = await terminal.rest()
    assert (await finish(process))[0] == 1
    assert re.search(r"ws r1 +rejected +the\s+server\s+answered\s+403 ", text)
    assert all(len(line) <= 80 for line in text.splitlines())


async def test_a_name_is_cut_at_a_bound(command: Command) -> None:
    _, out, _ = await command("stop", "ws", "a" * 300)
    assert out.startswith(f"{'a' * 100}...  not_found")


# Terminals

# A window title, a color, C1 controls, reversed text, zero-width and isolated text, a line end.
HOSTILE = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e\u200b\u2066\nall stopped\x7f"


def hostile_runtime(**fields: object) -> dict[str, object]:
    names = ("alias", "kind", "status", "driver", "createdAt", "updatedAt")
    id_ = "7b1f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f"
    return {**dict.fromkeys(names, HOSTILE), "id": id_, "workspaceId": id_, **fields}


def list_of(*runtimes: dict[str, object]) -> bytes:
    return http_answer("200 OK", json.dumps({"runtimes": runtimes}).encode())


def assert_harmless(*texts: str) -> None:
    for text in texts:
        assert all(line.isprintable() for line in text.split("\n")), ascii(text)
        assert "\nall stopped" not in text


@pytest.mark.parametrize("options", [(), ("-o", "json")])
@pytest.mark.parametrize(
    "answer",
    [
        http_answer("200 OK", json.dumps(hostile_runtime(alias="a")).encode()),
        http_answer(
            "400 No",
            json.dumps(
                dict.fromkeys(("code", "error", "hint", "requestId", "reasonClass"), HOSTILE)
            ).encode(),
        ),
        http_answer("403 No", HOSTILE.encode()),
        b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nX-Request-Id: \x1b]0;owned\xe2\x80\xae\r\n\r\n",
        b"HTTP/1.1 302 No\r\nContent-Length: 0\r\nLocation: /\xe2\x80\xae\xc2\x9b\r\n\r\n",
        b"HTTP/1.1 500 \x1b]0;owned\x07\r\nContent-Length: 0\r\nX: \x9b\r\n\r\n",
        b"\x1b]0;owned\x07\r\n\r\n",
    ],
    ids=["runtime", "error", "text", "request id", "location", "reason", "not http"],
)
async def test_no_answer_to_a_stop_reaches_the_terminal_raw(
    command: Command, answer: bytes, options: tuple[str, ...]
) -> None:
    """Fault: escape sequences in a runtime's status set the window's title."""
    async with raw_server(answering(answer)) as url:
        _, out, err = await command("stop", "--no-verify", *options, "--base-url", url, "ws", "a")

    assert_harmless(out, err)
    assert len(out.splitlines()) == (1 if options else 2)


@pytest.mark.parametrize("options", [(), ("-o", "json")])
async def test_no_field_of_a_runtime_reaches_the_terminal_raw(
    command: Command, options: tuple[str, ...]
) -> None:
    async with raw_server(
        answering(list_of(hostile_runtime(), hostile_runtime(id=HOSTILE)))
    ) as url:
        code, out, err = await command("list", *options, "--base-url", url, "ws")
    assert_harmless(out, err)
    assert (code, len(out.splitlines())) == (1, 1 if options else 2)

    answer = http_answer("200 OK", json.dumps(hostile_runtime(alias="a")).encode())
    async with raw_server(answering(answer)) as url:
        code, out, err = await command("get", *options, "--base-url", url, "ws", "a")
    assert_harmless(out, err)
    assert (code, len(out.splitlines())) == (0, 1 if options else 9)


async def test_no_field_of_a_runtime_reaches_the_terminal_raw_at_the_question() -> None:
    async with raw_server(answering(list_of(hostile_runtime(status="active")))) as url:
        args = ("stop", "--base-url", url, "ws", "--all")
        process, terminal = await start_on_terminal(*args, streams=("stdin", "stderr"))
        await terminal.until(r"Stop 1 runtime\? ")
        os.write(terminal._master, b"n\n")
        await finish(process)
    assert_harmless(await terminal.rest())


@pytest.mark.parametrize("option", [(), ("-o", "json"), ("--dry-run",)])
async def test_no_line_of_an_input_file_reaches_the_terminal_raw(
    holding: HoldingEmulator, command: Command, tmp_path: Path, option: tuple[str, ...]
) -> None:
    file = tmp_path / "targets.txt"
    file.write_text(f"{HOSTILE}\n" + json.dumps({"workspace_id": HOSTILE, "alias": HOSTILE}))
    _, out, err = await command("stop", "--from", file, *option)
    assert_harmless(out, err)
    assert holding.requests == []


async def test_forced_color_does_not_wrap_lines_in_a_file(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    code, out, _ = await command("stop", "--ignore-not-found", "ws", "a", "nobody")
    assert "\x1b[32m" in out
    assert (code, len(out.splitlines())) == (0, 3)


async def test_an_unencodable_alias_does_not_end_the_run(
    holding: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding.add_runtime("ws", "é")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, out, _ = await finish(await start(*program(), "stop", "ws", "é"))
    assert (code, out.partition("  ")[0]) == (0, r"\xe9")


# What cannot be written


@pytest.mark.parametrize("form", ["json", "table"])
async def test_the_stops_go_on_if_the_reader_of_stdout_leaves(
    holding: HoldingEmulator, form: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = await start(*program(), "stop", "-o", form, "ws", "a", "b", "c", stdout=writer)
    os.close(writer)
    code, _, err = await finish(process)
    assert {holding.status("ws", alias) for alias in "abc"} == {"stopped"}
    summary = "3 of 3 no longer running after 0.0 s: 3 stopped\n"
    assert (code, without_times(err)) == (0, summary if form == "json" else "")


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(
    "args",
    [
        *("stop ws a b", "stop --dry-run ws a", "list ws", "get ws a", "doctor ws"),
        *(
            "--version",
            "stop --help",
            "emulator --port 0",
            "report j.jsonl --from /dev/null --allow-empty",
        ),
    ],
)
async def test_the_stops_go_on_if_stdout_is_on_a_full_disk(
    holding: HoldingEmulator, args: str
) -> None:
    save("j.jsonl", header_line("https://api.test/v1", datetime.now(UTC)))
    full = os.open(FULL, os.O_WRONLY)
    process = await start(*program(), *args.split(), stdout=full)
    os.close(full)
    code, _, err = await finish(process)
    said = "bctrl-async: error: cannot write to stdout: No space left on device\n"
    assert (code, err.count(said), err.count("error")) == (1, 1, 1)
    assert ("Dry run: 1 to stop, 0 invalid\n" in err) is ("--dry-run" in args)
    assert holding.status("ws", "b") == ("stopped" if args == "stop ws a b" else "active")


async def test_a_stdout_that_the_shell_has_closed_exits_with_1() -> None:
    line = shlex.join([*program(), "list", "ws"])
    code, _, err = await finish(await start("sh", "-c", f"{line} >&-"))
    assert err.startswith("bctrl-async: error: cannot write to stdout: Bad file descriptor\n")
    assert code == 1


async def test_an_error_of_the_system_is_not_blamed_on_stdout(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Mock(side_effect=OSError(errno.EMFILE, "Too many open files"))
    monkeypatch.setattr(_app, "app", MagicMock(parse_args=failing))
    code, out, err = await command("stop", "ws", "a")
    assert (code, out, err) == (1, "", "bctrl-async: error: [Errno 24] Too many open files\n")
