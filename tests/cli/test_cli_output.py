"""The output of the command: JSON Lines, and lines for terminals, never raw."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from datetime import UTC, datetime
from unittest.mock import MagicMock, Mock

import pytest
from support.commands import (
    Command,
    finish,
    outcomes_of,
    save,
    start,
    start_on_terminal,
    without_times,
)
from support.journal_lines import header_line
from support.runtimes import WIRE
from support.servers import answering, http_answer, raw_server
from support.warm_server import program

from bctrl_async.cli import _app
from bctrl_async.emulator import Emulator, Fault, Reply


@pytest.fixture(autouse=True)
def _runtime(holding: Emulator) -> None:
    holding.add_runtime("ws", "é")


async def test_json_is_an_object_for_each_alias_in_ascii(command: Command) -> None:
    command.api.inject(Fault.DROP_BEFORE, None, alias="é")
    aliases = ("é", "nobody", "..", "a\udcff")
    code, out, err = await command(
        "stop", "-o", "json", "--ignore-not-found", "ws", *aliases
    )

    assert out.isascii()
    found = sorted(outcomes_of(out), key=lambda outcome: str(outcome["index"]))
    names = ("alias", "result", "ok", "attempts", "runtime")
    assert [tuple(outcome[name] for name in names) for outcome in found] == [
        ("é", "stopped", True, 2, command.api.runtimes["ws", "é"]),
        ("nobody", "not_found", True, 1, None),
        ("..", "invalid", False, 0, None),
        ("a?", "invalid", False, 0, None),
    ]
    assert [outcome["error"] is None for outcome in found] == [True, True, False, False]
    assert (code, err.startswith("2 of 4 no longer running, 2 unconfirmed after ")) == (
        1,
        True,
    )


async def test_a_long_line_wraps_between_words_on_a_terminal(command: Command) -> None:
    """Fault: the reason of a target of a list had 33 columns of 80."""
    command.setenv(TERM="xterm")
    command.api.inject(Reply(403, code="workspace.forbidden"))
    save("all.csv", "ws,a\n")
    args = ("stop", "-q", "--from", "all.csv")
    process, terminal = await start_on_terminal(*args, streams=("stdout",))
    text = await terminal.rest()
    assert (await finish(process))[0] == 1
    assert re.search(r"ws a +rejected +the\s+server\s+answered\s+403 ", text)
    assert all(len(line) <= 80 for line in text.splitlines())


async def test_a_stop_that_no_poll_confirmed_has_the_reason(command: Command) -> None:
    """Fault: a runtime whose polls failed was "active (unconfirmed)", and no more."""
    command.api.inject(Fault.ACCEPTED)
    command.api.inject(Reply(403, code="workspace.forbidden"), method="GET")
    _, out, _ = await command("stop", "ws", "a")
    assert out.startswith(
        "a  accepted         status active (unconfirmed), the stop was accepted, and "
        "no poll was answered: the server answered 403 "
    )


async def test_a_name_is_cut_at_a_bound(command: Command) -> None:
    _, out, _ = await command("stop", "ws", "a" * 300)
    assert out.startswith(f"{'a' * 100}...  not_found")


async def test_forced_color_does_not_wrap_lines_in_a_file(command: Command) -> None:
    command.patch.delenv("NO_COLOR")
    command.setenv(FORCE_COLOR="1")
    command.setenv(TERM="xterm")
    code, out, _ = await command("stop", "--ignore-not-found", "ws", "a", "nobody" * 20)
    assert "\x1b[32m" in out
    assert (code, len(out.splitlines())) == (0, 3)


async def test_an_unencodable_alias_does_not_end_the_run(command: Command) -> None:
    command.setenv(PYTHONIOENCODING="ascii")
    code, out, _ = await finish(await start(*program(), "stop", "ws", "é"))
    assert (code, out.partition("  ")[0]) == (0, r"\xe9")


# Nothing reaches a terminal raw

# A window title, a color, C1 controls, reversed text, zero-width and isolated text, a
# line end.
HOSTILE = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e\u200b\u2066\nall stopped\x7f"
_NAMES = ("alias", "kind", "status", "driver", "createdAt", "updatedAt")
RUNTIME = {**WIRE, **dict.fromkeys(_NAMES, HOSTILE)}
ERROR = dict.fromkeys(("code", "error", "hint", "requestId", "reasonClass"), HOSTILE)


def answer(fields: object, status: str = "200 OK") -> bytes:
    return http_answer(status, json.dumps(fields).encode())


STOP = "stop --no-verify ws a"
ANSWERS = {
    "a stopped runtime": (STOP, answer({**RUNTIME, "alias": "a"})),
    "an error": (STOP, answer(ERROR, "400 No")),
    "text": (STOP, http_answer("403 No", HOSTILE.encode())),
    "a request id": (
        STOP,
        http_answer("404 No", b"", "X-Request-Id: \x1b]0;owned\u202e"),
    ),
    "a location": (STOP, http_answer("302 No", b"", "Location: /\u202e\x9b")),
    "a reason": (STOP, http_answer("500 \x1b]0;owned\x07", b"", "X: \x9b")),
    "not HTTP": (STOP, b"\x1b]0;owned\x07\r\n\r\n"),
    "a list": ("list ws", answer({"runtimes": [RUNTIME, {**RUNTIME, "id": HOSTILE}]})),
    "a runtime": ("get ws a", answer({**RUNTIME, "alias": "a"})),
}
"""A command, and what the server answers."""


def assert_harmless(*texts: str) -> None:
    for text in texts:
        assert all(line.isprintable() for line in text.split("\n")), ascii(text)
        assert "\nall stopped" not in text


@pytest.mark.parametrize("options", [(), ("-o", "json")])
@pytest.mark.parametrize(("args", "answer"), ANSWERS.values(), ids=ANSWERS)
async def test_no_answer_reaches_the_terminal_raw(
    command: Command, args: str, answer: bytes, options: tuple[str, ...]
) -> None:
    """Fault: escape sequences in a runtime's status set the window's title."""
    async with raw_server(answering(answer)) as url:
        _, out, err = await command(*args.split(), *options, "--base-url", url)

    assert out
    assert_harmless(out, err)


async def test_no_answer_reaches_the_question_raw() -> None:
    listed = answer({"runtimes": [{**RUNTIME, "status": "active"}]})
    async with raw_server(answering(listed)) as url:
        args = ("stop", "--base-url", url, "ws", "--all")
        process, terminal = await start_on_terminal(*args, streams=("stdin", "stderr"))
        await terminal.until(r"Stop 1 runtime\? ")
        os.write(terminal._master, b"n\n")
        await finish(process)
    assert_harmless(await terminal.rest())


@pytest.mark.parametrize("option", [(), ("-o", "json"), ("--dry-run",)])
async def test_no_input_reaches_the_terminal_raw(
    command: Command, option: tuple[str, ...]
) -> None:
    save(
        "all.csv",
        f"{HOSTILE}\n" + json.dumps({"workspace_id": HOSTILE, "alias": HOSTILE}),
    )
    _, out, err = await command("stop", "--from", "all.csv", *option)
    assert_harmless(out, err)
    assert command.api.requests == []


# A CI system obeys such a command at the start of a line, and the others anywhere.
CI_COMMAND = "::error::##[error]##vso[task.complete]"


@pytest.mark.parametrize(
    "args",
    [
        *("list ws", "list ws -o json", "get ws TEXT", f"stop {CI_COMMAND} TEXT"),
        *("stop ws TEXT", "stop ws TEXT -o json", "stop --from all.csv"),
    ],
)
async def test_no_text_of_a_server_or_an_input_is_a_command_to_a_ci_system(
    command: Command, args: str
) -> None:
    command.api.add_runtime("ws", CI_COMMAND)
    runtime = {**WIRE, "alias": CI_COMMAND, "status": CI_COMMAND}
    found = Reply(200, body={**runtime, "runtimes": [runtime]})
    command.api.inject(found, method="GET")
    save("all.csv", f"workspace_id,alias\n{CI_COMMAND},{CI_COMMAND}\n")
    _, out, err = await command(*args.replace("TEXT", CI_COMMAND).split())
    assert "vso[task.complete]" in out
    assert not re.search(r"^ *::|##\[|##vso\[", out + err, re.MULTILINE)
    if "json" in args:
        assert CI_COMMAND in {outcome["alias"] for outcome in outcomes_of(out)}


# What cannot be written


@pytest.mark.parametrize("form", ["json", "table"])
async def test_the_stops_go_on_if_the_reader_of_stdout_leaves(
    command: Command, form: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = await start(
        *program(), "stop", "-o", form, "ws", "a", "b", "c", stdout=writer
    )
    os.close(writer)
    code, _, err = await finish(process)
    assert {command.api.status("ws", alias) for alias in "abc"} == {"stopped"}
    summary = "3 of 3 no longer running after 0.0 s: 3 stopped\n"
    assert (code, without_times(err)) == (0, summary if form == "json" else "")


FULL_DISK = "cannot write to stdout: No space left on device"
REDIRECTED = {
    "stop --from - <&-": (2, 0, "cannot read stdin: it is closed"),
    "stop ws --all <&-": (
        2,
        0,
        "cannot ask for confirmation without a terminal: add --yes",
    ),
    "stop --from - <targets": (0, 3, ""),
    "list ws >&-": (1, 0, "cannot write to stdout: Bad file descriptor"),
    "nosuch 2>&-": (2, 0, ""),
    "stop ws a 2>&-": (0, 1, ""),
    "stop ws a b >/dev/full": (1, 2, FULL_DISK),
    "stop --from targets >/dev/full": (1, 3, FULL_DISK),
    "stop --dry-run ws a >/dev/full": (1, 0, FULL_DISK),
    "list ws >/dev/full": (1, 0, FULL_DISK),
    "get ws a >/dev/full": (1, 0, FULL_DISK),
    "doctor ws >/dev/full": (1, 0, FULL_DISK),
    "--version >/dev/full": (1, 0, FULL_DISK),
    "stop --help >/dev/full": (1, 0, FULL_DISK),
    "emulator --port 0 >/dev/full": (1, 0, FULL_DISK),
    "report journal --from /dev/null --allow-empty >/dev/full": (1, 0, FULL_DISK),
}
"""Commands of a shell: the exit code, the number of stops, and the error on stderr."""


@pytest.mark.parametrize(("line", "expected"), REDIRECTED.items(), ids=REDIRECTED)
async def test_a_redirected_stream_is_used_or_reported(
    command: Command, line: str, expected: tuple[int, int, str]
) -> None:
    save("journal", header_line("https://api.test/v1", datetime.now(UTC)))
    code, out, err = await finish(
        await start("sh", "-c", f"exec {shlex.join(program())} {line}")
    )
    errors = [text for text in err.splitlines() if "error" in text]
    said = [f"bctrl-async: error: {expected[2]}"] * bool(expected[2])
    assert (code, len(command.api.stops), errors) == (*expected[:2], said)
    assert "error" not in out


async def test_an_error_of_the_system_is_not_blamed_on_stdout(command: Command) -> None:
    failing = Mock(side_effect=OSError(errno.EMFILE, "Too many open files"))
    command.patch.setattr(_app, "app", MagicMock(parse_args=failing))
    code, out, err = await command("stop", "ws", "a")
    assert (code, out, err) == (
        1,
        "",
        "bctrl-async: error: [Errno 24] Too many open files\n",
    )
