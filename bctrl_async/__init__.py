"""An asyncio client that stops bctrl runtimes, singly or in bulk."""

from importlib import import_module
from typing import TYPE_CHECKING

from bctrl_async._version import __version__

if TYPE_CHECKING:
    from bctrl_async._calls.retry import RetryPolicy
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
    from bctrl_async.outcomes import StopOutcome, StopReport, StopResult
    from bctrl_async.session import BctrlSession
    from bctrl_async.shards import shard
    from bctrl_async.stats import SessionStats
else:
    # Names are searched in this order, so modules that need no aiohttp come first.
    _MODULES = (
        *("errors", "models", "stats", "outcomes", "filters", "observer", "shards"),
        *("_calls.retry", "bulk", "session", "journal", "pace"),
    )

    def __getattr__(name: str) -> object:
        """Import a name at its first use: the command's help needs no aiohttp."""
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name in __all__:
            modules = (import_module(f"{__name__}.{module}") for module in _MODULES)
            return next(
                getattr(module, name) for module in modules if hasattr(module, name)
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> set[str]:
        return {*globals(), *__all__}


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
