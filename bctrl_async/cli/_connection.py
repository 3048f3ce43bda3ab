"""The connection that options, variables and a profile of the config file describe."""

import os
import re
import shlex
import ssl
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.request import getproxies, proxy_bypass

import msgspec
from cyclopts import Parameter, Token
from cyclopts.argument import ArgumentCollection

import bctrl_async
from bctrl_async import BctrlAuthenticationError, BctrlConfigError, BctrlError, _config
from bctrl_async.cli import _options as opt
from bctrl_async.cli._pace import open_rate
from bctrl_async.errors import format_duration

_KEY = "BCTRL_API_KEY"
_KEYS = (
    *("api_key_env", "workspace", "base_url", "timeout", "attempts", "patience", "proxy", "rate"),
    *("ca_file", "pace"),
)
_MAX_WORDS = 40
"""The most characters of names that an error repeats."""

# `Path.expanduser` would fail without a home folder.
_expand = os.path.expanduser


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The config file."""

    profiles: dict[str, dict[str, str | int | float]] = {}


class Profile(NamedTuple):
    """The profile in use; else it has no title, and the key and workspace of variables."""

    title: str
    key_variable: str
    workspace: str
    values: Mapping[str, str]
    origins: dict[str, str]
    """The source of each value (an option, a variable or a key), by the name of its key."""


NO_PROFILE = Profile("", _KEY, "", {}, {})


def _read_config() -> tuple[Path, Mapping[str, Mapping[str, str | int | float]]]:
    """Return the path of the config file, and the tables of its profiles."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.environ.get("APPDATA") or "~/.config"
    path = os.environ.get("BCTRL_CONFIG") or f"{folder}/bctrl-async/config.toml"
    file = Path(_expand(path)).absolute()
    try:
        return file, msgspec.toml.decode(file.read_bytes(), type=_File).profiles
    except OSError as error:
        raise BctrlConfigError(f"cannot read {file}: {error.strerror}") from error
    except (msgspec.MsgspecError, ValueError) as error:
        advice = "Write the keys of a profile below [profiles.NAME]"
        raise BctrlConfigError(f"invalid {file}: {error}", advice=advice) from error


def _read_profile(name: str) -> Profile:
    """Return a profile of the config file."""
    file, tables = _read_config()
    if name not in tables:
        names = ", ".join(sorted(tables)) or "none"
        raise BctrlConfigError(f"unknown profile {name!r}", advice=f"{file} has {names}")
    title = f"profile {name!r} of {file}"
    values = {key: str(value) for key, value in tables[name].items()}
    if unknown := values.keys() - set(_KEYS):
        problem = f"unknown key {min(unknown)}: expected one of {', '.join(_KEYS)}"
        raise BctrlConfigError(f"{title}: {problem}")
    variable = values.pop("api_key_env", "")
    if not (variable.isidentifier() and variable.isupper()):
        # The value is not shown, for it may be the key itself.
        problem = "api_key_env must name a variable in capitals, such as STAGING_KEY"
        raise BctrlConfigError(f"{title}: {problem}")
    for key in {"ca_file", "pace"} & values.keys():
        if ":" not in values[key]:
            values[key] = str(file.parent / _expand(values[key]))
    return Profile(title, variable, values.pop("workspace", ""), values, {})


def apply_profile(_: object, __: object, arguments: ArgumentCollection) -> None:
    """Give options the values of the profile in use, and note where each value comes from."""
    option = arguments.get("--profile", None)
    if option is None:
        return
    # An empty variable counts as unset.
    names = [token.value for token in option.tokens if token.value or token.source != "env"]
    if names:
        profile = _read_profile(names[0])
    else:
        profile = Profile("", _KEY, os.environ.get("BCTRL_WORKSPACE", ""), {}, {})
    option.tokens[:] = [Token(implicit_value=profile)]
    for argument in arguments:
        key, tokens = argument.name.lstrip("-").replace("-", "_"), argument.tokens
        if tokens and tokens[0].source == "env":
            # An empty URL is an error: it must not stand for the public API.
            is_set = tokens[0].value or key == "base_url"
            if names or not is_set:
                tokens.clear()
        if not tokens and key in profile.values:
            tokens.append(Token(keyword=f"{key} in {profile.title}", value=profile.values[key]))
        if tokens:
            profile.origins[key] = tokens[0].keyword or ""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Connection:
    """The options of the connection, how much is printed, and the session made from them."""

    verbose: Annotated[
        int,
        opt.in_output_flags(
            alias="-v",
            # Otherwise the last of several flags alone would count.
            allow_repeating=None,
            count=True,
            help="Print what is retried; -vv also what is sent and received.",
        ),
    ] = 0
    quiet: Annotated[
        bool, opt.in_output_flags(alias="-q", help="Print nothing but errors on stderr.")
    ] = False
    profile: Annotated[
        Profile,
        opt.in_connection(
            env_var="BCTRL_PROFILE",
            metavar="NAME",
            accepts_keys=False,
            n_tokens=1,
            show_default=False,
            completer=lambda _: [*_read_config()[1]],
            help="Profile of the config file.",
        ),
    ] = NO_PROFILE
    base_url: Annotated[
        opt.Text, opt.in_connection(metavar="URL", env_var="BCTRL_BASE_URL", help="URL of the API.")
    ] = _config.DEFAULT_BASE_URL
    timeout: Annotated[
        opt.Duration | None,
        opt.in_connection(show_default="60s; 10s to read", help="Time limit of one attempt."),
    ] = None
    attempts: Annotated[
        opt.Count | None,
        opt.in_connection(
            show_default="4; 2 to read", help="Attempts that may fail; 429 and 503 do not count."
        ),
    ] = None
    patience: Annotated[
        opt.Wait | None,
        opt.in_connection(
            show_default="5m, or --deadline; 60s to read",
            help="Time to wait while throttled (429, 503).",
        ),
    ] = None
    proxy: Annotated[
        opt.Text | None,
        opt.in_connection(
            metavar="URL", help="Proxy of all requests, instead of HTTPS_PROXY and NO_PROXY."
        ),
    ] = None
    ca_file: Annotated[
        opt.File | None,
        opt.in_connection(metavar="PEM", help="Trust the CAs in this file, not the system's."),
    ] = None

    def workspace(self, given: str | None, *, is_needed: bool = False) -> str:
        """Return the given workspace, or else the workspace of the profile or the environment."""
        workspace = given or self.profile.workspace
        if is_needed and not workspace:
            problem = "give WORKSPACE, set BCTRL_WORKSPACE, or name a profile with it"
            if self.profile.title:
                problem = f"give WORKSPACE, or add workspace to {self.profile.title}"
            raise BctrlConfigError(problem)
        return workspace

    def split_names(
        self,
        names: tuple[str, ...],
        workspace: str | None,
        command: str,
        *,
        has_aliases: bool = True,
    ) -> tuple[str, tuple[str, ...]]:
        """Return the workspace and the aliases of names, of which the first may be a workspace."""
        if workspace is not None:
            return workspace, names
        default = self.workspace(None) if has_aliases else ""
        if default and not names[1:]:
            return default, names
        if default and names[0] != default:
            words = textwrap.shorten(shlex.join(names), _MAX_WORDS, placeholder=" …")
            raise BctrlConfigError(
                f"{names[0]!r} may be a workspace, or an alias of {default!r}, the default",
                advice=f"Run {command} -w {shlex.quote(default)} {words}, or {command} -w {words}",
            )
        return "".join(names[:1]), names[1:]

    def key(self) -> tuple[str, str]:
        """Return the API key and where it comes from; raise an error if there is none."""
        title, variable, *_ = self.profile
        origin = f"{variable} (api_key_env of {title})" if title else variable
        if not (key := os.environ.get(variable)):
            raise BctrlConfigError(f"no API key: set {origin}")
        return key, origin

    def explain(self, error: BctrlError | None, *, deadline: float | None = None) -> None:
        """Say in an error where the API key comes from, and which deadline the user gave."""
        if isinstance(error, BctrlAuthenticationError):
            error.advice = f"Check the API key from {self.key()[1]}"
        if error is not None and deadline is not None:
            # The run's deadline is what a listing has left of the given deadline.
            given = f"the deadline of {format_duration(deadline)} "
            error.summary = re.sub(r"the deadline of \S+ ", given, error.summary)

    def proxy_in_effect(self) -> str | None:
        """Return the proxy; None for a direct connection."""
        if self.proxy is not None:
            return self.proxy
        url = _config.base_url(self.base_url, allow_plaintext=False)
        # Plain http is for loopback alone: a proxy, on another machine, could read the key.
        proxy = getproxies().get("https") if url.scheme == "https" else None
        if not proxy or proxy_bypass(url.authority):
            return None
        return proxy if "://" in proxy else f"http://{proxy}"

    def session(
        self,
        *,
        reads: bool = False,
        needs_key: bool = True,
        max_connections: int = 100,
        rate: float | None = None,
        pace: str | None = None,
    ) -> "bctrl_async.BctrlSession":
        """Make a session with these options; `reads` gives it a short timeout and few attempts."""
        timeout, attempts = (10.0, 2) if reads else (60.0, 4)
        shared_rate = open_rate(rate, pace, self.profile.origins.get("pace", "--pace"))
        key, origin = self.key() if needs_key else ("not-needed", "")
        try:
            return bctrl_async.BctrlSession(
                key,
                base_url=self.base_url,
                timeout=self.timeout or timeout,
                max_connections=max_connections,
                retry=bctrl_async.RetryPolicy(
                    attempts=self.attempts or attempts, patience=self.patience
                ),
                rate=shared_rate,
                proxy=self.proxy_in_effect(),
                ssl=ssl.create_default_context(cafile=self.ca_file) if self.ca_file else None,
            )
        except OSError as error:
            is_read = isinstance(error, ssl.SSLError)
            problem = "it has no certificate in PEM format" if is_read else error.strerror
            raise BctrlConfigError(f"cannot read the CA file {self.ca_file}: {problem}") from error
        except BctrlConfigError as error:
            # The error names an argument; the user set an option, a variable or a profile's key.
            origins = {"proxy": "HTTPS_PROXY", **self.profile.origins}
            origins["api_key"] = f"API key from {origin}"
            _, _, reason = error.summary.partition(": ")
            name = origins.get(str(error.argument), error.argument)
            raise BctrlConfigError(f"invalid {name}: {reason}") from error


CONNECTION = Connection()
