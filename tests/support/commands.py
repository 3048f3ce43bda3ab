"""Helpers of the tests of the command: processes, a terminal, and output."""

from __future__ import annotations

import asyncio
import codecs
import errno
import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from io import FileIO, TextIOWrapper
from pathlib import Path

import pytest

from bctrl_async.cli._app import app
from bctrl_async.emulator import Emulator
from support.helpers import BOUND, wait_for_line
from support.warm_server import program

COMMANDS = [name for name in app if not name.startswith("-")]
"""The commands of the command line, as the app has them."""
NOTICE = "another signal aborts"

Process = asyncio.subprocess.Process


@dataclass
class Command:
    """The command, run in this process, and the emulator that it uses.

    Attributes:
        api: The emulator, with the runtimes a, b and c in workspace ws.
        folder: The current folder, in which `targets` is a file with these three.
        patch: What it patches stays so for the rest of the test.
        capfd: What the command has printed so far.
    """

    api: Emulator
    folder: Path
    patch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    async def __call__(self, *args: str | Path) -> tuple[int, str, str]:
        """Run the command; return its exit code, stdout and stderr."""
        main = import_module("bctrl_async.cli").main
        # It runs in a thread, because the emulator runs in this loop.
        async with asyncio.timeout(BOUND):
            code = await asyncio.to_thread(main, [str(arg) for arg in args])
        return code, *self.capfd.readouterr()

    def setenv(self, **variables: str) -> None:
        for name, value in variables.items():
            self.patch.setenv(name, value)


_started: list[Process] = []


def end_started() -> None:
    """End the processes that a test has left."""
    while _started:
        process = _started.pop()
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()


async def start(*args: str | Path, **files: int) -> Process:
    pipes = {
        "stdout": asyncio.subprocess.PIPE,
        "stderr": asyncio.subprocess.PIPE,
        **files,
    }
    stdin = files.get("stdin", asyncio.subprocess.DEVNULL)
    process = await asyncio.create_subprocess_exec(
        *args, stdin=stdin, stdout=pipes["stdout"], stderr=pipes["stderr"]
    )
    _started.append(process)
    return process


async def finish(process: Process) -> tuple[int | None, str, str]:
    async with asyncio.timeout(BOUND):
        # It ends by itself before its pipes are closed.
        await process.wait()
        out, err = await process.communicate()
    return process.returncode, (out or b"").decode(), (err or b"").decode()


async def kill(*processes: Process) -> None:
    """Kill processes, and wait until their pipes are closed, too."""
    for process in processes:
        with suppress(ProcessLookupError):
            process.kill()
        async with asyncio.timeout(BOUND):
            # What runs for a process in a warm server ends a moment after it.
            await process.communicate()


async def begin_to_end(
    process: Process, signal_: signal.Signals = signal.SIGINT
) -> str:
    """Send a first signal and return the progress line that follows."""
    process.send_signal(signal_)
    return await wait_for_line(process.stderr, NOTICE)


def without_notices(err: str) -> str:
    """Return stderr without the progress of a run that was interrupted."""
    return re.sub(rf".*{NOTICE}.*\n", "", err)


def write(process: Process, text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text.encode())


async def close_stdin(process: Process) -> tuple[int | None, str, str]:
    """End the input of a process, and wait until it has ended."""
    assert process.stdin is not None
    process.stdin.close()
    return await finish(process)


async def stop_piped(
    content: str, *args: str, source: str = "-"
) -> tuple[int | None, str, str]:
    """Run `stop` with targets in a pipe."""
    files = {"stdin": asyncio.subprocess.PIPE}
    process = await start(*program(), "stop", *args, "--from", source, **files)
    write(process, content)
    return await close_stdin(process)


class Terminal:
    """A pseudo-terminal of 80 columns for the stdout and stderr of a process."""

    def __init__(self) -> None:
        self._master, self.fd = os.openpty()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._written = ""

    @property
    def text(self) -> str:
        """Everything that was written."""
        return self._written.replace("\r\n", "\n")

    @property
    def screen(self) -> list[str]:
        """The lines on the screen after all redrawing."""
        rows, row, column = [""], 0, 0
        for token in re.findall(
            r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", self._written
        ):
            if token == "\n":
                row += 1
                rows += [""] * (row == len(rows))
            elif token == "\r":
                column = 0
            elif token == "\x1b[2K":
                rows[row] = ""
            elif token.startswith("\x1b["):
                row -= int(token[2:-1]) if token.endswith("A") else 0
            else:
                kept = rows[row].ljust(column)
                rows[row] = kept[:column] + token + kept[column + len(token) :]
                column += len(token)
        return "\n".join(line.rstrip() for line in rows).rstrip().split("\n")

    def stream(self) -> TextIOWrapper:
        """Return a stream for this process."""
        return TextIOWrapper(FileIO(self.fd, "r+", closefd=False))

    async def until(self, pattern: str) -> None:
        async with asyncio.timeout(BOUND):
            while not re.search(pattern, self.text):
                await self._read()

    async def until_drawn(self, pattern: str) -> None:
        """Wait until this is the whole screen: what was read may end within a frame."""
        async with asyncio.timeout(BOUND):
            while not re.fullmatch(pattern, "\n".join(self.screen)):
                await self._read()

    async def rest(self) -> str:
        os.close(self.fd)
        async with asyncio.timeout(BOUND):
            while await self._read():
                pass
        os.close(self._master)
        return self.text

    async def _read(self) -> bool:
        try:
            data = await asyncio.to_thread(os.read, self._master, 65536)
        except OSError as error:
            if (
                error.errno != errno.EIO
            ):  # Linux says so once all other ends are closed.
                raise
            return False
        self._written += self._decoder.decode(data)
        return bool(data)


async def start_on_terminal(
    *args: str, streams: tuple[str, ...] = ("stdout", "stderr"), **files: int
) -> tuple[Process, Terminal]:
    """Start the command with a terminal in place of these streams."""
    terminal = Terminal()
    on_terminal = dict.fromkeys(streams, terminal.fd)
    return await start(*program(), *args, **files, **on_terminal), terminal


def save(path: str | Path, content: str | bytes, encoding: str = "utf-8") -> None:
    Path(path).write_bytes(
        content.encode(encoding) if isinstance(content, str) else content
    )


def without_times(text: str) -> str:
    return re.sub(r"\d+\.\d+ s", "0.0 s", text)


def outcomes_of(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def results_of(out: str) -> list[str]:
    return [str(outcome["result"]) for outcome in outcomes_of(out)]
