"""A real Redis or Valkey server, without persistence, that tests can kill, suspend and restart.

Its clock can be set: a library that is loaded before all others answers for the system's.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from helpers import BOUND, free_port

REDIS = shutil.which("redis-server")
VALKEY = shutil.which("valkey-server")

SERVERS = [program for program in (REDIS, VALKEY) if program is not None]
"""The servers that are installed; a test with all of them is skipped if there are none."""


needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler is installed, which a clock needs"
)

_CLOCK = r"""
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>

static volatile int64_t *microseconds;

__attribute__((constructor)) static void map_clock(void) {
  int file = open(getenv("CLOCK"), O_RDONLY);
  microseconds = mmap(NULL, sizeof *microseconds, PROT_READ, MAP_SHARED, file, 0);
}

int gettimeofday(struct timeval *now, void *zone) {
  now->tv_sec = *microseconds / 1000000;
  now->tv_usec = *microseconds % 1000000;
  return 0;
}
"""


class RedisServer:
    """A server on a loopback port.

    Args:
        program: The path of `redis-server` or `valkey-server`.
        folder: Its working directory.
        options: More of its options.
        can_set_clock: True to stop its clock, for `set_clock`.

    Attributes:
        port: The port; a restart keeps it.

    Raises:
        RuntimeError: It did not start; the message is its log.
    """

    def __init__(
        self, program: str, folder: Path, *options: str, can_set_clock: bool = False
    ) -> None:
        self._program = program
        self._folder = folder
        self._options = options
        self._environment = dict(os.environ)
        if can_set_clock:
            library = str(folder / "clock.so")
            command = ["cc", "-shared", "-fPIC", "-o", library, "-x", "c", "-"]
            subprocess.run(command, input=_CLOCK, text=True, check=True)
            self._environment |= {"LD_PRELOAD": library, "CLOCK": str(folder / "clock")}
            self.set_clock(time.time())
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
        """Suspend it with SIGSTOP: connections are accepted, but nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after `suspend`."""
        os.kill(self.pid, signal.SIGCONT)

    def set_clock(self, seconds: float) -> None:
        """Set its clock, which stands still, to so many seconds since 1970."""
        path = self._folder / "clock"
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(struct.pack("q", round(seconds * 1e6)))

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
                    *("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder)),
                    *("--save", "", "--appendonly", "no", "--loglevel", "warning"),
                    *self._options,
                ],
                env=self._environment,
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
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as client:
                client.sendall(b"INFO server\r\n")
                return f"process_id:{self.pid}\r\n".encode() in client.recv(65536)
        except OSError:
            return False


@contextmanager
def redis_server(
    program: str, *options: str, can_set_clock: bool = False
) -> Generator[RedisServer]:
    """Run a server of its own, and kill it at the end.

    Args:
        program: The path of `redis-server` or `valkey-server`.
        options: More of its options.
        can_set_clock: True to stop its clock, for `set_clock`.

    Raises:
        RuntimeError: It did not start; the message is its log.
    """
    with TemporaryDirectory() as folder:
        server = RedisServer(program, Path(folder), *options, can_set_clock=can_set_clock)
        try:
            yield server
        finally:
            server.kill()
