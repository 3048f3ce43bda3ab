"""The options of the connection, which several commands share, and the session made from them."""

import inspect
import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from typing import Annotated, Any
from urllib.request import getproxies, proxy_bypass

import typer
from yarl import URL

from bctrl_async import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    BctrlTimeoutError,
    RetryPolicy,
)
from bctrl_async.cli._api_key import URL_VARIABLE, KeySource, find_key
from bctrl_async.cli._options import check_not_empty, check_positive, duration
from bctrl_async.cli._profiles import Profile, load_profile, profile_names
from bctrl_async.cli._verbosity import verbosity
from bctrl_async.pace import Pace

_PUBLIC_API = "https://api.bctrl.ai"
_NO_KEY = "not-needed"
"""The key of a session that sends nothing."""

# The session advises to pass arguments; here they are options, variables and keys of a profile.
_ADVICE = {
    "api_key": "Expected visible ASCII characters, without 'Bearer '",
    "base_url": f"Give an https URL such as {_PUBLIC_API}; http on this machine only",
    "proxy": "Give a URL such as http://proxy.example.com:3128, for an https API only",
}

_option = partial(typer.Option, rich_help_panel="Connection")


_timeout = partial(
    _option,
    "--timeout",
    metavar="DURATION",
    parser=duration,
    callback=check_positive,
    help="Time limit of one attempt.",
)
attempts_option = partial(
    _option,
    "--attempts",
    metavar="N",
    min=1,
    help="Attempts that may fail; 429 and 503 do not count.",
)
_patience = partial(_option, "--patience", metavar="DURATION", parser=duration)


@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """The options of the connection. Each field is an option of the commands that have them."""

    profile: Annotated[
        str | None,
        _option(
            "--profile",
            metavar="NAME",
            envvar="BCTRL_PROFILE",
            callback=check_not_empty,
            autocompletion=profile_names,
            help="Profile of the config file.",
        ),
    ] = None
    base_url: Annotated[
        str,
        _option("--base-url", metavar="URL", envvar=URL_VARIABLE, help="URL of the API."),
    ] = _PUBLIC_API
    timeout: Annotated[float, _timeout(show_default="60s")] = 60.0
    attempts: Annotated[int, attempts_option()] = 4
    patience: Annotated[
        float | None,
        _patience(
            show_default="5m, or --deadline",
            help="Time that each target may wait while throttled (429, 503).",
        ),
    ] = None
    proxy: Annotated[
        str | None,
        _option(
            "--proxy",
            metavar="URL",
            callback=check_not_empty,
            help="Proxy of all requests; else HTTPS_PROXY and NO_PROXY decide.",
        ),
    ] = field(default=None, repr=False)
    """It may contain a password."""
    ca_file: Annotated[
        str | None,
        _option(
            "--ca-file",
            metavar="PEM",
            callback=check_not_empty,
            help="Trust the CAs in this file, not those of the system.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReadOptions(ConnectionOptions):
    """The options of a command that only reads, whose user should not wait for minutes."""

    timeout: Annotated[float, _timeout(show_default="10s")] = 10.0
    attempts: Annotated[int, attempts_option()] = 2
    patience: Annotated[
        float | None,
        _patience(show_default="60s", help="Time to wait while throttled (429, 503)."),
    ] = None


class Connection:
    """The connection that the options, the environment and a profile describe."""

    def __init__(
        self, options: ConnectionOptions, profile: Profile, origins: Mapping[str, str]
    ) -> None:
        self.options = options
        self.profile = profile
        self._origins = origins

    def origin(self, name: str) -> str:
        """Return where the value of an option comes from, for a message."""
        return self._origins[name]

    def key_source(self) -> KeySource:
        """Return where the API key comes from."""
        return find_key(self.profile, self.origin("base_url"))

    def explain(self, error: BctrlError | None) -> None:
        """Name in the advice of an error where the API key comes from, or an option."""
        if isinstance(error, BctrlAuthenticationError):
            error.advice = f"Check the API key from {self.key_source()}"
        elif isinstance(error, BctrlTimeoutError) and error.advice is None:
            error.advice = "Allow a longer --timeout; retrying is safe"

    @cached_property
    def key(self) -> str:
        """The API key."""
        return self.key_source().read()

    @cached_property
    def url(self) -> URL:
        """The URL of the API."""
        try:
            return URL(BctrlSession(_NO_KEY, base_url=self.options.base_url).base_url)
        except BctrlConfigError as error:
            raise self._named(error, "base_url") from error

    @cached_property
    def proxy(self) -> tuple[str, str] | None:
        """The proxy and where it comes from; None for a direct connection."""
        if self.options.proxy is not None:
            return self.options.proxy, self.origin("proxy")
        # A proxy is another machine: loopback traffic, which may go without TLS, must not reach it.
        proxy = getproxies().get("https") if self.url.scheme == "https" else None
        if not proxy or proxy_bypass(self.url.authority):
            return None
        return proxy if "://" in proxy else f"http://{proxy}", "HTTPS_PROXY"

    @cached_property
    def tls(self) -> ssl.SSLContext | None:
        """The TLS context; None for the default one."""
        file = self.options.ca_file
        if file is None:
            return None
        try:
            return ssl.create_default_context(cafile=file)
        except OSError as error:
            # An error of TLS is one as well, and has no words for a file without certificates.
            problem = "no PEM certificates" if isinstance(error, ssl.SSLError) else error.strerror
            raise BctrlConfigError(
                f"cannot read {file} ({self.origin('ca_file')}): {problem}"
            ) from error

    def session(
        self,
        *,
        needs_key: bool = True,
        max_connections: int = 100,
        rate: float | None = None,
        pace: Pace | None = None,
    ) -> BctrlSession:
        """Make a session with these options."""
        options = self.options
        try:
            proxy, tls = self.proxy, self.tls
            return BctrlSession(
                self.key if needs_key else _NO_KEY,
                base_url=options.base_url,
                timeout=options.timeout,
                max_connections=max_connections,
                retry=RetryPolicy(attempts=options.attempts, patience=options.patience),
                rate=rate,
                pace=pace,
                proxy=None if proxy is None else proxy[0],
                ssl=tls,
            )
        except BctrlConfigError as error:
            if error.argument not in _ADVICE:
                raise
            raise self._named(error, error.argument) from error

    def _named(self, error: BctrlConfigError, argument: str) -> BctrlConfigError:
        """Return an error of the session that names an option in place of an argument."""
        if argument == "api_key":
            summary = f"invalid API key from {self.key_source()}"
        else:
            origin = self.origin(argument)
            if argument == "proxy" and self.proxy is not None:
                origin = self.proxy[1]
            summary = error.summary.replace(f"invalid {argument}", f"invalid {origin}", 1)
        return BctrlConfigError(summary, advice=_ADVICE[argument])


def with_connection(
    command: Callable[..., int], kind: type[ConnectionOptions] = ConnectionOptions
) -> Callable[..., int]:
    """Give a command the options of a connection and `verbosity`, after its own."""
    own, shared = _parameters(command), _parameters(kind)
    shown = _parameters(verbosity)
    context_parameter = shown.pop("context")
    needs_context = own.pop("context", None) is not None
    del own["connection"]

    @wraps(command)
    def run(context: typer.Context, **values: Any) -> int:  # noqa: ANN401 - typer's.
        profile = load_profile(values["profile"])
        origins = _apply_profile(context, profile, values)
        options = kind(**{name: values.pop(name) for name in shared})
        if needs_context:
            values["context"] = context
        connection = Connection(options, profile, origins)
        with verbosity(context, **{name: values.pop(name) for name in shown}):
            try:
                return command(**values, connection=connection)
            except BctrlError as error:
                connection.explain(error)
                raise

    parameters = [context_parameter, *own.values(), *shared.values(), *shown.values()]
    # typer reads the options from it; functions have the attribute, and their type does not.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


with_quick_connection = partial(with_connection, kind=ReadOptions)
"""`with_connection` for a command that only reads, with `ReadOptions`."""


def _parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _apply_profile(
    context: typer.Context, profile: Profile, values: dict[str, Any]
) -> Mapping[str, str]:
    """Replace values by those of a profile, and return where each value comes from.

    An option precedes the profile. A variable precedes the default profile, but not one that the
    user named.
    """
    origins: dict[str, str] = {}
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        is_variable = source is not None and source.name == "ENVIRONMENT"
        is_given = source is not None and source.name == "COMMANDLINE"
        if name == "base_url" and not is_given and os.environ.get(URL_VARIABLE) == "":
            # click takes it for unset, which would stop runtimes of the public API.
            values[name], is_variable = "", True
        if not is_given and not (is_variable and not profile.is_named):
            if name in profile.options:
                values[name] = context.params[name] = profile.options[name]
                origins[name] = profile.origin(name)
                continue
            if name == "base_url" and values[name]:
                # Not BCTRL_BASE_URL, which is that of another account; an empty one is an error.
                values[name] = _PUBLIC_API
                is_variable = False
        option = parameter.opts[0] if is_given else "the default"
        origins[name] = str(parameter.envvar) if is_variable else option
    return origins
