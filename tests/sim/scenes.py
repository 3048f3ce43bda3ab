"""Scenes of throttling: targets and limits that chance would seldom draw."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from support.throttling import Server, fixed_window, sliding_log, token_bucket

from sim.exchange import Target

THROTTLING = frozenset({"quota", "random", "limit", "quotas", "gateway_retry_after"})
"""Hazards of a bulk stop of which some targets are throttled."""
_BAD = "ws-bad"
"""The workspace of the targets that are throttled for ever."""


@dataclass
class Scene:
    """The targets of a run, in order, and what throttles them.

    Attributes:
        ideal: The seconds that the limits alone would take.
        latency: The seconds that each answer takes, if they are the scene's own.
    """

    hazard: str
    targets: list[Target]
    over_quota: frozenset[str] = frozenset()
    buckets: dict[str, Server] = field(default_factory=dict)
    dead: frozenset[Target] = frozenset()
    dead_retry_after: str | None = None
    random_share: float = 0.0
    retry_after: str | None = None
    ideal: float = 0.0
    latency: float | None = None


def draw_service(rng: random.Random) -> Scene:
    """Draw single calls of workspaces, some of which are always throttled."""
    bad = [f"{_BAD}-{number}" for number in range(rng.choice([1, 1, 3, 12]))]
    good = [f"ws-{number}" for number in range(rng.randint(2, 4))]
    weights = [rng.choice([1, 4])] * len(bad) + [2] * len(good)
    owners = rng.choices(bad + good, weights, k=rng.randint(40, 120))
    return Scene(
        "service",
        [(owner, f"r{number}") for number, owner in enumerate(owners)],
        over_quota=frozenset(bad),
        retry_after=rng.choice([None, None, "1", "30"]),
    )


def draw_bulk(rng: random.Random) -> Scene:
    """Draw a scene of a bulk stop."""
    draw = rng.choice(
        [
            _draw_limit,
            _draw_limit,
            _draw_quotas,
            _draw_gateway,
            _draw_random,
            _draw_window,
            _draw_steps,
            _draw_slow_answers,
        ]
    )
    return draw(rng)


def _draw_limit(rng: random.Random) -> Scene:
    """Draw a limit for all beside targets that are throttled for ever."""
    good = _many(rng)
    worse = [(_BAD, f"bad{number}") for number in range(rng.choice([5, 12, 40]))]
    rate, burst = rng.choice([20.0, 50.0]), rng.choice([5, 20])
    return Scene(
        "limit",
        _placed(rng, worse, good),
        over_quota=frozenset({_BAD}),
        buckets={"ws-1": token_bucket(lambda _: rate, burst)},
        retry_after=rng.choice([None, None, "1"]),
        ideal=(len(good) - burst) / rate,
    )


def _draw_quotas(rng: random.Random) -> Scene:
    """Draw a quota for each workspace of a list, sorted or shuffled."""
    workspaces, size = rng.randint(2, 6), rng.randint(15, 40)
    targets = [(f"ws-{n}", f"r{n}-{m}") for n in range(workspaces) for m in range(size)]
    if rng.random() < 0.5:
        rng.shuffle(targets)
    buckets = {f"ws-{n}": token_bucket(lambda _: 5.0, 5) for n in range(workspaces)}
    return Scene("quotas", targets, buckets=buckets, ideal=(size - 5) / 5.0)


def _draw_gateway(rng: random.Random) -> Scene:
    """Draw dead targets for which a gateway answers 503 with a long Retry-After."""
    good = _many(rng)
    where = rng.choice(["ws-1", _BAD])
    dead = [(where, f"dead{number}") for number in range(rng.choice([3, 10, 20]))]
    return Scene(
        "gateway_retry_after",
        _placed(rng, dead, good),
        dead=frozenset(dead),
        dead_retry_after=rng.choice(["30", "600"]),
    )


def _draw_random(rng: random.Random) -> Scene:
    """Draw throttling at random of many targets."""
    count = rng.randint(100, 300)
    return Scene(
        "random",
        [("ws-1", f"r{number}") for number in range(count)],
        random_share=rng.uniform(0.01, 0.15),
        retry_after=rng.choice([None, "1"]),
    )


def _draw_window(rng: random.Random) -> Scene:
    """Draw a limit for all in a window of the clock, or in a log of past seconds."""
    limit, seconds = rng.choice([10, 30]), rng.choice([5.0, 20.0])
    targets = _many(rng)
    ideal = (len(targets) - 1) // limit * seconds
    kind = rng.choice(["window", "log", "log of all"])
    bucket = fixed_window(limit, seconds)
    if kind == "log":
        bucket = sliding_log(limit, seconds, counts_refused=False)
    elif kind == "log of all" and limit > seconds:
        # A lower limit takes `rate=`: at the slowest rate of the client, each refused
        # request is one too many.
        bucket = sliding_log(limit, seconds, counts_refused=True)
        ideal *= 2.0
    return Scene("limit", targets, buckets={"ws-1": bucket}, ideal=ideal)


def _draw_steps(rng: random.Random) -> Scene:
    """Draw a limit for all that rises and falls every ten seconds."""
    rates = rng.choice([(10.0, 40.0), (40.0, 10.0)])
    targets = _many(rng)
    return Scene(
        "limit",
        targets,
        buckets={"ws-1": token_bucket(lambda now: rates[int(now / 10.0) % 2], 5)},
        ideal=len(targets) / (sum(rates) / 2),
    )


def _draw_slow_answers(rng: random.Random) -> Scene:
    """Draw a limit for all of a server that answers after seconds."""
    targets = _many(rng)
    rate = rng.choice([20.0, 50.0])
    return Scene(
        "limit",
        targets,
        buckets={"ws-1": token_bucket(lambda _: rate, 20)},
        ideal=len(targets) / rate,
        latency=rng.choice([1.0, 2.0, 4.0]),
    )


def _many(rng: random.Random) -> list[Target]:
    return [("ws-1", f"r{number}") for number in range(rng.randint(60, 200))]


def _placed(rng: random.Random, bad: list[Target], good: list[Target]) -> list[Target]:
    """Return all targets, with the bad first or spread."""
    targets = bad + good
    if rng.random() < 0.5:
        rng.shuffle(targets)
    return targets
