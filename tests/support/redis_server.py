"""A real Redis or Valkey that tests can kill, suspend and restart."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from support.helpers import BOUND, free_port
from support.servers import listening

SERVERS = ["redis-server", "valkey-server"]
"""The programs, of which a test may use each that is installed."""
SERVER = "valkey-server" if shutil.which("redis-server") is None else "redis-server"
"""The program for a test that needs only a single program."""


class RedisServer:
    """A server on a loopback port.

    Args:
        program: `redis-server` or `valkey-server`.
        folder: Its working directory.
        options: More of its options.

    Attributes:
        port: The port; a restart keeps it.

    Raises:
        RuntimeError: It did not start; the message is its log.
    """

    def __init__(self, program: str, folder: Path, *options: str) -> None:
        self._program = program
        self._folder = folder
        self._options = options
        # A cluster also needs the port 10,000 above, which a client may have.
        for _ in range(20):
            self.port = free_port()
            if self._start():
                return
        raise RuntimeError(self._log)

    @property
    def url(self) -> str:
        """The URL of its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """The process id; a restart changes it."""
        return self._process.pid

    def kill(self) -> None:
        """End it with SIGKILL, also if it is suspended: connections are refused."""
        self._process.kill()
        self._process.wait()

    def suspend(self) -> None:
        """Suspend it with SIGSTOP: it accepts connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after `suspend`."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Start it again on the same port, empty; kill it before if it runs.

        Raises:
            RuntimeError: It did not start; the message is its log.
        """
        self.kill()
        if not self._start():
            raise RuntimeError(self._log)

    @property
    def _log(self) -> str:
        return Path(self._folder, "log").read_text()

    def _start(self) -> bool:
        """Return True once it answers, or False if it ended by itself."""
        with Path(self._folder, "log").open("w") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    *(
                        "--bind",
                        "127.0.0.1",
                        "--port",
                        str(self.port),
                        "--dir",
                        str(self._folder),
                    ),
                    *("--save", "", "--appendonly", "no", "--loglevel", "warning"),
                    *self._options,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + BOUND
        while self._process.poll() is None:
            if self._answers():
                return True
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.005)
        return False

    def _answers(self) -> bool:
        try:
            with socket.create_connection(
                ("127.0.0.1", self.port), timeout=1
            ) as client:
                client.sendall(b"INFO server\r\n")
                return f"process_id:{self.pid}\r\n".encode() in client.recv(65536)
        except OSError:
            return False


@contextmanager
def redis_server(program: str, *options: str) -> Generator[RedisServer]:
    """Run a server, and kill it at the end; skip the test if it is not installed.

    Args:
        program: `redis-server` or `valkey-server`.
        options: More of its options.

    Raises:
        RuntimeError: It did not start; the message is its log.
    """
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    with TemporaryDirectory() as folder:
        server = RedisServer(program, Path(folder), *options)
        try:
            yield server
        finally:
            server.kill()


@asynccontextmanager
async def delayed(server: RedisServer, delay: float) -> AsyncIterator[str]:
    """Run a proxy that passes everything on late; yield the server's URL there."""
    loop = asyncio.get_running_loop()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while data := await reader.read(65536):
                loop.call_later(delay, writer.write, data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, downstream), copy(upstream, writer))

    async with listening(serve) as port:
        yield f"redis://127.0.0.1:{port}"
