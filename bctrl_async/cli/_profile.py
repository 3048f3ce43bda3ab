"""The config file, and the values that its profile or the variables give to options."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from cyclopts import Token
from cyclopts.argument import ArgumentCollection

from bctrl_async import BctrlConfigError

_PATH_KEYS = ("ca_file", "pace")
"""The keys whose values may be paths, relative to the folder of the config file."""
_KEYS = (
    "api_key_env",
    "workspace",
    "base_url",
    "timeout",
    "attempts",
    "patience",
    "proxy",
    "rate",
    *_PATH_KEYS,
)

# `Path.expanduser` would fail without a home folder.
_expand = os.path.expanduser


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The config file."""

    profiles: dict[str, dict[str, str | int | float]] = {}


@dataclass(frozen=True)
class Profile:
    """The profile in use. An empty title stands for the variables alone."""

    title: str = ""
    key_variable: str = "BCTRL_API_KEY"
    workspace: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """The option, variable or key that each value comes from, by the value's key."""

    @property
    def key_origin(self) -> str:
        """The place where the API key comes from."""
        if self.title:
            return f"{self.key_variable} (api_key_env of {self.title})"
        return self.key_variable


NO_PROFILE = Profile()


def read_config() -> tuple[Path, Mapping[str, Mapping[str, str | int | float]]]:
    """Return the path of the config file, and the tables of its profiles."""
    folder = (
        os.environ.get("XDG_CONFIG_HOME") or os.environ.get("APPDATA") or "~/.config"
    )
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
    file, tables = read_config()
    if name not in tables:
        names = ", ".join(sorted(tables)) or "none"
        raise BctrlConfigError(
            f"unknown profile {name!r}", advice=f"{file} has {names}"
        )
    title = f"profile {name!r} of {file}"
    values = {key: str(value) for key, value in tables[name].items()}
    unknown = values.keys() - set(_KEYS)
    if unknown:
        problem = f"unknown key {min(unknown)}: expected one of {', '.join(_KEYS)}"
        raise BctrlConfigError(f"{title}: {problem}")
    variable = values.pop("api_key_env", "")
    if not (variable.isidentifier() and variable.isupper()):
        # The value is not shown, for it may be the key itself.
        problem = "api_key_env must name a variable in capitals, such as STAGING_KEY"
        raise BctrlConfigError(f"{title}: {problem}")
    for key in values.keys() & set(_PATH_KEYS):
        # A value with a colon is a URL, an address, or a whole path of Windows.
        if ":" not in values[key]:
            values[key] = str(file.parent / _expand(values[key]))
    return Profile(title, variable, values.pop("workspace", ""), values)


def _choose_profile(tokens: Iterable[Token]) -> Profile:
    """Return the profile that an option or a variable names."""
    for token in tokens:
        # An empty variable counts as unset.
        if token.value or token.source != "env":
            return _read_profile(token.value)
    return Profile(workspace=os.environ.get("BCTRL_WORKSPACE", ""))


def apply_profile(_: object, __: object, arguments: ArgumentCollection) -> None:
    """Give options the values of the profile in use, and note their origins."""
    option = arguments.get("--profile", None)
    if option is None:
        return
    profile = _choose_profile(option.tokens)
    option.tokens[:] = [Token(implicit_value=profile)]
    for argument in arguments:
        key = argument.name.lstrip("-").replace("-", "_")
        tokens = argument.tokens
        tokens[:] = [token for token in tokens if not _is_ignored(profile, key, token)]
        if not tokens and key in profile.values:
            origin = f"{key} in {profile.title}"
            tokens.append(Token(keyword=origin, value=profile.values[key]))
        if tokens:
            profile.origins[key] = tokens[0].keyword or ""


def _is_ignored(profile: Profile, key: str, token: Token) -> bool:
    """Return True for a variable that is empty, or that a profile in use replaces."""
    if token.source != "env":
        return False
    if profile.title:
        return True
    # An empty URL is an error: it must not stand for the public API.
    return not token.value and key != "base_url"
