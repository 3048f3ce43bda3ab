"""Runs of the command, and of uvicorn, in processes that have imported them already.

Imports take most of the time of a short run, and the tests make more than a hundred.
`program` starts a server that imports a program once, and forks for each run. Streams,
folder, environment, arguments, exit code, SIGINT and SIGTERM come from the process that
a test starts, `warm_client.py`.
"""

from __future__ import annotations

import gc
import io
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Literal, cast

_CLIENT = Path(__file__).with_name("warm_client.py")
_FORWARDED = (signal.SIGINT, signal.SIGTERM)
"""The signals that the client forwards."""
_STDERR = 2

Main = Callable[[], int | None]

running = ExitStack()
"""The server, which `tests/conftest.py` ends."""


@cache
def program(module: str = "bctrl_async") -> tuple[str, ...]:
    """Return the start of a command line that does what `python -m MODULE` does.

    Where processes cannot fork, it is `python -m MODULE`.

    Args:
        module: `bctrl_async`, `uvicorn`, or `runpy`, which runs a module that uses
            dask.
    """
    if not hasattr(os, "fork"):
        return (sys.executable, "-m", module)
    folder = running.enter_context(tempfile.TemporaryDirectory())
    path = str(Path(folder, "socket"))
    # It ends with its stdin, thus at the latest with this process.
    server = running.enter_context(
        subprocess.Popen(
            [sys.executable, __file__, path, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    )
    assert server.stdout is not None
    assert server.stdout.read(1)
    return (sys.executable, "-IS", str(_CLIENT), path)


class _Server:
    """The server: it forks for each connection, and reports how the fork has ended."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(100)
        self._clients: dict[int, socket.socket] = {}
        self._wakeup, self._waker = socket.socketpair()
        self._waker.setblocking(False)  # noqa: FBT003 - its only argument.
        self._selector = selectors.DefaultSelector()

    def serve(self) -> list[str] | None:
        """Serve until stdin ends; return the arguments in a fork, else None."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno())
        for source in (0, self._listener, self._wakeup):
            self._selector.register(source, selectors.EVENT_READ)
        os.write(1, b".")
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    arguments = self._fork(self._listener.accept()[0])
                    if arguments is not None:
                        return arguments
                elif key.fileobj is self._wakeup:
                    self._wakeup.recv(4096)
                    self._report()
                elif key.fileobj == 0:
                    for pid in self._clients:
                        os.kill(pid, signal.SIGKILL)
                    return None
                elif key.data in self._clients:
                    # The client was killed.
                    self._selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def _fork(self, client: socket.socket) -> list[str] | None:
        header, received, _, _ = socket.recv_fds(client, 8, 3)
        length, message = int.from_bytes(header, "big"), b""
        while len(message) < length and (part := client.recv(length - len(message))):
            message += part
        if not message or len(message) < length:
            # The client was killed.
            for descriptor in (client.detach(), *received):
                os.close(descriptor)
            return None
        streams, folder, count, *fields = message.split(b"\0")
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
            for descriptor in received:
                os.close(descriptor)
            self._clients[pid] = client
            self._selector.register(client, selectors.EVENT_READ, pid)
            # The client may have been killed: its end is seen by the selector.
            with suppress(OSError):
                client.sendall(pid.to_bytes(8, "big"))
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        inherited = (
            client,
            self._listener,
            self._wakeup,
            self._waker,
            *self._clients.values(),
        )
        for source in inherited:
            source.close()
        for stream in range(3):
            os.close(stream)
        for stream, descriptor in zip(
            map(int, streams.decode()), received, strict=True
        ):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        os.chdir(folder)
        os.environb.clear()
        for field in fields[int(count) :]:
            name, _, value = field.partition(b"=")
            os.environb[name] = value
        # The interpreter makes the streams so at its start.
        sys.stdin = _open(0, "rb", "strict")
        sys.stdout = _open(1, "wb", "strict")
        sys.stderr = _open(2, "wb", "backslashreplace")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        return [os.fsdecode(field) for field in fields[: int(count)]]

    def _report(self) -> None:
        """Tell the clients of the forks that have ended."""
        while self._clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            client = self._clients.pop(pid)
            with suppress(KeyError):
                self._selector.unregister(client)
            with client, suppress(OSError):
                client.sendall(status.to_bytes(8, "big"))


def _open(stream: int, mode: Literal["rb", "wb"], errors: str) -> io.TextIOWrapper:
    try:
        os.fstat(stream)
    except OSError:
        return cast("io.TextIOWrapper", None)
    encoding, _, errors_of_others = os.environ.get("PYTHONIOENCODING", "").partition(
        ":"
    )
    is_stderr = stream == _STDERR
    return io.TextIOWrapper(
        open(stream, mode, closefd=False),
        encoding=encoding or "utf-8",
        errors=errors if is_stderr else errors_of_others or errors,
        newline=None if mode == "rb" else "\n",
        line_buffering=is_stderr or os.isatty(stream),
    )


def _load_command() -> Main:
    with redirect_stderr(io.StringIO()):
        # What is imported when a command has arguments.
        import_module("bctrl_async.cli").main(["get", "", ""])
    # What is imported when a command makes a session, or a server.
    for name in ("aiohttp.web", "bctrl_async.emulator", "bctrl_async.session", "csv"):
        import_module(name)
    return cast("Main", import_module("bctrl_async.__main__").main)


def _load_uvicorn() -> Main:
    # What it and the example import when they start.
    for name in (
        *(
            "fastapi.responses",
            "fastapi.security",
            "fastapi.sse",
            "bctrl_async.fastapi",
        ),
        *("uvicorn.lifespan.on", "uvicorn.loops.auto", "uvicorn.protocols.http.auto"),
        "uvicorn.protocols.websockets.auto",
    ):
        import_module(name)
    return cast("Main", import_module("uvicorn").main)


def _load_dask() -> Main:
    for name in ("bctrl_async.journal", "bctrl_async.session", "distributed"):
        import_module(name)

    def run() -> None:
        # `python -m` does so.
        sys.path.insert(0, "")
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

    return run


if __name__ == "__main__":
    _, path, module = sys.argv
    load = {
        "bctrl_async": _load_command,
        "uvicorn": _load_uvicorn,
        "runpy": _load_dask,
    }
    main = load[module]()
    # No collection in a fork, nor its end, looks at the modules, whose memory it would
    # have to copy.
    gc.freeze()
    arguments = _Server(path).serve()
    if arguments is not None:
        sys.argv = [module, *arguments]
        sys.exit(main())
