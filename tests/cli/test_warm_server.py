"""The client of `warm_server.program`, with a server that fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import BOUND
from warm_server import _CLIENT

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "pthread_sigmask"), reason="there are no forks here"
)


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(BOUND)
        listener.bind("socket")
        listener.listen()
        yield listener


def start() -> subprocess.Popen[str]:
    command = [sys.executable, "-IS", str(_CLIENT), "socket"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def accept(listener: socket.socket) -> socket.socket:
    """Return the connection of a client that has sent its message and its streams."""
    server, _ = listener.accept()
    header, streams, _, _ = socket.recv_fds(server, 8, 3)
    for stream in streams:
        os.close(stream)
    server.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL)
    return server


@pytest.mark.parametrize("answer", [b"", b"\0\0\0\1", (1 << 40).to_bytes(8, "big")])
def test_the_client_fails_if_its_server_ends(listener: socket.socket, answer: bytes) -> None:
    """Fault: it exited with 0, as if the command had."""
    with start() as client:
        with accept(listener) as server:
            server.sendall(answer)
        _, err = client.communicate(timeout=BOUND)
    assert (client.returncode, err) == (97, "the warm server has ended\n")


def test_a_signal_after_the_end_of_the_fork_does_not_change_the_exit_code(
    listener: socket.socket,
) -> None:
    """Fault: it ended the client with a traceback and 1."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait(BOUND)
    with start() as client, accept(listener) as server:
        # It is pending until the client forwards signals.
        client.send_signal(signal.SIGTERM)
        server.sendall(ended.pid.to_bytes(8, "big"))
        server.sendall((3 << 8).to_bytes(8, "big"))
        _, err = client.communicate(timeout=BOUND)
    assert (client.returncode, err) == (3, "")
