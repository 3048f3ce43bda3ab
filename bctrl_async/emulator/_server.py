"""The server of the emulator: it receives requests, changes runtimes, and sends replies."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Self, cast

from aiohttp import web

from bctrl_async.emulator._arguments import check_seconds, check_texts, check_type
from bctrl_async.emulator._expectations import StopLog, targets_of
from bctrl_async.emulator._faults import Fault, FaultPlan
from bctrl_async.emulator._replies import (
    NO_KEY,
    NO_ROUTE,
    NO_RUNTIME,
    TOO_MANY,
    UNDECODABLE,
    WRONG_METHOD,
    Payload,
    ReplyMaker,
    WireReply,
)
from bctrl_async.emulator._reply import Reply
from bctrl_async.emulator._requests import ReceivedRequest
from bctrl_async.emulator._routes import Route, parse_route
from bctrl_async.emulator._runtimes import WireRuntime, end_runtime, make_runtime
from bctrl_async.emulator._sending import STREAMED, send_with_stray, stream

_METHODS = ("POST", "GET")
_BURST_SECONDS = 0.25
# An accepted connection becomes visible three iterations of the event loop later.
_ACCEPT_ITERATIONS = 4


class _RateLimit:
    """A generic cell rate algorithm (GCRA) with bursts of a quarter of a second."""

    def __init__(self, rate: float | None) -> None:
        if rate is not None:
            check_type("rate_limit", rate, int, float)
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"rate_limit is {rate}: give stops a second, above 0")
        self._interval = None if rate is None else 1 / rate
        self._empty_at = -math.inf

    def exceeded(self) -> bool:
        if self._interval is None:
            return False
        now = asyncio.get_running_loop().time()
        if self._empty_at - now > _BURST_SECONDS:
            return True
        self._empty_at = max(self._empty_at, now) + self._interval
        return False


class Emulator:
    """A server of `POST /v1/workspaces/{id}/runtimes/{alias}/stop` on a local port.

    It also serves `GET` for a runtime and for the list of a workspace. Use it as ``async with
    Emulator(port=0) as emulator``. Runtimes are added with `add_runtime`; a workspace without any
    is unknown. Faults and replies are queued with `inject`, or kept for a runtime with `poison`.
    Faults are also drawn at random for stops, with the probabilities `faults`. A random fault
    depends only on the seed, the target and the number of its earlier stops, never on the order of
    requests to other targets. Every request is kept in `requests`, so memory grows with their
    number.

    Attributes:
        requests: Every request, in order of arrival.
        received: The number of stops with a valid path, method and key for each
            `(workspace_id, alias)`, even of an unknown runtime. Reads are in `requests` only.

    Args:
        host: The address to listen on.
        port: The port to listen on, 0 to 65535; 0 picks a free one. The default is the port of
            the contract's second server (openapi.yaml, `servers`).
        api_key: The key that requests must carry, not empty.
        faults: The probability of each fault of a stop, each 0 to 1, together at most 1.
        seed: The seed of the random faults.
        latency: Seconds before every response, 0 or more.
        retry_after: The Retry-After of the faults that have one, in any form (contract errors.md);
            None omits the header.
        fault_latency: Seconds that `Fault.LATENCY` adds, and by which the answer that is one too
            many is late with `Fault.LATE_STRAY_ANSWER`; 0 or more.
        drip_interval: Seconds between two bytes of `Fault.SLOW_DRIP`, 0 or more.
        rate_limit: Requests per second, above 0, with bursts of a quarter of a second. Further
            requests get a 429. None means no limit.
        on_request: A function that is called with each request, once it has been added to
            `requests` and before it is answered. It runs in the emulator's event loop, so it must
            not block.

    Raises:
        ValueError: An argument is out of range, or of another type.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8787,
        api_key: str = "emulator-key",
        faults: Mapping[Fault, float] | None = None,
        seed: int = 0,
        latency: float = 0.0,
        retry_after: str | None = "1",
        fault_latency: float = 0.05,
        drip_interval: float = 0.01,
        rate_limit: float | None = None,
        on_request: Callable[[ReceivedRequest], object] | None = None,
    ) -> None:
        check_type("host", host, str)
        check_type("port", port, int)
        check_type("api_key", api_key, str)
        check_type("seed", seed, int)
        check_seconds(latency=latency, fault_latency=fault_latency, drip_interval=drip_interval)
        if not 0 <= port <= 65535:  # noqa: PLR2004 - the largest TCP port
            raise ValueError(f"port is {port}: give 0 to 65535, 0 for any free port")
        if not api_key:
            raise ValueError("api_key is empty: give the key that requests must carry")
        if on_request is not None and not callable(on_request):
            raise ValueError(f"on_request is {on_request!r}: give a function of a ReceivedRequest")
        self._host = host
        self._port = port
        self._authorization = f"Bearer {api_key}"
        self._latency = latency
        self._replies = ReplyMaker(retry_after)
        self._fault_latency = fault_latency
        self._drip_interval = drip_interval
        self._rate_limit = _RateLimit(rate_limit)
        self._on_request = on_request
        self._faults = FaultPlan({} if faults is None else faults, seed)
        self._runtimes: dict[tuple[str, str], WireRuntime] = {}
        self._ended: set[tuple[str, str]] = set()
        self._url: str | None = None
        self._listener: asyncio.Server | None = None
        self.requests: list[ReceivedRequest] = []
        self.received: Counter[tuple[str, str]] = Counter()

    def __repr__(self) -> str:
        where = "not started" if self._url is None else self._url
        counts = f"{len(self._runtimes)} runtimes, {len(self.requests)} requests"
        return f"<{type(self).__name__} {where}, {counts}>"

    @property
    def url(self) -> str:
        """The base URL without a trailing slash, such as ``http://127.0.0.1:8787``.

        Raises:
            RuntimeError: The emulator was not started.
        """
        if self._url is None:
            raise RuntimeError("the emulator has no URL yet: await start(), or use async with")
        return self._url

    @property
    def runtimes(self) -> Mapping[tuple[str, str], WireRuntime]:
        """A live view of all runtimes by `(workspace_id, alias)`."""
        return MappingProxyType(self._runtimes)

    @property
    def stops(self) -> list[ReceivedRequest]:
        """The requests that were stops, whatever their answers, in order of arrival."""
        return [request for request in self.requests if request.operation == "stop"]

    async def start(self) -> None:
        """Start listening.

        Raises:
            OSError: The port is in use, or the host is not an address of this machine.
            RuntimeError: The emulator was started before.
        """
        if self._url is not None:
            raise RuntimeError("the emulator was started before: make a new Emulator")
        loop = asyncio.get_running_loop()
        self._started_at = loop.time()
        # Cancellation tells a handler that its client disconnected; access logs cost time.
        self._server = web.Server(
            self._serve, handler_cancellation=True, access_log=None, auto_decompress=False
        )
        self._listener = await loop.create_server(
            self._server, self._host, self._port, backlog=1024
        )
        host, port = self._listener.sockets[0].getsockname()[:2]
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def close(self) -> None:
        """Stop listening and drop every connection at once, busy ones included."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        for listening in listener.sockets:
            # A listener that closes between accepting and setting up a connection leaves that
            # client hanging (asyncio, CPython 3.11 to 3.13), so stop accepting first. The event
            # loop of Windows has no readers to remove.
            with suppress(NotImplementedError):
                asyncio.get_running_loop().remove_reader(listening)
        try:
            await asyncio.sleep(0)
        finally:
            listener.close()
        iterations = 0
        while iterations < _ACCEPT_ITERATIONS or self._server.connections:
            for connection in self._server.connections:
                if connection.transport is not None:
                    # Unlike close(), abort() does not wait for the client to read the buffer.
                    connection.transport.abort()
            await asyncio.sleep(0)
            iterations += 1

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def add_runtime(
        self,
        workspace_id: str,
        alias: str,
        *,
        kind: str = "browser",
        status: str = "active",
        created_at: str = "2026-01-01T00:00:00.000Z",
    ) -> None:
        """Add a runtime, or replace the one with the same workspace id and alias.

        Args:
            workspace_id: Any non-empty text. A UUID becomes the `workspaceId` of responses; from
                any other text one is derived.
            alias: Any non-empty text.
            kind: `browser`, `desktop` or `spreadsheet` (openapi.yaml, `RuntimeKind`).
            status: `active`, `stopped` or `failed` (openapi.yaml, `RuntimeStatus`).
            created_at: The `createdAt`, any text: the contract specifies no format.

        Raises:
            ValueError: An argument is invalid.
        """
        self._runtimes[workspace_id, alias] = make_runtime(
            workspace_id, alias, kind=kind, status=status, created_at=created_at
        )
        self._ended.discard((workspace_id, alias))

    def status(self, workspace_id: str, alias: str) -> str | None:
        """Return the true status of a runtime, whatever its last response said.

        Args:
            workspace_id: As given to `add_runtime`.
            alias: As given to `add_runtime`.

        Returns:
            `active`, `stopped` or `failed`; None for an unknown runtime.

        Raises:
            ValueError: A name is not text.
        """
        check_type("workspace_id", workspace_id, str)
        check_type("alias", alias, str)
        runtime = self._runtimes.get((workspace_id, alias))
        return None if runtime is None else runtime["status"]

    def assert_stopped(self, workspace_id: str, *aliases: str, only: bool = False) -> None:
        """Assert that stops of some runtimes were received, and that they are stopped.

        Args:
            workspace_id: As given to `add_runtime`.
            *aliases: As given to `add_runtime`, at least one.
            only: Also assert that no stop of any other runtime was received, whatever its answer.

        Raises:
            AssertionError: It is not so. The message has a line for each difference (`-` for a
                runtime that is not stopped, `+` for a stop of another), with the answers to the
                stops and with similar names.
            ValueError: There is no alias, or a name is not text.
        """
        __tracebackhide__ = True
        targets = targets_of(workspace_id, aliases)
        log = StopLog(self._runtimes, self._ended, self.stops)
        if difference := log.explain_not_stopped(targets, only=only):
            raise AssertionError(difference)

    def assert_not_stopped(self, workspace_id: str, *aliases: str) -> None:
        """Assert that some runtimes were added, and that no stop of them took effect.

        Args:
            workspace_id: As given to `add_runtime`.
            *aliases: As given to `add_runtime`, at least one.

        Raises:
            AssertionError: A runtime was stopped, or was never added. The message has a line for
                each, with the answers to its stops and with similar names.
            ValueError: There is no alias, or a name is not text.
        """
        __tracebackhide__ = True
        targets = targets_of(workspace_id, aliases)
        if difference := StopLog(self._runtimes, self._ended, self.stops).explain_stopped(targets):
            raise AssertionError(difference)

    def inject(
        self,
        *faults: Fault | Reply | None,
        workspace_id: str | None = None,
        alias: str | None = None,
        method: str = "POST",
    ) -> None:
        """Queue faults and replies, one for each of the next stops of known runtimes.

        They precede random faults. A stop takes its own from the first non-empty queue of: its
        target, its workspace, its alias, all stops.

        Args:
            *faults: Faults and replies in the order of the stops; None is one normal stop.
            workspace_id: Only for stops in this workspace.
            alias: Only for stops of this alias.
            method: `POST` for stops, `GET` for reads; a list has no alias.

        Raises:
            ValueError: The method is neither `POST` nor `GET`, a fault is something else, or a name
                is not text.
        """
        check_texts(workspace_id=workspace_id, alias=alias)
        if method not in _METHODS:
            raise ValueError(f"method is {method!r}: give one of {', '.join(_METHODS)}")
        self._faults.add(faults, method, workspace_id, alias)

    def poison(self, workspace_id: str, alias: str, fault: Fault | Reply | None) -> None:
        """Give a runtime a fault or reply that every stop and every read of it meets.

        It precedes queued and random faults.

        Args:
            workspace_id: As given to `add_runtime`.
            alias: As given to `add_runtime`.
            fault: The fault or reply, in place of an earlier one; None clears it.

        Raises:
            ValueError: The fault is something else, or a name is not text.
        """
        self._faults.poison(workspace_id, alias, fault)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read() if request.body_exists else b""
        route, fault, reply = self._decide(request)
        received = ReceivedRequest(
            route.workspace_id if route else None,
            route.alias if route else None,
            request.method,
            request.raw_path,
            request.headers,
            body,
            fault,
            reply.status if reply else None,
            route.operation if route and route.method == request.method else None,
            asyncio.get_running_loop().time() - self._started_at,
        )
        self.requests.append(received)
        if self._on_request is not None:
            self._on_request(received)
        delay = self._latency + self._fault_latency * (fault is Fault.LATENCY)
        if delay:
            await asyncio.sleep(delay)
        if reply is None:
            if fault is not Fault.HANG:
                request.protocol.force_close()
            # This handler is cancelled when the connection closes.
            never: asyncio.Future[web.StreamResponse] = asyncio.get_running_loop().create_future()
            return await never
        if fault in STREAMED:
            return await stream(request, reply, fault, self._drip_interval)
        if (stray := self._replies.stray(fault)) is not None:
            late_by = self._fault_latency * (fault is Fault.LATE_STRAY_ANSWER)
            return await send_with_stray(request, reply, stray, late_by)
        return web.Response(status=reply.status, body=reply.body, headers=reply.headers)

    def _decide(
        self, request: web.BaseRequest
    ) -> tuple[Route | None, Fault | Reply | None, WireReply | None]:
        """Choose the reply and update the runtime, without awaiting: requests cannot interleave."""
        try:
            route = parse_route(request.raw_path)
        except ValueError:
            return None, None, self._replies.error(UNDECODABLE)
        if route is None:
            return None, None, self._replies.error(NO_ROUTE)
        if request.method != route.method:
            return route, None, self._replies.error(WRONG_METHOD, {"Allow": route.method})
        if request.headers.get("Authorization") != self._authorization:
            return route, None, self._replies.error(NO_KEY)
        if route.operation == "stop" and route.alias is not None:
            self.received[route.workspace_id, route.alias] += 1
        limited = self._rate_limit.exceeded()
        found = self._find(route)
        if limited or found is None:
            return route, None, self._replies.error(TOO_MANY if limited else NO_RUNTIME)
        fault = self._faults.next(route, self.received)
        conflict = False
        if route.operation == "stop":
            runtime = cast("WireRuntime", found)
            conflict = runtime["status"] != "active"
            self._stop(runtime, fault)
            if not conflict and runtime["status"] != "active":
                self._ended.add((route.workspace_id, cast("str", route.alias)))
        reply = (
            self._replies.written(fault, found)
            if isinstance(fault, Reply)
            else self._replies.reply(found, fault, request.raw_path, conflict=conflict)
        )
        return route, fault, reply

    def _find(self, route: Route) -> Payload | None:
        if route.alias is not None:
            return self._runtimes.get((route.workspace_id, route.alias))
        listed = [found for (id_, _), found in self._runtimes.items() if id_ == route.workspace_id]
        return {"runtimes": listed} if listed else None

    def _stop(self, runtime: WireRuntime, fault: Fault | Reply | None) -> None:
        """Stop a runtime, if it is active and the fault lets it."""
        if fault is Fault.FAILED:
            end_runtime(runtime, "failed")
        elif runtime["status"] == "active" and (fault is None or fault.takes_effect):
            end_runtime(runtime, "stopped")
