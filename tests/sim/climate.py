"""The faults of one run: a climate that a seed draws, and what each fault does."""

from __future__ import annotations

import json
import math
import random
import uuid
from dataclasses import dataclass, field

from support.throttling import Server
from support.wire_faults import WireFault

from bctrl_async.emulator import Fault
from sim.exchange import Action, Exchange, Fate, Stray, Target

HAZARDS = (
    "cut",
    "refuse",
    "connect_silence",
    "lookup",
    "lost",
    "late",
    "half_open",
    "stray",
    "storm",
    "long_retry_after",
    "outage",
    "partition",
    "poison",
    "page",
    "foreign_404",
    "denied",
    "server",
    "gateway",
)
"""The kinds of faults; a climate has any number of them."""

_SERVER_FAULTS = sorted(
    {*Fault, WireFault.CLOSE_KEPT_ALIVE, WireFault.SLOW_DRIP} - {Fault.LATENCY}
)
"""Faults of the emulator, but for the slow and what the network has."""

_FOREIGN: tuple[object, ...] = (
    {},
    {"message": "no Route matched with those values"},
    {"timestamp": "2026-01-01", "status": 404, "error": "Not Found", "path": "/v1"},
    {"detail": "Not Found"},
    {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404},
    {"code": "route.not_found", "error": "No operation has this path."},
)
_PAGES = (
    b"<!DOCTYPE html><html><body>Log in</body></html>",
    b"\xef\xbb\xbf<html><body>Log in</body></html>",
    "\ufeff<html><body>Log in</body></html>".encode("utf-16-le"),
    b"Please log in",
)
_ENVOY = b"upstream connect error or disconnect/reset before headers. reset reason: "
_UNAVAILABLE = (
    _ENVOY + b"connection reset",
    b"<!DOCTYPE html><html><body><h1>Error 503 Backend fetch failed</h1></body></html>",
    b"<html><head><title>503 Service Temporarily Unavailable</title></head></html>",
    b'{"error": {"code": "ServiceUnavailable", "message": "The backend is down."}}',
)
"""Answers of Envoy, Varnish, an ingress and a gateway that nests its errors."""
_IN_DOUBT = (
    *((503, body) for body in _UNAVAILABLE),
    (408, b"<html><body><h1>408 Request Time-out</h1></body></html>"),
    (408, b'{"message": "The upstream took too long."}'),
    (409, b'{"error": {"code": "Conflict"}, "code": "409"}'),
    (409, b"Conflict"),
    (499, b"<html><head><title>499 Client Closed Request</title></head></html>"),
)
"""Answers of gateways that may have forwarded the request."""
_ABSURD = ("31536000", "1790000000", "86400", "3600", "99999999999999999999")


class Span:
    """A span of virtual time."""

    def __init__(self, start: float, length: float) -> None:
        self.start = start
        self.end = start + length

    def __contains__(self, when: float) -> bool:
        return self.start <= when < self.end


@dataclass
class Climate:
    """The faults of one run, as probabilities and spans of virtual time.

    Attributes:
        hazards: The kinds of faults that it has.
        base_latency: The median latency of a segment, in seconds.
        idle_strays: Send stray answers also while no request waits for an answer.
        storm_of_gateway: The 503 of a storm are a gateway's.
        outage_is_answered: A gateway answers 503 while the server is down.
        poison: Runtimes behind a dead node: no request about them is answered by the
            API.
    """

    hazards: frozenset[str]
    timeout: float
    base_latency: float = 0.005
    cut: float = 0.0
    refuse: float = 0.0
    connect_silence: float = 0.0
    lookup_fails: float = 0.0
    half_open: float = 0.0
    descriptors: float = math.inf
    """The most connections that the client's machine can hold."""
    lost: float = 0.0
    late: float = 0.0
    strays: float = 0.0
    idle_strays: bool = True
    pages: float = 0.0
    foreign: float = 0.0
    gateway: float = 0.0
    denied: float = 0.0
    storms: list[Span] = field(default_factory=list)
    storm_share: float = 1.0
    storm_status: int = 429
    storm_of_gateway: bool = False
    retry_after: str | None = None
    outages: list[Span] = field(default_factory=list)
    outage_is_answered: bool = False
    partitions: list[Span] = field(default_factory=list)
    poison: dict[Target, Fate | int] = field(default_factory=dict)
    server_faults: dict[Fault | WireFault, float] = field(default_factory=dict)
    over_quota: frozenset[str] = frozenset()
    """Workspaces whose stops are all throttled."""
    random_share: float = 0.0
    """The share of stops that are throttled at random."""
    buckets: dict[str, Server] = field(default_factory=dict)
    """The limits of workspaces; a limit for all is one bucket of each."""
    dead: frozenset[Target] = frozenset()
    """Runtimes for which a gateway answers 503, with a Retry-After of its own."""
    dead_retry_after: str | None = None
    targets: list[Target] = field(default_factory=list)

    # Conditions of the network

    def latency(self, rng: random.Random) -> float:
        return self.base_latency * rng.uniform(0.5, 2.0)

    def reachable_at(self, when: float) -> float:
        """Return the time at which a segment arrives that a partition may hold up."""
        return next((span.end for span in self.partitions if when in span), when)

    def is_dead(self, when: float) -> bool:
        """Return True while the server is down, and nothing answers for it."""
        return not self.outage_is_answered and any(
            when in span for span in self.outages
        )

    # The gateway

    def decide(self, exchange: Exchange, rng: random.Random, now: float) -> Action:
        """Decide what the gateway does with a request."""
        poison = self.poison.get(exchange.target)
        if isinstance(poison, Fate):
            return Action(poison)
        if exchange.target in self.dead:
            page = unavailable(_UNAVAILABLE[1], self.dead_retry_after)
            return Action(Fate.ANSWER, page=page, foreign=True)
        if self._throttles(exchange, rng, now):
            return Action(Fate.ANSWER, page=refusal(429, self.retry_after))
        return self._decide(poison, rng, now)

    def _throttles(self, exchange: Exchange, rng: random.Random, now: float) -> bool:
        """Return True if a stop is over a quota or a limit, or throttled at random."""
        workspace = exchange.target[0]
        if "service" in self.hazards:
            # The quota is of reads, too.
            return workspace in self.over_quota
        if not exchange.stops:
            return False
        if workspace in self.over_quota:
            return True
        bucket = self.buckets.get(workspace)
        if bucket is not None and bucket(now) is not None:
            return True
        return self.random_share > 0.0 and rng.random() < self.random_share

    def _decide(self, poison: int | None, rng: random.Random, now: float) -> Action:
        page, is_foreign = self._unavailable(poison, rng, now), True
        if page is None:
            page, is_foreign = self._page(rng, now), False
        if page is not None:
            return Action(Fate.ANSWER, page=page, foreign=is_foreign)
        if rng.random() < self.gateway:
            status, body = rng.choice(_IN_DOUBT)
            page = _http(status, body, "Content-Type: text/plain")
            is_late = rng.random() < 0.5
            request, fate = (
                (Fate.PASS, Fate.REPLACED) if is_late else (Fate.ANSWER, Fate.PASS)
            )
            return Action(request, fate, page=page, foreign=True)
        delay = (
            rng.uniform(0.1, 2.0) * self.timeout if rng.random() < self.late else 0.0
        )
        if rng.random() >= self.lost:
            return Action(delay=delay)
        fate = rng.choice([Fate.RESET, Fate.CLOSE, Fate.SILENCE])
        if rng.random() < 0.5:
            return Action(fate, delay=delay)
        return Action(answer=fate, delay=delay)

    def _unavailable(
        self, poison: int | None, rng: random.Random, now: float
    ) -> bytes | None:
        """Return what a gateway says for a dead or busy node or server, or None."""
        if poison is not None:
            return html(poison, _PAGES[0])
        if any(now in span for span in self.outages):
            return unavailable(rng.choice(_UNAVAILABLE), None)
        if self.storm_of_gateway and self._storms(rng, now):
            return unavailable(rng.choice(_UNAVAILABLE), self.retry_after)
        return None

    def _storms(self, rng: random.Random, now: float) -> bool:
        return (
            any(now in span for span in self.storms) and rng.random() < self.storm_share
        )

    def _page(self, rng: random.Random, now: float) -> bytes | None:
        """Draw an answer of the gateway's own, or None."""
        if not self.storm_of_gateway and self._storms(rng, now):
            return refusal(self.storm_status, self.retry_after)
        draw = rng.random() - self.pages
        if draw < 0.0:
            return html(200, rng.choice(_PAGES))
        if (draw := draw - self.foreign) < 0.0:
            return answer(404, rng.choice(_FOREIGN))
        return error(403, "auth.forbidden") if draw < self.denied else None

    def stray(self, rng: random.Random) -> Stray | None:
        """Draw an answer too many, to be sent after a real answer."""
        if rng.random() >= self.strays:
            return None
        moment = rng.choice(["same segment", "idle", "idle", "next request"])
        if not self.idle_strays:
            moment = "next request"
        if moment == "next request" or rng.random() < 0.3:
            about = rng.choice(self.targets)
            return Stray(moment, runtime(about), about)
        page = rng.choice(
            [
                error(403, "auth.forbidden"),
                error(404, "runtime.not_found"),
                error(409, "runtime.not_active"),
                refusal(429, None),
            ]
        )
        return Stray(moment, page, None)


def draw_hazards(rng: random.Random) -> frozenset[str]:
    """Draw the kinds of faults; one run in eight has none."""
    kind = rng.random()
    if kind < 0.12:
        count = 0
    elif kind < 0.5:
        count = 1
    elif kind < 0.9:
        count = rng.randint(2, 4)
    else:
        count = len(HAZARDS)
    return frozenset(rng.sample(HAZARDS, count))


def draw(
    rng: random.Random, hazards: frozenset[str], targets: list[Target], timeout: float
) -> Climate:
    """Draw a climate with these hazards for these targets."""
    climate = Climate(
        hazards, timeout, base_latency=10 ** rng.uniform(-3.5, -1.3), targets=targets
    )

    def share(hazard: str, most: float) -> float:
        return rng.uniform(0.0, most) ** 1.5 if hazard in hazards else 0.0

    def spans(hazard: str, most: float) -> list[Span]:
        if hazard not in hazards:
            return []
        starts = [
            rng.choice([0.0, *[10 ** rng.uniform(-3.0, 1.0)] * 3]) for _ in range(2)
        ]
        return [
            Span(start, 10 ** rng.uniform(-1.0, math.log10(most)))
            for start in starts[: rng.randint(1, 2)]
        ]

    climate.cut = share("cut", 1.0)
    climate.refuse = share("refuse", 0.7)
    climate.connect_silence = share("connect_silence", 0.4)
    climate.lookup_fails = share("lookup", 0.6)
    climate.lost = share("lost", 0.5)
    climate.late = share("late", 0.5)
    climate.half_open = share("half_open", 0.6)
    climate.strays = share("stray", 1.0)
    climate.pages = share("page", 0.4)
    climate.foreign = share("foreign_404", 0.5)
    climate.denied = share("denied", 0.3)
    climate.gateway = share("gateway", 0.5)
    climate.storms = spans("storm", 8.0)
    climate.storm_share = rng.choice([1.0, 0.5, 0.1])
    climate.storm_status = rng.choice([429, 503])
    climate.storm_of_gateway = climate.storm_status == 503 and rng.random() < 0.5
    climate.retry_after = rng.choice([None, "0", "1", "0.25", "7"])
    climate.outages = spans("outage", 30.0)
    climate.outage_is_answered = rng.random() < 0.4
    climate.partitions = spans("partition", 10.0)
    if "long_retry_after" in hazards:
        start = rng.choice([0.0, 10 ** rng.uniform(-3.0, 0.5)])
        climate.storms.append(Span(start, rng.choice([0.05, 0.05, 1.0, 25.0])))
        climate.retry_after = rng.choice(_ABSURD)
    if "poison" in hazards and targets:
        fates: list[Fate | int] = [502, 503, 504, Fate.RESET, Fate.CLOSE, Fate.SILENCE]
        count = min(rng.choice([1, 1, 2, max(len(targets) // 5, 1)]), len(targets))
        climate.poison = dict.fromkeys(rng.sample(targets, count), rng.choice(fates))
    if "server" in hazards:
        faults = rng.sample(_SERVER_FAULTS, rng.randint(1, 6))
        climate.server_faults = {fault: rng.uniform(0.0, 0.1) for fault in faults}
    return climate


def answer(status: int, body: object, *headers: str) -> bytes:
    """Return an answer in JSON."""
    return _http(
        status, json.dumps(body).encode(), "Content-Type: application/json", *headers
    )


def html(status: int, body: bytes) -> bytes:
    """Return a page; a plain text is one by its Content-Type alone."""
    return _http(status, body, "Content-Type: text/html")


def error(status: int, code: str) -> bytes:
    """Return an error in the form of the API."""
    return answer(status, {"code": code, "error": "No."})


def refusal(status: int, retry_after: str | None) -> bytes:
    """Return a 429 or 503."""
    headers = [] if retry_after is None else [f"Retry-After: {retry_after}"]
    return answer(status, {"code": "rate.limited", "error": "Slow down."}, *headers)


def unavailable(body: bytes, retry_after: str | None) -> bytes:
    """Return a gateway's 503."""
    headers = [] if retry_after is None else [f"Retry-After: {retry_after}"]
    return _http(503, body, "Content-Type: text/plain", *headers)


def runtime(target: Target) -> bytes:
    """Return a 200 that says that a runtime is stopped."""
    workspace, alias = target
    namespace = uuid.uuid5(uuid.NAMESPACE_URL, workspace)
    body = {
        "alias": alias,
        "createdAt": "2026-01-01T00:00:00.000Z",
        "driver": "playwright",
        "id": str(uuid.uuid5(namespace, alias)),
        "kind": "browser",
        "status": "stopped",
        "summary": None,
        "updatedAt": "2026-01-01T00:00:00.000Z",
        "workspaceId": str(namespace),
    }
    return answer(200, body)


def _http(status: int, body: bytes, *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status} Simulated", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body
