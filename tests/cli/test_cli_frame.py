"""The frame of the command: durations, errors, terminals, completion and help."""

from __future__ import annotations

import asyncio
import os
import re
import sys

import pytest
from support.commands import (
    COMMANDS,
    Command,
    Terminal,
    finish,
    start,
    start_on_terminal,
)
from support.servers import http_answer, raw_server

from bctrl_async import __main__, __version__, cli
from bctrl_async.cli import _app, _options
from bctrl_async.emulator import Fault
from bctrl_async.errors import format_duration

# Durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("0", 0), ("0s", 0), ("500ms", 0.5), ("90s", 90), ("15m", 900), ("1.5m", 90)],
        *[("2h30m", 9000), ("1d", 86_400), ("1d2h3m4s5ms", 93_784.005)],
    ],
)
def test_a_duration_is_read_with_its_units(text: str, seconds: float) -> None:
    assert _options.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["0s", "59s", "1m1s", "1h", "2h5m", "300d1h", "250ms", "1.5s", "0.09ms"]
)
def test_seconds_are_printed_as_a_duration_is_read(text: str) -> None:
    assert format_duration(_options.duration(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "s",
            "soon",
            "90",
            "00",
            "-1s",
            "+1s",
            "30m2h",
            "1h1h",
            "1h30",
            "1 h",
            "1H",
            "٣s",
        ],
        *["nan", "inf", "1e3s"],
    ],
)
def test_any_other_text_is_not_a_duration(text: str) -> None:
    with pytest.raises(
        ValueError, match="is not a duration such as 500ms, 90s, 15m, 2h30m"
    ):
        _options.duration(text)


# Errors, other than those in messages.txt


async def test_the_advice_of_a_long_error_stands_on_a_line_of_its_own(
    command: Command,
) -> None:
    command.setenv(BCTRL_API_KEY="wrong")
    process, terminal = await start_on_terminal("list", "ws")
    text = await terminal.rest()
    assert (await finish(process))[0] == 2
    assert text.endswith("(request id req_1)\nCheck the API key from BCTRL_API_KEY\n")
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize(
    "args", ["\x1b[31mred", "stop --\x1b[31mred", "stop --from \x1b[31mred"]
)
async def test_control_characters_in_an_error_are_escaped(
    command: Command, args: str
) -> None:
    _, _, err = await command(*args.split(" "))
    assert ("31mred" in err, "\x1b" in err, err.count("\n")) == (True, False, 1)


# What is drawn on a terminal


THE_LIST = "Waiting for the list of workspace ws"
WAITS = {
    "list ws": THE_LIST,
    "get ws a": "Waiting for the status of 1 runtime",
    "doctor ws": THE_LIST,
    "stop --all ws": THE_LIST,
}
"""What commands print while they wait for an answer."""


@pytest.mark.parametrize("args", WAITS)
async def test_a_read_says_on_a_terminal_what_it_waits_for(
    command: Command, args: str
) -> None:
    terminal, answers = Terminal(), asyncio.Event()

    async def fail(_: bytes, writer: asyncio.StreamWriter) -> None:
        await answers.wait()
        writer.write(http_answer("404 No"))

    command.setenv(TERM="xterm")
    command.patch.setattr("bctrl_async.cli._progress._SHOW_WAITING_AFTER", 0)
    for name in ("stdin", "stdout", "stderr"):
        command.patch.setattr(f"sys.{name}", terminal.stream())
    async with raw_server(fail) as url:
        command.setenv(BCTRL_BASE_URL=url)
        running = asyncio.create_task(command(*args.split()))
        await terminal.until(WAITS[args])
        answers.set()
        assert (await running)[0] == 1
    assert "the server answered 404" in await terminal.rest()
    assert "Waiting" not in "\n".join(terminal.screen)


async def test_a_read_without_a_terminal_says_once_what_it_waits_for(
    command: Command,
) -> None:
    """Fault: `stop --all` in a job of CI was silent for minutes, then failed."""
    command.patch.setattr("bctrl_async.cli._progress._LINE_EVERY", 0)
    command.api.inject(Fault.LATENCY, method="GET")
    _, _, err = await command("stop", "ws", "--all", "--dry-run")
    assert err.count(THE_LIST) == 1


@pytest.mark.parametrize(
    ("args", "has_pipe"),
    [("list ws", True), ("stop ws a", True), ("stop -q ws a", False)],
)
async def test_quiet_or_a_pipe_draws_nothing(
    command: Command, args: str, *, has_pipe: bool
) -> None:
    """Fault: progress erased what `| jq` printed on the same terminal."""
    for name in ("_SHOW_AFTER", "_SHOW_WAITING_AFTER"):
        command.patch.setattr(f"bctrl_async.cli._progress.{name}", 0)
    command.setenv(TERM="xterm")
    terminal, (reader, writer) = Terminal(), os.pipe()
    command.patch.setattr("sys.stderr", terminal.stream())
    with os.fdopen(writer, "w") as pipe:
        if has_pipe:
            command.patch.setattr("sys.stdout", pipe)
        assert (await command(*args.split()))[0] == 0
    os.close(reader)
    assert "\x1b" not in await terminal.rest()


# Completion and help


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("stop --kind ", {"browser", "desktop"}),
        ("list --status ", {"active", "stopped", "failed", "any"}),
        ("emulator --fault ", {"hang=0.1", "rate_limited=0.1"}),
        ("stop ", set[str]()),
    ],
)
async def test_values_are_completed(
    command: Command, words: str, found: set[str]
) -> None:
    code, out, err = await command("__complete", *words.split(" "))
    assert (code, err) == (0, "")
    assert set(out.splitlines()[2:]) >= found
    assert bool(out.splitlines()[2:]) is bool(found)


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", "complete -F _bctrl_async bctrl-async"),
        ("zsh", "\ncompdef _cyclopts_bctrl-async bctrl-async\n"),
        ("fish", "complete -c bctrl-async "),
    ],
)
async def test_the_completion_of_a_shell_is_shown(
    command: Command, shell: str, line: str
) -> None:
    code, out, err = await command("--show-completion", shell)
    assert (code, line in out, err) == (0, True, "")


async def test_zsh_completes_options_where_a_name_may_stand(command: Command) -> None:
    """Fault: `stop --ki` and Tab listed --kind, and did not insert it."""
    _, script, _ = await command("--show-completion", "zsh")
    assert script.count(""":_guard "^-*" name' \\\n""") == 4
    assert not re.findall(r"^ +'[1*]:[^:]*\.' ", script, re.MULTILINE)


@pytest.mark.parametrize("name", ["", *COMMANDS])
async def test_help_is_plain_and_fits_80_columns(command: Command, name: str) -> None:
    code, out, err = await command(*name.split(), "--help")
    assert out.strip().startswith(f"Usage: bctrl-async {name}".rstrip() + " ")
    assert not name or out.split("\n\n")[1].startswith(_app._COMMANDS[name][1])
    assert all(len(line) <= 80 for line in out.splitlines())
    assert (code, err, set(out) & set("\x1b\\…")) == (0, "", set())


async def test_no_arguments_show_the_help(command: Command) -> None:
    assert await command() == await command("--help") == await command("help")
    assert await command("help", "stop") == await command("stop", "--help")


# Start


async def test_the_module_prints_its_version() -> None:
    expected = (0, f"bctrl-async {__version__}\n", "")
    assert (
        await finish(await start(sys.executable, "-m", "bctrl_async", "--version"))
        == expected
    )


async def test_a_capital_v_prints_the_version(command: Command) -> None:
    assert await command("-V") == await command("--version")
    # The user may have meant -v, and would take exit code 0 for a stop.
    assert (await command("stop", "ws", "a", "-V"))[0] == 2


@pytest.mark.parametrize("missing", ["rich", "cyclopts"])
def test_a_missing_extra_is_reported_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    monkeypatch.delattr("bctrl_async.cli")
    for name in list(sys.modules):
        if name.startswith("bctrl_async.cli") or name.partition(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert __main__.main() == 2
    out, err = capsys.readouterr()
    advice = (
        r"install bctrl-async with the extra cli \(in a clone: .* install '\.\[cli\]'\)"
    )
    assert re.fullmatch(f"bctrl-async: error: {missing}.* is missing: {advice}\n", err)
    assert out == ""


def test_ctrl_c_during_startup_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupt)
    assert __main__.main() == 130


def test_another_missing_module_has_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bctrl_async.cli._app", None)
    monkeypatch.delattr("bctrl_async.cli")
    monkeypatch.delitem(sys.modules, "bctrl_async.cli")
    with pytest.raises(ModuleNotFoundError, match="_app"):
        __main__.main()
