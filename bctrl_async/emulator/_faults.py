"""The faults of the emulator: their answers, and which stops meet them."""

import asyncio
import bisect
import hashlib
import itertools
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import cast

from aiohttp import web

from bctrl_async.emulator import _replies as replies
from bctrl_async.emulator._contract import Route, check, check_range
from bctrl_async.emulator._replies import Payload, Reply, dump


class Fault(StrEnum):
    """A fault of one stop: what the client receives, and whether the stop takes effect.

    The statuses, and which of them mean that nothing is stopped, follow contract
    errors.md. A fault of a `GET` changes its response alike, but never a runtime.
    """

    LATENCY = "latency"
    """The normal response, `fault_latency` seconds late; the runtime is stopped."""
    RATE_LIMITED = "rate_limited"
    """429 without Retry-After; nothing is stopped."""
    SERVER_ERROR = "server_error"
    """500 with the documented JSON; nothing is stopped, but a client cannot know."""
    BAD_GATEWAY = "bad_gateway"
    """502 with the HTML page of a proxy; the runtime is stopped behind the proxy."""
    DROP_BEFORE = "drop_before"
    """The connection closes without a response; nothing is stopped."""
    DROP_AFTER = "drop_after"
    """The connection closes without a response; the runtime is stopped."""
    HANG = "hang"
    """No response until the client or the emulator closes; the runtime is stopped."""
    TRUNCATED_JSON = "truncated_json"
    """The normal response, closed in the middle of its body; the runtime is stopped."""
    MALFORMED_JSON = "malformed_json"
    """A complete 200 whose body is not JSON; the runtime is stopped."""
    UNKNOWN_VALUES = "unknown_values"
    """200 with values and fields unknown to the contract; the runtime is stopped."""
    FAILED = "failed"
    """200 with status "failed"; the runtime's status becomes "failed"."""
    ACCEPTED = "accepted"
    """200 with status "active"; the runtime is stopped."""

    @property
    def takes_effect(self) -> bool:
        """True if a stop with this fault ends the runtime."""
        return self not in {Fault.RATE_LIMITED, Fault.SERVER_ERROR, Fault.DROP_BEFORE}


UNANSWERED = frozenset({Fault.DROP_BEFORE, Fault.DROP_AFTER, Fault.HANG})
_CONNECTION_CUTS = frozenset(
    {Fault.DROP_BEFORE, Fault.DROP_AFTER, Fault.TRUNCATED_JSON}
)

_JSON_HEADERS = {"Content-Type": "application/json"}


def reply_of(  # noqa: PLR0911 - each fault has its reply.
    fault: Fault | Reply | None, payload: Payload, *, is_conflict: bool
) -> Reply:
    """Return the reply to a request: its fault's, or else 409 on a conflict, or 200."""
    match fault:
        case Reply():
            return _with_payload(fault, payload)
        case Fault.RATE_LIMITED:
            return replies.TOO_MANY
        case Fault.SERVER_ERROR:
            return replies.SERVER_ERROR
        case Fault.BAD_GATEWAY:
            return replies.BAD_GATEWAY
        case Fault.MALFORMED_JSON:
            return Reply(
                200, body=dump(payload).replace(b":", b"="), headers=_JSON_HEADERS
            )
        case Fault.UNKNOWN_VALUES:
            return Reply(200, body=_with_unknown_values(payload))
        case Fault.FAILED:
            return Reply(200, body={**payload, "status": "failed"})
        case Fault.ACCEPTED:
            return Reply(200, body={**payload, "status": "active"})
    # The other faults change how a reply is sent.
    if is_conflict:
        return replies.NOT_ACTIVE
    return Reply(200, body=payload)


def _with_payload(reply: Reply, payload: Payload) -> Reply:
    """Return the reply of a test, with the usual body of its status if it has none."""
    if reply.body is None and reply.status in replies.PAYLOAD_STATUSES:
        return replace(reply, body=payload)
    return reply


def _with_unknown_values(payload: Payload) -> Payload:
    if "runtimes" in payload:
        runtimes = [_with_unknown_values(runtime) for runtime in payload["runtimes"]]
        return {"runtimes": runtimes, "next": 2}
    summary = {**payload["summary"], "launchMode": "teleport", "gpu": {"count": 2}}
    unknown = {
        "kind": "hologram",
        "status": "paused",
        "summary": summary,
        "region": "moon",
    }
    return {**payload, **unknown}


async def send(
    request: web.BaseRequest, response: web.Response, fault: Fault | Reply | None
) -> web.Response:
    """Return a response, or cut its connection or hang as its fault asks."""
    if fault is Fault.HANG:
        # This handler is cancelled when the connection closes.
        await asyncio.Future[None]()
    if fault in _CONNECTION_CUTS:
        if fault is Fault.TRUNCATED_JSON:
            cast("asyncio.Transport", request.transport).write(_first_half(response))
        # aiohttp ignores a response whose connection is closed.
        request.protocol.force_close()
    return response


def _first_half(response: web.Response) -> bytes:
    """Return the head of a response and half of its body."""
    body = cast("bytes", response.body)
    lines = [
        f"HTTP/1.1 {response.status} {response.reason}",
        *(f"{name}: {value}" for name, value in response.headers.items()),
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body[: len(body) // 2]


class FaultPlan:
    """The faults of future requests: first poison, then queued, then random faults."""

    def __init__(self, probabilities: Mapping[Fault, float], seed: int) -> None:
        check(Mapping, faults=probabilities)
        for fault, probability in probabilities.items():
            # In Python 3.11, `in Fault` raises a TypeError for any other value.
            if fault not in set(Fault):
                raise ValueError(f"faults has {fault!r}: give members of Fault")
            check_range(0, 1, **{f"faults[{fault}]": probability})
        total = sum(probabilities.values())
        if total > 1 + 1e-9:
            raise ValueError(
                f"faults add up to {total}: give probabilities of at most 1 together"
            )
        # The order of `Fault` makes a seed independent of the order of the mapping.
        faults = [fault for fault in Fault if probabilities.get(fault)]
        shares = [probabilities[fault] for fault in faults]
        self._bounds = list(itertools.accumulate(shares))
        # A number from the last bound on draws None, a normal stop.
        self._choices = [*faults, None]
        self._seed = seed
        # A key has a method, an id of a workspace and an alias: None stands for all.
        self.queues: defaultdict[tuple[str | None, ...], deque[Fault | Reply | None]]
        self.queues = defaultdict(deque)
        self.poison: dict[tuple[str, str | None], Fault | Reply | None] = {}

    def next(self, route: Route, stops: int) -> Fault | Reply | None:
        """Return the fault of a request; `stops` is how many its target has had."""
        operation, method, workspace_id, alias = route
        poison = self.poison.get((workspace_id, alias))
        if poison is not None:
            return poison
        for target in (
            (workspace_id, alias),
            (workspace_id, None),
            (None, alias),
            (None, None),
        ):
            queue = self.queues.get((method, *target))
            if queue:
                return queue.popleft()
        if not self._bounds or operation != "stop":
            return None
        # The hash is the random number: it does not depend on the order of requests.
        # The length keeps ("a", "bc") and ("ab", "c") apart.
        text = f"{self._seed}:{stops}:{len(workspace_id)}:{workspace_id}{alias}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        draw = int.from_bytes(digest) / 2**64
        return self._choices[bisect.bisect(self._bounds, draw)]
