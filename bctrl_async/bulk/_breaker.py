"""A circuit breaker, which tells a dead server from dead targets by sending a canary.

The canary is a GET: it shows whether the server answers, and stops nothing.
"""

from __future__ import annotations

import asyncio
import math

from bctrl_async import _quick_failures
from bctrl_async._calls.bulk_calls import BulkCall, BulkCalls
from bctrl_async._calls.observing import observe_call
from bctrl_async._calls.retry import probe_delay
from bctrl_async._calls.sender import Sender
from bctrl_async._kinds import Failure, Kind
from bctrl_async.bulk._cancel import CancelScope
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.errors import BctrlError, BctrlNetworkError
from bctrl_async.models import RuntimeRef

_NO_SUCH_RUNTIME = "bctrl-async-canary"
"""The alias in a canary until a target was answered; a live server answers 404."""
_CANARIES_PER_RETRY = 3
"""Unanswered canaries before the call itself probes: some servers answer no GETs."""
_MAX_CANARIES = 12
"""The most canaries before a retry: if all are answered, the 503s are not from load."""
_MANY_THROTTLED = 2
"""Throttled responses of a call after which its target may be the reason."""
_MAX_UNCOUNTED = 10
"""The most failures in outages that cost a call no attempt of its policy."""


class CircuitBreaker:
    """A circuit breaker shared by the workers of one bulk stop.

    An unanswered attempt shows a dead server or a dead target. So a canary is sent: a
    GET of a target that the server has answered before, which stops nothing. If the
    canary is answered, the target of the call is dead, the call's policy decides, and
    no other call waits. If not, the breaker opens. Then the calls that fail wait, and
    one of them probes: an outage costs a request now and then, however many calls wait,
    and costs them no attempts of their policy.

    Attempts are compared by their numbers: an answer proves that the server was up
    after a failure only if its attempt started later.

    `patience` is how many seconds to wait for a server that has answered before.
    """

    def __init__(
        self,
        sender: Sender,
        calls: BulkCalls,
        patience: float,
        ledger: Ledger,
    ) -> None:
        self._sender = sender
        self._limiter = sender.limiter
        self._calls = calls
        self._policy = calls.policy
        self._patience = patience
        self._state = ledger.state
        self._ledger = ledger
        self._attempts_before = sender.tally.attempts
        self._answered_call: BulkCall | None = None
        self.is_open: bool = False
        """True while the server answers no call."""
        self._opened_at = 0.0
        # The numbers of the attempt that showed an outage, and of the last in it.
        self._outage_first_attempt = 0
        self._outage_last_attempt = 0
        self._held_since = 0.0
        """The time at which the breaker opened, or last gave up a target."""
        self._probe: BulkCall | None = None
        # The scopes of the canaries in flight, each with the newest attempt before it:
        # an answer to a later attempt makes the canary needless.
        self._canaries: dict[CancelScope, int] = {}
        self._probers = 0
        """The number of times that a call became the probe, in this outage."""
        self._probe_failures = 0
        """The number of failed attempts of these calls."""
        self._lost_canaries = 0
        """The number of canaries that were not answered, in this outage."""
        self._has_no_probe = asyncio.Event()
        self._compare_lock = asyncio.Lock()
        self._unanswered_at = -math.inf
        """The time at which the last unanswered canary of `compare` was sent."""
        # The newest attempt when the machine could last not make a connection, and the
        # time of the first such attempt after which the server has answered none.
        self._local_attempt = 0
        self._local_since = 0.0
        self.has_given_up: bool = False

    @property
    def has_answered(self) -> bool:
        """True once the server has answered an attempt since the run was made."""
        return self._answers_after(self._attempts_before)

    def on_answer(self, call: BulkCall, failure: Failure | None = None) -> None:
        """Record that the server answered a call, perhaps with a failure."""
        is_throttled = failure is not None and failure.kind.is_throttling
        # A canary gets a runtime, and a list names none.
        if not is_throttled and call.alias is not None:
            self._answered_call = call
        self._close_if_up()
        for scope, newest_attempt in self._canaries.items():
            if self._answers_after(newest_attempt):
                scope.cancel()

    def _close_if_up(self) -> None:
        if self.is_open and self._answers_after(self._outage_first_attempt):
            self.is_open = False
            self._outage_last_attempt = self._sender.tally.attempts
            self.leave(self._probe)

    def _open(self, newest_attempt: int) -> None:
        self.is_open = True
        self._opened_at = self._held_since = _now()
        self._outage_first_attempt = newest_attempt
        self._probers = self._probe_failures = self._lost_canaries = 1

    def _answers_after(self, attempt: int) -> bool:
        """Return True if the server has answered a later attempt than this."""
        return self._sender.last_answered > attempt

    def leave(self, call: BulkCall | None) -> None:
        """Let another call become the probe, if this call was the probe."""
        if self._probe is call:
            self._probe = None
            self._has_no_probe.set()

    def give_up_error(self, failure: Failure) -> BctrlNetworkError:
        """Return the error of a run that gave up on its server after this failure."""
        advice = failure.advice
        if not self.has_answered:
            summary = f"the server does not answer: {failure.summary}"
            return BctrlNetworkError(summary, advice=advice)
        # An outage may pass; a certificate has to be renewed or trusted.
        if failure.kind is not Kind.UNTRUSTED:
            advice = "Run it again once the server is back"
        summary = f"the server answers no more: {failure.summary}"
        return BctrlNetworkError(summary, advice=advice)

    async def wait_to_retry(self, call: BulkCall, failure: Failure) -> bool:
        """Wait before retrying a call that failed; return False to give up.

        The caller must `leave` when the call has ended.
        """
        if failure.kind.is_unanswered and not failure.kind.is_throttling:
            return await self._wait_for_server(call, failure)
        if failure.kind.is_local and self.has_answered:
            return await self._wait_for_machine(call)
        return await self._back_off(call, failure)

    async def _wait_for_server(self, call: BulkCall, failure: Failure) -> bool:
        """Wait until the server is up or a call may probe it; False to give up."""
        # Only an answer to a newer attempt shows that the server is up.
        newest_attempt = self._sender.tally.attempts
        if self._probe is call and await self._gives_up_target():
            return False
        while not self._answers_after(newest_attempt):
            if self.has_given_up or self._limiter.is_closed():
                return False
            if not self._claim_probe(call):
                await self._has_no_probe.wait()
                continue
            if await self._shows_server_up(call, newest_attempt):
                break
            if self._gives_up(failure):
                return False
            await self._limiter.sleep(probe_delay(self._policy, self._lost_canaries))
            if self._is_to_probe(call, newest_attempt):
                call.log_retry(0.0)
                return True
        self._close_if_up()
        self.leave(call)
        return await self._retry(call, newest_attempt)

    async def _wait_for_machine(self, call: BulkCall) -> bool:
        """Wait while the machine cannot make a connection; return False to give up."""
        self.leave(call)
        if self._answers_after(self._local_attempt):
            self._local_since = _now()
        self._local_attempt = self._sender.tally.attempts
        tries = call.retries.failed_attempts
        is_too_long = _now() - self._local_since > self._patience
        if is_too_long or _quick_failures.is_enough(tries):
            return False
        await self._limiter.sleep(probe_delay(self._policy, tries))
        return True

    def _claim_probe(self, call: BulkCall) -> bool:
        """Make a call the probe; return False if another call is the probe."""
        if self._probe is None:
            self._probe = call
            self._has_no_probe.clear()
            self._probers += 1
            # A call becomes the probe after a failed attempt.
            self._probe_failures += 1
        return self._probe is call

    async def _shows_server_up(self, call: BulkCall, newest_attempt: int) -> bool:
        """Send a canary; open the breaker and return False if no answer comes.

        The canary is abandoned if another call of the run is answered first.
        """
        is_answered = False
        scope = CancelScope()
        self._canaries[scope] = newest_attempt
        try:
            with scope:
                is_answered = await self._ask_server(call)
        finally:
            del self._canaries[scope]
        if is_answered or scope.cancelled_caught or self._answers_after(newest_attempt):
            return True
        self._lost_canaries += 1
        if not self.is_open:
            self._open(newest_attempt)
        return False

    async def _ask_server(self, call: BulkCall) -> bool:
        """Send a canary, to an answered target if any; return True if answered."""
        answered_call = self._answered_call
        target = RuntimeRef(call.workspace_id, _NO_SUCH_RUNTIME)
        if answered_call is not None:
            target = RuntimeRef(answered_call.workspace_id, answered_call.alias or "")
        is_answered = await self._send_canary(target)
        if not is_answered and self._answered_call is answered_call:
            # The canary's target may have died since it was answered.
            self._answered_call = None
        return is_answered

    async def _send_canary(self, target: RuntimeRef) -> bool:
        """Send a GET once, before all new calls; return True if it is answered."""
        canary = self._calls.canary(target)
        try:
            with observe_call(
                self._ledger.observer, canary.operation, *target
            ) as observer:
                await self._sender.call(canary, observer)
        except BctrlError:
            failure = canary.retries.last_failure
            return failure is not None and failure.kind.is_answer
        return True

    async def _back_off(self, call: BulkCall, failure: Failure) -> bool:
        """Wait as the policy says after an answer; return False to give up."""
        if failure.status is not None:
            self.on_answer(call, failure)
        self.leave(call)
        # All calls may fail this way, so each retry waits for the shared quota.
        if not await call.back_off(self._limiter, waits_for_quota=True):
            return False
        await self.compare(call)
        return True

    def on_throttled(self, call: BulkCall) -> float | None:
        """Record a throttled answer; return the retry's delay, or None to give up."""
        self.on_answer(call, call.retries.last_failure)
        self.leave(call)
        delay = call.retries.delay(_now())
        if delay is None and call.retries.lacks_quota:
            # A parked stop holds no worker, so it may wait for a token.
            return probe_delay(self._policy, 1)
        if delay is not None:
            call.log_retry(delay)
        return delay

    async def compare(self, call: BulkCall) -> None:
        """Let canaries show whether a gateway answers 503 for all or some targets."""
        retries = call.retries
        failure = retries.last_failure
        if failure is None or not failure.kind.is_unanswered:
            return
        if retries.throttled < _MANY_THROTTLED:
            return
        # The calls that wait here use the canaries of the call that is compared.
        async with self._compare_lock:
            for _ in range(_MAX_CANARIES):
                since = retries.throttled_at
                started = _now()
                # It is shown once another call is answered, or a canary is not.
                if self._unanswered_at >= since or self._limiter.answers_others(since):
                    return
                if not await self._ask_server(call):
                    # An unanswered canary counts for all calls throttled before it.
                    self._unanswered_at = started
                    return

    def _gives_up(self, failure: Failure) -> bool:
        """Return True if the probe gives up; set `has_given_up` if the run does too."""
        hangs = _quick_failures.hangs(failure)
        if self.has_answered:
            is_too_long = _now() - self._opened_at > self._patience
            if is_too_long or hangs or _quick_failures.is_enough(self._lost_canaries):
                self.has_given_up = True
            return self.has_given_up
        # Waiting does not change a certificate, unless other calls are answered: then
        # it belongs to one of several machines, or to a proxy that reloads.
        is_untrusted = failure.kind is Kind.UNTRUSTED
        if self._probe_failures < self._policy.attempts and not (is_untrusted or hangs):
            return False
        # While requests are in flight, the server may be slow rather than dead.
        if self._state.in_flight:
            return False
        # The target of a single prober may be dead, not the server.
        self.has_given_up = self._probers > 1
        return True

    async def _gives_up_target(self) -> bool:
        """Let another call be the probe; return True to give up this target.

        Dead targets may hold all workers of a live server. In an outage, at most two
        are given up.
        """
        self._probe_failures += 1
        if not self.has_answered:
            return False
        self.leave(self._probe)
        held_for = _now() - self._held_since
        # A third of the patience apart, two are given up before it ends.
        if self._probers < len(self._state.workers) or held_for < self._patience / 3:
            # In this turn of the loop, the call that waited longest becomes the probe.
            await asyncio.sleep(0)
            return False
        self._held_since = _now()
        return True

    def _is_to_probe(self, call: BulkCall, newest_attempt: int) -> bool:
        """Return True if a call is to probe the server: some answer no GETs."""
        if self._probe is not call or self._answers_after(newest_attempt):
            return False
        if not self.has_answered:
            return self._probe_failures < self._policy.attempts
        return self._lost_canaries % _CANARIES_PER_RETRY == 0

    async def _retry(self, call: BulkCall, newest_attempt: int) -> bool:
        """Wait before a retry, now that the server is up; return False to give up."""
        retries = call.retries
        failed_in_outage = (
            newest_attempt >= self._outage_first_attempt
            and call.attempt_number <= self._outage_last_attempt
        )
        if not failed_in_outage or retries.uncounted > _MAX_UNCOUNTED:
            # A later retry waits for no quota, so dead targets do not hold up the run.
            is_first_retry = call.attempts == 1
            return await call.back_off(self._limiter, waits_for_quota=is_first_retry)
        # Jitter spreads the calls that the outage held, which are all retried now.
        delay = self._policy.backoff(1, retries.uniform)
        call.log_retry(delay)
        await self._limiter.sleep(delay)
        return True


def _now() -> float:
    return asyncio.get_running_loop().time()
