"""Bulk stops through real gateways with faults and restarts, compared with the server.

`python tests/nightly/gateways.py [--targets 1000] [--seed 0] [--only NAME ...]`

Install with `apt-get install --no-install-recommends apache2 caddy haproxy lighttpd
lighttpd-mod-openssl nginx squid varnish`. All take ten minutes, `--only nginx haproxy`
two.

Each gateway that is installed (`gateway_servers.py` has its configuration) stands in
front of the emulator, plain and over TLS. The server resets connections before and
after the effect, answers after the gateway has given up, answers in part, and closes
connections that the gateway keeps; during the run the gateway is reloaded, ended and
killed, and so is the server. Half of the runs neither retry nor verify, so that an
answer of the gateway is the last word. In the end no outcome may contradict the record
of the server, which may be late: a stop takes effect even if its client has gone.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import socket
import ssl
import struct
import sys
import tempfile
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import product
from pathlib import Path

import aiohttp.web
import trustme
from gateway_servers import INSTALLED, KINDS, PATIENCE, Gateway
from opentelemetry.sdk.trace import TracerProvider

from bctrl_async import BctrlSession, RetryPolicy, StopOutcome, StopResult
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.otel import OpenTelemetry

_KEY = "emulator-key"
_RATE = 200.0
"""Stops per second, so that a run meets many restarts."""
_DEADLINE = 45.0
_LATE = 1.5 * PATIENCE
_ONCE = RetryPolicy(attempts=1, patience=0)
_RETRIES = RetryPolicy(base=0.01, cap=0.1, patience=10.0)
_CLAIMS_STOPPED = frozenset(
    {StopResult.STOPPED, StopResult.ACCEPTED, StopResult.ALREADY_STOPPED}
)
_OWN_FAULTS = {Fault.RATE_LIMITED: 0.01, Fault.SERVER_ERROR: 0.01}
"""Errors of the API itself, after which nothing is stopped."""


class Trouble(StrEnum):
    """The fate of a request at the server."""

    RESET_BEFORE = "reset before the effect"
    RESET_AFTER = "reset after the effect"
    CLOSED_AFTER = "closed after the effect"
    CUT = "answered in part"
    LATE_BEFORE = "late, before the effect"
    LATE_AFTER = "late, after the effect"
    CLOSED_IDLE = "closed while it is kept alive"
    RESET_IDLE = "reset while it is kept alive"


class Event(StrEnum):
    """An event at a gateway, or at the server and its connections."""

    RELOADED = "reloads"
    ENDED = "restarts"
    KILLED = "kills"
    SERVER_RESTARTED = "restarts of the server"
    SERVER_RESET = "resets of its connections"


class Server:
    """The emulator, on a port that is closed and opened again.

    Attributes:
        emulator: Has the record.
        port: The port.
    """

    def __init__(self, rng: random.Random) -> None:
        self.emulator = Emulator(port=0, api_key=_KEY, faults=_OWN_FAULTS, latency=0.02)
        self.port = 0
        self._random = rng
        self._server = aiohttp.web.Server(self._serve, access_log=None)
        self._listener: asyncio.Server | None = None
        self._busy = 0

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._server, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stop listening, and reset all connections."""
        assert self._listener is not None
        self._listener.close()
        self.reset()

    def reset(self) -> None:
        for connection in self._server.connections:
            _end(connection.transport, reset=True)

    async def settled(self) -> None:
        """Wait until no request can arrive any longer, and all have taken effect."""
        await asyncio.sleep(_LATE)
        while self._busy:
            await asyncio.sleep(0.01)

    async def _serve(
        self, request: aiohttp.web.BaseRequest
    ) -> aiohttp.web.StreamResponse:
        trouble = (
            self._random.choice(list(Trouble)) if self._random.random() < 0.1 else None
        )
        self._busy += 1
        try:
            if trouble is Trouble.LATE_BEFORE:
                await asyncio.sleep(_LATE)
            if trouble is Trouble.RESET_BEFORE:
                _end(request.transport, reset=True)
                return aiohttp.web.Response()
            # A handler goes on if its connection is lost.
            response = await self.emulator._serve(request)
            if trouble is Trouble.LATE_AFTER:
                await asyncio.sleep(_LATE)
        finally:
            self._busy -= 1
        match trouble:
            case Trouble.RESET_AFTER | Trouble.CLOSED_AFTER:
                _end(request.transport, reset=trouble is Trouble.RESET_AFTER)
            case Trouble.CUT if request.transport is not None:
                head = (
                    f"HTTP/1.1 {response.status} Cut\r\nContent-Length: 999\r\n\r\n{{"
                )
                request.transport.write(head.encode())
                _end(request.transport, reset=False)
            case Trouble.CLOSED_IDLE | Trouble.RESET_IDLE:
                # The next request may be on its way.
                end = partial(
                    _end, request.transport, reset=trouble is Trouble.RESET_IDLE
                )
                asyncio.get_running_loop().call_later(
                    self._random.uniform(0.0, 0.1), end
                )
        return response


def _end(transport: asyncio.BaseTransport | None, *, reset: bool) -> None:
    """End a connection, by a reset or after what was written."""
    if not isinstance(transport, asyncio.Transport) or transport.is_closing():
        return
    if reset:
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )
        transport.abort()
    else:
        transport.close()


@dataclass
class Verdict:
    """The fate of the stops of one or several runs.

    Args:
        outcomes: The outcomes by result; an `unknown` by what became of its runtime as
            well.
        events: The events.
        false: The outcomes that contradict the record.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    false: list[str] = field(default_factory=list)

    def __add__(self, other: Verdict) -> Verdict:
        outcomes, events = self.outcomes + other.outcomes, self.events + other.events
        return Verdict(outcomes, events, self.false + other.false)

    def __str__(self) -> str:
        counts = [f"{count:,} {name}" for name, count in sorted(self.outcomes.items())]
        events = [f"{count} {name}" for name, count in sorted(self.events.items())]
        text = f"{self.outcomes.total():,} outcomes ({', '.join(counts)})"
        text += f" in {', '.join(events)}"
        return f"{text}: {'; '.join(self.false[:5]) or 'none is false'}"


class Run:
    """A bulk stop through a gateway."""

    def __init__(self, name: str, count: int, seed: str, folder: Path) -> None:
        self._kind = KINDS[name]
        self._random = random.Random(seed)
        self._server = Server(self._random)
        # Some gateways give up the rights of root.
        folder.chmod(0o755)
        self._folder = folder
        self._targets = [("ws-1", f"r{number}") for number in range(count)]
        for target in self._targets:
            self._server.emulator.add_runtime(*target)
        self._outcomes: list[StopOutcome] = []
        self._events: Counter[str] = Counter()

    async def run(self, *, tls: bool, retries: bool) -> Verdict:
        authority = trustme.CA()
        pem = self._folder / "localhost.pem"
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(
            pem
        )
        trusted = ssl.create_default_context()
        authority.configure_trust(trusted)
        gateways: list[Gateway] = []
        async with self._server.emulator:
            await self._server.open()
            try:
                gateways += self._gateways(pem if tls else None)
                for gateway in gateways:
                    await gateway.start()
                url = f"http{'s' * tls}://localhost:{gateways[-1].port}"
                # Each attempt has a `traceparent` of its own.
                observer = OpenTelemetry(tracer_provider=TracerProvider())
                async with BctrlSession(
                    _KEY, base_url=url, rate=_RATE, ssl=trusted, observer=observer
                ) as session:
                    await self._stop(session, gateways, retries=retries)
                await self._server.settled()
            finally:
                for gateway in gateways:
                    await gateway.end()
                self._server.close()
        stops = self._server.emulator.stops
        sent = Counter((stop.target, stop.headers["traceparent"]) for stop in stops)
        repeated = {target for (target, _), count in sent.items() if count > 1}
        verdict = Verdict(events=self._events)
        for outcome in self._outcomes:
            self._judge(verdict, outcome, is_repeated=outcome.target in repeated)
        indices = sorted(outcome.index for outcome in self._outcomes)
        if indices != list(range(len(self._targets))):
            verdict.false.append(
                f"{len(self._targets)} targets have {len(indices)} outcomes"
            )
        return verdict

    def _gateways(self, pem: Path | None) -> Iterator[Gateway]:
        if pem is None or self._kind.tls is not None:
            yield Gateway(self._kind, self._server.port, self._folder / "gateway", pem)
            return
        behind = Gateway(self._kind, self._server.port, self._folder / "behind", None)
        yield behind
        yield Gateway(KINDS["haproxy"], behind.port, self._folder / "gateway", pem)

    async def _stop(
        self, session: BctrlSession, gateways: list[Gateway], *, retries: bool
    ) -> None:
        async def disturb() -> None:
            while not stopping.done():
                await asyncio.sleep(self._random.uniform(0.3, 1.2))
                await self._disturb(self._random.choice(gateways))

        stopping = asyncio.ensure_future(
            session.stop_runtimes(
                self._targets,
                concurrency=50,
                deadline=_DEADLINE,
                on_outcome=self._outcomes.append,
                # The client gives up before the gateway does, or after it.
                timeout=self._random.choice([0.7, 3.0]) * PATIENCE,
                retry=_RETRIES if retries else _ONCE,
                verify=5.0 if retries else False,
            )
        )
        await asyncio.gather(stopping, disturb())

    async def _disturb(self, gateway: Gateway) -> None:
        event = self._random.choice(list(Event))
        self._events[event] += 1
        match event:
            case Event.RELOADED:
                await gateway.reload()
            case Event.ENDED | Event.KILLED:
                killed = event is Event.KILLED
                await gateway.end(signal.SIGKILL if killed else signal.SIGTERM)
                await asyncio.sleep(self._random.uniform(0.0, 0.3))
                await gateway.start()
            case Event.SERVER_RESTARTED:
                self._server.close()
                await asyncio.sleep(self._random.uniform(0.0, 0.3))
                await self._server.open()
            case Event.SERVER_RESET:
                self._server.reset()

    def _judge(
        self, verdict: Verdict, outcome: StopOutcome, *, is_repeated: bool
    ) -> None:
        """Compare an outcome with the record of the server."""
        has_stopped = self._server.emulator.status(*outcome.target) == "stopped"
        result, error = outcome.result, outcome.error
        claims_stopped = outcome.ok or result in _CLAIMS_STOPPED
        claims_not = not claims_stopped and not (
            error is not None and error.may_have_stopped
        )
        words = str(result)
        if result is StopResult.UNKNOWN and has_stopped:
            words += " (but stopped)"
        elif (
            claims_not
            and has_stopped
            and is_repeated
            and error is not None
            and error.code
        ):
            # The API answered the second copy; its answer to the first is lost.
            words += " (but stopped by a copy that the gateway sent)"
        elif claims_stopped > has_stopped or (claims_not and has_stopped):
            verdict.false.append(f"{outcome.target.alias} is {result}: {error}")
        verdict.outcomes[words] += 1
        verdict.events["targets repeated by the gateway"] += is_repeated


async def _main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", type=int, default=1000, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=list(KINDS))
    arguments = parser.parse_args()
    logging.disable()
    everything = Verdict()
    for name, tls, retries in product(
        arguments.only or INSTALLED, [False, True], [False, True]
    ):
        with tempfile.TemporaryDirectory() as folder:
            seed = f"{arguments.seed} {name} {tls} {retries}"
            run = Run(name, arguments.targets, seed, Path(folder))
            verdict = await run.run(tls=tls, retries=retries)
        everything += verdict
        words = f"{name}{', TLS' * tls}{', retries' * retries}"
        print(f"{words}: {verdict}", flush=True)  # noqa: T201 - its output.
    print(f"in all: {everything}")  # noqa: T201 - the same.
    return int(bool(everything.false))


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
