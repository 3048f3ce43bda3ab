"""The faults of the emulator, and the plan that chooses one for each request."""

import bisect
import hashlib
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from enum import StrEnum

from bctrl_async.emulator._arguments import check_type
from bctrl_async.emulator._reply import Reply
from bctrl_async.emulator._routes import Route


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
    STRAY_ANSWER = "stray_answer"
    """The normal response and, in the same segment, a 403 too many; the runtime is stopped."""
    LATE_STRAY_ANSWER = "late_stray_answer"
    """The normal response, and a 200 about another runtime `fault_latency` seconds later; the
    runtime is stopped."""
    FOREIGN_NOT_FOUND = "foreign_not_found"
    """404 with the JSON of another service, without a `code`; nothing is stopped."""
    LOGIN_PAGE = "login_page"
    """200 with the HTML page of a proxy that wants a login; nothing is stopped."""

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
        Fault.FOREIGN_NOT_FOUND,
        Fault.LOGIN_PAGE,
    }
)


class FaultPlan:
    """The faults of future requests: poison first, then queued faults, then random ones."""

    def __init__(self, probabilities: Mapping[Fault, float], seed: int) -> None:
        check_type("faults", probabilities, Mapping)
        for fault, share in probabilities.items():
            if fault not in set(Fault):
                raise ValueError(f"faults has {fault!r}: give members of Fault")
            check_type(f"faults[{fault}]", share, int, float)
            if not 0 <= share <= 1:
                raise ValueError(f"faults has {fault} at {share}: give a probability of 0 to 1")
        if (total := sum(probabilities.values())) > 1 + 1e-9:
            raise ValueError(f"faults add up to {total}: give probabilities of at most 1 together")
        # In the order of `Fault`, so that a seed does not depend on the order of the mapping.
        faults = [fault for fault in Fault if probabilities.get(fault)]
        self._bounds = list(itertools.accumulate(probabilities[fault] for fault in faults))
        self._choices = [*faults, None]
        self._seed = seed
        self._queues: defaultdict[tuple[str | None, ...], deque[Fault | Reply | None]]
        self._queues = defaultdict(deque)
        self._poison: dict[tuple[str, str | None], Fault | Reply | None] = {}

    def poison(self, workspace_id: str, alias: str, fault: Fault | Reply | None) -> None:
        check_type("workspace_id", workspace_id, str)
        check_type("alias", alias, str)
        _check(fault)
        self._poison[workspace_id, alias] = fault

    def add(self, faults: Sequence[Fault | Reply | None], *key: str | None) -> None:
        for fault in faults:
            _check(fault)
        self._queues[key].extend(faults)

    def next(self, route: Route, received: Counter[tuple[str, str]]) -> Fault | Reply | None:
        operation, workspace_id, alias = route
        if (poison := self._poison.get((workspace_id, alias))) is not None:
            return poison
        if self._queues:
            targets = ((workspace_id, alias), (workspace_id, None), (None, alias), (None, None))
            for target in targets:
                if queue := self._queues.get((route.method, *target)):
                    return queue.popleft()
        if not self._bounds or operation != "stop" or alias is None:
            return None
        number = received[workspace_id, alias]
        # The length keeps ("a", "bc") and ("ab", "c") apart.
        text = f"{self._seed}:{number}:{len(workspace_id)}:{workspace_id}{alias}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return self._choices[bisect.bisect(self._bounds, int.from_bytes(digest) / 2**64)]


def _check(fault: Fault | Reply | None) -> None:
    if fault is not None and not isinstance(fault, Fault | Reply):
        raise ValueError(f"fault is {fault!r:.50}: give a member of Fault, a Reply, or None")
