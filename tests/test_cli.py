"""The command as its users meet it: in this process for its words, in others for their signals."""

import asyncio
import errno
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import pytest

from bctrl_async import (
    RetryPolicy,
    RuntimeRef,
    StopOutcome,
    StopResult,
    __main__,
    __version__,
    _demo,
    cli,
)
from bctrl_async.emulator import Emulator, Fault

pty = pytest.importorskip("pty", reason="signals and terminals are tested where there are any")

KEY = "emulator-key"
FULL = Path("/dev/full")
COMMAND = (sys.executable, "-m", "bctrl_async")

Command = Callable[..., Coroutine[object, object, tuple[int, str, str]]]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BCTRL_BASE_URL", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "30")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")


@pytest.fixture
async def emulator(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Emulator]:
    async with Emulator(port=0, retry_after="0") as emulator:
        for alias in ("a", "b", "c"):
            emulator.add_runtime("ws", alias)
        monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
        yield emulator


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in this process; retries do not wait."""
    monkeypatch.setattr(RetryPolicy, "backoff", lambda *_: 0.0)

    async def command(*args: str) -> tuple[int, str, str]:
        # In a thread: the emulator needs this loop meanwhile.
        code = await asyncio.to_thread(cli.main, args)
        return code, *capfd.readouterr()

    return command


async def start(*args: str, **options: int) -> asyncio.subprocess.Process:
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE, **options}
    return await asyncio.create_subprocess_exec(
        *args, stdin=asyncio.subprocess.DEVNULL, stdout=pipes["stdout"], stderr=pipes["stderr"]
    )


async def finish(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    return process.returncode, (out or b"").decode(), (err or b"").decode()


class Terminal:
    """A pseudo-terminal of 80 columns that a process can have for its stdout and stderr."""

    def __init__(self) -> None:
        self._master, self.fd = pty.openpty()
        self.text = ""

    async def until(self, pattern: str) -> None:
        async with asyncio.timeout(30):
            while not re.search(pattern, self.text):
                await self._read()

    async def rest(self) -> str:
        os.close(self.fd)
        async with asyncio.timeout(30):
            while await self._read():
                pass
        os.close(self._master)
        return self.text

    async def _read(self) -> bool:
        try:
            data = await asyncio.to_thread(os.read, self._master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # This is how Linux says that nobody has it open any more.
                raise
            return False
        self.text += data.decode().replace("\r\n", "\n")
        return bool(data)


def without_times(text: str) -> str:
    return re.sub(r"\d+\.\d+ s", "0.0 s", text)


def outcomes_of(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


# What it prints


async def test_each_alias_gets_a_line_and_the_lines_are_aligned(
    emulator: Emulator, command: Command
) -> None:
    emulator.inject(Fault.RATE_LIMITED, None, alias="b")
    emulator.inject(Fault.UNKNOWN_VALUES, alias="c")
    emulator.inject(Fault.MALFORMED_JSON, alias="日本")
    emulator.add_runtime("ws", "日本")
    emulator.add_runtime("ws", "d", status="stopped")
    targets = ("a", "b", "c", "d", "日本", "nobody")

    code, out, err = await command("stop", "--max-connections", "1", "ws", *targets)

    assert without_times(out) == (
        "a       stopped          0.0 s\n"
        "b       stopped          0.0 s, 2 attempts\n"
        "c       accepted         0.0 s, status paused\n"
        "d       already_stopped  the server answered 409 runtime.not_active: "
        "Nothing runs under that alias.\n"
        "日本    accepted         the server answered 200, but its body is not JSON\n"
        "nobody  not_found        the server answered 404 runtime.not_found: "
        "No such workspace or alias.\n"
        "6 of 6 settled in 0.0 s: 2 stopped, 2 accepted, 1 already_stopped, 1 not_found\n"
    )
    assert (code, err) == (0, "")


async def test_what_is_not_settled_says_why_and_what_to_do_and_the_exit_code_is_1(
    emulator: Emulator, command: Command
) -> None:
    emulator.inject(*[Fault.SERVER_ERROR] * 4, alias="b")

    code, out, err = await command("stop", "ws", "a", "b")

    line = next(line for line in out.splitlines() if line.startswith("b"))
    assert line.startswith("b  unknown          the server answered 500 server.error: ")
    assert "4 attempts, the runtime may have stopped" in line
    assert line.endswith("Call again: a stop is safe to repeat")
    assert out.splitlines()[-1].endswith("s: 1 stopped, 1 unknown")
    assert (code, err) == (1, "")


async def test_json_is_one_object_for_each_alias_and_nothing_else(
    emulator: Emulator, command: Command
) -> None:
    emulator.inject(Fault.DROP_BEFORE, None, alias="a")

    code, out, err = await command("stop", "--json", "ws", "a", "nobody", "..", "a\udcff")

    found = {outcome.pop("index"): outcome for outcome in outcomes_of(out)}
    assert set(found) == {0, 1, 2, 3}
    for outcome in found.values():
        assert isinstance(outcome.pop("elapsed"), float)
    runtime = found[0].pop("runtime")
    assert isinstance(runtime, dict)
    assert (runtime["alias"], runtime["status"]) == ("a", "stopped")
    assert "workspaceId" in runtime
    assert found[0] == {
        "workspace_id": "ws",
        "alias": "a",
        "result": "stopped",
        "attempts": 2,
        "error": None,
    }
    assert found[1] == {
        "workspace_id": "ws",
        "alias": "nobody",
        "result": "not_found",
        "attempts": 1,
        "runtime": None,
        "error": {
            "type": "BctrlNotFoundError",
            "message": found[1]["error"]["message"],  # type: ignore[index]
            "status": 404,
            "code": "runtime.not_found",
            "request_id": found[1]["error"]["request_id"],  # type: ignore[index]
            "may_have_stopped": False,
        },
    }
    assert [found[index]["result"] for index in (2, 3)] == ["rejected", "rejected"]
    assert [found[index]["attempts"] for index in (2, 3)] == [0, 0]
    assert (code, err) == (1, "")


async def test_a_wrong_key_is_explained_without_showing_it(
    emulator: Emulator, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCTRL_API_KEY", "secret-1234567")
    code, out, err = await command("stop", "ws", "a")
    assert "rejected" in out
    assert "BCTRL_API_KEY" in out
    assert "secret-1234567" not in out + err
    assert code == 1
    assert emulator.status("ws", "a") == "active"


async def test_an_alias_cannot_steer_the_terminal(emulator: Emulator, command: Command) -> None:
    _, out, _ = await command("stop", "ws", "\x1b[31mred", "two\nlines", "")
    assert "\x1b" not in out
    assert "'\\x1b[31mred'" in out
    assert len(out.splitlines()) == 4
    assert not emulator.requests


async def test_color_that_is_forced_does_not_fold_lines_that_go_to_a_file(
    emulator: Emulator, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    code, out, _ = await command("stop", "ws", "a", "nobody")
    assert code == 0
    assert "\x1b[32m" in out
    assert len(out.splitlines()) == 3
    assert emulator.status("ws", "a") == "stopped"


async def test_an_encoding_without_the_letter_does_not_end_the_run(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.add_runtime("ws", "é")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, out, err = await finish(await start(*COMMAND, "stop", "ws", "é"))
    assert out.startswith(r"\xe9  stopped")
    assert (code, err) == (0, "")


async def test_on_a_terminal_a_long_line_wraps_under_its_own_column(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    process = await start(
        *COMMAND, "stop", "ws", "a", "nobody", stdout=terminal.fd, stderr=terminal.fd
    )
    lines = (await terminal.rest()).splitlines()
    assert await process.wait() == 0
    assert all(len(line) <= 80 for line in lines)
    at = next(index for index, line in enumerate(lines) if "not_found" in line)
    assert lines[at + 1] == " " * 25 + "workspace or alias."
    assert emulator.status("ws", "a") == "stopped"


# When it is cut short, or nobody listens


@pytest.mark.parametrize("option", [(), ("--json",)])
async def test_ctrl_c_accounts_for_every_alias_and_exits_with_130(
    emulator: Emulator, option: tuple[str, ...]
) -> None:
    emulator.inject(Fault.HANG, alias="b")
    args = ("stop", *option, "--max-connections", "1", "ws", "a", "b", "c", "d")
    process = await start(*COMMAND, *args)
    async with asyncio.timeout(30):
        while len(emulator.requests) < 2:
            await asyncio.sleep(0.005)

    process.send_signal(signal.SIGINT)
    code, out, err = await finish(process)

    if option:
        outcomes = outcomes_of(out)
        assert [outcome["index"] for outcome in outcomes] == [0, 1, 2, 3]
        assert [outcome["attempts"] for outcome in outcomes] == [1, 1, 0, 0]
        results = [str(outcome["result"]) for outcome in outcomes]
    else:
        *lines, count = out.splitlines()
        results = [line.split()[1] for line in lines]
        assert re.sub(r"\d+\.\d+", "0", count) == (
            "Interrupted: 1 of 4 settled in 0 s: 1 stopped, 2 not_sent, 1 unknown"
        )
    assert results == ["stopped", "unknown", "not_sent", "not_sent"]
    assert (code, err) == (130, "")


async def test_after_ctrl_c_on_a_terminal_the_account_starts_on_a_line_of_its_own(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    emulator.inject(Fault.HANG)
    terminal = Terminal()
    process = await start(*COMMAND, "stop", "ws", "a", stdout=terminal.fd, stderr=terminal.fd)
    async with asyncio.timeout(30):
        while not emulator.requests:
            await asyncio.sleep(0.005)
    process.send_signal(signal.SIGINT)
    text = await terminal.rest()
    assert text.startswith("\na  unknown ")
    assert await process.wait() == 130


async def test_when_nobody_reads_the_results_the_stops_go_on(emulator: Emulator) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = await start(*COMMAND, "stop", "--json", "ws", "a", "b", "c", stdout=writer)
    os.close(writer)
    code, _, err = await finish(process)
    assert {emulator.status("ws", alias) for alias in "abc"} == {"stopped"}
    assert (code, err) == (0, "")


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("args", ["stop ws a b", "--version", "stop --help"])
async def test_a_full_disk_is_one_line_and_exit_code_1_and_the_stops_go_on(
    emulator: Emulator, args: str
) -> None:
    full = os.open(FULL, os.O_WRONLY)
    process = await start(*COMMAND, *args.split(), stdout=full)
    os.close(full)
    code, _, err = await finish(process)
    assert err == "bctrl-async: error: cannot write to stdout: No space left on device\n"
    assert code == 1
    stopped = "stopped" if args == "stop ws a b" else "active"
    assert emulator.status("ws", "b") == stopped


# What a user gets wrong


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("nosuch", "No such command 'nosuch'"),
        ("stop", "Missing argument 'WORKSPACE' (see bctrl-async stop --help)"),
        ("stop ws", "Missing argument 'ALIAS"),
        ("stop --nosuch ws a", "No such option: --nosuch"),
        ("stop --api-key k ws a", "No such option: --api-key"),
        ("stop --timeout soon ws a", "Invalid value for '--timeout': "),
        ("stop --timeout 0 ws a", "--timeout is 0.0: give seconds above 0"),
        ("stop --max-connections 0 ws a", "--max-connections is 0: give a whole number from 1"),
        ("stop --base-url nosuch ws a", "--base-url is not a URL such as https://api.bctrl.ai: "),
        ("stop --base-url http://bctrl.test ws a", "would send the API key unencrypted: use https"),
        ("emulator --fault nosuch=1", "--fault nosuch=1 names no fault: give such as "),
        ("emulator --fault hang", "--fault hang is no NAME=PROBABILITY: give such as "),
        ("emulator --fault hang=2", "faults has hang at 2.0: give a probability of 0 to 1"),
        ("emulator --port 65536", "port is 65536: give 0 to 65535"),
        ("emulator --runtimes -1", "--runtimes is -1: give 0 to 100000"),
        ("emulator --host 192.0.2.1 --port 0", "cannot listen on 192.0.2.1 port 0: "),
        ("demo --runtimes 0", "--runtimes is 0: give 1 to 100000"),
    ],
)
async def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    command: Command, args: str, said: str
) -> None:
    code, out, err = await command(*args.split())
    assert err.startswith("bctrl-async: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert (code, out) == (2, "")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BCTRL_API_KEY", "", "there is no API key: set BCTRL_API_KEY"),
        ("BCTRL_API_KEY", "two words", "a space, a control character or non-ASCII text: correct "),
        ("BCTRL_BASE_URL", "nosuch", "BCTRL_BASE_URL is not a URL such as "),
    ],
)
async def test_a_mistake_in_the_environment_names_the_variable(
    command: Command, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    code, out, err = await command("stop", "ws", "a")
    assert said in err
    assert name in err
    assert (code, out, err.count("\n")) == (2, "", 1)


async def test_a_server_that_is_not_there_is_told_for_each_alias(command: Command) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        code, out, err = await command("stop", "--base-url", url, "ws", "a", "b")
    assert [line.split()[1] for line in out.splitlines()[:2]] == ["not_sent", "not_sent"]
    assert out.count("no connection") == 2
    assert (code, err) == (1, "")


async def test_an_error_message_cannot_steer_the_terminal(command: Command) -> None:
    _, _, err = await command("\x1b[31mred")
    assert "\x1b" not in err


async def test_with_stderr_closed_an_error_does_not_land_among_the_results() -> None:
    process = await start("/bin/sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "nosuch")
    assert await finish(process) == (2, "", "")


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_without_the_extra_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    monkeypatch.delattr("bctrl_async.cli")
    for name in ("cli", "_demo", "_display", "_fan_out"):
        monkeypatch.delitem(sys.modules, f"bctrl_async.{name}")
        monkeypatch.delattr(f"bctrl_async.{name}", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)

    assert __main__.main() == 2

    out, err = capsys.readouterr()
    assert err == (
        "bctrl-async: error: the command needs more packages: "
        "python -m pip install 'bctrl-async[cli]'\n"
    )
    assert out == ""


def test_a_module_that_is_missing_for_another_reason_is_not_blamed_on_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> int:
        raise ModuleNotFoundError(name="elsewhere")

    monkeypatch.setattr(cli, "main", broken)
    with pytest.raises(ModuleNotFoundError):
        __main__.main()


def test_ctrl_c_while_it_starts_is_exit_code_130_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    assert __main__.main() == 130
    assert capsys.readouterr() == ("", "")


# Help


@pytest.mark.parametrize("name", ["", "stop", "emulator", "demo"])
async def test_help_is_plain_and_fits_80_columns(command: Command, name: str) -> None:
    code, out, err = await command(*name.split(), "--help")
    assert out.startswith(f"Usage: bctrl-async {name}".rstrip() + " ")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert not set(out) & set("\x1b\\╭{")
    assert "..." not in out.partition("Commands:")[2]
    assert (code, err) == (0, "")


async def test_help_of_stop_shows_how_it_is_used(command: Command) -> None:
    _, out, _ = await command("stop", "-h")
    assert out.startswith("Usage: bctrl-async stop [OPTIONS] WORKSPACE ALIAS...\n")
    assert out.endswith(
        "Options:\n"
        "  --base-url URL       Where the API is; default is BCTRL_BASE_URL.\n"
        "  --timeout SECONDS    What one attempt may take; default 60.\n"
        "  --max-connections N  Stops in flight at most; default 100.\n"
        "  --json               Print a line of JSON for each alias.\n"
        "  -h, --help           Show this message and exit.\n"
    )


async def test_the_command_alone_shows_its_help(command: Command) -> None:
    assert await command() == await command("--help")


async def test_the_module_runs_and_tells_its_version() -> None:
    expected = (0, f"bctrl-async {__version__}\n", "")
    assert await finish(await start(*COMMAND, "--version")) == expected


# The emulator


@pytest.mark.parametrize(("signal_", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_what_the_emulator_prints_can_be_pasted_and_a_signal_ends_it(
    signal_: signal.Signals, expected: int, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await start(*COMMAND, "emulator", "--port", "0", "--api-key", "it's", "--seed", "1")
    assert process.stdout is not None
    async with asyncio.timeout(30):
        url, key, first = [(await process.stdout.readline()).decode() for _ in range(3)]
    assert key == "export BCTRL_API_KEY='it'\"'\"'s'\n"
    assert first == "bctrl-async stop demo runtime-0001\n"
    assert url.startswith("export BCTRL_BASE_URL=http://127.0.0.1:")
    monkeypatch.setenv("BCTRL_BASE_URL", url.strip().partition("=")[2])
    monkeypatch.setenv("BCTRL_API_KEY", "it's")

    code, out, _ = await command(*first.split()[1:], *["runtime-0011"] * (expected == 0))

    assert code == 0
    assert out.startswith("runtime-0001  stopped ")
    process.send_signal(signal_)
    code_of_emulator, more, err = await finish(process)
    received = "2 requests received" if expected == 0 else "1 request received"
    assert err == f"The emulator is running; Ctrl-C ends it. In another terminal:\n{received}\n"
    assert (code_of_emulator, more) == (expected, "")


async def test_the_emulator_has_the_faults_it_is_told_to(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--runtimes", "1", "--fault", "failed=0.5", "--fault", "accepted=0.5")
    process = await start(*COMMAND, "emulator", "--port", "0", *options)
    assert process.stdout is not None
    async with asyncio.timeout(30):
        url = (await process.stdout.readline()).decode()
    monkeypatch.setenv("BCTRL_BASE_URL", url.strip().partition("=")[2])

    _, out, _ = await command("stop", "demo", "runtime-0001", "runtime-0002")

    process.terminate()
    await finish(process)
    assert "accepted" in out
    assert "not_found" in out


async def test_a_port_in_use_is_named_with_the_way_out(
    emulator: Emulator, command: Command
) -> None:
    port = emulator.url.rpartition(":")[2]
    code, out, err = await command("emulator", "--port", port)
    assert f"error: port {port} of 127.0.0.1 is in use: choose another with --port" in err
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://0.0.0.0:8787", "http://127.0.0.1:8787"),
        ("http://[::]:8787", "http://[::1]:8787"),
        ("http://10.0.0.0:8787", "http://10.0.0.0:8787"),
    ],
)
def test_where_to_call_is_an_address_that_can_be_called(url: str, shown: str) -> None:
    assert cli._callable(url) == shown


# The demonstration


class QuickEmulator(Emulator):
    """The emulator of the demonstration, without its delays."""

    def __init__(self, *, latency: float, fault_latency: float, **options: object) -> None:
        assert latency < fault_latency
        super().__init__(**options)  # type: ignore[arg-type]


class LyingEmulator(QuickEmulator):
    """It finds everything still active."""

    def status(self, workspace_id: str, alias: str) -> str | None:
        return super().status(workspace_id, alias) and "active"


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_demo, "Emulator", QuickEmulator)


@pytest.mark.usefixtures("_quick")
async def test_the_demo_ends_with_an_account_that_the_emulator_confirms(command: Command) -> None:
    code, out, err = await command("demo", "--runtimes", "60", "--seed", "4")
    lines = [line.rstrip() for line in without_times(out).splitlines()]
    assert lines[0] == "Result            Count   Settled   What it means"
    counts = {line.split()[0]: int(line.split()[1]) for line in lines[2:9]}
    assert list(counts) == list(StopResult)
    assert sum(counts.values()) == 60
    assert counts["not_found"] == 1
    assert lines[-2].startswith("60 stops took ")
    assert lines[-1] == "The emulator confirms: all 59 runtimes are stopped."
    # Old versions of rich end a progress that is not shown with a line of its own.
    assert err.rstrip() == "Stopping 60 runtimes of a local emulator that misbehaves."
    assert code == 0


@pytest.mark.usefixtures("_quick")
async def test_the_demo_is_the_same_for_the_same_seed_and_another_for_another(
    command: Command,
) -> None:
    first, same, other = [
        without_times((await command("demo", "--runtimes", "50", "--seed", seed))[1])
        for seed in ("1", "1", "2")
    ]
    assert first == same
    assert first != other


@pytest.mark.usefixtures("_quick")
async def test_the_demo_needs_no_key_and_ignores_the_one_there_is(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BCTRL_API_KEY")
    monkeypatch.setenv("BCTRL_BASE_URL", "https://bctrl.test")
    code, out, _ = await command("demo", "--runtimes", "1")
    assert out.endswith("The emulator confirms: all 1 runtimes are stopped.\n")
    assert code == 0


async def test_a_demo_that_the_emulator_contradicts_exits_with_1(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_demo, "Emulator", LyingEmulator)
    code, out, _ = await command("demo", "--runtimes", "3")
    assert "The emulator disagrees about 3 of 3:\n" in out
    assert re.search(r"^runtime-000\d was reported \w+, and it is active\.$", out, re.MULTILINE)
    assert code == 1


def test_a_demo_that_is_interrupted_at_once_accounts_for_every_runtime(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_short(targets: list[RuntimeRef], *_: object, **__: object) -> list[StopOutcome]:
        return [
            StopOutcome(index=index, target=target, result=StopResult.NOT_SENT)
            for index, target in enumerate(targets)
        ]

    monkeypatch.setattr(_demo, "stop_all", cut_short)
    with pytest.raises(KeyboardInterrupt):
        _demo.run(3, 1)
    out, _ = capfd.readouterr()
    assert re.search(r"^not_sent +3 ", out, re.MULTILINE)
    assert "Interrupted after 0 requests" in out
    assert out.endswith("Still running: 3, all of them reported as not settled.\n")


async def test_the_demo_draws_its_progress_and_ctrl_c_leaves_an_account(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    process = await start(*COMMAND, "demo", stdout=terminal.fd, stderr=terminal.fd)
    await terminal.until(r"[1-9]\d*/300")
    process.send_signal(signal.SIGINT)
    text = await terminal.rest()
    assert await process.wait() == 130
    account = text[text.index("Result ") :]
    counts = {
        result: int(count) for result, count in re.findall(r"^(\w+) +(\d+) ", account, re.MULTILINE)
    }
    assert sum(counts.values()) == 300
    assert counts["not_sent"] > 0
    assert "\nInterrupted after " in account
    assert "The emulator confirms: " in account
