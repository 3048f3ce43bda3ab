"""A local server of the bctrl contract, with faults on demand, to test clients against.

It imports nothing of the client and restates the wire format with plain dicts, so that one bug
cannot hide on both sides. What it answers follows ``docs/contract/openapi.yaml``; what a server
says when it does not answer 200, and "contract errors.md" below, is ``errors.md`` beside it.
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
from collections.abc import Callable, Mapping
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
# A connection that the listener accepted becomes visible three turns of the loop later.
_ACCEPT_TURNS = 4


class Fault(StrEnum):
    """What can go wrong with one stop; each member says what the client sees and what was done.

    The statuses, and whether one means that nothing was done, follow contract errors.md. A get or
    a list that is given one is answered in the same way, and changes nothing; of a runtime it says
    what is so, whatever a stop would have made of it.
    """

    LATENCY = "latency"
    """The usual answer, `fault_latency` seconds late; the stop took effect."""
    RATE_LIMITED = "rate_limited"
    """429 without Retry-After; nothing was done."""
    RATE_LIMITED_RETRY_AFTER = "rate_limited_retry_after"
    """429 with Retry-After; nothing was done."""
    SERVER_ERROR = "server_error"
    """500 with the documented JSON error body; nothing was done, which the client cannot know."""
    BAD_GATEWAY = "bad_gateway"
    """502 with a proxy's HTML page; the stop took effect behind the proxy."""
    UNAVAILABLE = "unavailable"
    """503 with Retry-After; nothing was done."""
    GATEWAY_TIMEOUT = "gateway_timeout"
    """504 with a proxy's HTML page; the stop took effect behind the proxy."""
    DROP_BEFORE = "drop_before"
    """The connection is closed without an answer; nothing was done."""
    DROP_AFTER = "drop_after"
    """The connection is closed without an answer; the stop took effect."""
    CLOSE_KEPT_ALIVE = "close_kept_alive"
    """The usual answer, promising keep-alive, then a closed connection; the stop took effect."""
    HANG = "hang"
    """No answer until the client leaves or the emulator closes; the stop took effect."""
    SLOW_DRIP = "slow_drip"
    """The usual answer, its body a byte every `drip_interval` seconds; the stop took effect."""
    TRUNCATED_JSON = "truncated_json"
    """The usual answer, cut off in mid-body with its connection; the stop took effect."""
    MALFORMED_JSON = "malformed_json"
    """A complete 200 that is not JSON; the stop took effect."""
    WRONG_SHAPE = "wrong_shape"
    """200 with JSON that lacks every required field; the stop took effect."""
    OVERSIZED = "oversized"
    """200 with a valid Runtime of more than 2 MiB; the stop took effect."""
    COMPRESSED_BOMB = "compressed_bomb"
    """200 of some 64 KiB of gzip that unpack to 64 MiB of JSON; the stop took effect."""
    UNKNOWN_VALUES = "unknown_values"
    """200 with enum values and fields that no contract knows yet; the stop took effect."""
    FAILED = "failed"
    """200 with status "failed"; the runtime's status becomes "failed"."""
    ACCEPTED = "accepted"
    """200 with status still "active"; the stop took effect all the same."""
    REDIRECT = "redirect"
    """307 to another path of this server, which answers 404; nothing was done."""

    @property
    def takes_effect(self) -> bool:
        """Whether a stop that meets this fault leaves the runtime no longer active."""
        return self not in _NOTHING_DONE


_NOTHING_DONE = frozenset(
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
    """A Runtime as it stands on the wire (openapi.yaml, `components.schemas.Runtime`)."""

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
    """One request as it arrived, and what the emulator decided to do with it.

    Attributes:
        workspace_id: The decoded workspace id, None when the path is that of no operation.
        alias: The decoded alias, None when the path is that of no operation, or of a list.
        method: The HTTP method.
        raw_path: The request target exactly as on the wire, with its query.
        headers: The headers; names compare without regard to case.
        body: The body as on the wire, not decompressed.
        fault: The fault that was applied, None for the usual behaviour.
        status: The HTTP status that was answered, None when none was.
    """

    workspace_id: str | None
    alias: str | None
    method: str
    raw_path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes
    fault: Fault | None
    status: int | None


_Answer = Mapping[str, Any]
"""What is answered with 200: a Runtime, or a list of them."""


class _Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


class _Refusal(NamedTuple):
    status: int
    code: str
    reason_class: str
    error: str
    hint: str


_NOT_DECODABLE = _Refusal(
    400, "request.invalid", "invalid_input", "The path is not UTF-8.", "Percent-encode its UTF-8."
)
_NO_ROUTE = _Refusal(
    404, "route.not_found", "not_found", "No operation has this path.", "See the reference."
)
_WRONG_METHOD = _Refusal(
    405, "method.not_allowed", "invalid_input", "Not with this method.", "See Allow."
)
_NO_KEY = _Refusal(
    401, "auth.required", "unauthorized", "Invalid API key.", "Send Bearer <api-key>."
)
_NO_RUNTIME = _Refusal(
    404, "runtime.not_found", "not_found", "No such workspace or alias.", "List what is there."
)
_NOT_ACTIVE = _Refusal(
    409, "runtime.not_active", "conflict", "Nothing runs under that alias.", "It is stopped."
)
_TOO_MANY = _Refusal(429, "rate.limited", "rate_limited", "Too many requests.", "Slow down.")
_FAULT_REFUSALS: dict[Fault | None, _Refusal] = {
    Fault.RATE_LIMITED: _TOO_MANY,
    Fault.RATE_LIMITED_RETRY_AFTER: _TOO_MANY,
    Fault.SERVER_ERROR: _Refusal(
        500, "server.error", "server", "Something broke.", "If it lasts, report the request id."
    ),
    Fault.UNAVAILABLE: _Refusal(
        503, "server.unavailable", "upstream", "Out for maintenance.", "Try again later."
    ),
}
_WITH_RETRY_AFTER = frozenset({Fault.RATE_LIMITED_RETRY_AFTER, Fault.UNAVAILABLE})


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _from_the_future(answer: _Answer) -> _Answer:
    if "runtimes" in answer:
        return {
            "runtimes": [_from_the_future(runtime) for runtime in answer["runtimes"]],
            "next": 2,
        }
    runtime = answer
    summary = {**runtime["summary"], "launchMode": "teleport", "gpu": {"count": 2}}
    return {**runtime, "kind": "hologram", "status": "paused", "summary": summary, "region": "moon"}


@functools.cache
def _bomb() -> bytes:
    packer = zlib.compressobj(level=9, wbits=zlib.MAX_WBITS | 16)
    megabyte = b"x" * _MIB
    parts = [packer.compress(b'{"padding":"')]
    parts += [packer.compress(megabyte) for _ in range(64)]
    return b"".join([*parts, packer.compress(b'"}'), packer.flush()])


# What these faults answer with 200 in place of the usual answer, whatever the status was.
_BODIES: dict[Fault | None, Callable[[_Answer], bytes]] = {
    Fault.MALFORMED_JSON: lambda answer: _dump(answer).replace(b":", b"="),
    Fault.WRONG_SHAPE: lambda _: b'{"ok":true}',
    Fault.OVERSIZED: lambda answer: _dump({**answer, "padding": "x" * (2 * _MIB)}),
    Fault.COMPRESSED_BOMB: lambda _: _bomb(),
    Fault.UNKNOWN_VALUES: lambda answer: _dump(_from_the_future(answer)),
    Fault.FAILED: _dump,
    Fault.ACCEPTED: lambda answer: _dump({**answer, "status": "active"}),
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
    """What a path stands for, None for another path; ValueError if it cannot be decoded.

    The paths are those of openapi.yaml (`runtimes-stop`) and of contract errors.md (`runtimes-get`
    and `runtimes-list`).
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
    # RFC 3986 5.2.4: bare dot segments are not names but steps out of the path. To take them for
    # names would hide the client's bug that a real gateway turns into a 404.
    if {*names} & {"", ".", ".."}:
        return None
    return _Route(method, *map(_decode, names))


class Emulator:
    """A server of `POST /v1/workspaces/{id}/runtimes/{alias}/stop` on a local port.

    It also answers `GET` of a runtime and of a workspace's list. Use it as ``async with
    Emulator(port=0) as emulator``. The runtimes it knows are those added with `add_runtime`, and a
    workspace is known while it has any. Faults come from `inject`, and at random, for stops, with
    the probabilities `faults`; a random one depends only on the seed, the target, and how many
    stops that target had before, never on how the requests of different targets interleave. Every
    request is kept in `requests`, so memory grows with their number.

    Attributes:
        requests: Every request, in order of arrival.
        received: How many stops came for each `(workspace_id, alias)`, counting those that had
            the right path, method and key, whether or not the runtime exists. Gets and lists are
            found in `requests` alone.

    Args:
        host: The address to listen on.
        port: The port to listen on, 0 to 65535; 0 picks a free one. The default is the port of
            the contract's second server (openapi.yaml, `servers`).
        api_key: The key that requests must carry, not empty.
        faults: The probability of each fault for one stop, each 0 to 1, together at most 1.
        seed: What the random faults are drawn from.
        latency: Seconds before every answer, 0 or more.
        retry_after: The Retry-After of a 429 or 503 that carries one, of any form (contract
            errors.md); None leaves the header out.
        fault_latency: Seconds that `Fault.LATENCY` adds, 0 or more.
        drip_interval: Seconds between two bytes of `Fault.SLOW_DRIP`, 0 or more.
        rate_limit: Requests a second, above 0; faster ones are answered 429, but for a quarter of a
            second's worth that may come at once. None is no limit.

    Raises:
        ValueError: An argument is out of its range.
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
        seconds = {
            "latency": latency,
            "fault_latency": fault_latency,
            "drip_interval": drip_interval,
        }
        for name, value in seconds.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}: give seconds, finite and not negative")
        if rate_limit is not None and not 0 < rate_limit < math.inf:
            raise ValueError(f"rate_limit is {rate_limit}: give stops a second, above 0")
        self._host = host
        self._port = port
        self._authorization = f"Bearer {api_key}"
        self._seed = seed
        self._latency = latency
        self._advice = {} if retry_after is None else {"Retry-After": retry_after}
        self._fault_latency = fault_latency
        self._drip_interval = drip_interval
        self._rate_limit = rate_limit
        self._allowed_at = -math.inf
        self._odds, self._bounds = _cumulate(faults or {})
        self._queues: defaultdict[tuple[str | None, ...], deque[Fault | None]] = defaultdict(deque)
        self._runtimes: dict[tuple[str, str], WireRuntime] = {}
        self._serial = itertools.count(1)
        self._url: str | None = None
        self._listener: asyncio.Server | None = None
        self.requests: list[ReceivedRequest] = []
        self.received: Counter[tuple[str, str]] = Counter()

    @property
    def url(self) -> str:
        """The base URL, such as ``http://127.0.0.1:8787``, without a trailing slash.

        Raises:
            RuntimeError: The emulator was not started.
        """
        if self._url is None:
            raise RuntimeError("the emulator has no URL yet: await start(), or use async with")
        return self._url

    @property
    def runtimes(self) -> Mapping[tuple[str, str], WireRuntime]:
        """A live view of every runtime by its `(workspace_id, alias)`."""
        return MappingProxyType(self._runtimes)

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The port is in use, or the host is not an address of this machine.
            RuntimeError: The emulator was started before.
        """
        if self._url is not None:
            raise RuntimeError("the emulator was started before: make a new Emulator")
        # Cancellation is how a handler learns that its client left; access logs cost time.
        self._server = web.Server(
            self._serve, handler_cancellation=True, access_log=None, auto_decompress=False
        )
        self._listener = await asyncio.get_running_loop().create_server(
            self._server, self._host, self._port, backlog=1024
        )
        host, port = self._listener.sockets[0].getsockname()[:2]
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def close(self) -> None:
        """Stop listening and drop every connection at once, also those still being answered."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        for listening in listener.sockets:
            # A listener that closes between accepting a connection and setting it up leaves that
            # client hanging (asyncio, CPython 3.11 to 3.13), so accepting ends first. Windows'
            # loop has no readers to remove.
            with suppress(NotImplementedError):
                asyncio.get_running_loop().remove_reader(listening)
        try:
            await asyncio.sleep(0)
        finally:
            listener.close()
        turns = 0
        while turns < _ACCEPT_TURNS or self._server.connections:
            for connection in self._server.connections:
                if connection.transport is not None:
                    # A close would first wait for the client to read what is buffered.
                    connection.transport.abort()
            await asyncio.sleep(0)
            turns += 1

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
        """Add a runtime, or replace the one under the same name.

        Args:
            workspace_id: Any text but an empty one; a UUID is kept as the answer's `workspaceId`,
                from other text one is derived.
            alias: Any text but an empty one.
            kind: `browser`, `desktop` or `spreadsheet` (openapi.yaml, `RuntimeKind`).
            status: `active`, `stopped` or `failed` (openapi.yaml, `RuntimeStatus`).
            created_at: Its `createdAt`; any text, as the contract gives it no format.

        Raises:
            ValueError: An argument is not one of those.
        """
        for name, value in {"workspace_id": workspace_id, "alias": alias}.items():
            if not value:
                raise ValueError(f"{name} is empty, which no path can name: give some text")
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
        """The true status of a runtime, whatever was answered.

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
        """Queue faults, one for each of the next stops of known runtimes, before any random ones.

        A stop takes from the first queue that fits it and is not empty: the queue of its target,
        of its workspace, of its alias, of all.

        Args:
            *faults: In the order of the stops; None is one stop with the usual behaviour.
            workspace_id: Only for stops in this workspace.
            alias: Only for stops of this alias.
            method: `GET` queues them for gets and lists instead; a list has no alias.

        Raises:
            ValueError: The method is neither `POST` nor `GET`.
        """
        if method not in _METHODS:
            raise ValueError(f"method is {method!r}: give one of {', '.join(_METHODS)}")
        self._queues[method, workspace_id, alias].extend(faults)

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
            # The loss of the connection cancels this handler.
            never: asyncio.Future[web.StreamResponse] = asyncio.get_running_loop().create_future()
            return await never
        if fault in _STREAMED:
            return await self._stream(request, reply, fault)
        return web.Response(status=reply.status, body=reply.body, headers=reply.headers)

    def _decide(
        self, request: web.BaseRequest
    ) -> tuple[_Route | None, Fault | None, _Reply | None]:
        """Decide, and change the runtime, without a pause, so that requests cannot interleave."""
        try:
            route = _route(request.raw_path)
        except ValueError:
            return None, None, self._refuse(_NOT_DECODABLE)
        if route is None:
            return None, None, self._refuse(_NO_ROUTE)
        if request.method != route.method:
            return route, None, self._refuse(_WRONG_METHOD, {"Allow": route.method})
        if request.headers.get("Authorization") != self._authorization:
            return route, None, self._refuse(_NO_KEY)
        if route.method == "POST" and route.alias is not None:
            self.received[route.workspace_id, route.alias] += 1
        too_fast = self._is_too_fast()
        answer = self._find(route)
        if too_fast or answer is None:
            return route, None, self._refuse(_TOO_MANY if too_fast else _NO_RUNTIME)
        fault = self._next_fault(route)
        if route.method == "POST":
            reply = self._stop(cast("WireRuntime", answer), fault, request.raw_path)
        else:
            reply = self._answer(answer, fault, request.raw_path)
        return route, fault, reply

    def _find(self, route: _Route) -> _Answer | None:
        if route.alias is not None:
            return self._runtimes.get((route.workspace_id, route.alias))
        listed = [
            runtime
            for (workspace_id, _), runtime in self._runtimes.items()
            if workspace_id == route.workspace_id
        ]
        return {"runtimes": listed} if listed else None

    def _is_too_fast(self) -> bool:
        if self._rate_limit is None:
            return False
        now = asyncio.get_running_loop().time()
        # The time at which the bucket will be empty again stands for what is in it (GCRA).
        if self._allowed_at - now > _BURST_SECONDS:
            return True
        self._allowed_at = max(self._allowed_at, now) + 1 / self._rate_limit
        return False

    def _next_fault(self, route: _Route) -> Fault | None:
        method, workspace_id, alias = route
        if self._queues:
            targets = ((workspace_id, alias), (workspace_id, None), (None, alias), (None, None))
            for target in targets:
                if queue := self._queues.get((method, *target)):
                    return queue.popleft()
        if not self._bounds or method != "POST" or alias is None:
            return None
        received = self.received[workspace_id, alias]
        # The length keeps ("a", "bc") and ("ab", "c") apart.
        text = f"{self._seed}:{received}:{len(workspace_id)}:{workspace_id}{alias}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return self._odds[bisect.bisect(self._bounds, int.from_bytes(digest) / 2**64)]

    def _stop(self, runtime: WireRuntime, fault: Fault | None, raw_path: str) -> _Reply | None:
        was_active = runtime["status"] == "active"
        if fault is Fault.FAILED:
            _end(runtime, "failed")
        elif was_active and (fault is None or fault.takes_effect):
            _end(runtime, "stopped")
        usual = runtime if was_active or fault in _BODIES else None
        return self._answer(usual, fault, raw_path)

    def _answer(self, usual: _Answer | None, fault: Fault | None, raw_path: str) -> _Reply | None:
        """Answer with this, or with a conflict if it is None, unless the fault has it otherwise."""
        if fault in _UNANSWERED:
            return None
        if fault is Fault.REDIRECT:
            return _Reply(307, b"", {"Location": f"/moved{raw_path}"})
        if page := _PROXY_PAGES.get(fault):
            title = f"{page.value} {page.phrase}"
            html = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
            return _Reply(page, html.encode(), {"Content-Type": "text/html"})
        if refusal := _FAULT_REFUSALS.get(fault):
            return self._refuse(
                refusal, self._advice if fault in _WITH_RETRY_AFTER else _NO_HEADERS
            )
        if usual is None:
            return self._refuse(_NOT_ACTIVE)
        headers = {"Content-Type": _JSON, "x-request-id": self._request_id()}
        if fault is Fault.COMPRESSED_BOMB:
            headers["Content-Encoding"] = "gzip"
        return _Reply(200, _BODIES.get(fault, _dump)(usual), headers)

    def _refuse(self, refusal: _Refusal, headers: Mapping[str, str] = _NO_HEADERS) -> _Reply:
        request_id = self._request_id()
        body = {
            "code": refusal.code,
            "error": refusal.error,
            "reasonClass": refusal.reason_class,
            "requestId": request_id,
            "hint": refusal.hint,
        }
        return _Reply(
            refusal.status,
            _dump(body),
            {"Content-Type": _JSON, "x-request-id": request_id, **headers},
        )

    def _request_id(self) -> str:
        return f"req_{next(self._serial)}"

    async def _stream(
        self, request: web.BaseRequest, reply: _Reply, fault: Fault
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        response.content_length = len(reply.body)
        # A client that leaves in the middle is no error of the server.
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


def _cumulate(faults: Mapping[Fault, float]) -> tuple[list[Fault | None], list[float]]:
    """The faults that can be drawn, and up to which number in 0..1 each one is."""
    for fault, probability in faults.items():
        if fault not in set(Fault):
            raise ValueError(f"faults has {fault!r}: give members of Fault")
        if not 0 <= probability <= 1:
            raise ValueError(f"faults has {fault} at {probability}: give a probability of 0 to 1")
    # The order of the mapping must not change what a seed draws.
    odds = [fault for fault in Fault if faults.get(fault)]
    bounds = list(itertools.accumulate(faults[fault] for fault in odds))
    if bounds and bounds[-1] > 1 + 1e-9:
        raise ValueError(f"faults add up to {bounds[-1]}: give probabilities of at most 1 together")
    return [*odds, None], bounds
