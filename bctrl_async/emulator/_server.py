"""The server of the emulator: it takes requests, changes runtimes, sends replies."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType, NoneType
from typing import Self

from aiohttp import web

from bctrl_async.emulator import _contract as contract, _replies as replies
from bctrl_async.emulator._assertions import ReceivedRequest, Target, explain
from bctrl_async.emulator._endings import Endings
from bctrl_async.emulator._faults import UNANSWERED, Fault, FaultPlan, reply_of, send
from bctrl_async.emulator._replies import Payload, Reply

_METHODS = ("POST", "GET")
_BURST_SECONDS = 0.25
# An accepted connection becomes visible three iterations of the event loop later.
_ACCEPT_ITERATIONS = 4


class Emulator:
    """A server of `POST /v1/workspaces/{id}/runtimes/{alias}/stop` on a local port.

    It also serves `GET` for a runtime and for the list of a workspace. Use it as
    ``async with Emulator(port=0) as emulator``. Runtimes are added with `add_runtime`;
    a workspace without any is unknown. Faults and replies are queued with `inject`, or
    kept for a runtime with `poison`. Faults are also drawn at random for stops, with
    the probabilities `faults`. A random fault depends only on the seed, the target and
    the number of its earlier stops, never on the order of requests to other targets.
    Every request is kept in `requests`, so memory grows with their number.

    A workspace has the name that `add_runtime` was given, and the UUID that its
    responses have. Requests and the methods of the emulator may use either; what is
    recorded has the name. A method raises a ValueError for an argument of another type.

    Attributes:
        api_key: The key that requests must carry. Assign a new key to rotate it.
        requests: Every request, in order of arrival.
        received: The number of stops with a valid path, method and key for each
            `(workspace_id, alias)`, even of an unknown runtime. Reads are not counted.

    Args:
        host: The address to listen on.
        port: The port to listen on, 0 to 65535; 0 picks a free port. The default is the
            port of the contract's second server (openapi.yaml, `servers`).
        api_key: The key that requests must carry, not empty.
        faults: The probability of each fault of a stop, 0 to 1, at most 1 together.
        seed: The seed of the random faults.
        latency: Seconds before every response, up to a day.
        fault_latency: Seconds that `Fault.LATENCY` adds, up to a day.
        stop_takes: Seconds from a stop until its runtime ends, up to a day. Meanwhile
            every answer says `active`, also to another stop, which does not move the
            end. A runtime that fails (`Fault.FAILED`) ends at once.
        rate_limit: Requests per second, 0.0001 to 1,000,000, with bursts of a quarter
            of a second. Others get a 429. None means no limit.
        on_request: A function that is called with each request, once it has been added
            to `requests` and before it is answered. It runs in the emulator's event
            loop, so it must not block.

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
        fault_latency: float = 0.05,
        stop_takes: float = 0.0,
        rate_limit: float | None = None,
        on_request: Callable[[ReceivedRequest], object] | None = None,
    ) -> None:
        contract.check(str, host=host, api_key=api_key)
        contract.check(int, port=port, seed=seed)
        contract.check_range(0, 65535, port=port)
        contract.check_range(
            0,
            86_400,
            latency=latency,
            fault_latency=fault_latency,
            stop_takes=stop_takes,
        )
        # An interval of 0 means no limit: the bucket of `_admit` stays empty.
        self._interval = 0.0
        if rate_limit is not None:
            contract.check_range(0.0001, 1_000_000, rate_limit=rate_limit)
            self._interval = 1 / rate_limit
        if not api_key:
            raise ValueError("api_key is empty: give the key that requests must carry")
        if on_request is not None and not callable(on_request):
            raise ValueError(
                f"on_request is {on_request!r}: give a function of a ReceivedRequest"
            )
        self.api_key: str = api_key
        self.requests: list[ReceivedRequest] = []
        self.received: Counter[tuple[str, str]] = Counter()
        self._host = host
        self._port = port
        self._latency = latency
        self._fault_latency = fault_latency
        self._stop_takes = stop_takes
        self._request_number = 0
        self._empty_at = 0.0
        self._on_request = on_request
        self._faults = FaultPlan({} if faults is None else faults, seed)
        self._names: dict[str, str] = {}
        self._runtimes: dict[Target, contract.WireRuntime] = {}
        self._endings = Endings(self._runtimes)
        # The runtimes that a stop has ended, or is ending.
        self._stopped: set[Target] = set()
        self._holds: dict[Target, asyncio.Event] = {}
        self._url: str | None = None
        self._listener: asyncio.Server | None = None

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
            raise RuntimeError(
                "the emulator has no URL yet: await start(), or use async with"
            )
        return self._url

    @property
    def runtimes(self) -> Mapping[tuple[str, str], contract.WireRuntime]:
        """A live view of all runtimes by `(workspace_id, alias)`."""
        return MappingProxyType(self._runtimes)

    @property
    def ending(self) -> list[tuple[str, str]]:
        """The runtimes that a stop is ending, in order of their stops."""
        return list(self._endings.pending)

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
        # Cancellation tells a handler of a disconnect. Access logs would cost time.
        self._server = web.Server(
            self._serve,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
        )
        self._listener = await loop.create_server(
            self._server, self._host, self._port, backlog=1024
        )
        host, port = self._listener.sockets[0].getsockname()[:2]
        if ":" in host:
            host = f"[{host}]"
        self._url = f"http://{host}:{port}"

    async def close(self) -> None:
        """Stop listening and drop every connection at once, even during a request.

        A runtime that is ending stays so.
        """
        listener = self._listener
        if listener is None:
            return
        self._listener = None
        self._endings.close()
        for socket in listener.sockets:
            # A listener that closes between accepting and setting up a connection
            # leaves that client hanging (asyncio, CPython 3.11 to 3.13), so stop
            # accepting first. The event loop of Windows has no readers to remove.
            with suppress(NotImplementedError):
                asyncio.get_running_loop().remove_reader(socket)
        try:
            # The event loop has a turn to set up what it has accepted.
            await asyncio.sleep(0)
        finally:
            listener.close()
        iterations = 0
        while iterations < _ACCEPT_ITERATIONS or self._server.connections:
            for connection in self._server.connections:
                if connection.transport is not None:
                    # Unlike close(), abort() does not wait for the client to read.
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
        created_at: str | None = None,
        stop_takes: float | None = None,
    ) -> None:
        """Add a runtime, or replace the runtime with the same workspace id and alias.

        A runtime that replaces another has an id of its own.

        Args:
            workspace_id: Any non-empty text. A UUID becomes the `workspaceId` of
                responses; a UUID is derived from any other text.
            alias: Any non-empty text.
            kind: `browser`, `desktop` or `spreadsheet` (openapi.yaml, `RuntimeKind`).
            status: `active`, `stopped` or `failed` (openapi.yaml, `RuntimeStatus`).
            created_at: The `createdAt`, any text: the contract specifies no format. It
                is the `updatedAt`, too, until the runtime ends. None for the present
                time if another is replaced, and else for the start of 2026.
            stop_takes: Seconds from a stop until the runtime ends, up to a day; None
                for the emulator's.

        Raises:
            ValueError: An argument is invalid.
        """
        if stop_takes is None:
            stop_takes = self._stop_takes
        contract.check_range(0, 86_400, stop_takes=stop_takes)
        replaced = self._runtimes.get((workspace_id, alias))
        if created_at is None:
            created_at = contract.time_of_start(replaced)
        runtime = contract.make_runtime(workspace_id, alias, kind, status, created_at)
        if replaced is not None:
            runtime["id"] = contract.next_id(replaced["id"])
        # A UUID stands for the name, unless it is the name of another workspace.
        self._names[workspace_id] = workspace_id
        self._names.setdefault(runtime["workspaceId"], workspace_id)
        self._endings.add((workspace_id, alias), stop_takes)
        self._runtimes[workspace_id, alias] = runtime
        self._stopped.discard((workspace_id, alias))

    def status(self, workspace_id: str, alias: str) -> str | None:
        """Return the true status of a runtime, whatever its last response said.

        Returns:
            `active`, also while it is `ending`; `stopped` or `failed`; None for an
            unknown runtime.
        """
        runtime = self._runtimes.get(self._target(workspace_id, alias))
        if runtime is None:
            return None
        return runtime["status"]

    def assert_stopped(
        self, workspace_id: str, *aliases: str, only: bool = False
    ) -> None:
        """Assert that each of these runtimes is stopped, and got a stop.

        A runtime that is still ending is not stopped.

        Args:
            workspace_id: The workspace.
            *aliases: The runtimes, at least one.
            only: Also assert that no other runtime got a stop, whatever its answer.

        Raises:
            AssertionError: A runtime is not stopped or got no stop (`-`), or, with
                `only`, another got a stop (`+`). The message has a line for each, with
                its status and its answers.
        """
        __tracebackhide__ = True
        targets = self._targets(workspace_id, aliases)
        stops = self.stops
        stop_targets = dict.fromkeys(stop.target for stop in stops)
        missing = [
            target
            for target in targets
            if target not in stop_targets or self.status(*target) != "stopped"
        ]
        unexpected = [target for target in stop_targets if target not in targets]
        if missing or (only and unexpected):
            marked = {"-": missing, "+": unexpected}
            raise AssertionError(
                explain(marked, self._runtimes, self._endings.pending, stops)
            )

    def assert_not_stopped(self, workspace_id: str, *aliases: str) -> None:
        """Assert that these runtimes, at least one, were added and not ended by a stop.

        Raises:
            AssertionError: A runtime was stopped or is ending, or was never added. The
                message has a line with the status and the answers for each.
        """
        __tracebackhide__ = True
        targets = self._targets(workspace_id, aliases)
        unexpected = [
            target
            for target in targets
            if target in self._stopped or target not in self._runtimes
        ]
        if unexpected:
            marked = {"+": unexpected}
            raise AssertionError(
                explain(marked, self._runtimes, self._endings.pending, self.stops)
            )

    def inject(
        self,
        *faults: Fault | Reply | None,
        workspace_id: str | None = None,
        alias: str | None = None,
        method: str = "POST",
    ) -> None:
        """Queue faults and replies, one for each of the next stops of known runtimes.

        They precede random faults. A stop takes its fault from the first queue that is
        not empty: of its target, of its workspace, of its alias, of all stops.

        Args:
            *faults: Faults and replies, in the order of stops; None is a normal stop.
            workspace_id: Only for stops in this workspace.
            alias: Only for stops of this alias.
            method: `POST` for stops, `GET` for reads; a list has no alias.

        Raises:
            ValueError: The method is neither, or an item is of another type.
        """
        contract.check(str, NoneType, workspace_id=workspace_id, alias=alias)
        for fault in faults:
            contract.check(Fault, Reply, NoneType, fault=fault)
        if method not in _METHODS:
            raise ValueError(f"method is {method!r}: give one of {', '.join(_METHODS)}")
        if workspace_id is not None:
            workspace_id = self._names.get(workspace_id, workspace_id)
        self._faults.queues[method, workspace_id, alias].extend(faults)

    def poison(
        self, workspace_id: str, alias: str, fault: Fault | Reply | None
    ) -> None:
        """Give a runtime a fault or reply that every stop and every read of it meets.

        It precedes other faults, and replaces earlier poison; None clears it.
        """
        contract.check(Fault, Reply, NoneType, fault=fault)
        self._faults.poison[self._target(workspace_id, alias)] = fault

    def hold(self, workspace_id: str, *aliases: str) -> None:
        """Hold back the answers to stops and reads of these runtimes, until `release`.

        A stop takes effect when it arrives. `close` drops what is held.

        Args:
            workspace_id: The workspace.
            *aliases: The runtimes, at least one.
        """
        for target in self._targets(workspace_id, aliases):
            self._holds.setdefault(target, asyncio.Event())

    def release(self, workspace_id: str, *aliases: str) -> None:
        """Send the answers that these runtimes hold back, and hold back no more.

        Args:
            workspace_id: The workspace.
            *aliases: The runtimes, at least one.
        """
        for target in self._targets(workspace_id, aliases):
            event = self._holds.pop(target, None)
            # Nobody waits for it before the start, or after the close.
            if event is not None and self._listener is not None:
                # The emulator may run in another thread.
                self._listener.get_loop().call_soon_threadsafe(event.set)

    def _target(self, workspace_id: str, alias: str) -> Target:
        contract.check(str, workspace_id=workspace_id, alias=alias)
        return self._names.get(workspace_id, workspace_id), alias

    def _targets(self, workspace_id: str, aliases: Sequence[str]) -> list[Target]:
        if not aliases:
            raise ValueError(
                "no alias is given: name the runtimes, each as an argument"
            )
        return list(
            dict.fromkeys(self._target(workspace_id, alias) for alias in aliases)
        )

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        route = contract.parse_route(request.method, request.raw_path, self._names)
        fault, reply = self._decide(request, route)
        self._request_number += 1
        response = replies.response_to(reply, f"req_{self._request_number}")
        record = ReceivedRequest(
            route.workspace_id or None,
            route.alias,
            request.method,
            request.raw_path,
            request.headers,
            body,
            fault,
            None if fault in UNANSWERED else response.status,
            route.operation,
            asyncio.get_running_loop().time() - self._started_at,
        )
        self.requests.append(record)
        if self._on_request is not None:
            self._on_request(record)
        delay = self._latency
        if fault is Fault.LATENCY:
            delay += self._fault_latency
        if delay:
            await asyncio.sleep(delay)
        release = self._holds.get(record.target)
        if release is not None:
            await release.wait()
        return await send(request, response, fault)

    def _decide(
        self, request: web.BaseRequest, route: contract.Route
    ) -> tuple[Fault | Reply | None, Reply]:
        """Choose the reply and update the runtime at once: this must not await.

        Return the fault, which may change how the reply is sent, and the reply.
        """
        if not route.allowed_method:
            return None, replies.NO_ROUTE
        if route.operation is None:
            return None, replace(
                replies.WRONG_METHOD, headers={"Allow": route.allowed_method}
            )
        if request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return None, replies.NO_KEY
        is_stop = route.operation == "stop"
        if is_stop:
            self.received[route.target] += 1
        if not self._admit():
            return None, replies.TOO_MANY
        payload = self._payload(route)
        if payload is None:
            return None, replies.NO_RUNTIME
        fault = self._faults.next(route, self.received[route.target])
        is_conflict = False
        if is_stop:
            is_conflict = not self._stop(route.target, fault)
        return fault, reply_of(fault, payload, is_conflict=is_conflict)

    def _payload(self, route: contract.Route) -> Payload | None:
        """Return the runtime, or the list of the workspace; None if it is unknown."""
        if route.alias is not None:
            return self._runtimes.get(route.target)
        runtimes = [
            runtime
            for (workspace_id, _), runtime in self._runtimes.items()
            if workspace_id == route.workspace_id
        ]
        if not runtimes:
            return None
        return {"runtimes": runtimes}

    def _admit(self) -> bool:
        """Count a request as the GCRA does; return False if it is over the limit."""
        now = asyncio.get_running_loop().time()
        # The bucket of the requests, which drains at the rate, is empty at this time.
        self._empty_at = max(self._empty_at, now)
        if self._empty_at - now > _BURST_SECONDS:
            return False
        self._empty_at += self._interval
        return True

    def _stop(self, target: Target, fault: Fault | Reply | None) -> bool:
        """Stop a runtime, if its fault lets it; return True if it was active."""
        was_active = self._runtimes[target]["status"] == "active"
        if was_active and (fault is None or fault.takes_effect):
            self._stopped.add(target)
            if fault is Fault.FAILED:
                self._endings.end(target, "failed")
            else:
                self._endings.stop(target)
        return was_active
