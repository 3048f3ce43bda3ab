"""Run the command in a fork of `warm_server.py`, which has the streams of this process.

`python -IS warm_client.py SOCKET ARGUMENT...` ends as the fork does, and forwards signals to it. It
imports as little as it can: most tests wait for it.
"""

import os
import signal
import socket
import sys

_FORWARDED = (signal.SIGINT, signal.SIGTERM)


def _is_open(stream: int) -> bool:
    try:
        os.fstat(stream)
    except OSError:
        return False
    return True


def _main(path: str, *arguments: str) -> int:
    # Before the socket, which would take the number of a closed stream.
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
        socket.send_fds(server, [len(message).to_bytes(8, "big")], streams)
        server.sendall(message)
        pid = int.from_bytes(server.recv(8), "big")
        for number in _FORWARDED:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        code = os.waitstatus_to_exitcode(int.from_bytes(server.recv(8), "big"))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


os._exit(_main(*sys.argv[1:]))
