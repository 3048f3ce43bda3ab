"""The session manager: what users call, and what their arguments come to."""

from __future__ import annotations

import inspect
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Self, TypeVar
from uuid import UUID

import aiohttp
import msgspec
from multidict import CIMultiDict

from bctrl_async import _config
from bctrl_async._calls.call import Call, annotate
from bctrl_async._calls.observing import ObservedStop, observe_read
from bctrl_async._calls.retry import RetryPolicy
from bctrl_async._calls.sender import Sender
from bctrl_async._http import transport
from bctrl_async._http.operations import GET, LIST, STOP, Operation
from bctrl_async._http.pool import Pool
from bctrl_async._http.request import check_extra_headers, path_segment
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async._version import __version__
from bctrl_async.bulk import OnOutcome, StopBatch
from bctrl_async.bulk._breaker import CircuitBreaker
from bctrl_async.bulk._run import Run
from bctrl_async.bulk._targets import Input, Listing, Target, Targets
from bctrl_async.errors import (
    BctrlConfigError,
    BctrlError,
    BctrlResponseError,
)
from bctrl_async.filters import RuntimeFilter
from bctrl_async.journal import Journal
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.observer import Observer, ReadObserver
from bctrl_async.stats import SessionStats

_BULK_PATIENCE = 300.0
"""Seconds for which a bulk stop without a deadline bears a server that refuses or is silent."""
_NO_HEADERS: Mapping[str, str] = {}
_PLAIN_WHERE = "Pass a RuntimeFilter, or a plain function of a Runtime"

_T = TypeVar("_T")


class BctrlSession:
    """A session with the bctrl v1 workspaces API: one connection pool for any number of calls.

    It can be made anywhere, also where no event loop runs. The pool opens with the first call or
    `async with`, belongs to that loop, and closes with the session or, if nobody closes it, with
    the loop.

    Args:
        api_key: The key, or a function (plain or async) that is asked for it before each attempt.
            `BCTRL_API_KEY` when None.
        base_url: Where the API is, with or without `/v1`. `BCTRL_BASE_URL` when None, else
            `https://api.bctrl.ai`.
        timeout: Seconds that one attempt may take, above 0, counted from when it has its
            connection slot. A connection must stand after nine tenths of it. A function that
            gives the key may take as long again.
        max_connections: Attempts in flight at most, from 1; further calls wait their turn,
            first come, first served, without a limit of time.
        retry: When and how often to try again.
        rate: Attempts a second at most, above 0, evenly spaced; None is no such limit. Without it
            the session still slows down for as long as the server answers 429 or 503.
        http: An `aiohttp.ClientSession` to send through instead of a pool of its own. It is never
            closed here; its connector's limits bound the attempts in flight as well.
        trace_configs: `aiohttp.TraceConfig`s for the pool.
        trust_env: Whether the pool uses the proxies of the environment (`HTTPS_PROXY`, …).
        allow_plaintext: Whether the key may travel over plain http to another machine.
        observer: Who is told of every call and attempt, as `bctrl_async.otel.OpenTelemetry`.

    Raises:
        BctrlConfigError: There is no key, or an argument is of no use; the text names it.
    """

    def __init__(
        self,
        api_key: str | Callable[[], str | Awaitable[str]] | None = None,
        *,
        base_url: str | None = None,
        timeout: float = 60.0,
        max_connections: int = 100,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is immutable.
        rate: float | None = None,
        http: aiohttp.ClientSession | None = None,
        trace_configs: Iterable[aiohttp.TraceConfig] = (),
        trust_env: bool = False,
        allow_plaintext: bool = False,
        observer: Observer | None = None,
    ) -> None:
        if api_key is None:
            api_key = _config.api_key_from_environment()
        elif isinstance(api_key, str):
            api_key = _config.Secret(api_key)
        headers = CIMultiDict(
            {"Accept": "application/json", "User-Agent": f"bctrl-async/{__version__}"}
        )
        if not callable(api_key):
            headers["Authorization"] = _config.authorization(api_key)
        self._url = _config.base_url(base_url, allow_plaintext=allow_plaintext)
        self._workspaces = f"{self._url.raw_path}/workspaces"
        self._timeout = transport.time_limit(timeout)
        self._retry = _checked_policy(retry)
        limit = _config.count(max_connections, "max_connections")
        if rate is not None:
            rate = _config.per_second(rate, "rate")
        trace_configs = list(trace_configs)
        if http is not None:
            if not isinstance(http, aiohttp.ClientSession):
                raise BctrlConfigError(
                    f"http is a {type(http).__name__}", advice="Pass an aiohttp.ClientSession"
                )
            if self._url.scheme == "http" and http.trust_env and not allow_plaintext:
                raise BctrlConfigError(
                    "the aiohttp.ClientSession given as http= may send the API key unencrypted to "
                    "a proxy of the environment",
                    advice="Make it without trust_env, or pass allow_plaintext=True",
                )
            if trace_configs or trust_env:
                raise BctrlConfigError(
                    "trace_configs and trust_env have no effect on a borrowed http=",
                    advice="Set them on the aiohttp.ClientSession",
                )
            limit = _within_limits(limit, http)
        # A proxy of the environment is another machine: loopback traffic, which may go without
        # TLS, must not reach it.
        trust_env = trust_env and (self._url.scheme == "https" or allow_plaintext)

        def open_pool() -> aiohttp.ClientSession:
            return aiohttp.ClientSession(
                # The limiter is the bound: nothing ever waits in the connector's own queue.
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=transport.NO_CONTENT_TYPE,
                trace_configs=trace_configs,
                trust_env=trust_env,
            )

        self._limiter = Limiter(limit, AdaptiveRate(rate))
        self._sender = Sender(
            Pool(open_pool, http),
            self._limiter,
            self._url,
            headers,
            key_provider=api_key if callable(api_key) else None,
        )
        self._observer = _checked_observer(observer)

    def __repr__(self) -> str:
        if not hasattr(self, "_sender"):
            return "<BctrlSession that could not be made>"
        opened = "open" if self._sender.opened else "not opened yet"
        state = "closed" if self.closed else opened
        return f"<BctrlSession {str(self._url)!r} {state}>"

    async def __aenter__(self) -> Self:
        self._sender.open_pool()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def base_url(self) -> str:
        """Where the API is, with the `/v1`."""
        return str(self._url)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._sender.closed

    @property
    def stats(self) -> SessionStats:
        """What the session has done so far, single and bulk stops together."""
        return self._sender.stats

    async def close(self) -> None:
        """Close the pool, if it is the session's own; a second call does nothing.

        Calls that wait for their turn or for their next attempt fail with `BctrlConfigError`,
        those in flight with `BctrlNetworkError`.

        Raises:
            BctrlConfigError: The session belongs to another loop, which still runs.
        """
        await self._sender.close()

    async def stop_runtime(
        self,
        workspace_id: str | UUID,
        alias: str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - of each attempt, as in aiohttp.
        retry: RetryPolicy | None = None,
        idempotency_key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Runtime:
        """Stop a live runtime inside a workspace (contract: `runtimes-stop`).

        It is safe to call again: a stop converges.

        Args:
            workspace_id: The workspace's id; any text, which arrives exactly as it is given.
            alias: The runtime's alias; any text, likewise.
            timeout: Seconds for one attempt, above 0; the session's when None.
            retry: When and how often to try again; the session's policy when None.
            idempotency_key: Sent as `Idempotency-Key`, the same with each attempt.
            headers: Further headers; they cannot replace the key or what frames the request.

        Returns:
            The runtime as the server described it. Its status may still be `active`: accepted,
            not finished.

        Raises:
            BctrlConfigError: Bad arguments, or a session that cannot be used: closed, on another
                loop, or opened before a fork.
            BctrlApiError: The server answered with an error status; `BctrlConflictError` with
                `already_stopped` if nothing was running under the alias.
            BctrlTimeoutError: No answer in time, at the last attempt.
            BctrlResponseError: An answer that cannot be read, or a redirect.
            BctrlNetworkError: No answer.
        """
        observer: ObservedStop | None = None
        try:
            if self._observer is not None:
                observer = ObservedStop(self._observer, str(workspace_id), str(alias))
            path = self._stop_path(workspace_id, alias)
            extra = _extra_headers(headers, idempotency_key)
            limit = self._timeout if timeout is None else transport.time_limit(timeout)
            policy = self._retry if retry is None else _checked_policy(retry)
            http = self._sender.open_pool()
            if not self._limiter.acquire_nowait():
                await self._limiter.acquire(policy.max_throttle_wait)
        except BaseException as error:
            if isinstance(error, BctrlError):
                annotate(error, STOP.name, workspace_id, alias)
            if observer is not None:
                observer.end(error)
            raise
        # What an attempt needs is made only now: a hundred thousand calls may wait for their turn.
        call = Call(STOP, str(workspace_id), alias, path, extra, limit, policy)
        if observer is not None:
            return await observer.run(call, self._sender.attempt_loop(call, http))
        return await self._sender.attempt_loop(call, http)

    async def get_runtime(
        self,
        workspace_id: str | UUID,
        alias: str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - of each attempt, as in aiohttp.
        retry: RetryPolicy | None = None,
    ) -> Runtime:
        """Look at a runtime (contract errors.md: `runtimes-get`).

        It passes the same limiter as the stops, and is tried again by the same rules.

        Args:
            workspace_id: The workspace's id; any text, which arrives exactly as it is given.
            alias: The runtime's alias; any text, likewise.
            timeout: Seconds for one attempt, above 0; the session's when None.
            retry: When and how often to try again; the session's policy when None.

        Returns:
            The runtime as the server describes it.

        Raises:
            BctrlError: As `stop_runtime` raises it; `may_have_stopped` is always False.
        """
        path = partial(self._get_path, workspace_id, alias)
        with observe_read(self._observer, str(workspace_id), str(alias)) as observer:
            return await self._read(
                GET, workspace_id, alias, path, timeout=timeout, retry=retry, observer=observer
            )

    async def list_runtimes(
        self,
        workspace_id: str | UUID,
        *,
        on_unreadable: Callable[[BctrlResponseError], object] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - of each attempt, as in aiohttp.
        retry: RetryPolicy | None = None,
    ) -> list[Runtime]:
        """List all runtimes of a workspace (contract errors.md: `runtimes-list`).

        A list with a gap must not pass for a whole one, for what is missing may go on running: so
        a runtime that cannot be read is an error, unless `on_unreadable` takes note of it.

        Args:
            workspace_id: The workspace's id; any text, which arrives exactly as it is given.
            on_unreadable: A function that is called with the error of each runtime that cannot be
                read; `alias` is set if at least that could be. The others are then returned.
            timeout: Seconds for one attempt, above 0; the session's when None.
            retry: When and how often to try again; the session's policy when None.

        Returns:
            The runtimes in the server's order.

        Raises:
            BctrlResponseError: The list, or a runtime in it, cannot be read, or takes more than
                64 MiB.
            BctrlError: As `stop_runtime` raises it; `may_have_stopped` is always False.
        """
        runtimes: list[Runtime] = []
        with observe_read(self._observer, str(workspace_id), None) as observer:
            for item in await self._list(workspace_id, timeout, retry, observer):
                if isinstance(item, Runtime):
                    runtimes.append(item)
                elif on_unreadable is None:
                    raise item
                else:
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
        journal: str | os.PathLike[str] | None = None,
        verify: bool = False,
    ) -> StopBatch:
        """Stop any number of runtimes, and give each one its outcome; none raises.

            report = await session.stop_runtimes(targets)

            async with session.stop_runtimes(targets) as batch:
                async for outcome in batch:
                    ...

        Targets are read only as fast as they are worked off, and outcomes come as they are known.
        The run ends early when the key is refused (401), when the server answers nothing at all or
        asks to stay away for longer than the patience, when the journal cannot be written, and at
        the deadline: `StopReport.ended_early` says why.
        What is left of an input with a length becomes `not_sent`; another one is read no further.

        Args:
            targets: Any iterable or async iterable of `RuntimeRef`s or pairs (workspace id, alias).
                What is neither becomes a `rejected` outcome.
            concurrency: Stops under way at most, from 1; the session's `max_connections` when None,
                and never more.
            deadline: Seconds after which everything is cut off, above 0; None is no such limit.
                Callbacks are still waited for.
            on_outcome: A function, plain or async, that is called with each outcome. If it raises,
                the run is cut off and raises the same. It is not called any more once the run is
                cancelled; `report.failures` has all that it has not seen.
            timeout: Seconds for one attempt, above 0; the session's when None.
            retry: When and how often to try again; the session's policy when None.
            journal: A file to which each outcome is appended as a line of JSON. The same call with
                the same file resumes the run: what is settled is not sent again, so take another
                file for runtimes that have been started anew.
            verify: Whether to look at what was stopped (`get_runtime`) where the server has not yet
                said that it is: at what would be `unknown`, or `accepted` with a status that is not
                final. It is looked at again and again until it is `stopped`, gone (`not_found`), or
                `failed`, in which nothing runs any more: that is `accepted`, and the runtime of the
                outcome says so. If that is not so by the deadline, or without one within the
                policy's patience, the outcome stays what it was. Meanwhile others are stopped, as
                long as no more than a thousand are looked at. What a journal calls `accepted` is
                looked at as well. Looks come after everything else that waits for its turn.

        Returns:
            What to await for the `StopReport`, or to enter and iterate over. It then raises what
            the input or `on_outcome` raised, once every target that was read has its outcome.

        Raises:
            BctrlConfigError: Bad arguments, here; where it is awaited or entered, a session that
                cannot be used; where it is awaited or iterated over, a journal that is in use,
                foreign, or of another version.
        """
        return self._bulk(
            Input(targets),
            concurrency=concurrency,
            deadline=deadline,
            on_outcome=on_outcome,
            timeout=timeout,
            policy=self._patient(retry, deadline),
            journal=journal,
            verify=verify,
        )

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
        journal: str | os.PathLike[str] | None = None,
        verify: bool = False,
    ) -> StopBatch:
        """Stop the runtimes of a workspace, those that are active or any others.

            report = await session.stop_workspace("ws-1")
            report = await session.stop_workspace("ws-1", where=RuntimeFilter(older_than=7200))

        It lists them when it is run, and stops those that fit as `stop_runtimes` does; what is
        started later is not in the list. A runtime that the list has, but that cannot be read,
        becomes a `rejected` outcome: whether it fits is not known.

        Args:
            workspace_id: The workspace's id; any text, which arrives exactly as it is given.
            where: What is stopped: a `RuntimeFilter`, or a plain function that is called with each
                runtime. None is `RuntimeFilter()`, what is active. A function sees the others as
                well, which are `already_stopped`.
            concurrency: As for `stop_runtimes`.
            deadline: The same; the list is within it.
            on_outcome: The same.
            timeout: The same, for the list as well.
            retry: The same.
            journal: The same. A resumed run lists anew: its report has only what was still active.
            verify: The same.

        Returns:
            What `stop_runtimes` returns. Where it is awaited or iterated over it also raises what
            `list_runtimes` raised, or `where`; then nothing was stopped.

        Raises:
            BctrlConfigError: As for `stop_runtimes`, and a bad workspace id.
        """
        self._list_path(workspace_id)
        if where is None:
            where = RuntimeFilter()
        elif not callable(where):
            raise BctrlConfigError(f"where is a {type(where).__name__}", advice=_PLAIN_WHERE)
        policy = self._patient(retry, deadline)
        return self._bulk(
            Listing(partial(self._find, workspace_id, where, timeout, policy)),
            concurrency=concurrency,
            deadline=deadline,
            on_outcome=on_outcome,
            timeout=timeout,
            policy=policy,
            journal=journal,
            verify=verify,
        )

    async def _find(
        self,
        workspace_id: str | UUID,
        where: Callable[[Runtime], object],
        timeout: float | None,  # noqa: ASYNC109 - of each attempt.
        policy: RetryPolicy,
    ) -> list[Target | BctrlResponseError]:
        """List what is to be stopped."""
        with observe_read(self._observer, str(workspace_id), None) as observer:
            listed = await self._list(workspace_id, timeout, policy, observer)
        return [
            (workspace_id, item.alias) if isinstance(item, Runtime) else item
            for item in listed
            if not isinstance(item, Runtime) or _fits(item, where)
        ]

    def _patient(self, retry: RetryPolicy | None, deadline: float | None) -> RetryPolicy:
        """Return the policy of a bulk stop."""
        policy = self._retry if retry is None else _checked_policy(retry)
        if policy.patience is not None:
            return policy
        patience = _BULK_PATIENCE if deadline is None else _config.seconds(deadline, "deadline")
        return msgspec.structs.replace(policy, patience=patience)

    def _bulk(
        self,
        source: Input,
        *,
        concurrency: int | None,
        deadline: float | None,
        on_outcome: OnOutcome | None,
        timeout: float | None,
        policy: RetryPolicy,
        journal: str | os.PathLike[str] | None,
        verify: bool,
    ) -> StopBatch:
        limit = self._timeout if timeout is None else transport.time_limit(timeout)
        if deadline is not None:
            deadline = _config.seconds(deadline, "deadline")
        workers = self._limiter.limit
        if concurrency is not None:
            workers = min(workers, _config.count(concurrency, "concurrency"))
        if not isinstance(journal, str | os.PathLike | None):
            raise BctrlConfigError(
                f"journal is a {type(journal).__name__}", advice="Pass the path of a file"
            )
        if on_outcome is not None and not callable(on_outcome):
            raise BctrlConfigError(
                f"on_outcome is a {type(on_outcome).__name__}", advice="Pass a function"
            )
        if source.length is not None:
            workers = min(workers, source.length)

        breaker = CircuitBreaker(self._limiter, policy, deadline or _BULK_PATIENCE)

        def make_call(target: RuntimeRef) -> Call[Runtime]:
            path = self._stop_path(*target)
            return Call(STOP, *target, path, _NO_HEADERS, limit, policy)

        def make_poll(target: RuntimeRef) -> Call[Runtime]:
            path = self._get_path(*target)
            call = Call(GET, *target, path, _NO_HEADERS, limit, policy)
            call.is_poll = True
            return call

        run = Run(
            source,
            make_call=make_call,
            request=self._sender.request,
            limiter=self._limiter,
            breaker=breaker,
            concurrency=max(workers, 1),
            deadline=deadline,
            make_poll=make_poll if verify else None,
        )
        return StopBatch(
            source,
            run,
            check=self._sender.open_pool,
            is_throttled=lambda: self._limiter.is_throttled,
            open_journal=None if journal is None else partial(Journal, journal, self.base_url),
            on_outcome=on_outcome,
            observer=self._observer,
        )

    async def _list(
        self,
        workspace_id: str | UUID,
        timeout: float | None,  # noqa: ASYNC109 - of each attempt.
        retry: RetryPolicy | None,
        observer: ReadObserver | None,
    ) -> list[Runtime | BctrlResponseError]:
        path = partial(self._list_path, workspace_id)
        listed = await self._read(
            LIST, workspace_id, None, path, timeout=timeout, retry=retry, observer=observer
        )
        for item in listed:
            if isinstance(item, BctrlResponseError):
                annotate(item, LIST.name, workspace_id, item.alias)
                item.may_have_stopped = False
        return listed

    async def _read(
        self,
        operation: Operation[_T],
        workspace_id: str | UUID,
        alias: str | None,
        make_path: Callable[[], str],
        *,
        timeout: float | None,  # noqa: ASYNC109 - of each attempt.
        retry: RetryPolicy | None,
        observer: ReadObserver | None,
    ) -> _T:
        try:
            path = make_path()
            limit = self._timeout if timeout is None else transport.time_limit(timeout)
            policy = self._retry if retry is None else _checked_policy(retry)
        except BctrlError as error:
            annotate(error, operation.name, workspace_id, alias)
            raise
        call = Call(operation, str(workspace_id), alias, path, _NO_HEADERS, limit, policy)
        call.observer = observer
        return await self._sender.request(call)

    def _list_path(self, workspace_id: str | UUID) -> str:
        workspace = path_segment(workspace_id, "workspace id")
        return f"{self._workspaces}/{workspace}/runtimes"

    def _get_path(self, workspace_id: str | UUID, alias: str) -> str:
        return f"{self._list_path(workspace_id)}/{path_segment(alias, 'alias')}"

    def _stop_path(self, workspace_id: str | UUID, alias: str) -> str:
        return f"{self._get_path(workspace_id, alias)}/stop"


def _fits(runtime: Runtime, where: Callable[[Runtime], object]) -> bool:
    answer = where(runtime)
    if inspect.isawaitable(answer):
        # It would be as good as true, and everything be stopped.
        if inspect.iscoroutine(answer):
            answer.close()
        raise BctrlConfigError("where must be awaited", advice=_PLAIN_WHERE)
    return bool(answer)


def _checked_policy(retry: RetryPolicy) -> RetryPolicy:
    if not isinstance(retry, RetryPolicy):
        raise BctrlConfigError(f"retry is {retry!r}", advice="Pass a RetryPolicy")
    return retry


def _checked_observer(observer: Observer | None) -> Observer | None:
    if not isinstance(observer, Observer | None):
        raise BctrlConfigError(
            f"observer is a {type(observer).__name__}", advice="Pass a bctrl_async.Observer"
        )
    return observer


def _within_limits(limit: int, http: aiohttp.ClientSession) -> int:
    # Beyond the connector's own limits a request would wait in its queue, on the attempt's time.
    connector = http.connector
    if connector is None:
        return limit
    return min(limit, connector.limit or limit, connector.limit_per_host or limit)


def _extra_headers(
    headers: Mapping[str, str] | None, idempotency_key: str | None
) -> Mapping[str, str]:
    if headers is None and idempotency_key is None:
        return _NO_HEADERS
    if not isinstance(headers, Mapping | None):
        raise BctrlConfigError(
            f"headers is a {type(headers).__name__}", advice="Pass a mapping of names to values"
        )
    extra = dict(headers or {})
    if idempotency_key is not None:
        if any(name.lower() == "idempotency-key" for name in extra):
            raise BctrlConfigError(
                "Idempotency-Key is given twice", advice="Leave it out of headers="
            )
        extra["Idempotency-Key"] = idempotency_key
    check_extra_headers(extra)
    return extra
