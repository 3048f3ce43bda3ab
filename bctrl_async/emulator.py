"""A local server for testing clients: it implements the bctrl contract and injects faults.

It imports nothing from the client and restates the wire format in plain dicts, so that a bug cannot
hide on both sides. Runtimes follow ``docs/contract/openapi.yaml``; error responses follow
``errors.md`` beside it, "contract errors.md" below.
"""

import asyncio
import bisect
import functools
import hashlib
import itertools
import json
import math
import re
import uuid
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypedDict, cast
from urllib.parse import unquote_to_bytes

from aiohttp import web

__all__ = ["Emulator", "Fault", "ReceivedRequest", "WireRuntime"]

_KINDS = ("browser", "desktop", "spreadsheet")
_STATUSES = ("active", "stopped", "failed")
_METHODS = ("POST", "GET")
_JSON = "application/json"
_MIB = 2**20
_BURST_SECONDS = 0.25
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
# An accepted connection becomes visible three iterations of the event loop later.
_ACCEPT_ITERATIONS = 4


class Fault(StrEnum):
    """A fault of one stop: what the client receives, and whether the stop takes effect.

    The statuses, and which of them mean that nothing is stopped, follow contract errors.md. A fault
    of a `GET` changes the response in the same way, but never a runtime.
    """

    LATENCY = "latency"
    """The normal response, `fault_latency` seconds late; the runtime is stopped."""
    RATE_LIMITED = "rate_limited"
    """429 without Retry-After; nothing is stopped."""
    RATE_LIMITED_RETRY_AFTER = "rate_limited_retry_after"
    """429 with Retry-After; nothing is stopped."""
    SERVER_ERROR = "server_error"
    """500 with the documented JSON error body; nothing is stopped, but a client cannot know."""
    BAD_GATEWAY = "bad_gateway"
    """502 with the HTML page of a proxy; the runtime is stopped behind the proxy."""
    UNAVAILABLE = "unavailable"
    """503 with Retry-After; nothing is stopped."""
    GATEWAY_TIMEOUT = "gateway_timeout"
    """504 with the HTML page of a proxy; the runtime is stopped behind the proxy."""
    DROP_BEFORE = "drop_before"
    """The connection closes without a response; nothing is stopped."""
    DROP_AFTER = "drop_after"
    """The connection closes without a response; the runtime is stopped."""
    CLOSE_KEPT_ALIVE = "close_kept_alive"
    """The normal response, then the kept-alive connection closes; the runtime is stopped."""
    HANG = "hang"
    """No response until the client or the emulator closes; the runtime is stopped."""
    SLOW_DRIP = "slow_drip"
    """The normal response, one byte every `drip_interval` seconds; the runtime is stopped."""
    TRUNCATED_JSON = "truncated_json"
    """The normal response, closed in the middle of its body; the runtime is stopped."""
    MALFORMED_JSON = "malformed_json"
    """A complete 200 whose body is not JSON; the runtime is stopped."""
    WRONG_SHAPE = "wrong_shape"
    """200 with JSON that lacks every required field; the runtime is stopped."""
    OVERSIZED = "oversized"
    """200 with a valid Runtime of more than 2 MiB; the runtime is stopped."""
    COMPRESSED_BOMB = "compressed_bomb"
    """200 with 64 KiB of gzip that unpack to 64 MiB of JSON; the runtime is stopped."""
    UNKNOWN_VALUES = "unknown_values"
    """200 with enum values and fields unknown to the contract; the runtime is stopped."""
    FAILED = "failed"
    """200 with status "failed"; the runtime's status becomes "failed"."""
    ACCEPTED = "accepted"
    """200 with status "active"; the runtime is stopped."""
    REDIRECT = "redirect"
    """307 to a path of this server that answers 404; nothing is stopped."""

    @property
    def takes_effect(self) -> bool:
        """True if a stop with this fault ends the runtime."""
        return self not in _WITHOUT_EFFECT


_WITHOUT_EFFECT = frozenset(
    {
        Fault.RATE_LIMITED,
        Fault.RATE_LIMITED_RETRY_AFTER,
        Fault.SERVER_ERROR,
        Fault.UNAVAILABLE,
        Fault.DROP_BEFORE,
        Fault.REDIRECT,
    }
)
_UNANSWERED = frozenset({Fault.DROP_BEFORE, Fault.DROP_AFTER, Fault.HANG})
_STREAMED = frozenset({Fault.CLOSE_KEPT_ALIVE, Fault.SLOW_DRIP, Fault.TRUNCATED_JSON})
_PROXY_PAGES: dict[Fault | None, HTTPStatus] = {
    Fault.BAD_GATEWAY: HTTPStatus.BAD_GATEWAY,
    Fault.GATEWAY_TIMEOUT: HTTPStatus.GATEWAY_TIMEOUT,
}


class _WireSummary(TypedDict):
    browserRunning: bool
    currentDriver: str | None
    defaultContextId: str | None
    defaultPageId: str | None
    launchMode: str
    profileId: str | None
    storageWorkspace: str | None


class WireRuntime(TypedDict):
    """A Runtime on the wire (openapi.yaml, `components.schemas.Runtime`)."""

    alias: str
    createdAt: str
    driver: str
    id: str
    kind: str
    status: str
    summary: _WireSummary
    updatedAt: str
    workspaceId: str


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A request as received, and the emulator's reaction to it.

    Attributes:
        workspace_id: The decoded workspace id, None if the path is unknown.
        alias: The decoded alias, None if the path is unknown or that of a list.
        method: The HTTP method.
        raw_path: The request target exactly as on the wire, with its query.
        headers: The headers, with case-insensitive names.
        body: The body as on the wire, not decompressed.
        fault: The fault that was applied, None for normal behaviour.
        status: The HTTP status of the response, None if there was no response.
    """

    workspace_id: str | None
    alias: str | None
    method: str
    raw_path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes
    fault: Fault | None
    status: int | None


_Payload = Mapping[str, Any]
"""The JSON of a 200: a Runtime, or a list of them."""


class _Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


class _Error(NamedTuple):
    status: int
    code: str
    reason_class: str
    error: str
    hint: str


_UNDECODABLE = _Error(
    400, "request.invalid", "invalid_input", "The path is not UTF-8.", "Percent-encode its UTF-8."
)
_NO_ROUTE = _Error(
    404, "route.not_found", "not_found", "No operation has this path.", "See the reference."
)
_WRONG_METHOD = _Error(
    405, "method.not_allowed", "invalid_input", "Method not allowed.", "See Allow."
)
_NO_KEY = _Error(401, "auth.required", "unauthorized", "Invalid API key.", "Send Bearer <api-key>.")
_NO_RUNTIME = _Error(
    404, "runtime.not_found", "not_found", "No such workspace or alias.", "List what is there."
)
_NOT_ACTIVE = _Error(
    409, "runtime.not_active", "conflict", "Nothing runs under that alias.", "It is stopped."
)
_TOO_MANY = _Error(429, "rate.limited", "rate_limited", "Too many requests.", "Slow down.")
_FAULT_ERRORS: dict[Fault | None, _Error] = {
    Fault.RATE_LIMITED: _TOO_MANY,
    Fault.RATE_LIMITED_RETRY_AFTER: _TOO_MANY,
    Fault.SERVER_ERROR: _Error(
        500, "server.error", "server", "Something broke.", "If it lasts, report the request id."
    ),
    Fault.UNAVAILABLE: _Error(
        503, "server.unavailable", "upstream", "Out for maintenance.", "Try again later."
    ),
}
_WITH_RETRY_AFTER = frozenset({Fault.RATE_LIMITED_RETRY_AFTER, Fault.UNAVAILABLE})


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _with_unknown_values(payload: _Payload) -> _Payload:
    if "runtimes" in payload:
        return {
            "runtimes": [_with_unknown_values(runtime) for runtime in payload["runtimes"]],
            "next": 2,
        }
    runtime = payload
    summary = {**runtime["summary"], "launchMode": "teleport", "gpu": {"count": 2}}
    return {**runtime, "kind": "hologram", "status": "paused", "summary": summary, "region": "moon"}


@functools.cache
def _bomb() -> bytes:
    packer = zlib.compressobj(level=9, wbits=zlib.MAX_WBITS | 16)
    megabyte = b"x" * _MIB
    parts = [packer.compress(b'{"padding":"')]
    parts += [packer.compress(megabyte) for _ in range(64)]
    return b"".join([*parts, packer.compress(b'"}'), packer.flush()])


# These faults answer 200 with a body of their own, even for a runtime that is not active.
_FAULT_BODIES: dict[Fault | None, Callable[[_Payload], bytes]] = {
    Fault.MALFORMED_JSON: lambda payload: _dump(payload).replace(b":", b"="),
    Fault.WRONG_SHAPE: lambda _: b'{"ok":true}',
    Fault.OVERSIZED: lambda payload: _dump({**payload, "padding": "x" * (2 * _MIB)}),
    Fault.COMPRESSED_BOMB: lambda _: _bomb(),
    Fault.UNKNOWN_VALUES: lambda payload: _dump(_with_unknown_values(payload)),
    Fault.FAILED: _dump,
    Fault.ACCEPTED: lambda payload: _dump({**payload, "status": "active"}),
}


def _decode(segment: str) -> str:
    if not segment.isascii() or re.search("%(?![0-9A-Fa-f]{2})", segment):
        raise ValueError(segment)
    return unquote_to_bytes(segment).decode()


class _Route(NamedTuple):
    method: str
    workspace_id: str
    alias: str | None = None


def _route(raw_path: str) -> _Route | None:
    """Return the operation of a path, None for an unknown path.

    The paths are those of openapi.yaml (`runtimes-stop`) and of contract errors.md (`runtimes-get`
    and `runtimes-list`).

    Raises:
        ValueError: A segment is not percent-encoded UTF-8.
    """
    match raw_path.partition("?")[0].split("/"):
        case ["", "v1", "workspaces", workspace_id, "runtimes", alias, "stop"]:
            method, names = "POST", [workspace_id, alias]
        case ["", "v1", "workspaces", workspace_id, "runtimes", alias]:
            method, names = "GET", [workspace_id, alias]
        case ["", "v1", "workspaces", workspace_id, "runtimes"]:
            method, names = "GET", [workspace_id]
        case _:
            return None
    # Dot segments are not names (RFC 3986 5.2.4). Accepting them would hide a bug of the client
    # that a real gateway turns into a 404.
    if {*names} & {"", ".", ".."}:
        return None
    return _Route(method, *map(_decode, names))


class _FaultPlan:
    """The faults of future requests: queued ones first, then random ones."""

    def __init__(self, probabilities: Mapping[Fault, float], seed: int) -> None:
        for fault, share in probabilities.items():
            if fault not in set(Fault):
                raise ValueError(f"faults has {fault!r}: give members of Fault")
            if not 0 <= share <= 1:
                raise ValueError(f"faults has {fault} at {share}: give a probability of 0 to 1")
        if (total := sum(probabilities.values())) > 1 + 1e-9:
            raise ValueError(f"faults add up to {total}: give probabilities of at most 1 together")
        # In the order of `Fault`, so that a seed does not depend on the order of the mapping.
        faults = [fault for fault in Fault if probabilities.get(fault)]
        self._bounds = list(itertools.accumulate(probabilities[fault] for fault in faults))
        self._choices = [*faults, None]
        self._seed = seed
        self._queues: defaultdict[tuple[str | None, ...], deque[Fault | None]] = defaultdict(deque)

    def add(self, faults: Iterable[Fault | None], *key: str | None) -> None:
        self._queues[key].extend(faults)

    def next(self, route: _Route, received: Counter[tuple[str, str]]) -> Fault | None:
        method, workspace_id, alias = route
        if self._queues:
            targets = ((workspace_id, alias), (workspace_id, None), (None, alias), (None, None))
            for target in targets:
                if queue := self._queues.get((method, *target)):
                    return queue.popleft()
        if not self._bounds or method != "POST" or alias is None:
            return None
        number = received[workspace_id, alias]
        # The length keeps ("a", "bc") and ("ab", "c") apart.
        text = f"{self._seed}:{number}:{len(workspace_id)}:{workspace_id}{alias}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return self._choices[bisect.bisect(self._bounds, int.from_bytes(digest) / 2**64)]


class _RateLimit:
    """A generic cell rate algorithm (GCRA) with bursts of a quarter of a second."""

    def __init__(self, rate: float | None) -> None:
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
    is unknown. Faults are queued with `inject`, or drawn at random for stops with the probabilities
    `faults`. A random fault depends only on the seed, the target and the number of its earlier
    stops, never on the order of requests to other targets. Every request is kept in `requests`, so
    memory grows with their number.

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
        fault_latency: Seconds that `Fault.LATENCY` adds, 0 or more.
        drip_interval: Seconds between two bytes of `Fault.SLOW_DRIP`, 0 or more.
        rate_limit: Requests per second, above 0, with bursts of a quarter of a second. Further
            requests get a 429. None means no limit.

    Raises:
        ValueError: An argument is out of range.
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
    ) -> None:
        if not 0 <= port <= 65535:  # noqa: PLR2004 - the largest TCP port
            raise ValueError(f"port is {port}: give 0 to 65535, 0 for any free port")
        if not api_key:
            raise ValueError("api_key is empty: give the key that requests must carry")
        if retry_after is not None and not retry_after.isprintable():
            raise ValueError(f"retry_after is {retry_after!r}: leave out control characters")
        times = {"latency": latency, "fault_latency": fault_latency, "drip_interval": drip_interval}
        for name, value in times.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}: give seconds, finite and not negative")
        self._host = host
        self._port = port
        self._authorization = f"Bearer {api_key}"
        self._latency = latency
        self._retry_after = {} if retry_after is None else {"Retry-After": retry_after}
        self._fault_latency = fault_latency
        self._drip_interval = drip_interval
        self._rate_limit = _RateLimit(rate_limit)
        self._faults = _FaultPlan(faults or {}, seed)
        self._runtimes: dict[tuple[str, str], WireRuntime] = {}
        self._request_numbers = itertools.count(1)
        self._url: str | None = None
        self._listener: asyncio.Server | None = None
        self.requests: list[ReceivedRequest] = []
        self.received: Counter[tuple[str, str]] = Counter()

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

    async def start(self) -> None:
        """Start listening.

        Raises:
            OSError: The port is in use, or the host is not an address of this machine.
            RuntimeError: The emulator was started before.
        """
        if self._url is not None:
            raise RuntimeError("the emulator was started before: make a new Emulator")
        # Cancellation tells a handler that its client disconnected; access logs cost time.
        self._server = web.Server(
            self._serve, handler_cancellation=True, access_log=None, auto_decompress=False
        )
        self._listener = await asyncio.get_running_loop().create_server(
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
        for name, value in {"workspace_id": workspace_id, "alias": alias}.items():
            if not value:
                raise ValueError(f"{name} is empty, which a path cannot express: give some text")
        if kind not in _KINDS:
            raise ValueError(f"kind is {kind!r}: give one of {', '.join(_KINDS)}")
        if status not in _STATUSES:
            raise ValueError(f"status is {status!r}: give one of {', '.join(_STATUSES)}")
        try:
            workspace_uuid = uuid.UUID(workspace_id)
        except ValueError:
            workspace_uuid = uuid.uuid5(uuid.NAMESPACE_URL, workspace_id)
        self._runtimes[workspace_id, alias] = {
            "alias": alias,
            "createdAt": created_at,
            "driver": "playwright",
            "id": str(uuid.uuid5(workspace_uuid, alias)),
            "kind": kind,
            "status": status,
            "summary": {
                "browserRunning": status == "active",
                "currentDriver": None,
                "defaultContextId": None,
                "defaultPageId": None,
                "launchMode": "ephemeral",
                "profileId": None,
                "storageWorkspace": None,
            },
            "updatedAt": created_at,
            "workspaceId": str(workspace_uuid),
        }

    def status(self, workspace_id: str, alias: str) -> str | None:
        """Return the true status of a runtime, whatever its last response said.

        Args:
            workspace_id: As given to `add_runtime`.
            alias: As given to `add_runtime`.

        Returns:
            `active`, `stopped` or `failed`; None for an unknown runtime.
        """
        runtime = self._runtimes.get((workspace_id, alias))
        return None if runtime is None else runtime["status"]

    def inject(
        self,
        *faults: Fault | None,
        workspace_id: str | None = None,
        alias: str | None = None,
        method: str = "POST",
    ) -> None:
        """Queue faults, one for each of the next stops of known runtimes.

        Queued faults precede random ones. A stop takes its fault from the first non-empty queue of:
        its target, its workspace, its alias, all stops.

        Args:
            *faults: The faults in the order of the stops; None is one normal stop.
            workspace_id: Only for stops in this workspace.
            alias: Only for stops of this alias.
            method: `POST` for stops, `GET` for reads; a list has no alias.

        Raises:
            ValueError: The method is neither `POST` nor `GET`.
        """
        if method not in _METHODS:
            raise ValueError(f"method is {method!r}: give one of {', '.join(_METHODS)}")
        self._faults.add(faults, method, workspace_id, alias)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read() if request.body_exists else b""
        route, fault, reply = self._decide(request)
        self.requests.append(
            ReceivedRequest(
                route.workspace_id if route else None,
                route.alias if route else None,
                request.method,
                request.raw_path,
                request.headers,
                body,
                fault,
                reply.status if reply else None,
            )
        )
        delay = self._latency + self._fault_latency * (fault is Fault.LATENCY)
        if delay:
            await asyncio.sleep(delay)
        if reply is None:
            if fault is not Fault.HANG:
                request.protocol.force_close()
            # This handler is cancelled when the connection closes.
            never: asyncio.Future[web.StreamResponse] = asyncio.get_running_loop().create_future()
            return await never
        if fault in _STREAMED:
            return await self._stream(request, reply, fault)
        return web.Response(status=reply.status, body=reply.body, headers=reply.headers)

    def _decide(
        self, request: web.BaseRequest
    ) -> tuple[_Route | None, Fault | None, _Reply | None]:
        """Choose the reply and update the runtime, without awaiting: requests cannot interleave."""
        try:
            route = _route(request.raw_path)
        except ValueError:
            return None, None, self._error_reply(_UNDECODABLE)
        if route is None:
            return None, None, self._error_reply(_NO_ROUTE)
        if request.method != route.method:
            return route, None, self._error_reply(_WRONG_METHOD, {"Allow": route.method})
        if request.headers.get("Authorization") != self._authorization:
            return route, None, self._error_reply(_NO_KEY)
        if route.method == "POST" and route.alias is not None:
            self.received[route.workspace_id, route.alias] += 1
        limited = self._rate_limit.exceeded()
        found = self._find(route)
        if limited or found is None:
            return route, None, self._error_reply(_TOO_MANY if limited else _NO_RUNTIME)
        fault = self._faults.next(route, self.received)
        if route.method == "POST":
            reply = self._stop(cast("WireRuntime", found), fault, request.raw_path)
        else:
            reply = self._reply(found, fault, request.raw_path)
        return route, fault, reply

    def _find(self, route: _Route) -> _Payload | None:
        if route.alias is not None:
            return self._runtimes.get((route.workspace_id, route.alias))
        listed = [found for (id_, _), found in self._runtimes.items() if id_ == route.workspace_id]
        return {"runtimes": listed} if listed else None

    def _stop(self, runtime: WireRuntime, fault: Fault | None, raw_path: str) -> _Reply | None:
        was_active = runtime["status"] == "active"
        if fault is Fault.FAILED:
            _end(runtime, "failed")
        elif was_active and (fault is None or fault.takes_effect):
            _end(runtime, "stopped")
        payload = runtime if was_active or fault in _FAULT_BODIES else None
        return self._reply(payload, fault, raw_path)

    def _reply(self, payload: _Payload | None, fault: Fault | None, raw_path: str) -> _Reply | None:
        """Return the reply of the fault if it has one, else the payload, or a conflict for None."""
        if fault in _UNANSWERED:
            return None
        if fault is Fault.REDIRECT:
            return _Reply(307, b"", {"Location": f"/moved{raw_path}"})
        if page := _PROXY_PAGES.get(fault):
            title = f"{page.value} {page.phrase}"
            html = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
            return _Reply(page, html.encode(), {"Content-Type": "text/html"})
        if error := _FAULT_ERRORS.get(fault):
            return self._error_reply(
                error, self._retry_after if fault in _WITH_RETRY_AFTER else _NO_HEADERS
            )
        if payload is None:
            return self._error_reply(_NOT_ACTIVE)
        headers = {"Content-Type": _JSON, "x-request-id": self._request_id()}
        if fault is Fault.COMPRESSED_BOMB:
            headers["Content-Encoding"] = "gzip"
        return _Reply(200, _FAULT_BODIES.get(fault, _dump)(payload), headers)

    def _error_reply(self, error: _Error, headers: Mapping[str, str] = _NO_HEADERS) -> _Reply:
        request_id = self._request_id()
        body = {
            "code": error.code,
            "error": error.error,
            "reasonClass": error.reason_class,
            "requestId": request_id,
            "hint": error.hint,
        }
        all_headers = {"Content-Type": _JSON, "x-request-id": request_id, **headers}
        return _Reply(error.status, _dump(body), all_headers)

    def _request_id(self) -> str:
        return f"req_{next(self._request_numbers)}"

    async def _stream(
        self, request: web.BaseRequest, reply: _Reply, fault: Fault
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        response.content_length = len(reply.body)
        # The client may disconnect at any point.
        with suppress(ConnectionError):
            await response.prepare(request)
            if fault is Fault.SLOW_DRIP:
                for byte in reply.body:
                    await response.write(bytes((byte,)))
                    await asyncio.sleep(self._drip_interval)
            elif fault is Fault.TRUNCATED_JSON:
                await response.write(reply.body[: len(reply.body) // 2])
                request.protocol.force_close()
            else:
                await response.write_eof(reply.body)
                request.protocol.force_close()
        return response


def _end(runtime: WireRuntime, status: str) -> None:
    runtime["status"] = status
    runtime["summary"]["browserRunning"] = False
    runtime["updatedAt"] = "2026-01-01T00:00:01.000Z"
