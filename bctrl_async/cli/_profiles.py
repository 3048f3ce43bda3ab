"""The config file and its profiles: values of options, and where the API key comes from."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer

from bctrl_async import BctrlConfigError
from bctrl_async.cli._options import check_positive, duration
from bctrl_async.cli._pace import is_address

DEFAULT = "default"
"""The profile that is used unless another is named."""

_Text = Annotated[str, msgspec.Meta(min_length=1)]
_is_variable = re.compile("[A-Z_][A-Z0-9_]*").fullmatch


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The config file."""

    profiles: dict[str, dict[str, Any]] = {}


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The keys of a profile."""

    api_key_env: _Text | None = None
    base_url: _Text | None = None
    timeout: _Text | None = None
    attempts: Annotated[int, msgspec.Meta(ge=1)] | None = None
    patience: _Text | None = None
    proxy: _Text | None = None
    ca_file: _Text | None = None
    rate: float | None = None
    pace: _Text | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A profile of the config file, or the lack of one; `is_named` by an option or a variable."""

    name: str = DEFAULT
    file: Path
    exists: bool = True
    is_named: bool = False
    api_key_env: str | None = None
    options: Mapping[str, object] = {}

    def __str__(self) -> str:
        return f"profile {self.name!r} of {self.file}"

    def origin(self, key: str) -> str:
        """Return how messages name one of its keys."""
        return f"{key} in {self}"


def config_file() -> Path:
    """Return the path of the config file, which need not exist."""
    given = os.environ.get("BCTRL_CONFIG")
    return Path(given or Path(typer.get_app_dir("bctrl-async")) / "config.toml").absolute()


def profile_names() -> list[str]:
    """Return the names of the profiles, for the completion of a shell."""
    try:
        return list(_read(config_file()))
    except BctrlConfigError:
        return []


def load_profile(name: str | None) -> Profile:
    """Return the profile with this name; None is the default one, which need not exist."""
    file = config_file()
    tables = _read(file)
    if name is None and DEFAULT not in tables:
        return Profile(file=file, exists=False)
    table = tables.get(name or DEFAULT)
    if table is None:
        known = f"{file} has {', '.join(sorted(tables)) or 'none'}"
        raise BctrlConfigError(
            f"unknown profile {name!r}", advice=known if file.exists() else f"There is no {file}"
        )
    return _Parser(name or DEFAULT, file, is_named=name is not None).parse(table)


def _read(file: Path) -> Mapping[str, dict[str, Any]]:
    """Return the tables of the profiles."""
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        if os.environ.get("BCTRL_CONFIG"):
            raise BctrlConfigError(f"there is no {file}", advice="Check BCTRL_CONFIG") from error
        return {}
    except OSError as error:
        raise BctrlConfigError(f"cannot read {file}: {error.strerror}") from error
    try:
        return msgspec.toml.decode(content, type=_File).profiles
    except msgspec.ValidationError as error:
        raise BctrlConfigError(
            f"invalid {file}: {_plain(error)}", advice="Write the keys below [profiles.NAME]"
        ) from error
    # In msgspec 0.19, its errors are not ValueErrors.
    except (ValueError, msgspec.DecodeError) as error:
        raise BctrlConfigError(f"invalid {file}: {error}") from error


class _Parser:
    """A parser of one profile, whose errors name the file, the profile and the key."""

    def __init__(self, name: str, file: Path, *, is_named: bool) -> None:
        self._name = name
        self._file = file
        self._is_named = is_named

    def parse(self, table: Mapping[str, object]) -> Profile:
        """Return the profile in a table of the file."""
        if "api_key" in table:
            self._fail("the API key must not be in it: use api_key_env")
        fields = {field.name: field.type for field in msgspec.structs.fields(Settings)}
        if unknown := sorted(table.keys() - fields):
            self._fail(f"unknown key {unknown[0]}: expected one of {', '.join(fields)}")
        values = {name: self._convert(name, value, fields[name]) for name, value in table.items()}
        settings = Settings(**values)
        if settings.api_key_env and not _is_variable(settings.api_key_env):
            # It is not shown, for it may be the key itself.
            self._fail("invalid api_key_env: expected a variable in capitals, such as STAGING_KEY")
        options = {
            "base_url": settings.base_url,
            "timeout": self._check("timeout", settings.timeout, _positive_duration),
            "attempts": settings.attempts,
            "patience": self._check("patience", settings.patience, duration),
            "proxy": settings.proxy,
            "ca_file": settings.ca_file and self._path("ca_file", settings.ca_file),
            "rate": self._check("rate", settings.rate, check_positive),
            "pace": settings.pace and self._place(settings.pace),
        }
        return Profile(
            name=self._name,
            file=self._file,
            is_named=self._is_named,
            api_key_env=settings.api_key_env,
            options={name: value for name, value in options.items() if value is not None},
        )

    def _convert(self, name: str, value: object, kind: object) -> Any:  # noqa: ANN401 - of any kind.
        try:
            converted = msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            self._fail(f"invalid {name}: {_plain(error)}")
        if isinstance(converted, str) and "\0" in converted:
            # No path and no name of a host has one.
            self._fail(f"invalid {name}: it has a null character")
        return converted

    def _check(self, name: str, value: Any, check: Callable[[Any], object]) -> object:  # noqa: ANN401 - of any kind.
        try:
            return None if value is None else check(value)
        except typer.BadParameter as error:
            self._fail(f"invalid {name}: {error.message}")

    def _path(self, name: str, path: str) -> str:
        """Return a path that does not depend on the folder in which the command runs."""
        try:
            return str(self._file.parent / Path(path).expanduser())
        except RuntimeError:
            self._fail(f"invalid {name}: there is no home folder for {path!r}")

    def _place(self, place: str) -> str:
        return place if "://" in place or is_address(place) else self._path("pace", place)

    def _fail(self, problem: str) -> NoReturn:
        raise BctrlConfigError(f"profile {self._name!r} of {self._file}: {problem}")


def _positive_duration(text: str) -> float | None:
    return check_positive(duration(text))


def _plain(error: msgspec.ValidationError) -> str:
    """Return the text of an error without what only readers of JSON know."""
    text = str(error).partition(" - at ")[0].replace(" | null", "").replace("`", "")
    return text[:1].lower() + text[1:]
