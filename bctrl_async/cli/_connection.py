"""The connection that options, variables and a profile of the config file describe."""

import os
import ssl
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.request import getproxies, proxy_bypass

import msgspec
from cyclopts import Parameter, Token
from cyclopts.argument import ArgumentCollection

from bctrl_async import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    BctrlTimeoutError,
    RetryPolicy,
    _config,
)
from bctrl_async.cli import _options as opt
from bctrl_async.pace import Pace

_KEY = "BCTRL_API_KEY"
_URL = "BCTRL_BASE_URL"
_WORKSPACE = "BCTRL_WORKSPACE"
_DEFAULT = "default"
"""The profile that is used unless another is named."""
_NO_KEY = "not-needed"
"""The key of a session that sends nothing."""
_TIMEOUT = opt.in_connection(help="Time limit of one attempt.")
ATTEMPTS = opt.in_connection(help="Attempts that may fail; 429 and 503 do not count.")
_PUBLIC_API = opt.Setting.of(_config.DEFAULT_BASE_URL)
_PATHS = ("ca_file", "pace")
"""Keys of a profile whose paths are relative to the folder of its file."""
_KEYS = (
    *("api_key_env", "workspace", "base_url", "timeout", "attempts", "patience", "proxy", "rate"),
    *_PATHS,
)

# The session advises to pass arguments; here they are options, variables and keys of a profile.
_ADVICE = {
    "api_key": "Expected visible ASCII characters, without 'Bearer '",
    "base_url": f"Give an https URL such as {_config.DEFAULT_BASE_URL}; http on this machine only",
    "proxy": "Give a URL such as http://proxy.example.com:3128, for an https API only",
}


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The config file."""

    profiles: dict[str, dict[str, Any]] = {}


class Profile:
    """A profile of the config file, or the lack of one; `is_named` by an option or a variable."""

    def __init__(
        self, name: str, file: Path, table: Mapping[str, object] | None, *, is_named: bool
    ) -> None:
        self.name = name
        self.file = file
        self.exists = table is not None
        self.is_named = is_named
        self.values = {key: self._text(key, value) for key, value in (table or {}).items()}

    def __str__(self) -> str:
        return f"profile {self.name!r} of {self.file}"

    def origin(self, key: str) -> str:
        """Return how messages name one of its keys."""
        return f"{key} in {self}"

    def _text(self, key: str, value: object) -> str:
        """Return a value as the command line would have it."""
        if key == "api_key":
            self._fail("the API key must not be in it: use api_key_env")
        if key not in _KEYS:
            self._fail(f"unknown key {key}: expected one of {', '.join(_KEYS)}")
        if isinstance(value, bool | list | dict):
            self._fail(f"invalid {key}: expected a text or a number")
        text = str(value)
        if key == "api_key_env" and not (text.isidentifier() and text.isupper()):
            # It is not shown, for it may be the key itself.
            self._fail("invalid api_key_env: expected a variable in capitals, such as STAGING_KEY")
        is_path = key in _PATHS and text and ":" not in text
        return str(self.file.parent / _expand(text)) if is_path else text

    def _fail(self, problem: str) -> NoReturn:
        raise BctrlConfigError(f"{self}: {problem}")


NO_PROFILE = Profile(_DEFAULT, Path(), None, is_named=False)


def _config_file() -> Path:
    """Return the path of the config file, which need not exist."""
    if given := os.environ.get("BCTRL_CONFIG"):
        return Path(given).absolute()
    folder = os.environ.get("XDG_CONFIG_HOME") or os.environ.get("APPDATA") or "~/.config"
    return Path(_expand(folder), "bctrl-async", "config.toml")


def _expand(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 - a Path fails where there is no home.


def _read_profiles(file: Path) -> Mapping[str, Mapping[str, object]]:
    """Return the tables of the profiles."""
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        if os.environ.get("BCTRL_CONFIG"):
            raise BctrlConfigError(f"there is no {file}", advice="Check BCTRL_CONFIG") from error
        return {}
    except OSError as error:
        raise BctrlConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise BctrlConfigError(f"invalid {file}: {error}") from error
    try:
        return msgspec.convert(tables, _File).profiles
    except msgspec.ValidationError as error:
        raise BctrlConfigError(f"invalid {file}: write the keys below [profiles.NAME]") from error


def _load_profile(name: str | None) -> Profile:
    """Return the profile with this name; None is the default one, which need not exist."""
    file = _config_file()
    tables = _read_profiles(file)
    if name is not None and name not in tables:
        known = f"{file} has {', '.join(sorted(tables)) or 'none'}"
        raise BctrlConfigError(
            f"unknown profile {name!r}", advice=known if file.exists() else f"There is no {file}"
        )
    table = tables.get(name or _DEFAULT)
    return Profile(name or _DEFAULT, file, table, is_named=name is not None)


def _profile_names(_: object) -> Iterable[str]:
    return list(_read_profiles(_config_file()))


def apply_profile(_: object, __: object, arguments: ArgumentCollection) -> None:
    """Give options the values of a profile.

    An option precedes the profile. A variable precedes the default profile, but not one that the
    user named, whose key must not go to the URL of a variable.
    """
    chosen = arguments.get("--profile", None)
    if chosen is None:
        return
    # An empty variable is an unset one.
    named = [token.value for token in chosen.tokens if token.value or token.source != "env"]
    profile = _load_profile(named[0] if named else None)
    chosen.tokens[:] = [Token(keyword="--profile", implicit_value=profile)]
    for argument in arguments:
        key = argument.name.lstrip("-").replace("-", "_")
        for variable in [token for token in argument.tokens if token.source == "env"]:
            is_url = key == "base_url"
            is_behind = key in profile.values or (is_url and variable.value)
            # An empty URL must not stand for the public API.
            if (profile.is_named and is_behind) or not (variable.value or is_url):
                argument.tokens.remove(variable)
        if not argument.tokens and key in profile.values:
            token = Token(keyword=profile.origin(key), value=profile.values[key], source="profile")
            argument.append(token)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Connection:
    """The options of the connection, how much is printed, and the session made from them."""

    verbose: Annotated[
        bool, opt.in_output(alias="-v", show_default=False, help="Print what is retried, and why.")
    ] = False
    quiet: Annotated[
        bool,
        opt.in_output(alias="-q", show_default=False, help="Print nothing but errors on stderr."),
    ] = False
    profile: Annotated[
        Profile,
        opt.in_connection(
            env_var="BCTRL_PROFILE",
            metavar="NAME",
            accepts_keys=False,
            n_tokens=1,
            show_default=False,
            completer=_profile_names,
            help="Profile of the config file.",
        ),
    ] = NO_PROFILE
    base_url: Annotated[
        opt.Given, opt.in_connection(metavar="URL", env_var=_URL, help="URL of the API.")
    ] = _PUBLIC_API
    timeout: Annotated[opt.Duration, _TIMEOUT] = 60.0
    attempts: Annotated[opt.Count, ATTEMPTS] = 4
    patience: Annotated[
        opt.Wait | None,
        opt.in_connection(
            show_default="5m, or --deadline",
            help="Time that each target may wait while throttled (429, 503).",
        ),
    ] = None
    proxy: Annotated[
        opt.Given | None,
        opt.in_connection(
            metavar="URL", help="Proxy of all requests; else HTTPS_PROXY and NO_PROXY decide."
        ),
    ] = field(default=None, repr=False)
    """It may contain a password."""
    ca_file: Annotated[
        opt.File | None,
        opt.in_connection(
            metavar="PEM", help="Trust the CAs in this file, not those of the system."
        ),
    ] = None

    def workspace(self, given: str | None) -> str | None:
        """Return the workspace that is given, or that of the environment or the profile."""
        variable, values = os.environ.get(_WORKSPACE), self.profile.values
        if self.profile.is_named:
            return given or values.get("workspace") or None
        return given or variable or values.get("workspace") or None

    def key_source(self) -> opt.Setting:
        """Return the variable that has the API key; raise an error if there is none for this URL.

        The key of one account must not go to the URL of another. So a profile that the user named
        precedes BCTRL_API_KEY, as does the default one for its own URL if it has a key; and the key
        of the default profile is not for BCTRL_BASE_URL.
        """
        profile, origin = self.profile, self.base_url.origin
        variable = profile.values.get("api_key_env")
        has_both = variable is not None and origin == profile.origin("base_url")
        if not (profile.is_named or has_both):
            if os.environ.get(_KEY):
                return opt.Setting.of(_KEY, _KEY)
            if variable is None:
                raise BctrlConfigError(f"no API key: set {_KEY}")
            if origin == _URL:
                raise BctrlConfigError(
                    f"no API key: set {_KEY} as well as {_URL}",
                    advice=f"The key of {profile} is for its own URL",
                )
        if variable is None:
            raise BctrlConfigError(f"no API key in {profile}", advice="Add api_key_env")
        return opt.Setting.of(variable, f"{variable} (api_key_env of {profile})")

    def explain(self, error: BctrlError | None) -> None:
        """Name in the advice of an error where the API key comes from, or an option."""
        if isinstance(error, BctrlAuthenticationError):
            error.advice = f"Check the API key from {self.key_source().origin}"
        elif isinstance(error, BctrlTimeoutError) and error.advice is None:
            error.advice = "Allow a longer --timeout; retrying is safe"

    @cached_property
    def proxy_in_effect(self) -> opt.Setting | None:
        """The proxy; None for a direct connection."""
        if self.proxy is not None:
            return self.proxy
        url = _config.base_url(self.base_url, allow_plaintext=False)
        # A proxy is another machine: loopback traffic, which may go without TLS, must not reach it.
        proxy = getproxies().get("https") if url.scheme == "https" else None
        if not proxy or proxy_bypass(url.authority):
            return None
        return opt.Setting.of(proxy if "://" in proxy else f"http://{proxy}", "HTTPS_PROXY")

    @cached_property
    def _tls(self) -> ssl.SSLContext | None:
        """The TLS context; None for the default one."""
        if self.ca_file is None:
            return None
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            # An error of TLS is one as well, and has no words for a file without certificates.
            problem = "no PEM certificates" if isinstance(error, ssl.SSLError) else error.strerror
            raise BctrlConfigError(f"cannot read the CA file {self.ca_file}: {problem}") from error

    def session(
        self,
        *,
        needs_key: bool = True,
        max_connections: int = 100,
        rate: float | None = None,
        pace: Pace | None = None,
    ) -> BctrlSession:
        """Make a session with these options."""
        source = self.key_source() if needs_key else opt.Setting.of("", "")
        # A key in a file or a secret store often ends with a line end, which is none of it.
        key = os.environ.get(source, "").rstrip("\r\n")
        if needs_key and not key:
            raise BctrlConfigError(f"no API key from {source.origin}: it is not set")
        proxy: opt.Setting | None = None
        try:
            proxy = self.proxy_in_effect
            return BctrlSession(
                key or _NO_KEY,
                base_url=self.base_url,
                timeout=self.timeout,
                max_connections=max_connections,
                retry=RetryPolicy(attempts=self.attempts, patience=self.patience),
                rate=rate,
                pace=pace,
                proxy=proxy,
                ssl=self._tls,
            )
        except BctrlConfigError as error:
            if error.argument not in _ADVICE:
                raise
            # The session names its arguments; the user has set something else.
            origin = {
                "api_key": f"API key from {source.origin}",
                "base_url": self.base_url.origin,
                "proxy": "" if proxy is None else proxy.origin,
            }[error.argument]
            reason = error.summary.partition(": ")[1:] if error.argument == "base_url" else ()
            raise BctrlConfigError(
                f"invalid {origin}{''.join(reason)}", advice=_ADVICE[error.argument]
            ) from error


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReadConnection(Connection):
    """The options of a command that only reads, whose user should not wait for minutes."""

    timeout: Annotated[opt.Duration, _TIMEOUT] = 10.0
    attempts: Annotated[opt.Count, ATTEMPTS] = 2
    patience: Annotated[
        opt.Wait | None,
        opt.in_connection(show_default="60s", help="Time to wait while throttled (429, 503)."),
    ] = None


STOPPING = Connection()
READING = ReadConnection()
