"""All that a seed decides about one run."""

from __future__ import annotations

import math
import random
import uuid
from enum import StrEnum

import msgspec

from bctrl_async import RetryPolicy, RuntimeRef
from sim import climate as climates, scenes
from sim.exchange import Target
from sim.server import LIST_TROUBLES, ListFault, ListTrouble
from sim.starts import Start, draw_starts

_UUID = str(uuid.UUID(int=7))
_INVALID: tuple[object, ...] = (None, ("ws", ""), "ab", ("ws", "a/../b", 3), 7)
VERIFY_SECONDS = 120.0
"""Seconds of polling by default."""


class Kind(StrEnum):
    """A way to use the client."""

    BULK = "bulk stop"
    COMMAND = "command"
    CALLS = "single calls"


class Ending(StrEnum):
    """A way in which a bulk stop ends."""

    COMPLETED = "completed"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    MOVE_ON_AFTER = "anyio.move_on_after"
    FAIL_AFTER = "anyio.fail_after"
    SCOPE_CANCELLED = "anyio.CancelScope cancelled"
    LEFT_EARLY = "left early"
    STOP_READING = "stop_reading"
    ABORT = "abort"
    CALLBACK_RAISES = "on_outcome raises"
    INPUT_RAISES = "input raises"
    KEY_REVOKED = "key revoked"
    SESSION_CLOSED = "session closed"
    DROPPED = "batch dropped"
    CTRL_C = "Ctrl-C"
    CTRL_C_TWICE = "Ctrl-C twice"


_TIMED = frozenset({Ending.DEADLINE, Ending.MOVE_ON_AFTER, Ending.FAIL_AFTER})
_KINDS = [Kind.BULK] * 13 + [Kind.COMMAND] * 3 + [Kind.CALLS] * 4
_COMMAND_ENDINGS = [Ending.COMPLETED, Ending.CTRL_C, Ending.CTRL_C, Ending.CTRL_C_TWICE]
_BULK_ENDINGS = [ending for ending in Ending if ending not in _COMMAND_ENDINGS]
_BULK_ENDINGS += [Ending.COMPLETED] * 5
_COMPLETED = [Ending.COMPLETED]
_CUT_OFF = [Ending.DEADLINE, Ending.STOP_READING, Ending.ABORT, Ending.CANCELLED]
_THEMED = 0.3
_THEMES: list[tuple[set[str], list[Kind], list[Ending] | None]] = [
    ({"poison"}, [Kind.BULK], _COMPLETED),
    ({"poison", "outage"}, [Kind.BULK], _COMPLETED),
    ({"outage"}, [Kind.BULK], _COMPLETED),
    ({"storm"}, [Kind.BULK], _CUT_OFF),
    ({"long_retry_after"}, [Kind.CALLS], None),
    ({"stray"}, _KINDS, None),
    (set(), [Kind.BULK], [Ending.STOP_READING]),
]
"""Hazards, kinds and endings that chance alone would seldom bring together."""


class Plan:
    """All random choices of one run.

    Args:
        seed: The seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = self.rng = random.Random(seed)
        theme = rng.choice(_THEMES) if rng.random() < _THEMED else None
        hazards, kinds, endings = theme or (climates.draw_hazards(rng), _KINDS, None)
        self.kind = rng.choice(kinds)
        count = int(10 ** rng.uniform(0.3, 1.75))
        workspaces = rng.choice([["ws-1"], ["ws-1", _UUID], ["ws-1", "zwei ü"]])
        names = rng.choice(["r{}", "r {}/é", "cafe\u0301-{}"])
        self.targets = [(rng.choice(workspaces), names.format(n)) for n in range(count)]
        self.status: dict[Target, str | None] = {
            target: rng.choices(["active", "stopped", None], [85, 10, 5])[0]
            for target in self.targets
        }
        self.timeout = rng.choice([0.5, 1.0, 2.0])
        self.climate = climates.draw(
            rng, frozenset(hazards), self.targets, self.timeout
        )
        self.policy = RetryPolicy(
            attempts=rng.randint(1, 4),
            base=rng.choice([0.05, 0.5]),
            cap=rng.choice([0.5, 5.0]),
            patience=rng.choice([None, None, 0, 2.0, 10.0]),
        )
        self.max_connections = rng.choice([1, 2, 5, 20, 100])
        self.concurrency = rng.choice([None, None, 1, 3, 10])
        self.rate = rng.choice([None, None, 5.0, 50.0])
        # Drawn apart, so that the rest of a seed's run stays as it is without a pace.
        self._draw_pace(random.Random(f"pace {seed}"))
        self.spacing = rng.choice([0.0, 0.0, 0.05, 20.0])
        if hazards == {"stray"}:
            # Connections are idle now and then.
            self.rate, self.spacing = rng.choice([None, 20.0, 20.0]), 0.05
            self.max_connections = rng.choice([1, 2, 5])
        if self.concurrency is not None:
            self.concurrency = min(self.concurrency, self.max_connections)
        self.host = "localhost" if "lookup" in self.climate.hazards else "127.0.0.1"
        self.borrows = rng.random() < 0.1
        # A borrowed pool does not look for bytes on idle connections.
        self.climate.idle_strays = not self.borrows
        self.key_function = rng.choice([None, None, "plain", "async"])
        self.latency = rng.choice([0.0, 0.0, 0.01, 0.2])
        self.thread_delay = rng.choice([0.0, 0.001, 0.3])
        endings = endings or (
            _COMMAND_ENDINGS if self.kind is Kind.COMMAND else _BULK_ENDINGS
        )
        self.ending = (
            Ending.COMPLETED if self.kind is Kind.CALLS else rng.choice(endings)
        )
        if self.ending is Ending.KEY_REVOKED:
            self.key_function = self.key_function or "plain"
        self._draw_end(rng, count)
        self._draw_input(rng)
        self._draw_output(rng)
        # Drawn apart, so that the rest of a seed's run stays as it is.
        self._draw_throttling(random.Random(f"throttling {seed}"))
        self._draw_scene(random.Random(f"scene {seed}"))
        self._draw_slow_stops(random.Random(f"slow {seed}"))
        self._draw_idle(random.Random(f"idle {seed}"))
        self._draw_starts(random.Random(f"starts {seed}"))
        self._draw_stalls(random.Random(f"stalls {seed}"))
        self._draw_threads(random.Random(f"threads {seed}"))
        self._draw_descriptors(random.Random(f"descriptors {seed}"))

    def _draw_pace(self, rng: random.Random) -> None:
        """Draw a shared pace: its rate, and when its store answers or is away."""
        self.pace = rng.choice([None, None, None, 20.0, 200.0])
        self.store_latency = rng.choice([0.0005, 0.0005, 0.02, 0.3, 5.0])
        self.store_outage = rng.choice(
            [(0.0, 0.0), (0.0, math.inf), (rng.uniform(0, 1), rng.uniform(1, 5))]
        )

    def _draw_throttling(self, rng: random.Random) -> None:
        """Draw a workspace over its quota, or random throttling, instead."""
        climate = self.climate
        if climate.hazards or self.kind is Kind.CALLS or rng.random() < 0.2:
            return
        # A Retry-After beyond the patience may end the run.
        is_patient = self.policy.patience is None or self.policy.patience > 1.0
        climate.retry_after = rng.choice([None, "1"]) if is_patient else None
        workspaces = sorted({workspace for workspace, _ in self.targets})
        if rng.random() < 0.3:
            climate.hazards = frozenset({"random"})
            climate.random_share = rng.uniform(0.01, 0.2)
        elif len(workspaces) > 1:
            climate.hazards = frozenset({"quota"})
            climate.over_quota = frozenset({rng.choice(workspaces)})
            order = rng.choice(["first", "spread", "last"])
            if order != "spread" and self.input != "workspace":
                self.items.sort(key=self._is_over_quota, reverse=order == "first")
            # An invalid first item is an error of the call.
            self.items.sort(key=_is_invalid)

    def _is_over_quota(self, item: object) -> bool:
        return (
            isinstance(item, RuntimeRef)
            and item.workspace_id in self.climate.over_quota
        )

    def _draw_end(self, rng: random.Random, count: int) -> None:
        """Draw the moment of the end: a step, a time, or a number of outcomes."""
        self.trigger = rng.choice(["step", "time", "outcome"])
        if self.ending in _TIMED:
            self.trigger = "time"
        self.end_step = 2 + int(10 ** rng.uniform(0.0, 3.3))
        self.end_time = 10 ** rng.uniform(-3.0, 1.2)
        if self.climate.storms and self.ending in _CUT_OFF and rng.random() < 0.8:
            self.trigger = "time"
            self.end_time = self.climate.storms[0].start + rng.uniform(0.0, 1.0)
        self.end_count = rng.randrange(count)
        self.twice_after = rng.choice([0.0, 0.01, 1.0])

    def _draw_input(self, rng: random.Random) -> None:
        """Draw the input of a bulk stop."""
        self.input = rng.choice(
            ["list", "list", "list", "generator", "async", "workspace"]
        )
        self.workspace = self.targets[0][0]
        if self.ending is Ending.INPUT_RAISES and self.input in {"list", "workspace"}:
            self.input = "generator"
        self.input_delay = rng.choice([0.0, 0.001, 0.1])
        self.items: list[object] = [RuntimeRef(*target) for target in self.targets]
        if self.input == "workspace":
            # Those that it lists and selects, in the emulator's order.
            active = [
                target for target in self.targets if self.status[target] == "active"
            ]
            self.items = [target for target in active if target[0] == self.workspace]
            return
        if rng.random() < 0.3:
            self.items += [rng.choice(self.targets) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.2 and self.kind is not Kind.COMMAND:
            self.items += [rng.choice(_INVALID) for _ in range(rng.randint(1, 3))]
        rng.shuffle(self.items)
        # A first item of another type is an error of the call.
        first = next(
            (item for item in self.items if isinstance(item, RuntimeRef)), ("ws", "")
        )
        if self.items and not isinstance(self.items[0], RuntimeRef):
            self.items.insert(0, first)

    def _draw_output(self, rng: random.Random) -> None:
        """Draw the ways in which outcomes are read, verified and recorded."""
        self.consumer = rng.choice(["await", "await", "task", "stream"])
        if self.ending in {Ending.LEFT_EARLY, Ending.DROPPED}:
            self.consumer = "stream"
        self.reader_delay = rng.choice([0.0, 0.0, 0.01])
        self.callback = rng.choice(["plain", "async", None])
        if self.ending is Ending.CALLBACK_RAISES:
            self.callback = self.callback or "plain"
        self.verify = rng.random() < 0.25
        self.observed = rng.random() < 0.8
        self.journal = rng.random() < 0.35 or not self.observed
        self.resume = self.journal and self.input != "workspace" and rng.random() < 0.6
        self.torn = rng.random()
        self.calm_resume = rng.random() < 0.5
        # Limits inside of the client that only a large run would reach
        self.max_unread = rng.choice([1, 5, 100])
        self.max_polls = rng.choice([1, 3, 1000])
        if "poison" in self.climate.hazards:
            # At the bound, what waits for dead targets would hold up the others.
            self.max_polls = 1000

    def _draw_scene(self, rng: random.Random) -> None:
        """Draw a scene of throttling with targets of its own, in place of no hazard."""
        self.ideal = 0.0
        if self.climate.hazards or rng.random() < 0.3:
            return
        if self.kind is Kind.CALLS:
            scene = scenes.draw_service(rng)
            self.spacing = rng.choice([0.0, 0.02, 0.1])
        else:
            scene = scenes.draw_bulk(rng)
            self._set_items(scene.targets, rng)
        climate = self.climate
        climate.hazards = frozenset({scene.hazard})
        climate.over_quota, climate.buckets = scene.over_quota, scene.buckets
        climate.dead, climate.dead_retry_after = scene.dead, scene.dead_retry_after
        climate.random_share, climate.retry_after = (
            scene.random_share,
            scene.retry_after,
        )
        climate.targets = self.targets = scene.targets
        self.status = dict.fromkeys(scene.targets, "active")
        self.ideal = scene.ideal
        self.policy = msgspec.structs.replace(self.policy, patience=None)
        self.rate = self.pace = self.concurrency = None
        self.max_connections = rng.choice([5, 20, 100])
        self.latency = min(self.latency, 0.01)
        if scene.latency is not None:
            self.latency = scene.latency
            climate.timeout = self.timeout = 4.0 * scene.latency
        # At the bound, what waits for dead targets would hold up the others.
        self.max_polls = 1000

    def _set_items(self, targets: list[Target], rng: random.Random) -> None:
        self.items = [RuntimeRef(*target) for target in targets]
        if self.input == "workspace":
            self.input = "list"
        if rng.random() < 0.8 and self.kind is Kind.BULK:
            self.ending = Ending.COMPLETED

    def _draw_slow_stops(self, rng: random.Random) -> None:
        """Draw many runtimes of a workspace whose stops take time, in few runs."""
        self.stop_seconds: dict[Target, float] = {}
        self.list_faults: dict[ListFault, float] = {}
        self.list_trouble: ListTrouble | None = None
        self.verify_seconds = VERIFY_SECONDS
        is_scene = self.climate.hazards & scenes.THROTTLING
        # Drawn apart, so that the rest of a seed's run stays as it is.
        trouble = random.Random(f"list trouble {self.seed}")
        has_trouble = trouble.random() < 0.02
        is_slow = rng.random() <= 0.03 or has_trouble
        if self.kind is Kind.CALLS or is_scene or not is_slow:
            return
        targets = [(self.workspace, f"r{n}") for n in range(rng.randint(10, 60))]
        longest = rng.choice([1.0, 4.0, 12.0])
        self.stop_seconds = {target: rng.uniform(0.1, longest) for target in targets}
        faults = rng.sample(list(ListFault), rng.randint(0, 3))
        self.list_faults = {fault: rng.uniform(0.1, 0.33) for fault in faults}
        if rng.random() < 0.6:
            self.climate = climates.draw(rng, frozenset(), targets, self.timeout)
        self.climate.hazards |= {"slow"}
        self.climate.targets = self.targets = targets
        self.status = dict.fromkeys(targets, "active")
        if self.input == "workspace":
            self.items = list(targets)
        else:
            self._set_items(targets, rng)
        self.policy = msgspec.structs.replace(
            self.policy, base=0.5, cap=5.0, patience=None
        )
        self.rate = self.pace = None
        self.max_connections, self.concurrency = rng.choice([5, 20, 100]), None
        self.latency = min(self.latency, 0.01)
        self.verify = rng.random() < 0.85
        if has_trouble:
            self._draw_list_trouble(trouble)

    def _draw_list_trouble(self, rng: random.Random) -> None:
        """Draw a fault of lists alone, for a user of any patience."""
        self.list_faults = {}
        lists = rng.choice([1, 1, 2, math.inf])
        self.list_trouble = ListTrouble(rng.choice(LIST_TROUBLES), lists)
        longest = rng.choice([4.0, 12.0, 25.0])
        self.stop_seconds = {
            target: rng.uniform(0.1, longest) for target in self.targets
        }
        self.timeout = rng.choice([self.timeout, 10.0, 60.0])
        self.verify = True
        self.verify_seconds = rng.choice([VERIFY_SECONDS, VERIFY_SECONDS, 3.0, 30.0])
        if rng.random() < 0.7:
            self.climate = climates.draw(rng, frozenset(), self.targets, self.timeout)
            self.climate.hazards |= {"slow"}
            self.max_polls = 1000

    def _draw_idle(self, rng: random.Random) -> None:
        """Draw when an async input, as a queue or a feed, has no next item for long."""
        self.idle_at, self.idle = 0, 0.0
        if self.kind is Kind.CALLS or self.input == "workspace":
            return
        # Throttled stops are parked while the input is idle.
        is_likely = self.input == "async" or self.climate.hazards & scenes.THROTTLING
        if rng.random() < (0.6 if is_likely else 0.1):
            self.input = "async"
            self.idle_at = rng.randint(1, len(self.items))
            self.idle = rng.choice([5.0, 60.0, 900.0])

    def _draw_starts(self, rng: random.Random) -> None:
        """Draw runtimes that another program starts, in half of the runs that look."""
        self.starts: list[Start] = []
        if self.kind is Kind.CALLS or self.input != "workspace" or rng.random() < 0.5:
            return
        self.starts = draw_starts(rng)
        self.climate.hazards |= {"starts"}
        self.verify = self.verify or rng.random() < 0.8
        has_faults = self.list_faults or self.list_trouble is not None
        if not has_faults and rng.random() < 0.4:
            self.list_faults = {rng.choice(list(ListFault)): rng.uniform(0.3, 1.0)}

    def _draw_stalls(self, rng: random.Random) -> None:
        """Draw when the process is starved of CPU, in one run of twenty."""
        self.stalls: list[float] = []
        if rng.random() < 0.05:
            self.stalls = sorted(
                10 ** rng.uniform(-2.0, 1.0) for _ in range(rng.randint(1, 3))
            )
            self.climate.hazards |= {"starved"}

    def _draw_threads(self, rng: random.Random) -> None:
        """Draw whether threads can start: for the journal, and to look up the host."""
        needs_thread = self.journal or self.host == "localhost"
        self.has_threads = not needs_thread or rng.random() >= 0.05
        if not self.has_threads:
            self.climate.hazards |= {"no threads"}

    def _draw_descriptors(self, rng: random.Random) -> None:
        """Draw how many connections the machine can hold, in one run of four.

        It is no hazard: no target is lost, and no attempt costs anything.
        """
        # The ideal time of a scene is for as many connections as there may be.
        if not self.ideal and rng.random() < 1 / 4:
            self.climate.descriptors = rng.choice([1, 2, 3, 5])

    @property
    def is_whole(self) -> bool:
        """True if every item is read, however the run ends."""
        return self.input in {"list", "workspace"}

    @property
    def is_paced(self) -> bool:
        """True if attempts wait for a rate."""
        return self.rate is not None or self.pace is not None

    @property
    def worker_count(self) -> int:
        """The number of workers of a bulk stop."""
        return min(self.max_connections, self.concurrency or self.max_connections)

    @property
    def slot_count(self) -> int:
        """The number of workers that have a connection at a time."""
        return int(min(self.worker_count, self.climate.descriptors))

    def seconds_in_turn(self, count: int) -> float:
        """Return the most seconds of these requests if they lack connections.

        Each takes two segments, which share what connections the machine can hold.
        """
        if self.slot_count == self.worker_count:
            return 0.0
        return -(-count // self.slot_count) * 4.0 * self.climate.base_latency

    def longest(self, count: int, workers: int) -> float:
        """Return the seconds in which workers make all attempts of these calls."""
        attempts = self.policy.attempts * (2.0 * self.timeout + self.policy.cap)
        # A lease has a slot at least, and takes a second at most.
        pace = sum(1.0 / rate for rate in (self.rate, self.pace) if rate)
        pace += 1.0 if self.pace else 0.0
        delays = pace + self.input_delay + self.latency
        return -(-count // workers) * attempts + count * delays + self.idle

    def __str__(self) -> str:
        shown = {
            name: value
            for name, value in vars(self).items()
            if name not in {"rng", "targets", "status", "items", "climate"}
        }
        policy = {name: getattr(self.policy, name) for name in _POLICY}
        lines = [
            f"  {name} = {value}" for name, value in {**shown, "policy": policy}.items()
        ]
        fields = vars(self.climate).items()
        for name, value in fields:
            if value and name != "targets":
                shown_value = (
                    [vars(span) for span in value] if name in _SPANS else value
                )
                lines.append(f"  climate.{name} = {shown_value}")
        return "\n".join(lines)


def _is_invalid(item: object) -> bool:
    return not isinstance(item, RuntimeRef)


_POLICY = ("attempts", "base", "cap", "patience")
_SPANS = {"storms", "outages", "partitions"}
