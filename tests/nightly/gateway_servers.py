"""The gateways that Debian has, as real processes in front of a server on loopback."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))
from support.helpers import free_port

PATIENCE = 1
"""Seconds that each gateway waits for the server, or for a connection to it."""
_START = 30.0
# Debian installs servers in a directory that is often not in the PATH of an
# unprivileged user.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])


class Kind(NamedTuple):
    """A gateway, and how to run it, with `$` names for ports, paths and the patience.

    Args:
        command: The command that runs it in the foreground.
        config: Its configuration.
        reload: The signal that reloads its configuration, or the commands that do.
        tls: What `$tls` in the configuration stands for over TLS; None if it has no
            TLS, and HAProxy decrypts in front of it.
    """

    command: str
    config: str
    reload: signal.Signals | list[str]
    tls: str | None


KINDS = {
    "haproxy": Kind(
        "haproxy -W -db -f $config",
        """
defaults
    mode http
    timeout connect ${patience}s
    timeout server ${patience}s
    timeout client 30s
listen api
    bind 127.0.0.1:$port $tls
    server up 127.0.0.1:$upstream
""",
        signal.SIGUSR2,
        "ssl crt $pem",
    ),
    "nginx": Kind(
        "nginx -p $folder -c $config -e error.log",
        """
daemon off;
user root;
worker_processes 2;
pid nginx.pid;
error_log error.log crit;
events { worker_connections 1000; }
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    upstream api {
        server 127.0.0.1:$upstream;
        keepalive 100;
    }
    server {
        listen 127.0.0.1:$port $tls;
        location / {
            proxy_pass http://api;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_connect_timeout $patience;
            proxy_read_timeout $patience;
        }
    }
}
""",
        signal.SIGHUP,
        "ssl; ssl_certificate $pem; ssl_certificate_key $pem",
    ),
    "apache2": Kind(
        "apache2 -D FOREGROUND -d $folder -f $config",
        """
ServerName localhost
Listen 127.0.0.1:$port
PidFile apache.pid
DefaultRuntimeDir $folder
ErrorLog error.log
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so
User www-data
Group www-data
KeepAlive On
MaxKeepAliveRequests 0
$tls
ProxyPass / http://127.0.0.1:$upstream/ timeout=$patience retry=0
""",
        signal.SIGUSR1,
        "SSLEngine on\nSSLCertificateFile $pem",
    ),
    "caddy": Kind(
        "caddy run --adapter caddyfile --config $config",
        """
{
    admin $admin
    auto_https off
}
http$s://localhost:$port {
    bind 127.0.0.1
    $tls
    reverse_proxy 127.0.0.1:$upstream {
        transport http {
            dial_timeout ${patience}s
            response_header_timeout ${patience}s
        }
    }
}
""",
        ["caddy reload --force --adapter caddyfile --config $config --address $admin"],
        "tls $pem $pem",
    ),
    "varnish": Kind(
        "varnishd -F -j none -n $folder/w -a 127.0.0.1:$port -s malloc,32m -f $config",
        """
vcl 4.1;
backend default {
    .host = "127.0.0.1";
    .port = "$upstream";
    .connect_timeout = ${patience}s;
    .first_byte_timeout = ${patience}s;
    .between_bytes_timeout = ${patience}s;
}
# By default its errors have `Retry-After: 5`, which ends a run that has no patience.
sub vcl_backend_error {
    synthetic(beresp.reason);
    return (deliver);
}
sub vcl_synth {
    synthetic(resp.reason);
    return (deliver);
}
""",
        [
            "varnishadm -n $folder/w vcl.load v$number $config",
            "varnishadm -n $folder/w vcl.use v$number",
        ],
        None,
    ),
    "squid": Kind(
        "squid -N -f $config",
        """
http${s}_port 127.0.0.1:$port accel defaultsite=localhost $tls
cache_peer 127.0.0.1 parent $upstream 0 no-query no-digest originserver login=PASSTHRU
never_direct allow all
http_access allow all
cache deny all
connect_timeout $patience seconds
read_timeout $patience seconds
forward_timeout $patience seconds
shutdown_lifetime 0 seconds
pid_filename none
access_log none
netdb_filename none
cache_log $folder/cache.log
coredump_dir $folder
""",
        signal.SIGHUP,
        "tls-cert=$pem",
    ),
    "lighttpd": Kind(
        "lighttpd -D -f $config",
        """
server.modules = ("mod_proxy", "mod_openssl")
server.document-root = "$folder"
server.bind = "127.0.0.1"
server.port = $port
$tls
proxy.server = ("" => ((
    "host" => "127.0.0.1", "port" => $upstream,
    "connect-timeout" => $patience, "read-timeout" => $patience
)))
""",
        signal.SIGUSR1,
        'ssl.engine = "enable"\nssl.pemfile = "$pem"',
    ),
}
INSTALLED = [
    name
    for name, kind in KINDS.items()
    if shutil.which(kind.command.split()[0], path=_PATH)
]


class Gateway:
    """A gateway in a session of its own, whose processes end by the id of their group.

    Args:
        kind: What runs.
        upstream: The port of the server.
        folder: Its own folder, for its configuration and whatever it writes.
        pem: A certificate for localhost with its key, if it is to listen with TLS.

    Attributes:
        port: The port on which it listens.
    """

    def __init__(
        self, kind: Kind, upstream: int, folder: Path, pem: Path | None
    ) -> None:
        self.port = free_port()
        self._kind = kind
        self._folder = folder
        self._reloads = 0
        self._process: Process | None = None
        # Some gateways give up the rights of root.
        folder.mkdir()
        folder.chmod(0o777)
        self._names: dict[str, object] = {
            "port": self.port,
            "upstream": upstream,
            "folder": folder,
            "config": folder / "config",
            "admin": f"unix/{folder}/admin.sock",
            "patience": PATIENCE,
            "pem": pem,
            "s": "s" if pem else "",
        }
        self._names["tls"] = (
            Template(kind.tls or "").substitute(self._names) if pem else ""
        )
        (folder / "config").write_text(
            Template(kind.config).substitute(self._names), "utf-8"
        )

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        with (self._folder / "output").open("ab") as output:
            self._process = await self._run(self._kind.command, output.fileno())
        async with asyncio.timeout(_START):
            while self._process.returncode is None:
                if self._is_listening():
                    return
                await asyncio.sleep(0.02)
        text = (self._folder / "output").read_text("utf-8", "replace")
        raise RuntimeError(f"{self._kind.command} ended by itself: {text[-2000:]}")

    async def reload(self) -> None:
        """Reload its configuration, as an administrator does."""
        assert self._process is not None
        self._reloads += 1
        if isinstance(self._kind.reload, signal.Signals):
            # Apache dies of it if it has only just started, and runs again after the
            # next restart.
            with suppress(ProcessLookupError):
                self._process.send_signal(self._kind.reload)
            return
        for command in self._kind.reload:
            await (await self._run(command, DEVNULL)).wait()

    async def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it and its children."""
        if (process := self._process) is None:
            return
        self._process = None
        with suppress(ProcessLookupError):
            process.send_signal(how)
        with suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                await process.wait()
        # Children may outlive their parent, with its socket, and keep it for a moment
        # when killed.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        async with asyncio.timeout(_START):
            while self._is_listening():
                await asyncio.sleep(0.02)

    def _is_listening(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    async def _run(self, command: str, output: int) -> Process:
        names = {**self._names, "number": self._reloads}
        program, *arguments = Template(command).substitute(names).split()
        return await asyncio.create_subprocess_exec(
            program,
            *arguments,
            env={**os.environ, "PATH": _PATH, "HOME": str(self._folder)},
            stdin=DEVNULL,
            stdout=output,
            stderr=STDOUT,
            start_new_session=True,
        )
