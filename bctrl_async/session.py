"""The session manager: what users call, from arguments to the last attempt."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Self
from uuid import UUID

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from bctrl_async import _config, _protocol, _transport
from bctrl_async._admission import Gate
from bctrl_async._pool import Pool
from bctrl_async._retry import Retries, RetryPolicy
from bctrl_async._version import __version__
from bctrl_async.errors import (
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlTimeoutError,
    session_closed,
)
from bctrl_async.models import Runtime

_NO_HEADERS: Mapping[str, str] = {}


class BctrlSession:
    """A session with the bctrl v1 workspaces API: one connection pool for any number of stops.

    It can be made anywhere, also where no event loop runs. The pool opens with the first call or
    `async with`, belongs to that loop, and closes with the session or, if nobody closes it, with
    the loop.

    Args:
        api_key: The key, or a function (plain or async) that is asked for it before each attempt.
            `BCTRL_API_KEY` when None.
        base_url: Where the API is, with or without `/v1`. `BCTRL_BASE_URL` when None, else
            `https://api.bctrl.ai`.
        timeout: Seconds that one attempt may take, above 0, counted from when it has its
            connection slot. A connection must stand after nine tenths of it.
        max_connections: Attempts in flight at most, from 1; further calls wait their turn,
            first come, first served, without a limit of time.
        retry: When and how often to try again.
        http: An `aiohttp.ClientSession` to send through instead of a pool of its own. It is never
            closed here; its connector's limits bound the attempts in flight as well.
        trace_configs: `aiohttp.TraceConfig`s for the pool.
        trust_env: Whether the pool uses the proxies of the environment (`HTTPS_PROXY`, …).
        allow_plaintext: Whether the key may travel over plain http to another machine.

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
        http: aiohttp.ClientSession | None = None,
        trace_configs: Iterable[aiohttp.TraceConfig] = (),
        trust_env: bool = False,
        allow_plaintext: bool = False,
    ) -> None:
        if api_key is None:
            api_key = _config.api_key_from_environment()
        elif isinstance(api_key, str):
            api_key = _config.Secret(api_key)
        self._ask_key = api_key if callable(api_key) else None
        self._headers = CIMultiDict(
            {"Accept": "application/json", "User-Agent": f"bctrl-async/{__version__}"}
        )
        if not callable(api_key):
            self._headers["Authorization"] = _config.authorization(api_key)
        self._url = _config.base_url(base_url, allow_plaintext=allow_plaintext)
        self._workspaces = f"{self._url.raw_path}/workspaces"
        self._timeout = _transport.time_limit(timeout)
        self._retry = _checked_policy(retry)
        limit = _config.count(max_connections, "max_connections")
        trace_configs = list(trace_configs)
        if http is not None:
            if trace_configs or trust_env:
                raise BctrlConfigError(
                    "trace_configs and trust_env have no effect on a borrowed http=",
                    cure="Set them on the aiohttp.ClientSession",
                )
            limit = _within_limits(limit, http)
        # A proxy of the environment is another machine: loopback traffic, which may go without
        # TLS, must not reach it.
        trust_env = trust_env and (self._url.scheme == "https" or allow_plaintext)

        def open_pool() -> aiohttp.ClientSession:
            return aiohttp.ClientSession(
                # The gate is the bound: nothing ever waits in the connector's own queue.
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=_transport.NO_CONTENT_TYPE,
                trace_configs=trace_configs,
                trust_env=trust_env,
            )

        self._pool = Pool(open_pool, http)
        self._gate = Gate(limit)
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._pool.opened else "not opened yet"
        return f"<BctrlSession {str(self._url)!r} {state}>"

    async def __aenter__(self) -> Self:
        self._open_pool()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    async def close(self) -> None:
        """Close the pool, if it is the session's own; a second call does nothing.

        Calls that wait for their turn or for their next attempt fail with `BctrlConfigError`,
        those in flight with `BctrlNetworkError`.

        Raises:
            BctrlConfigError: The session belongs to another loop, which still runs.
        """
        if self._closed:
            return
        if not self._pool.gone:
            self._pool.check_loop()
            self._gate.close()
        self._closed = True
        await self._pool.close()

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
        attempts = 0
        retries: Retries | None = None
        ended: Runtime | BctrlError | None = None
        try:
            path = (
                f"{self._workspaces}/{_protocol.path_segment(workspace_id, 'workspace id')}"
                f"/runtimes/{_protocol.path_segment(alias, 'alias')}/stop"
            )
            extra = _extra_headers(headers, idempotency_key)
            limit = self._timeout if timeout is None else _transport.time_limit(timeout)
            policy = self._retry if retry is None else _checked_policy(retry)
            while True:
                http = self._open_pool()
                if not self._gate.enter_nowait():
                    await self._gate.enter()
                attempts += 1
                try:
                    ended = await self._attempt(http, path, extra, limit)
                finally:
                    self._gate.leave()
                if isinstance(ended, Runtime):
                    return ended
                ended = self._explained(ended)
                if retries is None:
                    retries = Retries(policy)
                delay = retries.delay(ended, asyncio.get_running_loop().time())
                if delay is None or self._closed:
                    raise ended
                await self._gate.pause(delay)
        except BctrlError as error:
            error.workspace_id = str(workspace_id)
            error.alias = str(alias)
            error.attempts = attempts
            if retries is not None:
                retries.account(error)
            raise
        finally:
            # A traceback refers to this frame: an error kept in it would be a reference cycle.
            ended = retries = None

    def _open_pool(self) -> aiohttp.ClientSession:
        if self._closed:
            raise session_closed()
        return self._pool.get()

    def _attempt(
        self,
        http: aiohttp.ClientSession,
        path: str,
        extra: Mapping[str, str],
        limit: aiohttp.ClientTimeout,
    ) -> Awaitable[Runtime | BctrlError]:
        # A failed attempt is returned, not raised: a traceback would show the variables of the
        # frames below, which may hold what the server sent back of the key.
        url = self._url.with_path(path, encoded=True)
        if extra or self._ask_key is not None:
            return self._attempt_with(extra, http, url, limit)
        return _transport.post(http, url, headers=self._headers, limit=limit)

    async def _attempt_with(
        self,
        extra: Mapping[str, str],
        http: aiohttp.ClientSession,
        url: URL,
        limit: aiohttp.ClientTimeout,
    ) -> Runtime | BctrlError:
        headers = self._headers.copy()
        headers.update(extra)
        if self._ask_key is not None:
            try:
                headers["Authorization"] = await _ask(self._ask_key, limit)
            except BctrlError as error:
                return error
        return await _transport.post(http, url, headers=headers, limit=limit)

    def _explained(self, ended: BctrlError) -> BctrlError:
        """Name the reason, where it is that the session was closed under an attempt."""
        broke_off = isinstance(ended, BctrlNetworkError) and ended.status is None
        if not (self._closed and broke_off):
            return ended
        closed = BctrlNetworkError(
            "the session was closed while the stop was in flight",
            cure="Close the session after its calls have ended",
            may_have_stopped=True,
        )
        closed.__cause__ = ended
        return closed


async def _ask(
    ask: Callable[[], str | Awaitable[str]], limit: aiohttp.ClientTimeout
) -> _config.Secret:
    try:
        async with asyncio.timeout(limit.total):
            key = ask()
            if inspect.isawaitable(key):
                key = await key
            key = _config.Secret(key) if isinstance(key, str) else key
    except TimeoutError as error:
        raise BctrlTimeoutError(
            f"the api_key function gave no key within {limit.total:g} s"
        ) from error
    except Exception as error:
        # Its text is left to the cause: it may hold what the function was working with.
        raise BctrlConfigError(
            f"the api_key function raised {type(error).__name__}", cure="See the error's cause"
        ) from error
    return _config.authorization(key)


def _checked_policy(retry: RetryPolicy) -> RetryPolicy:
    if not isinstance(retry, RetryPolicy):
        raise BctrlConfigError(f"retry is {retry!r}", cure="Pass a RetryPolicy")
    return retry


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
    extra = dict(headers or {})
    if idempotency_key is not None:
        if any(name.lower() == "idempotency-key" for name in extra):
            raise BctrlConfigError(
                "Idempotency-Key is given twice", cure="Leave it out of headers="
            )
        extra["Idempotency-Key"] = idempotency_key
    _protocol.check_extra_headers(extra)
    return extra
