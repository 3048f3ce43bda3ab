"""A real nginx with a rate limit, in a folder of its own and in front of any server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

# An unprivileged user's PATH often lacks where Debian puts it.
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

RATE, BURST = 200, 50

# Relative paths are nginx's `-p`, the temporary folder. One process: it keeps its user, root as
# well, and ends with the id that started it.
_CONFIG = """
daemon off;
master_process off;
pid nginx.pid;
lock_file nginx.lock;
error_log error.log crit;
events {{ worker_connections 1000; }}
http {{
    log_format only_status $status;
    access_log status.log only_status;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_requests 1000000;
    limit_req_zone $binary_remote_addr zone=all:1m rate={rate}r/s;
    upstream api {{
        server {upstream};
        keepalive 200;
        keepalive_requests 1000000;
    }}
    server {{
        listen {listen} backlog=1024;
        location / {{
            limit_req zone=all{burst};
            limit_req_status 429;
            {error_page}
            proxy_pass http://api;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
        location @refused {{
            {retry_after}
            return 429;
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """A running nginx.

    Attributes:
        url: Where it listens.
        statuses: How many answers had each status, complete once it has ended.
    """

    url: str
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def refused(self) -> float:
        """The share of requests that were answered 429."""
        return self.statuses[429] / max(self.statuses.total(), 1)


@contextmanager
def nginx(
    upstream: str, *, rate: int = RATE, burst: int = BURST, retry_after: int | None = None
) -> Generator[Nginx]:
    """Run nginx before a server, with `limit_req … burst nodelay` and 429.

    Args:
        upstream: The URL of the server.
        rate: Requests a second.
        burst: Requests more that may come at once.
        retry_after: The Retry-After of a 429, in seconds; None is no such header.

    Raises:
        RuntimeError: It ended by itself; the message is its error log.
    """
    assert NGINX is not None
    # The socket is handed over like at an upgrade of the binary: a port that is only looked up
    # could be taken by another process before nginx has it.
    with TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listening:
        listen = f"127.0.0.1:{listening.getsockname()[1]}"
        config = Path(folder, "nginx.conf")
        config.write_text(
            _CONFIG.format(
                rate=rate,
                # It takes no burst of 0, which is what leaving it out means.
                burst=f" burst={burst} nodelay" if burst else "",
                listen=listen,
                upstream=urlsplit(upstream).netloc,
                error_page="" if retry_after is None else "error_page 429 @refused;",
                retry_after=f"add_header Retry-After {retry_after or 0} always;",
            )
        )
        # It is read also if nothing was ever answered.
        log = Path(folder, "status.log")
        log.touch()
        process = subprocess.Popen(
            [NGINX, "-p", folder, "-c", config, "-e", "error.log"],
            env={**os.environ, "NGINX": f"{listening.fileno()};"},
            pass_fds=[listening.fileno()],
            stderr=subprocess.DEVNULL,
        )
        # With this copy open, connections to an nginx that has ended would hang.
        listening.close()
        running = Nginx(f"http://{listen}")
        try:
            yield running
        finally:
            ended_itself = process.poll() is not None
            process.terminate()
            process.wait()
            if ended_itself:
                raise RuntimeError(Path(folder, "error.log").read_text())
            running.statuses.update(map(int, log.read_text().split()))
