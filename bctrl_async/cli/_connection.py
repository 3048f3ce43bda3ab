"""The connection that options, variables and a profile of the config file describe."""

import os
import shlex
import ssl
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

import bctrl_async
from bctrl_async import BctrlAuthenticationError, BctrlConfigError, BctrlError, _config
from bctrl_async.cli import _options as opt
from bctrl_async.cli._profile import NO_PROFILE, Profile, read_config

if TYPE_CHECKING:
    from bctrl_async.pace import Pace

_WORDS_WIDTH = 40
"""The most characters of names that an error repeats."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Connection:
    """The options of the connection and of how much is printed, and their session."""

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
    quiet: opt.Quiet = False
    profile: Annotated[
        Profile,
        opt.in_connection(
            env_var="BCTRL_PROFILE",
            metavar="NAME",
            accepts_keys=False,
            n_tokens=1,
            show_default=False,
            completer=lambda _: [*read_config()[1]],
            help="Profile of the config file.",
        ),
    ] = NO_PROFILE
    base_url: Annotated[
        opt.Text,
        opt.in_connection(
            metavar="URL", env_var="BCTRL_BASE_URL", help="URL of the API."
        ),
    ] = _config.DEFAULT_BASE_URL
    timeout: Annotated[
        opt.Duration | None,
        opt.in_connection(
            show_default="60s in stop, else 10s", help="Time limit of one attempt."
        ),
    ] = None
    attempts: Annotated[
        opt.Count | None,
        opt.in_connection(
            show_default="4 in stop, 2 in list and get",
            help="Attempts that may fail; 429 and 503 do not count.",
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
            metavar="URL",
            help="Proxy of all requests, instead of HTTPS_PROXY and NO_PROXY.",
        ),
    ] = None
    ca_file: Annotated[
        opt.File | None,
        opt.in_connection(
            metavar="PEM", help="Trust the CAs in this file, not the system's."
        ),
    ] = None

    def workspace(self, name: str | None, *, is_needed: bool = False) -> str:
        """Return this workspace, or the default, which is empty if there is none."""
        workspace = name or self.profile.workspace
        if workspace or not is_needed:
            return workspace
        if self.profile.title:
            raise BctrlConfigError(
                f"give WORKSPACE, or add workspace to {self.profile.title}"
            )
        raise BctrlConfigError(
            "give WORKSPACE, set BCTRL_WORKSPACE, or name a profile with it"
        )

    def split_names(
        self,
        names: tuple[str, ...],
        workspace: str | None,
        command: str,
        *,
        has_aliases: bool = True,
    ) -> tuple[str, tuple[str, ...]]:
        """Return the workspace and the aliases; the first name may be the workspace."""
        if workspace is not None:
            return workspace, names
        # A single name is an alias, but with --all or --from it is a workspace.
        default = self.profile.workspace if has_aliases else ""
        if default and len(names) <= 1:
            return default, names
        if default and names[0] != default:
            words = textwrap.shorten(shlex.join(names), _WORDS_WIDTH, placeholder=" …")
            problem = f"{names[0]!r} may be a workspace, or an alias of {default!r}"
            raise BctrlConfigError(
                f"{problem}, the default",
                advice=f"Run {command} -w {shlex.quote(default)} {words}, "
                f"or {command} -w {words}",
            )
        if not names:
            return "", names
        return names[0], names[1:]

    def key(self) -> str:
        """Return the API key, or raise an error if there is none."""
        key = os.environ.get(self.profile.key_variable)
        if not key:
            raise BctrlConfigError(f"no API key: set {self.profile.key_origin}")
        return key

    def explain(self, error: BctrlError | None) -> None:
        """Say in an error where the API key comes from."""
        if isinstance(error, BctrlAuthenticationError):
            error.advice = f"Check the API key from {self.profile.key_origin}"

    def proxy_in_effect(self) -> str | None:
        """Return the proxy; None for a direct connection."""
        if self.proxy is not None:
            return self.proxy
        url = _config.base_url(self.base_url, allow_plaintext=False)
        if url.scheme != "https":
            # Plain http is for loopback: a proxy on another machine could read the key.
            return None
        # The import would delay the help.
        from urllib.request import getproxies, proxy_bypass  # noqa: PLC0415 - above.

        proxy = getproxies().get("https")
        if not proxy or proxy_bypass(url.authority):
            return None
        if "://" not in proxy:
            return f"http://{proxy}"
        return proxy

    def read_session(self, attempts: int = 2) -> "bctrl_async.BctrlSession":
        """Make a session that only reads, and gives up sooner."""
        return self.session(timeout=10.0, attempts=attempts)

    def session(
        self,
        *,
        timeout: float = 60.0,
        attempts: int = 4,
        needs_key: bool = True,
        max_connections: int = 100,
        rate: "float | Pace | None" = None,
    ) -> "bctrl_async.BctrlSession":
        """Make a session with these options."""
        key = self.key() if needs_key else "not-needed"
        context = self._ssl_context()
        try:
            return bctrl_async.BctrlSession(
                key,
                base_url=self.base_url,
                timeout=self.timeout or timeout,
                max_connections=max_connections,
                retry=bctrl_async.RetryPolicy(
                    attempts=self.attempts or attempts, patience=self.patience
                ),
                rate=rate,
                proxy=self.proxy_in_effect(),
                ssl=context,
            )
        except BctrlConfigError as error:
            # The error names an argument, but the user set an option, variable or key.
            origins = {"proxy": "HTTPS_PROXY", **self.profile.origins}
            origins["api_key"] = f"API key from {self.profile.key_origin}"
            _, _, reason = error.summary.partition(": ")
            name = origins.get(str(error.argument), error.argument)
            raise BctrlConfigError(f"invalid {name}: {reason}") from error

    def _ssl_context(self) -> ssl.SSLContext | None:
        if self.ca_file is None:
            return None
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            problem = error.strerror
            if isinstance(error, ssl.SSLError):
                problem = "it has no certificate in PEM format"
            raise BctrlConfigError(
                f"cannot read the CA file {self.ca_file}: {problem}"
            ) from error


CONNECTION = Connection()
