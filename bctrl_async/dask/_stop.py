"""The bulk stop on a cluster, as users call it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from functools import partial

from bctrl_async import _config
from bctrl_async._calls.retry import RetryPolicy
from bctrl_async._http import transport
from bctrl_async.bulk import OnOutcome, StopBatch
from bctrl_async.bulk._targets import Input, Targets
from bctrl_async.bulk._verify import verify_for
from bctrl_async.dask._distributed import Client, Cluster, pickled
from bctrl_async.dask._messages import Recipe
from bctrl_async.dask._run import ClusterRun
from bctrl_async.errors import BctrlConfigError
from bctrl_async.journal import Journal
from bctrl_async.pace import Pace
from bctrl_async.session import BctrlSession

_CHUNK_SIZE = 1_000
_SHORTEST_KEY = 8
_NO_KEY = (
    "the key would travel through the scheduler of dask and be kept there, and in the memory and "
    "the logs of every worker"
)


def stop_runtimes(
    client: Client,
    targets: Targets,
    *,
    session: Callable[..., BctrlSession] = BctrlSession,
    base_url: str | None = None,
    pace: Pace | None = None,
    chunk_size: int = _CHUNK_SIZE,
    concurrency: int | None = None,
    deadline: float | None = None,
    on_outcome: OnOutcome | None = None,
    timeout: float | None = None,
    retry: RetryPolicy | None = None,
    journal: str | os.PathLike[str] | None = None,
    journal_max_age: float | None = None,
    verify: bool | float = True,
    missing_ok: bool = False,
) -> StopBatch:
    """Stop any number of runtimes on a cluster, with one outcome for each.

        async with Client("tcp://scheduler:8786", asynchronous=True) as client:
            report = await stop_runtimes(client, targets, journal="night.jsonl")

    It is `BctrlSession.stop_runtimes` with other sessions: what is not said here is as it is there.
    Targets are read here, and handed to the workers in chunks, only as far ahead as these need.
    Each outcome is recorded here once, the first settled one. The chunk of a worker that dies is
    repeated on another one; a target that it had stopped already ends as `already_stopped`. If all
    workers die that take a chunk, its targets without a settled outcome become `unknown`.

    The run ends early as in one process: the first 401 of any worker ends it for all. It also ends
    early if a worker cannot make its session, and if the scheduler is lost: all that was handed out
    and has no outcome is `unknown` then. While there are no workers it waits for some.

    Args:
        client: A running client of dask.distributed, made with `asynchronous=True`.
        targets: As for `BctrlSession.stop_runtimes`.
        session: A function that makes the session of each worker, called there without arguments,
            or with `pace` if it is given. By default `BctrlSession`, which reads `BCTRL_API_KEY` in
            the environment of the worker. It is pickled, so it must not contain the key.
        base_url: The URL of the API, which all workers must have as well. None reads
            `BCTRL_BASE_URL` here, and else is `https://api.bctrl.ai`.
        pace: A rate that all workers share, for their sessions.
        chunk_size: The most targets of a chunk, from 1. A worker that dies costs that many repeated
            requests; each chunk costs the scheduler about a millisecond.
        concurrency: The most stops at once of a chunk, from 1 to the `max_connections` of the
            session, which is the default. A worker begins a chunk once it has begun all targets of
            the one before.
        deadline: As for `BctrlSession.stop_runtimes`. Waiting for workers counts.
        on_outcome: As for `BctrlSession.stop_runtimes`, called here.
        timeout: As for `BctrlSession.stop_runtimes`.
        retry: As for `BctrlSession.stop_runtimes`.
        journal: As for `BctrlSession.stop_runtimes`; a file here. Targets that have stopped are
            not handed out. The same file can also be resumed in one process.
        journal_max_age: As for `BctrlSession.stop_runtimes`.
        verify: As for `BctrlSession.stop_runtimes`.
        missing_ok: As for `BctrlSession.stop_runtimes`.

    Returns:
        The bulk stop: await it for its `StopReport`, or enter it and iterate. Its `in_flight` is
        the number of targets that are handed out; `polling` and `retry_after` are 0, `retrying` is
        empty, and `is_throttled` and `is_unanswered` are False. The `elapsed` of an outcome counts
        from the time at which its worker read the target.

    Raises:
        BctrlConfigError: Here if an argument is invalid; when awaited or entered if the client does
            not run in this event loop; when awaited or iterated over if the journal cannot be used.
    """
    if not isinstance(client, Client):
        raise _config.invalid_type("client", client, "a dask.distributed.Client")
    _check_session(session)
    server = str(_config.base_url(base_url, allow_plaintext=True))
    _config.check_type(pace, Pace | None, "pace", "a bctrl_async.pace.Pace")
    if concurrency is not None:
        _config.count(concurrency, "concurrency")
    if timeout is not None:
        transport.time_limit(timeout)
    if deadline is not None:
        deadline = _config.seconds(deadline, "deadline")
    if journal_max_age is not None:
        journal_max_age = _config.seconds(journal_max_age, "journal_max_age")
    _config.check_type(retry, RetryPolicy | None, "retry", "a RetryPolicy")
    _config.check_type(journal, str | os.PathLike | None, "journal", "the path of a file")
    verify_for(verify)
    _config.check_flags(missing_ok=missing_ok)
    if on_outcome is not None and not callable(on_outcome):
        raise _config.invalid_type("on_outcome", on_outcome, "a function")
    recipe = Recipe(
        make_session=session,
        base_url=server,
        pace=pace,
        concurrency=concurrency,
        timeout=timeout,
        retry=retry,
        verify=verify,
    )
    source = Input(targets)
    run = ClusterRun(
        source,
        Cluster(client, f"bctrl-async-{uuid.uuid4().hex}"),
        _pickled(recipe),
        chunk_size=_config.count(chunk_size, "chunk_size"),
        deadline=deadline,
        missing_ok=missing_ok,
        open_journal=None
        if journal is None
        else partial(Journal, journal, server, journal_max_age),
    )
    return StopBatch(run, on_outcome)


def _check_session(session: object) -> None:
    if isinstance(session, str | BctrlSession) or not callable(session):
        raise _config.invalid_type(
            "session", session, "a function that makes the session of a worker"
        )
    if isinstance(session, partial) and (
        any(isinstance(value, str) for value in session.args)
        or isinstance(session.keywords.get("api_key"), str)
    ):
        raise _key_is_sent()


def _pickled(recipe: Recipe) -> bytes:
    try:
        data = pickled(recipe)
    except Exception as error:
        raise BctrlConfigError(
            f"session= or pace= cannot be pickled: {error}",
            advice="Define the function at the top level of a module that the workers have",
            argument="session",
        ) from error
    key = os.environ.get("BCTRL_API_KEY", "")
    # A short one, of an emulator, may be part of a name.
    if len(key) >= _SHORTEST_KEY and key.encode() in data:
        raise _key_is_sent()
    return data


def _key_is_sent() -> BctrlConfigError:
    return BctrlConfigError(
        f"session= contains the API key: {_NO_KEY}",
        advice="Set BCTRL_API_KEY in the environment of the workers, or let the function fetch it",
        argument="session",
    )
