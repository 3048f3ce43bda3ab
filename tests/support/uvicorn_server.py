"""The FastAPI example under a real uvicorn, on the test's kind of event loop."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx2
import pytest

from bctrl_async.emulator import Emulator
from support.helpers import BOUND
from support.loops import package_of
from support.warm_server import program

KEY = "emulator-key"
TOKEN = "let-me-in"
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "fastapi"
GRACE = 60


class Uvicorn:
    """The example under uvicorn.

    Attributes:
        process: The main process.
        url: The base URL.
        lines: The log lines so far.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""

    def client(self) -> httpx2.AsyncClient:
        """Return a client that sends the token."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=BOUND)

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(line.decode())

    def logged(self, pattern: str) -> list[re.Match[str]]:
        return [found for line in self.lines if (found := re.search(pattern, line))]

    async def wait_for(self, pattern: str, times: int = 1) -> re.Match[str]:
        try:
            async with asyncio.timeout(BOUND):
                while len(found := self.logged(pattern)) < times:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pytest.fail(f"{pattern!r} is not in the log:\n{''.join(self.lines)}")
        return found[-1]

    @property
    def reports(self) -> list[Counter[str]]:
        """The logged counts of each bulk stop."""
        lines = self.logged(r"bulk stop: .* s: ([^;]*)")
        counts = [re.findall(r"(\d[\d,]*) ([a-z_]+)", line[1]) for line in lines]
        return [
            Counter({name: int(n.replace(",", "")) for n, name in series})
            for series in counts
        ]

    async def end(self) -> None:
        """Send SIGTERM to the main process, and wait until it has ended."""
        self.process.terminate()
        async with asyncio.timeout(GRACE + BOUND):
            await self.process.wait()


@asynccontextmanager
async def uvicorn(
    emulator: Emulator, *options: str, folder: Path = EXAMPLE
) -> AsyncIterator[Uvicorn]:
    environment = {
        **os.environ,
        "BCTRL_API_KEY": KEY,
        "BCTRL_BASE_URL": emulator.url,
        "APP_TOKEN": TOKEN,
    }
    # uvicorn takes uvloop by default, where it is installed.
    loop = package_of(asyncio.get_running_loop())
    # It starts processes itself if it has workers or a reloader; they must end with it.
    command = (sys.executable, "-m", "uvicorn") if options else program("uvicorn")
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--app-dir", str(folder), "app:app", "--port", "0", "--loop", loop),
        *("--timeout-graceful-shutdown", str(GRACE)),
        *options,
        env=environment,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    server = Uvicorn(process)
    reading = asyncio.create_task(server.read())
    try:
        server.url = (await server.wait_for(r"running on (http://\S+)"))[1]
        await server.wait_for("Application startup complete")
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await reading
