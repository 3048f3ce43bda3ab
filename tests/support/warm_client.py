"""Run the command in a fork of `warm_server.py`, which has the streams of this process.

`python -IS warm_client.py SOCKET ARGUMENT...` ends as the fork does, and forwards
signals to it. It imports as little as it can: most tests wait for it.
"""

import os
import signal
import socket
import sys
from contextlib import suppress

_FORWARDED = (signal.SIGINT, signal.SIGTERM)
_LENGTH = 8
_SERVER_ENDED = 97
"""The exit code if the server has ended; the command never ends so."""


def _is_open(stream: int) -> bool:
    try:
        os.fstat(stream)
    except OSError:
        return False
    return True


def _receive(server: socket.socket) -> int:
    """Return a number from the server, or end this process if it has ended."""
    data = b""
    while len(data) < _LENGTH:
        try:
            part = server.recv(_LENGTH - len(data))
        except ConnectionError:
            part = b""
        if not part:
            os.write(2, b"the warm server has ended\n")
            os._exit(_SERVER_ENDED)
        data += part
    return int.from_bytes(data, "big")


def _main(path: str, *arguments: str) -> int:
    # The socket would take the number of a closed stream.
    streams = [stream for stream in range(3) if _is_open(stream)]
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        fields = [
            "".join(map(str, streams)).encode(),
            os.getcwdb(),  # noqa: PTH109 - pathlib would take half of the time.
            str(len(arguments)).encode(),
            *map(os.fsencode, arguments),
            *(b"%b=%b" % item for item in os.environb.items()),
        ]
        message = b"\0".join(fields)
        socket.send_fds(server, [len(message).to_bytes(_LENGTH, "big")], streams)
        server.sendall(message)
        pid = _receive(server)

        def forward(number: int, _: object) -> None:
            # The fork may have ended; its exit code arrives next.
            with suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in _FORWARDED:
            signal.signal(number, forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        code = os.waitstatus_to_exitcode(_receive(server))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


os._exit(_main(*sys.argv[1:]))
