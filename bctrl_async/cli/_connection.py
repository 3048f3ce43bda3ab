"""The options of the connection, which several commands share, and the session made from them."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Annotated, Any

import typer

from bctrl_async import BctrlConfigError, BctrlSession, RetryPolicy
from bctrl_async._limiter.pace import Pace
from bctrl_async.cli._options import check_positive, duration
from bctrl_async.cli._verbosity import verbosity

_NO_KEY = "not-needed"
"""The key of a session that sends nothing."""

_option = partial(typer.Option, rich_help_panel="Connection")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """The options of the connection. Each field is an option of the commands that have them."""

    base_url: Annotated[
        str | None,
        _option(
            "--base-url",
            metavar="URL",
            envvar="BCTRL_BASE_URL",
            show_default="https://api.bctrl.ai",
            help="URL of the API.",
        ),
    ] = None
    timeout: Annotated[
        float,
        _option(
            "--timeout",
            metavar="DURATION",
            parser=duration,
            callback=check_positive,
            show_default="60s",
            help="Time limit of one attempt.",
        ),
    ] = 60.0
    attempts: Annotated[
        int,
        _option(
            "--attempts",
            metavar="N",
            min=1,
            help="Attempts that may fail; 429 and 503 do not count.",
        ),
    ] = 4
    patience: Annotated[
        float | None,
        _option(
            "--patience",
            metavar="DURATION",
            parser=duration,
            help="Time to wait while the server answers 429 or 503.",
        ),
    ] = None

    def session(
        self,
        *,
        needs_key: bool = True,
        max_connections: int = 100,
        rate: float | None = None,
        pace: Pace | None = None,
    ) -> BctrlSession:
        """Make a session with these options.

        Args:
            needs_key: False for a session that sends nothing.
            max_connections: As for `BctrlSession`.
            rate: As for `BctrlSession`.
            pace: As for `BctrlSession`.

        Raises:
            BctrlConfigError: There is no key, or an option is invalid.
        """
        return BctrlSession(
            self._key() if needs_key else _NO_KEY,
            base_url=self.base_url,
            timeout=self.timeout,
            max_connections=max_connections,
            retry=RetryPolicy(attempts=self.attempts, patience=self.patience),
            rate=rate,
            pace=pace,
        )

    def _key(self) -> str:
        key = os.environ.get("BCTRL_API_KEY")
        if not key:
            raise BctrlConfigError("no API key: set BCTRL_API_KEY")
        return key


def with_connection(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options of `Connection` and `verbosity`, after its own.

    Args:
        command: A command with the keyword `connection`, and `context` if it needs that.
    """
    own, shared = _parameters(command), _parameters(Connection)
    shown = _parameters(verbosity)
    context_parameter = shown.pop("context")
    needs_context = own.pop("context", None) is not None
    del own["connection"]

    @wraps(command)
    def run(context: typer.Context, **values: Any) -> int:  # noqa: ANN401 - typer's.
        connection = Connection(**{name: values.pop(name) for name in shared})
        if needs_context:
            values["context"] = context
        with verbosity(context, **{name: values.pop(name) for name in shown}):
            return command(**values, connection=connection)

    parameters = [context_parameter, *own.values(), *shared.values(), *shown.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)
