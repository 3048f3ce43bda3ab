"""An asyncio client that stops bctrl runtimes, singly or in bulk, with one outcome for each."""

from bctrl_async._calls.retry import RetryPolicy
from bctrl_async._version import __version__
from bctrl_async.bulk import StopBatch
from bctrl_async.errors import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNetworkError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlTimeoutError,
    BctrlValidationError,
)
from bctrl_async.filters import RuntimeFilter
from bctrl_async.models import (
    LaunchMode,
    Runtime,
    RuntimeKind,
    RuntimeRef,
    RuntimeStatus,
    RuntimeSummary,
)
from bctrl_async.observer import (
    Attempt,
    AttemptObserver,
    BulkObserver,
    CallObserver,
    Observer,
    StopObserver,
)
from bctrl_async.outcomes import RuntimeState, StopOutcome, StopReport, StopResult
from bctrl_async.session import BctrlSession
from bctrl_async.shards import shard
from bctrl_async.stats import SessionStats

__all__ = [
    "Attempt",
    "AttemptObserver",
    "BctrlApiError",
    "BctrlAuthenticationError",
    "BctrlConfigError",
    "BctrlConflictError",
    "BctrlError",
    "BctrlNetworkError",
    "BctrlNotFoundError",
    "BctrlPermissionError",
    "BctrlRateLimitError",
    "BctrlResponseError",
    "BctrlServerError",
    "BctrlSession",
    "BctrlTimeoutError",
    "BctrlValidationError",
    "BulkObserver",
    "CallObserver",
    "LaunchMode",
    "Observer",
    "RetryPolicy",
    "Runtime",
    "RuntimeFilter",
    "RuntimeKind",
    "RuntimeRef",
    "RuntimeState",
    "RuntimeStatus",
    "RuntimeSummary",
    "SessionStats",
    "StopBatch",
    "StopObserver",
    "StopOutcome",
    "StopReport",
    "StopResult",
    "__version__",
    "shard",
]
