"""A real nginx that rate-limits requests to another server."""

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

# Debian installs it in a directory that is often not in the PATH of an unprivileged
# user.
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

RATE, BURST = 200, 50

# Paths are relative to nginx's `-p`, a temporary directory. As a single process it
# keeps its user, even root, and ends when it is terminated.
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
            limit_req_status {status};
            {error_page}
            proxy_pass http://api;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
        location @throttled {{
            {retry_after}
            return {status};
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """A running nginx.

    Attributes:
        url: The URL of the server.
        statuses: The number of responses by status, complete once nginx has ended.
    """

    url: str
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def throttled_share(self) -> float:
        """The share of responses that were 429 or 503."""
        throttled = self.statuses[429] + self.statuses[503]
        return throttled / max(self.statuses.total(), 1)


@contextmanager
def nginx(
    upstream: str,
    *,
    rate: int = RATE,
    burst: int = BURST,
    retry_after: int | None = None,
    status: int = 429,
) -> Generator[Nginx]:
    """Run nginx in front of a server, with `limit_req … burst nodelay`.

    Args:
        upstream: The URL of the server.
        rate: Requests per second.
        burst: Additional requests that are accepted at once.
        retry_after: The Retry-After of a throttled response, in seconds; None for no
            header.
        status: The status of a throttled response; nginx's own default is 503.

    Raises:
        RuntimeError: nginx ended by itself; the message is its error log.
    """
    assert NGINX is not None
    # nginx inherits the listening socket, as in a binary upgrade. Another process could
    # take a free port before nginx listens on it.
    with (
        TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):
        listen = f"127.0.0.1:{listening.getsockname()[1]}"
        config = Path(folder, "nginx.conf")
        config.write_text(
            _CONFIG.format(
                rate=rate,
                # nginx rejects `burst=0`; the default is 0.
                burst=f" burst={burst} nodelay" if burst else "",
                listen=listen,
                upstream=urlsplit(upstream).netloc,
                error_page=""
                if retry_after is None
                else f"error_page {status} @throttled;",
                status=status,
                retry_after=f"add_header Retry-After {retry_after or 0} always;",
            )
        )
        # Read at the end, even if there was no request.
        log = Path(folder, "status.log")
        log.touch()
        process = subprocess.Popen(
            [NGINX, "-p", folder, "-c", config, "-e", "error.log"],
            env={**os.environ, "NGINX": f"{listening.fileno()};"},
            pass_fds=[listening.fileno()],
            stderr=subprocess.DEVNULL,
        )
        # If this copy stayed open, connections would hang after nginx has ended.
        listening.close()
        running = Nginx(f"http://{listen}")
        try:
            yield running
        finally:
            ended = process.poll() is not None
            process.terminate()
            process.wait()
            if ended:
                raise RuntimeError(Path(folder, "error.log").read_text())
            running.statuses.update(map(int, log.read_text().split()))
