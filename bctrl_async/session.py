"""The session manager: the pool, the limiter and the calls that users make."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from ssl import SSLContext
from types import MappingProxyType
from typing import NoReturn, Self, TypeVar
from uuid import UUID

import aiohttp
from multidict import CIMultiDict

from bctrl_async import _config, _quick_failures
from bctrl_async._calls.bulk_calls import BulkCalls
from bctrl_async._calls.call import Call, annotate
from bctrl_async._calls.observing import ObservedStop, observe_call
from bctrl_async._calls.retry import RetryPolicy, RetryState
from bctrl_async._calls.sender import Sender
from bctrl_async._http import transport
from bctrl_async._http.fast import open_pool
from bctrl_async._http.pool import Pool
from bctrl_async._http.request import (
    GET,
    LIST,
    STOP,
    Operation,
    checked_headers,
    plain_text,
    plain_texts,
)
from bctrl_async._kinds import Failure, Kind
from bctrl_async._limiter.bounds import FixedRate
from bctrl_async._limiter.evidence import History
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.queues import Priority
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async._version import __version__
from bctrl_async.bulk import OnOutcome, StopBatch, Targets
from bctrl_async.bulk._input import Input, Listing
from bctrl_async.bulk._options import Options, verify_for
from bctrl_async.bulk._run import Run
from bctrl_async.errors import BctrlConfigError, BctrlError, BctrlResponseError
from bctrl_async.filters import WHERE, RuntimeFilter, Selection
from bctrl_async.journal import Journal
from bctrl_async.models import Runtime
from bctrl_async.observer import CallObserver, Observer, StopObserver
from bctrl_async.pace import Pace
from bctrl_async.stats import SessionStats

__all__ = ["BctrlSession"]

_IDEMPOTENCY_KEY = "Idempotency-Key"
_SLICE = 1_000
"""The number of listed runtimes that are filtered before other tasks get a turn."""
_TURNS_TO_LEAVE = 2
"""The turns of the loop from the end of a run until its reader has left its block."""

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_T = TypeVar("_T")
_log = logging.getLogger("bctrl_async")


class BctrlSession:
    """A session with the bctrl v1 API: one connection pool for any number of calls.

    It can be created before an event loop runs. The pool opens with the first call or
    `async with`, belongs to the loop that runs then, and closes with the session, or
    else with the loop.

    Args:
        api_key: The key, or a plain or async function that is called for it before each
            attempt. None reads `BCTRL_API_KEY`. A newline at the end of a key is left
            out.
        base_url: The URL of the API, with or without `/v1`. None reads
            `BCTRL_BASE_URL`, or uses `https://api.bctrl.ai` if that is not set.
        timeout: Seconds for one attempt, above 0, once `max_connections` and `rate`
            allow it. Connecting may take 90 % of them. An `api_key` function has an
            equal limit of its own.
        max_connections: The most attempts in flight, from 1. If this machine lacks the
            file descriptors or ports for so many, a warning says so, and fewer are in
            flight. What may have taken effect is sent first, then single stops, then
            bulk stops. If the server throttles every attempt for as long as the
            `patience`, a call that waits fails.
        retry: The retry policy.
        rate: The most attempts a second, above 0, evenly spaced, or a rate that this
            session shares with sessions of other processes: a
            `bctrl_async.pace.FilePace` or a `bctrl_async.redis.RedisPace`. None sets no
            limit. Either way the session slows down while many targets get 429 or 503.
        http: An `aiohttp.ClientSession` to send through, instead of a pool of the
            session's own. It is never closed here, and the limits of its connector also
            apply. Unlike the session's own pool, it keeps idle connections on which
            unexpected bytes arrived. Its client middlewares must send a request at most
            once: if a middleware retries and then finds no connection, a stop is
            `not_sent` although its first request may have arrived.
        trust_env: Use the proxies of the environment (`HTTPS_PROXY`, …).
        proxy: The URL of a proxy for all requests of the pool, such as
            `http://user:password@proxy.example.com:3128`; it takes precedence over the
            proxies of the environment. The API must be https, or `allow_plaintext`
            True.
        ssl: The TLS context of the pool, for a private CA or a client certificate; None
            uses `ssl.create_default_context()`.
        allow_plaintext: Allow sending the key over plain http to another machine.
        observer: The observer of all calls, such as `bctrl_async.otel.OpenTelemetry`.
        headers: More headers for every request, except those that the session sets. The
            headers of a call take precedence.
        check_answers: Accept an answer only if it has the requested alias, or id, and
            the requested workspace if that is a UUID. False accepts any answer, for a
            mock server that makes its answers up.

    Raises:
        BctrlConfigError: There is no key, or an argument is invalid; the text names it.
    """

    def __init__(
        self,
        api_key: str | Callable[[], str | Awaitable[str]] | None = None,
        *,
        base_url: str | None = None,
        timeout: float = 60.0,
        max_connections: int = 100,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is immutable.
        rate: float | Pace | None = None,
        http: aiohttp.ClientSession | None = None,
        trust_env: bool = False,
        proxy: str | None = None,
        ssl: SSLContext | None = None,
        allow_plaintext: bool = False,
        observer: Observer | None = None,
        headers: Mapping[str, str] | None = None,
        check_answers: bool = True,
    ) -> None:
        key_provider = api_key if callable(api_key) else None
        key_origin = _key_origin(api_key)
        key = _config.hidden_key(api_key)
        hidden_proxy = _config.hidden(proxy)
        api_key = proxy = None  # A traceback that shows variables must not reveal them.
        all_headers = _session_headers(headers)
        if key_provider is None:
            all_headers["Authorization"] = _config.authorization(key)
        for name, flag in {
            "allow_plaintext": allow_plaintext,
            "trust_env": trust_env,
            "check_answers": check_answers,
        }.items():
            _config.check_type(flag, bool, name, "a bool")
        _config.check_type(retry, RetryPolicy, "retry", "a RetryPolicy")
        _config.check_type(ssl, SSLContext | None, "ssl", "an ssl.SSLContext")
        _config.check_type(
            observer, Observer | None, "observer", "a bctrl_async.Observer"
        )
        self._url = _config.base_url(base_url, allow_plaintext=allow_plaintext)
        # Plain http is for loopback alone: a proxy elsewhere could read the key.
        is_loopback_only = self._url.scheme == "http" and not allow_plaintext
        checked_proxy = _config.proxy(hidden_proxy, is_allowed=not is_loopback_only)
        self._timeout = transport.time_limit(timeout)
        self._retry = retry
        self._observer = observer
        self._open_runs: dict[Run, None] = {}
        max_connections = _config.count(max_connections, "max_connections")
        if http is not None:
            pool_options = (trust_env, checked_proxy, ssl)
            _check_borrowed(http, pool_options, is_loopback_only=is_loopback_only)
            max_connections = _lowest_limit(http.connector, max_connections)
        if is_loopback_only:
            # A proxy of the environment could read the key, too.
            trust_env = False
        self._limiter = _make_limiter(max_connections, rate)
        self._sender = Sender(
            Pool(
                partial(
                    open_pool,
                    self._url,
                    all_headers,
                    trust_env=trust_env,
                    proxy=checked_proxy,
                    ssl=ssl,
                ),
                http,
            ),
            self._limiter,
            self._url,
            all_headers,
            key_provider=key_provider,
            key_origin=key_origin,
            check_answers=check_answers,
        )

    def __repr__(self) -> str:
        if not hasattr(self, "_sender"):
            return "<BctrlSession with invalid arguments>"
        state = "not opened yet"
        if self.closed:
            state = "closed"
        elif self._sender.was_opened:
            state = "open"
        return f"<BctrlSession {str(self._url)!r} {state}>"

    def __reduce__(self) -> NoReturn:
        """Refuse `copy`, `deepcopy` and `pickle`: a pool belongs to one process."""
        advice = "share it, or make one in each process and loop"
        raise TypeError(f"cannot copy or pickle a BctrlSession: {advice}")

    async def __aenter__(self) -> Self:
        self._sender.open_pool()
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        await self.close()

    @property
    def base_url(self) -> str:
        """The URL of the API, with the `/v1`."""
        return str(self._url)

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._sender.is_closed

    @property
    def stats(self) -> SessionStats:
        """The statistics of all calls so far."""
        return self._sender.stats

    async def close(self) -> None:
        """Close the session and its pool, unless that is borrowed; repeating is safe.

        Calls that wait fail with `BctrlConfigError`, calls in flight with
        `BctrlNetworkError`. Bulk stops end early. They are waited for until each target
        has its outcome, in the journal, too, except those that still deliver outcomes
        to your code, which may itself wait for `close`.

        Raises:
            BctrlConfigError: The session belongs to another loop that still runs.
        """
        await self._sender.close()
        if not self._sender.is_in_its_loop:
            return
        runs = list(self._open_runs)
        for run in runs:
            run.end()
        for run in runs:
            await run.wait_until_over()
        if runs:
            for _ in range(_TURNS_TO_LEAVE):
                await asyncio.sleep(0)

    async def stop_runtime(
        self,
        workspace_id: str | UUID,
        alias: str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - of an attempt, as in aiohttp.
        retry: RetryPolicy | None = None,
        headers: Mapping[str, str] | None = None,
        stopped_ok: bool = False,
    ) -> Runtime:
        """Stop a live runtime inside a workspace (contract: `runtimes-stop`).

        A stop is safe to repeat, and needs no idempotency key. If the server says that
        the runtime is not running, and an earlier attempt of this call may have stopped
        it, the call gets the runtime (`runtimes-get`) and returns it.

        Args:
            workspace_id: The workspace's id; 1 to 1,000 characters, sent unchanged.
            alias: The runtime's alias; 1 to 1,000 characters, sent unchanged.
            timeout: Seconds for one attempt, above 0; None is the session's.
            retry: The retry policy; None is the session's.
            headers: More headers, except those that the session sets.
            stopped_ok: Also get and return a runtime that was not running in the first
                place, instead of raising.

        Returns:
            The runtime as the server describes it. Its status may still be `active`:
            the stop was accepted and is not finished, or the runtime was started anew
            while the call got it.

        Raises:
            BctrlConfigError: An argument is invalid, or the session cannot be used: it
                is closed, belongs to another loop, was opened before a fork, or its
                pace is misconfigured.
            BctrlApiError: The server answered with an error status;
                `BctrlConflictError` with `already_stopped` if the runtime was not
                running, or could not be read after it was stopped: see `__cause__`.
            BctrlTimeoutError: The last attempt was not answered in time.
            BctrlResponseError: The answer cannot be parsed, or is a redirect.
            BctrlNetworkError: There was no answer.
        """
        workspace_id, alias = plain_texts(workspace_id, alias)
        observed: ObservedStop | None = None
        call: Call[Runtime] | None = None
        result: Runtime | Failure | None
        try:
            if self._observer is not None:
                observed = ObservedStop(self._observer, str(workspace_id), str(alias))
            path = STOP.path(self._url.raw_path, workspace_id, alias)
            headers = _optional_headers(headers)
            limit = self._time_limit(timeout)
            policy = self._policy(retry)
            _config.check_type(stopped_ok, bool, "stopped_ok", "a bool")
            http = self._sender.open_pool()
            history: History | None = None
            if not self._limiter.acquire_nowait(workspace_id):
                history = History(workspace=workspace_id)
                await self._limiter.acquire(policy.max_throttle_wait, history=history)
            # The `Call` is made after the wait, to save memory: 100,000 stops may wait
            # at once.
            retries = RetryState(
                policy, self._sender.quota, STOP.repeat, workspace=workspace_id
            )
            if history is not None:
                # The call keeps its place in the limiter.
                retries.continue_from(history)
            call = Call(
                STOP, workspace_id, alias, path, limit, retries=retries, headers=headers
            )
            observer = None if observed is None else observed.observer
            # `request` gives back the slot.
            result = await self._sender.request(call, http, observer)
            if type(result) is Failure:
                result = await self._get_stopped_or_raise(
                    call, result, observer, stopped_ok=stopped_ok
                )
        except BaseException as error:
            # A failure may hold the error of a key function, whose frames refer to this
            # frame: a reference cycle.
            result = None
            if isinstance(error, BctrlError):
                annotate(error, STOP.name, workspace_id, alias)
            if observed is not None:
                observed.fail(error, call)
            raise
        if observed is not None:
            observed.end(result, call)
        return result

    async def _get_stopped_or_raise(
        self,
        call: Call[Runtime],
        failure: Failure,
        observer: StopObserver | None,
        *,
        stopped_ok: bool,
    ) -> Runtime:
        """Get the runtime of a stop that found it stopped; raise any other failure."""
        # If in doubt, an earlier attempt of this call may have stopped it.
        if failure.kind is Kind.NOT_RUNNING and (stopped_ok or call.retries.in_doubt):
            headers = CIMultiDict(call.headers)
            # The idempotency key belongs to the stop, and this is another request.
            headers.popall(_IDEMPOTENCY_KEY, None)
            get = self._make_call(
                GET,
                call.limit,
                call.workspace_id,
                call.alias,
                policy=call.retries.policy,
                headers=headers,
            )
            try:
                return await self._sender.call(get, observer)
            except BctrlError as error:
                raise call.error(failure) from error
        try:
            raise call.error(failure)
        finally:
            # It may hold the error of a key function, whose frames refer to this frame:
            # a reference cycle.
            del failure

    async def get_runtime(
        self,
        workspace_id: str | UUID,
        alias: str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - of an attempt, as in aiohttp.
        retry: RetryPolicy | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Runtime:
        """Get a runtime of a workspace.

        Args:
            workspace_id: As for `stop_runtime`.
            alias: As for `stop_runtime`.
            timeout: As for `stop_runtime`.
            retry: As for `stop_runtime`.
            headers: As for `stop_runtime`.

        Returns:
            The runtime as the server describes it.

        Raises:
            BctrlError: As `stop_runtime` raises it; `may_have_stopped` is always False.
        """
        workspace_id, alias = plain_texts(workspace_id, alias)
        with observe_call(self._observer, GET, workspace_id, alias) as observer:
            return await self._read(
                GET, workspace_id, alias, observer, timeout, retry, headers
            )

    async def list_runtimes(
        self,
        workspace_id: str | UUID,
        *,
        on_unreadable: Callable[[BctrlResponseError], object] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - of an attempt, as in aiohttp.
        retry: RetryPolicy | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> list[Runtime]:
        """List all runtimes of a workspace.

        A runtime that cannot be parsed is an error, unless `on_unreadable` handles it:
        a runtime that is missing from a list may go on running.

        Args:
            workspace_id: As for `stop_runtime`.
            on_unreadable: Called with the error of each runtime that cannot be parsed;
                the others are then returned. The error's `alias` is set if the alias
                can be parsed.
            timeout: As for `stop_runtime`.
            retry: As for `stop_runtime`.
            headers: As for `stop_runtime`.

        Returns:
            The runtimes in the server's order.

        Raises:
            BctrlResponseError: The list cannot be parsed, is larger than 64 MiB or a
                page of a longer list, or a runtime in it cannot be parsed (with
                `on_unreadable`: more than 100 of them).
            BctrlError: As `stop_runtime` raises it; `may_have_stopped` is always False.
        """
        workspace_id = plain_text(workspace_id)
        if on_unreadable is not None and not callable(on_unreadable):
            raise _config.invalid_type(
                "on_unreadable", type(on_unreadable), "a function"
            )
        runtimes: list[Runtime] = []
        with observe_call(self._observer, LIST, workspace_id, None) as observer:
            for item in await self._read(
                LIST, workspace_id, None, observer, timeout, retry, headers
            ):
                if isinstance(item, Runtime):
                    runtimes.append(item)
                    continue
                annotate(item, LIST.name, workspace_id, item.alias)
                if on_unreadable is None:
                    raise item
                on_unreadable(item)
        return runtimes

    def stop_runtimes(
        self,
        targets: Targets,
        *,
        concurrency: int | None = None,
        deadline: float | None = None,
        on_outcome: OnOutcome | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        journal: Journal | str | os.PathLike[str] | None = None,
        verify: bool | float = True,
        missing_ok: bool = False,
    ) -> StopBatch:
        """Stop any number of runtimes, with one outcome for each and no exceptions.

            report = await session.stop_runtimes(targets)

            async with session.stop_runtimes(targets) as batch:
                async for outcome in batch:
                    ...

        Targets are read as fast as they are stopped; outcomes are delivered as they are
        known. The run ends early at the deadline, when the key is rejected (401), when
        the server answers nothing, when its Retry-After for all exceeds the patience,
        and when the journal cannot be written: `StopReport.ended_early` says why. The
        rest of an input with a length becomes `not_sent`; any other input is not read
        to its end.

        Args:
            targets: Any iterable or async iterable of pairs (workspace id, alias),
                `RuntimeRef`s or `Runtime`s. Any other item becomes an `invalid`
                outcome.
            concurrency: The most stops at once, from 1 to the session's
                `max_connections`, which is the default.
            deadline: Seconds after which the run is aborted, above 0; None sets no
                deadline. Callbacks are still waited for.
            on_outcome: A plain or async function, called with each outcome; async calls
                overlap. If it raises, the run is cancelled and raises the same error.
                After a cancellation it is not called; `report.failures` has the
                failures that it missed.
            timeout: Seconds for one attempt, above 0; None is the session's.
            retry: The retry policy; None is the session's.
            journal: A file to which each outcome is appended as a line of JSON, or a
                `Journal`, which its maker closes. The same call with the same file
                resumes the run, and skips each target whose last entry says that its
                runtime no longer runs. Use another file for runtimes that were started
                anew, and `Journal(path, max_age=…)` to reject an old one; if a file is
                older than a day, skipping is logged as a warning.
            verify: Poll each runtime whose stop is `unknown`, or `accepted` with a
                status that is not final, until it no longer runs or is `not_found`: at
                least once, and for two minutes after its stop was answered or given up,
                also in an outage. A number of seconds, above 0, replaces the two
                minutes, and bounds each request (if above 5); False polls none. Ten or
                more runtimes of a workspace are polled with its list
                (`list_runtimes`), others one by one (`get_runtime`), at first after
                0.5 s and later every 5 s, so that a list may come some seconds after
                the time is up. A throttled poll waits as long as the
                `patience`. `StopOutcome.running` is True if the last answer said so,
                and None if all polls failed. Polls have the lowest priority, and
                get a twentieth of the rate while stops wait. Once 100,000 runtimes are
                polled, no target is read until some have ended.
            missing_ok: Count a runtime that is `not_found` as no longer running. By
                default it is a failure, because every target of a mistyped workspace is
                `not_found`.

        Returns:
            The bulk stop: await it for its `StopReport`, or enter it and iterate. Both
            raise the error of the input or of `on_outcome`, once every target read has
            its outcome.

        Raises:
            BctrlConfigError: Here if an argument is invalid; when awaited or entered if
                the session cannot be used; when awaited or iterated over if the first
                item is of another type, such as a string, or the journal is in use
                (then it is a `journal.JournalInUseError`), damaged, foreign, too old,
                or of another version.
        """
        options = Options(
            concurrency=concurrency,
            deadline=deadline,
            on_outcome=on_outcome,
            timeout=timeout,
            retry=retry,
            journal=journal,
            verify=verify,
            missing_ok=missing_ok,
        )
        return StopBatch(self._make_run(Input(targets), options))

    def stop_workspace(
        self,
        workspace_id: str | UUID,
        *,
        where: Callable[[Runtime], object] | None = None,
        concurrency: int | None = None,
        deadline: float | None = None,
        on_outcome: OnOutcome | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        journal: Journal | str | os.PathLike[str] | None = None,
        verify: bool | float = True,
        missing_ok: bool = False,
    ) -> StopBatch:
        """Stop a workspace's runtimes that have not ended, or that `where` selects.

            report = await session.stop_workspace("ws-1")
            report = await session.stop_workspace(
                "ws-1", where=RuntimeFilter(older_than=7200)
            )

        The run lists the workspace, and stops the selected runtimes as `stop_runtimes`
        does. At the end it lists the workspace once more (with `verify`, unless it ends
        early), for a minute at most: runtimes that have started since are in
        `StopReport.started_since`, and are not stopped. If that list has a stopped
        runtime as running under the same id, or as unreadable, and then a GET as
        running, the report is not `ok`. A runtime has ended if it is `stopped` or
        `failed`; with any other status, even a status unknown to this version, it is
        stopped. A listed runtime that cannot be parsed becomes a `rejected` outcome,
        and so does a runtime of unreadable age that otherwise matches a `where` with
        `older_than`.

        Args:
            workspace_id: As for `stop_runtime`.
            where: A `RuntimeFilter`, or a plain function that is called with each
                runtime. None is `RuntimeFilter()`: runtimes that have not ended. A
                function may also select ended runtimes, which become `already_stopped`.
            concurrency: As for `stop_runtimes`.
            deadline: As for `stop_runtimes`; it includes the list.
            on_outcome: As for `stop_runtimes`.
            timeout: As for `stop_runtimes`, also for the list.
            retry: As for `stop_runtimes`, also for the list.
            journal: As for `stop_runtimes`, but the list decides what is sent, never
                the file: each entry that the list contradicts is corrected. A resumed
                run lists anew: its report has only the runtimes that have not ended.
            verify: As for `stop_runtimes`.
            missing_ok: As for `stop_runtimes`: accept runtimes that are gone since the
                list.

        Returns:
            The bulk stop, as from `stop_runtimes`. It also raises the error of
            `list_runtimes` or of `where`, when nothing was stopped. `where` is called
            for the last list, too: an error is then `StopReport.look_error`.

        Raises:
            BctrlConfigError: As from `stop_runtimes`, or for an invalid workspace id.
        """
        workspace_id = plain_text(workspace_id)
        # An invalid id raises here, not when the run lists the workspace.
        LIST.path(self._url.raw_path, workspace_id, None)
        if where is None:
            where = RuntimeFilter()
        # A class can be called, too: `RuntimeFilter` without its parentheses.
        if not callable(where) or isinstance(where, type):
            raise _config.invalid_type("where", type(where), WHERE)
        options = Options(
            concurrency=concurrency,
            deadline=deadline,
            on_outcome=on_outcome,
            timeout=timeout,
            retry=retry,
            journal=journal,
            verify=verify,
            missing_ok=missing_ok,
        )
        source = Listing(partial(self._select, workspace_id, where, options))
        return StopBatch(self._make_run(source, options))

    async def _select(
        self, workspace_id: str, where: Callable[[Runtime], object], options: Options
    ) -> Selection:
        """List a workspace, and select the runtimes to stop."""
        policy = self._policy(options.retry).for_bulk(options.deadline)
        unreadable: list[BctrlResponseError] = []
        runtimes = await self.list_runtimes(
            workspace_id,
            on_unreadable=unreadable.append,
            timeout=options.timeout,
            retry=policy,
        )
        # The selection is dated now that the list has arrived: what another run has
        # recorded before is older.
        selection = Selection(workspace_id, where)
        for start in range(0, len(runtimes), _SLICE):
            await asyncio.sleep(0)
            selection.add(runtimes[start : start + _SLICE])
        selection.add(unreadable)
        return selection.drop_replaced()

    def _make_run(self, source: Input, options: Options) -> Run:
        limit = self._time_limit(options.timeout)
        policy = self._policy(options.retry).for_bulk(options.deadline)
        concurrency = self._limiter.limit
        if options.concurrency is not None:
            concurrency = options.concurrency
        if concurrency > self._limiter.limit:
            raise BctrlConfigError(
                f"invalid concurrency {concurrency}: expected at most the session's "
                f"max_connections, {self._limiter.limit}",
                advice="Raise max_connections",
                argument="concurrency",
            )
        if source.length is not None:
            concurrency = min(concurrency, source.length)
        return Run(
            source,
            options,
            self._sender,
            BulkCalls(self._make_call, policy, limit, verify_for(options.verify)),
            # Even an empty input needs a worker, which reads its end.
            concurrency=max(concurrency, 1),
            base_url=self.base_url,
            observer=self._observer,
            open_runs=self._open_runs,
        )

    def _make_call(
        self,
        operation: Operation[_T],
        limit: aiohttp.ClientTimeout,
        workspace_id: str | UUID,
        alias: str | None,
        *,
        policy: RetryPolicy,
        priority: Priority = Priority.SINGLE,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> Call[_T]:
        path = operation.path(self._url.raw_path, workspace_id, alias)
        workspace = str(workspace_id)
        retries = RetryState(
            policy,
            self._sender.quota,
            operation.repeat,
            workspace=workspace,
            may_park=priority is Priority.BULK,
        )
        return Call(
            operation,
            workspace,
            alias,
            path,
            limit,
            retries=retries,
            headers=headers,
            first_priority=priority,
        )

    def _time_limit(self, timeout: float | None) -> aiohttp.ClientTimeout:
        limit = self._timeout
        if timeout is not None:
            limit = transport.time_limit(timeout)
        if _quick_failures.is_on:
            limit = transport.at_most(limit, _quick_failures.TIME_LIMIT)
        return limit

    def _policy(self, retry: RetryPolicy | None) -> RetryPolicy:
        if retry is None:
            return self._retry
        _config.check_type(retry, RetryPolicy, "retry", "a RetryPolicy")
        return retry

    async def _read(  # noqa: PLR0917 - every call has these.
        self,
        operation: Operation[_T],
        workspace_id: str,
        alias: str | None,
        observer: CallObserver | None,
        timeout: float | None,  # noqa: ASYNC109 - of each attempt.
        retry: RetryPolicy | None,
        headers: Mapping[str, str] | None,
    ) -> _T:
        """Make a call that stops nothing, within `observe_call`."""
        limit = self._time_limit(timeout)
        call = self._make_call(
            operation,
            limit,
            workspace_id,
            alias,
            policy=self._policy(retry),
            headers=_optional_headers(headers),
        )
        return await self._sender.call(call, observer)


def _key_origin(api_key: object) -> str:
    """Return where the key comes from, for the advice of an error."""
    if api_key is None:
        return "BCTRL_API_KEY"
    if callable(api_key):
        return "the api_key function"
    return "the argument api_key"


def _session_headers(headers: Mapping[str, str] | None) -> CIMultiDict[str]:
    agent = f"bctrl-async/{__version__}"
    all_headers = CIMultiDict({"Accept": "application/json", "User-Agent": agent})
    all_headers.update(_optional_headers(headers))
    if _IDEMPOTENCY_KEY in all_headers:
        raise BctrlConfigError(
            f"an {_IDEMPOTENCY_KEY} for all calls would make one call of them",
            advice="Pass it in headers= of a call",
            argument="headers",
        )
    return all_headers


def _optional_headers(headers: Mapping[str, str] | None) -> Mapping[str, str]:
    if headers is None:
        return _NO_HEADERS
    return checked_headers(headers)


def _check_borrowed(
    http: aiohttp.ClientSession,
    pool_options: Collection[object],
    *,
    is_loopback_only: bool,
) -> None:
    """Raise if a borrowed session may reveal the key, or options have no effect."""
    _config.check_type(http, aiohttp.ClientSession, "http", "an aiohttp.ClientSession")
    if http.trust_env and is_loopback_only:
        raise BctrlConfigError(
            "the aiohttp.ClientSession given as http= may send the API key "
            "unencrypted to a proxy of the environment",
            advice="Make it without trust_env, or pass allow_plaintext=True",
        )
    if any(pool_options):
        raise BctrlConfigError(
            "trust_env, proxy and ssl have no effect on a borrowed http=",
            advice="Set them on the aiohttp.ClientSession",
        )


def _lowest_limit(connector: aiohttp.BaseConnector | None, limit: int) -> int:
    """Return a limit of attempts in flight, or the limit of a connector if lower."""
    if connector is None:
        return limit
    # Beyond its limits, a request would wait in the connector while its timeout runs.
    # A limit of 0 means that there is no limit.
    limits = (limit, connector.limit, connector.limit_per_host)
    return min(number for number in limits if number)


def _make_limiter(limit: int, rate: float | Pace | None) -> Limiter:
    if rate is None or isinstance(rate, Pace):
        return Limiter(limit, AdaptiveRate(), rate)
    fixed = FixedRate(_config.per_second(rate, "rate"))
    return Limiter(limit, AdaptiveRate(), fixed)
