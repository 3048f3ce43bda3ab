# By `python docs/reference/names.py`. The docstrings in its files say more.

# Types in signatures; bctrl_async.bulk has OnOutcome and Targets.
Target = RuntimeRef | Runtime | tuple[str | UUID, str]
Targets = Iterable[Target] | AsyncIterable[Target]
OnOutcome = Callable[[StopOutcome], Awaitable[object] | object]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]
PlainLifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
class _OpenEnum(StrEnum):
    """A `StrEnum` that accepts unknown values as comparable and picklable members."""
class _Client(Protocol):
    """An asyncio client of redis-py or valkey-py, also for a cluster."""

# bctrl_async.BctrlSession, in bctrl_async/session.py
class BctrlSession:
    """A session with the bctrl v1 API: one connection pool for any number of calls."""
    def __init__(
        self,
        api_key: str | Callable[[], str | Awaitable[str]] | None = None,  # The key, or a plain or async function that is called for it before each attempt.
        *,
        base_url: str | None = None,  # The URL of the API, with or without `/v1`.
        timeout: float = 60.0,  # Seconds for one attempt, above 0, once `max_connections` and `rate` allow it.
        max_connections: int = 100,  # The most attempts in flight, from 1.
        retry: RetryPolicy = RetryPolicy(),  # The retry policy.
        rate: float | Pace | None = None,  # The most attempts a second, above 0, evenly spaced, or a rate that this session shares with sessions of other processes: a `bctrl_async.pace.FilePace` or a `bctrl_async.redis.RedisPace`.
        http: aiohttp.ClientSession | None = None,  # An `aiohttp.ClientSession` to send through, instead of a pool of the session's own.
        trust_env: bool = False,  # Use the proxies of the environment (`HTTPS_PROXY`, …).
        proxy: str | None = None,  # The URL of a proxy for all requests of the pool, such as `http://user:password@proxy.example.com:3128`; it takes precedence over the proxies of the environment.
        ssl: SSLContext | None = None,  # The TLS context of the pool, for a private CA or a client certificate; None uses `ssl.create_default_context()`.
        allow_plaintext: bool = False,  # Allow sending the key over plain http to another machine.
        observer: Observer | None = None,  # The observer of all calls, such as `bctrl_async.otel.OpenTelemetry`.
        headers: Mapping[str, str] | None = None,  # More headers for every request, except those that the session sets.
        check_answers: bool = True,  # Accept an answer only if it has the requested alias, or id, and the requested workspace if that is a UUID.
    ) -> None:
        ...
    async def __aenter__(self) -> Self:
        ...
    @property
    def base_url(self) -> str:
        """The URL of the API, with the `/v1`."""
    @property
    def closed(self) -> bool:
        """True once `close` was called."""
    @property
    def stats(self) -> SessionStats:
        """The statistics of all calls so far."""
    async def close(self) -> None:
        """Close the session and its pool, unless that is borrowed; repeating is safe."""
    async def stop_runtime(
        self,
        workspace_id: str | UUID,  # The workspace's id; 1 to 1,000 characters, sent unchanged.
        alias: str,  # The runtime's alias; 1 to 1,000 characters, sent unchanged.
        *,
        timeout: float | None = None,  # Seconds for one attempt, above 0; None is the session's.
        retry: RetryPolicy | None = None,  # The retry policy; None is the session's.
        headers: Mapping[str, str] | None = None,  # More headers, except those that the session sets.
        stopped_ok: bool = False,  # Also get and return a runtime that was not running in the first place, instead of raising.
    ) -> Runtime:
        """Stop a live runtime inside a workspace (contract: `runtimes-stop`)."""
    async def get_runtime(
        self,
        workspace_id: str | UUID,  # As for `stop_runtime`.
        alias: str,  # As for `stop_runtime`.
        *,
        timeout: float | None = None,  # As for `stop_runtime`.
        retry: RetryPolicy | None = None,  # As for `stop_runtime`.
        headers: Mapping[str, str] | None = None,  # As for `stop_runtime`.
    ) -> Runtime:
        """Get a runtime of a workspace."""
    async def list_runtimes(
        self,
        workspace_id: str | UUID,  # As for `stop_runtime`.
        *,
        on_unreadable: Callable[[BctrlResponseError], object] | None = None,  # Called with the error of each runtime that cannot be parsed; the others are then returned.
        timeout: float | None = None,  # As for `stop_runtime`.
        retry: RetryPolicy | None = None,  # As for `stop_runtime`.
        headers: Mapping[str, str] | None = None,  # As for `stop_runtime`.
    ) -> list[Runtime]:
        """List all runtimes of a workspace."""
    def stop_runtimes(
        self,
        targets: Targets,  # Any iterable or async iterable of pairs (workspace id, alias), `RuntimeRef`s or `Runtime`s.
        *,
        concurrency: int | None = None,  # The most stops at once, from 1 to the session's `max_connections`, which is the default.
        deadline: float | None = None,  # Seconds after which the run is aborted, above 0; None sets no deadline.
        on_outcome: OnOutcome | None = None,  # A plain or async function, called with each outcome; async calls overlap.
        timeout: float | None = None,  # Seconds for one attempt, above 0; None is the session's.
        retry: RetryPolicy | None = None,  # The retry policy; None is the session's.
        journal: Journal | str | os.PathLike[str] | None = None,  # A file to which each outcome is appended as a line of JSON, or a `Journal`, which its maker closes.
        verify: bool | float = True,  # Poll each runtime whose stop is `unknown`, or `accepted` with a status that is not final, until it no longer runs or is `not_found`: at least once, and for two minutes after its stop was answered or given up, also in an outage.
        missing_ok: bool = False,  # Count a runtime that is `not_found` as no longer running.
    ) -> StopBatch:
        """Stop any number of runtimes, with one outcome for each and no exceptions."""
    def stop_workspace(
        self,
        workspace_id: str | UUID,  # As for `stop_runtime`.
        *,
        where: Callable[[Runtime], object] | None = None,  # A `RuntimeFilter`, or a plain function that is called with each runtime.
        concurrency: int | None = None,  # As for `stop_runtimes`.
        deadline: float | None = None,  # As for `stop_runtimes`; it includes the list.
        on_outcome: OnOutcome | None = None,  # As for `stop_runtimes`.
        timeout: float | None = None,  # As for `stop_runtimes`, also for the list.
        retry: RetryPolicy | None = None,  # As for `stop_runtimes`, also for the list.
        journal: Journal | str | os.PathLike[str] | None = None,  # As for `stop_runtimes`, but the list decides what is sent, never the file: each entry that the list contradicts is corrected.
        verify: bool | float = True,  # As for `stop_runtimes`.
        missing_ok: bool = False,  # As for `stop_runtimes`: accept runtimes that are gone since the list.
    ) -> StopBatch:
        """Stop a workspace's runtimes that have not ended, or that `where` selects."""

# bctrl_async.SessionStats, in bctrl_async/stats.py
class SessionStats(msgspec.Struct):
    """A snapshot of the counters of a session."""
    attempts: int = 0
    """Attempts started."""
    retries: int = 0
    """Attempts that were not the first of their call."""
    succeeded: int = 0
    """Attempts answered with a success status and a valid body."""
    failed: dict[str, int] = ...
    """Failed attempts by HTTP status (`"429"`), or by error class (`"BctrlTimeoutError"`) if there was no usable answer."""
    cancelled: int = 0
    """Attempts whose call was cancelled, so that no answer was waited for."""
    in_flight: int = 0
    """Attempts in flight."""
    waiting: int = 0
    """Calls that wait for the session's limits or for their next attempt; one more for each bulk stop while its next poll is not due yet."""
    @property
    def throttled(self) -> int:
        """The number of attempts that were answered with 429 or 503."""

# bctrl_async.StopBatch, in bctrl_async/bulk/_batch.py
class StopBatch(Coroutine[object, object, StopReport]):
    """A bulk stop, made by `BctrlSession.stop_runtimes`; it runs once."""
    @property
    def counts(self) -> Counter[StopResult]:
        """The number of outcomes so far, by result."""
    @property
    def read(self) -> int:
        """The number of targets read so far."""
    @property
    def total(self) -> int | None:
        """The number of targets; None while it is unknown."""
    @property
    def progress(self) -> Progress:
        """The activity of the run at this moment."""
    @property
    def retries(self) -> int:
        """The number of retries of the targets that have their outcome."""
    @property
    def ended_early(self) -> BctrlError | None:
        """The reason why the run ended early, such as its deadline, or None."""
    @property
    def report(self) -> StopReport:
        """The report on the targets read so far; it is not `ok` before the run ends."""
    def stop_reading(self) -> None:
        """Stop reading targets, send no new stops, and wait for requests in flight."""
    def abort(self) -> None:
        """Abandon requests in flight (`unknown`) and send nothing more (`not_sent`)."""
    def send(self, value: object) -> object:
        """Resume the run: the coroutine protocol of `asyncio.create_task`."""
    def throw(self, *error: Any) -> object:
        """Raise an exception in the run, as the cancellation of a task does."""
    def close(self) -> None:
        """Close the coroutine of a run that `send` has started."""
    async def __aenter__(self) -> Self:
        ...
    def __aiter__(self) -> Self:
        ...

# bctrl_async.bulk.Progress, in bctrl_async/bulk/_state.py
class Progress(msgspec.Struct):
    """The activity of a bulk stop at one moment, as `StopBatch.progress` returns it."""
    in_flight: int
    """The number of requests in flight."""
    polling: int = 0
    """The number of runtimes that were asked to stop, and are polled until they end (`verify=`)."""
    polling_for: float = 0.0
    """The seconds after which the time of all that are polled is up, or that of the run (`deadline=`); 0 once polls have ended."""
    polling_failures: Counter[str] = ...
    """The number of them whose last poll failed, by its result as in `retrying`: nobody knows whether they have ended."""
    is_full: bool = False
    """True while a hundred thousand are polled, so that no target is read until some have ended."""
    is_throttled: bool = False
    """True while the session slows down because of a 429 or 503."""
    retry_after: float = 0.0
    """The seconds for which the server has asked to wait (Retry-After); 0 if it has not."""
    is_unanswered: bool = False
    """True while the server answers nothing and is only probed."""
    is_looking: bool = False
    """True while the workspace is listed once more, at the end."""
    retrying: Counter[str] = ...
    """The number of targets that wait for another attempt, by the result of their last: a status such as `"500"`, or an error's class such as `"BctrlTimeoutError"`."""

# bctrl_async.shard, in bctrl_async/shards.py
def shard(targets: Targets, number: int, count: int) -> Targets:
    """Return the targets of one shard in their order; each is in exactly one shard."""

# bctrl_async.shards.shard_of, in bctrl_async/shards.py
def shard_of(target: object, count: int) -> int:
    """Return the shard of a target, from 1, the same in every process and version."""

# bctrl_async.StopResult, in bctrl_async/outcomes.py
class StopResult(StrEnum):
    """The result of a stop: what the server said to it."""
    STOPPED = 'stopped'
    ACCEPTED = 'accepted'
    ALREADY_STOPPED = 'already_stopped'
    NOT_FOUND = 'not_found'
    REJECTED = 'rejected'
    INVALID = 'invalid'
    NOT_SENT = 'not_sent'
    UNKNOWN = 'unknown'
    @property
    def needs_poll(self) -> bool:
        """True if the server may have taken the stop, and the runtime may still run."""
    @property
    def is_accepted(self) -> bool:
        """True if the server accepted the stop, but has not confirmed it."""
    @property
    def has_no_effect(self) -> bool:
        """True if the stop cannot have stopped the runtime."""
    @property
    def is_processed(self) -> bool:
        """True if the server has processed the stop, so that the call did not fail."""

# bctrl_async.StopOutcome, in bctrl_async/outcomes.py
class StopOutcome(msgspec.Struct):
    """The outcome of stopping one target."""
    index: int
    """The target's position in the input, from 0."""
    target: RuntimeRef
    """The runtime to stop."""
    result: StopResult
    """What the server said to the stop."""
    running: bool | None = None
    """True if the runtime runs, False if it no longer runs, by the server's own word; None where nobody knows."""
    runtime: Runtime | None = None
    """The runtime as last described by the server, in the answer, in a poll, or in the list of `stop_workspace` if no request can have stopped it since; else None."""
    error: BctrlError | None = None
    """The error that explains why the outcome is not `ok`; None if it is."""
    attempts: int = 1
    """The number of stop requests started; polls are not counted."""
    elapsed: float = 0.0
    """Seconds from reading the target to this outcome."""
    at: datetime = ...
    """The time at which the outcome became known, in UTC; if `runtime` comes from a poll or a list, the time of the poll or the list."""
    sent_at: datetime | None = None
    """The time at which the last request started, in UTC: a stop, or the poll that was answered last; None if none started."""
    request_id: str | None = None
    """The server's id of the last stop request that it answered, or None."""
    resumed: bool = False
    """True if the outcome comes from an earlier run's journal."""
    @property
    def ok(self) -> bool:
        """True if the runtime no longer runs, by the server's own word."""
    def to_dict(self) -> dict[str, object]:
        """Return the outcome as JSON values, for any encoder."""

# bctrl_async.StopReport, in bctrl_async/outcomes.py
class StopReport(msgspec.Struct):
    """The report of a bulk stop."""
    total: int
    """The number of targets read; the counts add up to it."""
    counts: Counter[StopResult]
    """The number of outcomes for each result; 0 if it did not occur."""
    running: int
    """The number of runtimes that run, by the server's own word."""
    not_running: int
    """The number of runtimes that no longer run, by the server's word."""
    failures: tuple[StopOutcome, ...]
    """The outcomes that are not `ok`, in order of completion."""
    elapsed: float
    """The duration of the run in seconds."""
    retries: int = 0
    """The number of stop requests beyond the first for each target."""
    throttled: int = 0
    """The number of 429 and 503 answers."""
    resumed: int = 0
    """The number of outcomes that come from an earlier run's journal."""
    ended_early: BctrlError | None = None
    """The reason why the run ended early, such as its deadline, or None."""
    started_since: tuple[Runtime, ...] | None = None
    """The runtimes that match and run, and were no targets, by a last list of the workspace; also a new runtime under the alias of a target, and a runtime whose age alone cannot be read."""
    look_error: BctrlError | None = None
    """The reason why this last look failed, or None: the list or a GET of it failed or took over a minute, had a runtime that cannot be read, `where` raised, or the run was left or ended before."""
    @property
    def ok(self) -> bool:
        """True if the whole input was read and no runtime in it runs any longer."""
    def to_dict(self) -> dict[str, object]:
        """Return the report as JSON values, for any encoder."""
    def raise_for_failures(self) -> None:
        """Raise unless the report is `ok`."""

# bctrl_async.BctrlError, in bctrl_async/errors.py
class BctrlError(Exception):
    """The base class of all errors of this package."""
    summary: str
    """The failure in one line, without a full stop."""
    advice: str | None = None
    """The remedy, by default the advice of the class; None if there is none."""
    operation: str = 'stop'
    """The operation of the API, such as `stop`."""
    workspace_id: str | None = None
    """The workspace of the call."""
    alias: str | None = None
    """The alias of the call."""
    attempts: int = 0
    """The number of requests started for this call."""
    may_have_worked: bool = False
    """True if any of these requests may have taken effect; always False for an operation that only reads."""
    may_have_stopped: bool = False
    """The same for a stop: the runtime may have stopped."""
    accepted: bool = False
    """True if the server accepted a stop with a 2xx status, but its answer has an unusable body (`BctrlNetworkError` only)."""
    status: int | None = None
    """The HTTP status of the last answer."""
    code: str | None = None
    """The server's error code, such as `runtime.not_active`."""
    message: str | None = None
    """The server's message."""
    reason_class: str | None = None
    """The server's `reasonClass`, such as `conflict`; new values will appear."""
    request_id: str | None = None
    """The server's id of the request, for its support team."""
    hint: str | None = None
    """The server's advice."""
    retry_after: float | None = None
    """The seconds that the server asked to wait."""
    body: str | None = None
    """The first 2,048 characters of the answer's body."""
    argument: str | None = None
    """The name of the argument that the error is about, such as `timeout`; `api_key` for an `api_key` function that was too slow."""

# bctrl_async.BctrlConfigError, in bctrl_async/errors.py
class BctrlConfigError(BctrlError, ValueError):
    """The call cannot be made: nothing was sent."""

# bctrl_async.BctrlNetworkError, in bctrl_async/errors.py
class BctrlNetworkError(BctrlError):
    """No usable answer: connection refused, host unreachable, disconnected."""
    advice: str | None = 'Check the base URL and the network; retrying is safe'

# bctrl_async.BctrlTimeoutError, in bctrl_async/errors.py
class BctrlTimeoutError(BctrlNetworkError, TimeoutError):
    """An attempt took longer than `timeout`, or an `api_key` function did."""
    advice: str | None = 'Allow a longer timeout; retrying is safe'

# bctrl_async.BctrlResponseError, in bctrl_async/errors.py
class BctrlResponseError(BctrlNetworkError):
    """An unreadable answer: not JSON, malformed, too large, a page or a redirect."""
    advice: str | None = 'Check that the base URL points to the bctrl API'

# bctrl_async.BctrlApiError, in bctrl_async/errors.py
class BctrlApiError(BctrlError):
    """The server answered with an error status."""
    advice: str | None = "Retrying will not help: contact the server's support"

# bctrl_async.BctrlValidationError, in bctrl_async/errors.py
class BctrlValidationError(BctrlApiError):
    """400 or 422: the request is invalid and will fail again."""
    advice: str | None = 'Correct the request; retrying will not help'

# bctrl_async.BctrlAuthenticationError, in bctrl_async/errors.py
class BctrlAuthenticationError(BctrlApiError):
    """401: the API key is missing or invalid; every call with it will fail."""
    advice: str | None = 'Check the API key'

# bctrl_async.BctrlPermissionError, in bctrl_async/errors.py
class BctrlPermissionError(BctrlApiError):
    """403: the API key has no access to this resource."""
    advice: str | None = 'Use a key with access to this workspace'

# bctrl_async.BctrlNotFoundError, in bctrl_async/errors.py
class BctrlNotFoundError(BctrlApiError):
    """404: the workspace, the alias or the path does not exist."""
    advice: str | None = 'Check the workspace id, the alias and the base URL'
    @property
    def names_runtime(self) -> bool:
        """True if the API reports that the workspace or the alias does not exist."""

# bctrl_async.BctrlConflictError, in bctrl_async/errors.py
class BctrlConflictError(BctrlApiError):
    """409: the state of the runtime does not allow a stop."""
    advice: str | None = "Check the runtime's status; retrying is safe"
    @property
    def already_stopped(self) -> bool:
        """True if nothing ran under this alias (contract: `runtime.not_active`)."""

# bctrl_async.BctrlRateLimitError, in bctrl_async/errors.py
class BctrlRateLimitError(BctrlApiError):
    """429: too many requests; the server did not process this request."""
    advice: str | None = 'Limit the rate, or retry later'

# bctrl_async.BctrlServerError, in bctrl_async/errors.py
class BctrlServerError(BctrlApiError):
    """5xx: the server or a gateway failed."""
    advice: str | None = 'Retrying is safe'

# bctrl_async.journal.Journal, in bctrl_async/journal.py
class Journal:
    """A journal that is open, locked, and appended to; use it as a context manager."""
    def __init__(
        self,
        path: str | os.PathLike[str],  # The file, not a symbolic link; if there is none, it is made for its owner alone (0600).
        *,
        base_url: str | None = None,  # The URL of the API, with the `/v1`.
        max_age: float | None = None,  # The greatest age of the file in seconds, above 0; an older file, such as last night's, is rejected.
    ) -> None:
        ...
    def write(self, outcome: StopOutcome, *, flush: bool = False) -> None:
        """Append an outcome, which is then the last entry of its target."""
    def flush(self) -> None:
        """Flush the file to disk (`fsync`)."""
    def close(self) -> None:
        """Flush the file to disk, unlock and close it; a second call does nothing."""

# bctrl_async.journal.read_journals, in bctrl_async/journal.py
def read_journals(
    paths: Iterable[str | os.PathLike[str]],  # The files.
    targets: Iterable[RuntimeRef | Runtime | tuple[str | UUID, str]] | None = None,  # The list: `RuntimeRef`s, pairs (workspace id, alias) or `Runtime`s.
    *,
    max_age: float | None = None,  # The greatest age of a file in seconds, above 0; an older file, such as last night's, is rejected.
) -> Iterator[StopOutcome]:
    """Yield the latest outcome of each target in one or more journals of one server."""

# bctrl_async.journal.JournalInUseError, in bctrl_async/journal.py
class JournalInUseError(BctrlConfigError):
    """Another run has the journal, or a file server holds the lock of a dead client."""

# bctrl_async.RuntimeRef, in bctrl_async/models.py
class RuntimeRef(NamedTuple):
    """A reference to a runtime; a plain `(workspace_id, alias)` tuple works as well."""
    workspace_id: str
    alias: str

# bctrl_async.Runtime, in bctrl_async/models.py
class Runtime(msgspec.Struct):
    """A runtime as described by the server; texts are cut at 4,096 characters."""
    id: UUID
    alias: str
    workspace_id: UUID
    kind: RuntimeKind
    status: RuntimeStatus
    driver: str
    created_at: str
    updated_at: str
    summary: RuntimeSummary | None = None

# bctrl_async.RuntimeSummary, in bctrl_async/models.py
class RuntimeSummary(msgspec.Struct):
    """Details of a runtime."""
    browser_running: bool | None = None
    current_driver: str | None = None
    default_context_id: str | None = None
    default_page_id: str | None = None
    launch_mode: LaunchMode | None = None
    profile_id: UUID | None = None
    storage_workspace: str | None = None

# bctrl_async.RuntimeKind, in bctrl_async/models.py
class RuntimeKind(_OpenEnum):
    """The kind of a runtime."""
    BROWSER = 'browser'
    DESKTOP = 'desktop'
    SPREADSHEET = 'spreadsheet'

# bctrl_async.RuntimeStatus, in bctrl_async/models.py
class RuntimeStatus(_OpenEnum):
    """The status of a runtime."""
    ACTIVE = 'active'
    STOPPED = 'stopped'
    FAILED = 'failed'
    @property
    def is_final(self) -> bool:
        """True if a runtime with this status no longer runs: `stopped` or `failed`."""

# bctrl_async.LaunchMode, in bctrl_async/models.py
class LaunchMode(_OpenEnum):
    """The launch mode of a runtime."""
    PROFILE = 'profile'
    EPHEMERAL = 'ephemeral'

# bctrl_async.RuntimeFilter, in bctrl_async/filters.py
class RuntimeFilter(msgspec.Struct):
    """A predicate for runtimes; any function of a `Runtime` can take its place."""
    status: str | None = None
    """The status to match; None, the default, matches each status but `stopped` and `failed`, including statuses unknown to this version."""
    kind: str | None = None
    """The kind to match; None matches any."""
    older_than: float | timedelta | None = None
    """The least age, above 0, in seconds or as a `timedelta`; None matches any age."""

# bctrl_async.RetryPolicy, in bctrl_async/_calls/retry.py
class RetryPolicy(msgspec.Struct):
    """A retry policy with exponential backoff and full jitter."""
    attempts: int = 4
    """Attempts that may fail, from 1; a busy server's 429 and 503 do not count."""
    base: float = 0.5
    """The longest first delay in seconds, above 0."""
    cap: float = 20.0
    """The longest delay in seconds, above 0."""
    patience: float | None = None
    """Seconds of all delays after a 429 or 503 until giving up, and the longest Retry-After to wait for; 0 gives up at once."""
    statuses: frozenset[int] = ...
    """The statuses to retry, of 408, 429 and 500 to 599."""
    @property
    def max_throttle_wait(self) -> float:
        """The patience of a single call in seconds, 60 if None."""

# bctrl_async.pace.FilePace, in bctrl_async/pace/_file.py
class FilePace(Pace):
    """A pace shared by the processes of one machine, in a file that they lock in turn."""
    def __init__(self, path: str | os.PathLike[str], *, rate: float) -> None:
        ...

# bctrl_async.redis.RedisPace, in bctrl_async/redis.py
class RedisPace(Pace):
    """A pace shared by the processes of many machines, in Redis (from 6.2) or Valkey."""
    def __init__(self, client: _Client, *, rate: float, name: str = 'default') -> None:
        ...

# bctrl_async.pace.Pace, in bctrl_async/pace/_leases.py
class Pace(ABC):
    """A rate that several processes share; an instance serves any number of sessions."""
    def __init__(self, *, rate: float) -> None:
        ...
    async def acquire(self, slots: int) -> None:
        """Wait until this many attempts may start, spaced by the rate."""

# bctrl_async.Observer, in bctrl_async/observer.py
class Observer(_WithCalls):
    """An observer of all calls of a session."""
    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        """Handle the start of a stop."""
    def begin_call(self, operation: str, workspace_id: str, alias: str | None) -> CallObserver:
        """Handle the start of a call that stops nothing, such as `get_runtime`."""
    def begin_bulk(self) -> BulkObserver:
        """Handle the start of a bulk stop."""

# bctrl_async.StopObserver, in bctrl_async/observer.py
class StopObserver(_WithAttempts):
    """An observer of one stop: its attempts, and the GETs that check its effect."""
    def begin_attempt(self, attempt: Attempt) -> AttemptObserver:
        """Handle the start of an attempt."""
    def raised(self, error: BaseException) -> None:
        """Handle what a single stop is about to raise, just before its `end`."""
    def end(self, outcome: StopOutcome) -> None:
        """Handle the end of the stop."""

# bctrl_async.CallObserver, in bctrl_async/observer.py
class CallObserver(_WithAttempts):
    """An observer of one call that stops nothing, and of its attempts."""
    def begin_attempt(self, attempt: Attempt) -> AttemptObserver:
        """Handle the start of an attempt."""
    def end(self, error: BaseException | None) -> None:
        """Handle the end of the call."""

# bctrl_async.Attempt, in bctrl_async/observer.py
class Attempt(msgspec.Struct):
    """One attempt of a call: one HTTP request."""
    number: int
    """The number of the attempt within the call, from 1."""
    operation: str
    """The operation of the API, such as `stop`."""
    stops: bool
    """True if the operation may stop a runtime."""
    method: str
    """The HTTP method."""
    url: URL
    """The URL of the request."""
    template: str
    """The path of the operation, with `{id}` and `{alias}` for the names."""

# bctrl_async.AttemptObserver, in bctrl_async/observer.py
class AttemptObserver:
    """An observer of one attempt: one HTTP request."""
    def headers(self) -> Mapping[str, str]:
        """Return headers to add, such as `traceparent`."""
    def answered(self, status: int) -> None:
        """Handle the start of the response, which has this HTTP status."""
    def end(self, error: BaseException | None) -> None:
        """Handle the end of the attempt."""

# bctrl_async.BulkObserver, in bctrl_async/observer.py
class BulkObserver(_WithCalls):
    """An observer of one bulk stop."""
    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        """Handle the start of a stop."""
    def begin_call(self, operation: str, workspace_id: str, alias: str | None) -> CallObserver:
        """Handle the start of a call that stops nothing, such as `get_runtime`."""
    def outcome(self, outcome: StopOutcome) -> None:
        """Handle an outcome of this run, even if its stop was never started."""
    def end(self, report: StopReport) -> None:
        """Handle the end of the bulk stop."""

# bctrl_async.otel.OpenTelemetry, in bctrl_async/otel.py
class OpenTelemetry(Observer):
    """An observer that records spans and metrics."""
    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,  # The provider of the tracer; None uses the global provider.
        meter_provider: metrics.MeterProvider | None = None,  # The provider of the meter; None uses the global provider.
        spans_in_bulk: bool = True,  # If False, a bulk stop of any size is one span, without spans for its stops and attempts.
    ) -> None:
        ...

# bctrl_async.emulator.Emulator, in bctrl_async/emulator/_server.py
class Emulator:
    """A server of `POST /v1/workspaces/{id}/runtimes/{alias}/stop` on a local port."""
    def __init__(
        self,
        *,
        host: str = '127.0.0.1',  # The address to listen on.
        port: int = 8787,  # The port to listen on, 0 to 65535; 0 picks a free port.
        api_key: str = 'emulator-key',  # The key that requests must carry, not empty.
        faults: Mapping[Fault, float] | None = None,  # The probability of each fault of a stop, 0 to 1, at most 1 together.
        seed: int = 0,  # The seed of the random faults.
        latency: float = 0.0,  # Seconds before every response, up to a day.
        fault_latency: float = 0.05,  # Seconds that `Fault.LATENCY` adds, up to a day.
        stop_takes: float = 0.0,  # Seconds from a stop until its runtime ends, up to a day.
        rate_limit: float | None = None,  # Requests per second, 0.0001 to 1,000,000, with bursts of a quarter of a second.
        on_request: Callable[[ReceivedRequest], object] | None = None,  # A function that is called with each request, once it has been added to `requests` and before it is answered.
    ) -> None:
        ...
    api_key: str
    requests: list[ReceivedRequest]
    received: Counter[tuple[str, str]]
    @property
    def url(self) -> str:
        """The base URL without a trailing slash, such as ``http://127.0.0.1:8787``."""
    @property
    def runtimes(self) -> Mapping[tuple[str, str], contract.WireRuntime]:
        """A live view of all runtimes by `(workspace_id, alias)`."""
    @property
    def ending(self) -> list[tuple[str, str]]:
        """The runtimes that a stop is ending, in order of their stops."""
    @property
    def stops(self) -> list[ReceivedRequest]:
        """The requests that were stops, whatever their answers, in order of arrival."""
    async def start(self) -> None:
        """Start listening."""
    async def close(self) -> None:
        """Stop listening and drop every connection at once, even during a request."""
    async def __aenter__(self) -> Self:
        ...
    def add_runtime(
        self,
        workspace_id: str,  # Any non-empty text.
        alias: str,  # Any non-empty text.
        *,
        kind: str = 'browser',  # `browser`, `desktop` or `spreadsheet` (openapi.yaml, `RuntimeKind`).
        status: str = 'active',  # `active`, `stopped` or `failed` (openapi.yaml, `RuntimeStatus`).
        created_at: str | None = None,  # The `createdAt`, any text: the contract specifies no format.
        stop_takes: float | None = None,  # Seconds from a stop until the runtime ends, up to a day; None for the emulator's.
    ) -> None:
        """Add a runtime, or replace the runtime with the same workspace id and alias."""
    def status(self, workspace_id: str, alias: str) -> str | None:
        """Return the true status of a runtime, whatever its last response said."""
    def assert_stopped(self, workspace_id: str, *aliases: str, only: bool = False) -> None:
        """Assert that each of these runtimes is stopped, and got a stop."""
    def assert_not_stopped(self, workspace_id: str, *aliases: str) -> None:
        """Assert that these runtimes, at least one, were added and not ended by a stop."""
    def inject(
        self,
        *faults: Fault | Reply | None,
        workspace_id: str | None = None,  # Only for stops in this workspace.
        alias: str | None = None,  # Only for stops of this alias.
        method: str = 'POST',  # `POST` for stops, `GET` for reads; a list has no alias.
    ) -> None:
        """Queue faults and replies, one for each of the next stops of known runtimes."""
    def poison(self, workspace_id: str, alias: str, fault: Fault | Reply | None) -> None:
        """Give a runtime a fault or reply that every stop and every read of it meets."""
    def hold(self, workspace_id: str, *aliases: str) -> None:
        """Hold back the answers to stops and reads of these runtimes, until `release`."""
    def release(self, workspace_id: str, *aliases: str) -> None:
        """Send the answers that these runtimes hold back, and hold back no more."""

# bctrl_async.emulator.Fault, in bctrl_async/emulator/_faults.py
class Fault(StrEnum):
    """A fault of one stop: what the client receives, and whether the stop takes effect."""
    LATENCY = 'latency'
    RATE_LIMITED = 'rate_limited'
    SERVER_ERROR = 'server_error'
    BAD_GATEWAY = 'bad_gateway'
    DROP_BEFORE = 'drop_before'
    DROP_AFTER = 'drop_after'
    HANG = 'hang'
    TRUNCATED_JSON = 'truncated_json'
    MALFORMED_JSON = 'malformed_json'
    UNKNOWN_VALUES = 'unknown_values'
    FAILED = 'failed'
    ACCEPTED = 'accepted'
    @property
    def takes_effect(self) -> bool:
        """True if a stop with this fault ends the runtime."""

# bctrl_async.emulator.Reply, in bctrl_async/emulator/_replies.py
class Reply:
    """An answer of any status, for `Emulator.inject` and `Emulator.poison`."""
    status: int
    """The HTTP status, 200 to 599."""
    code: str | None = None
    """The `code` of the error body; None for its usual value (errors.md)."""
    message: str | None = None
    """The `error` of the error body; None for the name of the status."""
    reason_class: str | None = None
    """The `reasonClass` of the error body; None for its usual value."""
    hint: str | None = None
    """The `hint` of the error body; None omits it."""
    headers: Mapping[str, str] = ...
    """Headers to add, or to send in place of the usual: `Retry-After`, say."""
    body: object = ...
    """What is sent in place of the usual body; None for the usual body."""
    takes_effect: bool | None = None
    """True if a stop with this answer ends the runtime."""

# bctrl_async.emulator.ReceivedRequest, in bctrl_async/emulator/_assertions.py
class ReceivedRequest:
    """A request as received, and the emulator's reaction to it."""
    workspace_id: str | None
    """The workspace by the name given to `add_runtime`, else as in the path; None if the path is unknown."""
    alias: str | None
    """The decoded alias, None for the path of a list and an unknown path."""
    method: str
    """The HTTP method."""
    raw_path: str
    """The request target exactly as on the wire, with its query."""
    headers: Mapping[str, str] = ...
    """The headers, with case-insensitive names."""
    body: bytes
    """The body as on the wire, not decompressed."""
    fault: Fault | Reply | None
    """The fault or reply that was applied, None for normal behaviour."""
    status: int | None
    """The HTTP status of the response, None if there was no response."""
    operation: str | None
    """Its name, such as `stop`; None if the path is unknown, or its operation has another method."""
    received_at: float
    """Seconds from the emulator's start until the request had arrived, on a clock that never goes back."""

# bctrl_async.emulator.WireRuntime, in bctrl_async/emulator/_contract.py
class WireRuntime(TypedDict):
    """A Runtime on the wire (openapi.yaml, `components.schemas.Runtime`)."""
    alias: str
    createdAt: str
    driver: str
    id: str
    kind: str
    status: str
    summary: dict[str, bool | str | None]
    updatedAt: str
    workspaceId: str

# bctrl_async.testing.bctrl_emulator, in bctrl_async/testing.py
def bctrl_emulator(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """A running emulator: add runtimes, inject faults, then inspect its requests."""

# bctrl_async.testing.bctrl_session, in bctrl_async/testing.py
def bctrl_session(bctrl_emulator: Emulator) -> Iterator[BctrlSession]:
    """A session for the emulator; it opens in the event loop that first uses it."""

# bctrl_async.testing.bctrl_env, in bctrl_async/testing.py
def bctrl_env(bctrl_emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of the emulator, for code under test that makes its own session."""

# bctrl_async.testing.set_testing, in bctrl_async/testing.py
def set_testing(testing: bool) -> AbstractContextManager[object]:
    """Make failures quick in this process, or stop that."""

# bctrl_async.testing.bctrl_aioresponses, in bctrl_async/testing.py
def bctrl_aioresponses(monkeypatch: pytest.MonkeyPatch) -> Iterator[aioresponses]:
    """Mocked answers in place of a server; needs the package aioresponses."""

# bctrl_async.fastapi.BctrlDep
"""The app's session as a parameter: ``session: BctrlDep``."""

# bctrl_async.fastapi.Problem
"""Problem details (RFC 9457) of a failed call of the bctrl API: :doc:`its members <problems>`, in snake_case."""

# bctrl_async.fastapi.PROBLEM_RESPONSES
"""The :doc:`problems <problems>` for the app's OpenAPI: pass ``responses=PROBLEM_RESPONSES`` to routes or routers."""

# bctrl_async.fastapi.Runtime
"""A :py:class:`bctrl_async.Runtime`, shown as the API's own JSON."""

# bctrl_async.fastapi.StopOutcome
"""A :py:class:`bctrl_async.StopOutcome`, shown with the fields of its ``to_dict``."""

# bctrl_async.fastapi.StopReport
"""A :py:class:`bctrl_async.StopReport`."""

# bctrl_async.fastapi.lifespan, in bctrl_async/fastapi/_app.py
def lifespan(
    make_session: Callable[[], BctrlSession] = BctrlSession,  # Called at each startup; by default the environment configures the session.
    *,
    rate: float | Pace | None = None,  # The most attempts a second of each worker process, or of all together if it is a pace, such as `bctrl_async.pace.FilePace`.
    inner: Lifespan | PlainLifespan | None = None,  # The app's own lifespan.
) -> Lifespan:
    """Make a lifespan that opens a session at startup and closes it at shutdown."""

# bctrl_async.fastapi.get_session, in bctrl_async/fastapi/_app.py
async def get_session(connection: HTTPConnection) -> BctrlSession:
    """Return the app's session."""

# bctrl_async.fastapi.add_exception_handlers, in bctrl_async/fastapi/_app.py
def add_exception_handlers(app: FastAPI) -> None:
    """Answer every BctrlError with a problem (RFC 9457)."""

# bctrl_async.fastapi.problem, in bctrl_async/fastapi/_problems.py
def problem(error: BctrlError) -> Problem:
    """Describe an error to the app's clients as problem details (RFC 9457)."""
