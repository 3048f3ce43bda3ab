"""Many stops through one session, for the command, as long as the session has no bulk stop."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

import aiohttp

from bctrl_async import (
    BctrlError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    RuntimeRef,
    StopOutcome,
)
from bctrl_async.outcomes import result_of


async def stop_all(
    targets: Sequence[RuntimeRef],
    report: Callable[[StopOutcome], None],
    *,
    max_connections: int,
    api_key: str | None = None,
    base_url: str | None = None,
    timeout: float = 60.0,  # noqa: ASYNC109 - of each attempt, as in the session.
    retry: RetryPolicy | None = None,
) -> list[StopOutcome]:
    """Stop them concurrently, and report the outcome of each as it is known.

    Returns:
        The outcomes of those that were cut short, if it was cancelled: each target's outcome is
        either here or was reported.

    Raises:
        BctrlConfigError: The session cannot be made.
    """
    pending = enumerate(targets)
    cut_short: list[StopOutcome] = []
    begun: Counter[object] = Counter()

    async def count_attempt(*_: object) -> None:
        begun[asyncio.current_task()] += 1

    async def work(session: BctrlSession) -> None:
        me = asyncio.current_task()
        for index, target in pending:
            begun[me] = 0
            since = time.monotonic()
            try:
                ended: Runtime | BctrlError = await session.stop_runtime(*target)
            except BctrlError as error:
                ended = error
            except asyncio.CancelledError:
                elapsed = time.monotonic() - since
                cut_short.append(_interrupted(index, target, begun[me], elapsed))
                raise
            report(_outcome(index, target, ended, begun[me], time.monotonic() - since))

    counter = aiohttp.TraceConfig()
    counter.on_request_start.append(count_attempt)
    try:
        async with (
            BctrlSession(
                api_key,
                base_url=base_url,
                timeout=timeout,
                max_connections=max_connections,
                retry=retry or RetryPolicy(),
                trace_configs=[counter],
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(max_connections, len(targets))):
                group.create_task(work(session))
    except asyncio.CancelledError:
        cut_short.extend(_interrupted(index, target, 0, 0.0) for index, target in pending)
    return sorted(cut_short, key=lambda outcome: outcome.index)


def _outcome(
    index: int, target: RuntimeRef, ended: Runtime | BctrlError, attempts: int, elapsed: float
) -> StopOutcome:
    return StopOutcome(
        index=index,
        target=target,
        result=result_of(ended),
        runtime=ended if isinstance(ended, Runtime) else None,
        error=ended if isinstance(ended, BctrlError) else None,
        attempts=attempts,
        elapsed=elapsed,
    )


def _interrupted(index: int, target: RuntimeRef, attempts: int, elapsed: float) -> StopOutcome:
    error = BctrlError(
        "interrupted before an answer" if attempts else "interrupted before it was sent",
        cure="Run the command again: a stop is safe to repeat",
        workspace_id=target.workspace_id,
        alias=target.alias,
        attempts=attempts,
        may_have_stopped=attempts > 0,
    )
    return _outcome(index, target, error, attempts, elapsed)
