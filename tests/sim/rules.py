"""Parts that all checks share: the form of a problem, and the effect of an exchange."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bctrl_async import StopResult
from sim.exchange import Exchange, Target

NOT_RUNNING = frozenset({"stopped", "failed"})
REFUSED = frozenset({429, 503})
CLAIMS_STOPPED = frozenset(
    {StopResult.STOPPED, StopResult.ACCEPTED, StopResult.ALREADY_STOPPED}
)
CLAIMS_NO_EFFECT = frozenset({StopResult.REJECTED, StopResult.NOT_SENT})


class Problem(NamedTuple):
    """A rule that a run broke, and how."""

    rule: str
    text: str


PATIENCE = 180.0
"""Seconds that a run may take beyond its attempts: outages, pauses, polls."""

Problems = Iterator[Problem]


def name(target: Target) -> str:
    """Return a target as text."""
    return "/".join(target)


def may_have_stopped(exchange: Exchange) -> bool:
    """Return True if an answer leaves it possible that the stop took effect."""
    status = exchange.status
    if status is None or exchange.foreign:
        return True
    return (
        status not in REFUSED and not 400 <= status < 500 and status not in {307, 308}
    )


def is_decisive(exchange: Exchange) -> bool:
    """Return True if the answer was delivered whole and leaves no doubt."""
    if exchange.answered is None or exchange.status is None or exchange.foreign:
        return False
    return 400 <= exchange.status < 500 or exchange.status in {
        503,
        200 if not exchange.page else 0,
    }


def posts(exchanges: Iterable[Exchange]) -> dict[Target, list[Exchange]]:
    """Return the stops among the exchanges by target."""
    found: defaultdict[Target, list[Exchange]] = defaultdict(list)
    for exchange in exchanges:
        if exchange.stops:
            found[exchange.target].append(exchange)
    return found
