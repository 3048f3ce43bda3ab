"""The API key, from the environment or from where a profile says."""

import os
import subprocess
import time
from collections.abc import Sequence
from threading import Thread
from typing import IO, NamedTuple, NoReturn

from bctrl_async import BctrlConfigError
from bctrl_async.cli._profiles import Profile

VARIABLE = "BCTRL_API_KEY"
URL_VARIABLE = "BCTRL_BASE_URL"
_COMMAND_TIMEOUT = 60.0
_MAX_OUTPUT = 65536
"""Bytes; a key and what password managers print below it take much less."""


class KeySource(NamedTuple):
    """The origin of the API key: a variable, or the command of a profile.

    Attributes:
        variable: The variable; empty for a command.
        command: The command.
        profile: The profile that names it; None for BCTRL_API_KEY.
    """

    variable: str = ""
    command: Sequence[str] = ()
    profile: Profile | None = None

    def __str__(self) -> str:
        name = self.variable or f"the command {self.command[0]!r}"
        key = "api_key_env" if self.variable else "api_key_command"
        return name if self.profile is None else f"{name} ({key} of {self.profile})"

    def read(self) -> str:
        """Return the key.

        Raises:
            BctrlConfigError: It cannot be read. The error does not contain it.
        """
        key = os.environ.get(self.variable) if self.variable else self._run()
        return key or self._fail("it is not set" if self.variable else "it printed nothing")

    def _run(self) -> str:
        try:
            # Not with our stdin, which may have targets. It shares our stderr, so that it can say
            # what is wrong, or ask to touch a security key.
            process = subprocess.Popen(  # noqa: S603 - the user's own command.
                self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
            )
        except OSError as error:
            self._fail(f"it cannot be run: {error.strerror}")
        try:
            printed = _read(process)
        except subprocess.TimeoutExpired:
            self._fail(f"it took more than {_COMMAND_TIMEOUT:g} s")
        finally:
            process.kill()
            process.wait()
        if len(printed) > _MAX_OUTPUT:
            self._fail(f"it printed more than {_MAX_OUTPUT // 1024} KiB")
        if process.returncode:
            self._fail(f"it failed with exit code {process.returncode}")
        # Password managers print further fields below the password.
        return printed.decode(errors="replace").strip().partition("\n")[0].strip()

    def _fail(self, problem: str) -> NoReturn:
        # The cause would have the output of the command.
        raise BctrlConfigError(f"no API key from {self}: {problem}") from None


def _read(process: subprocess.Popen[bytes]) -> bytes:
    """Return what a command prints, and wait for its end unless it prints too much.

    Raises:
        subprocess.TimeoutExpired: It takes too long.
    """
    ends = time.monotonic() + _COMMAND_TIMEOUT
    printed: list[bytes] = []

    def read(stdout: IO[bytes]) -> None:
        with stdout:
            printed.append(stdout.read(_MAX_OUTPUT + 1))
            if len(printed[0]) > _MAX_OUTPUT:
                # Before the pipe is closed, of which the command would complain.
                process.kill()

    # A thread: a read of a pipe has no timeout, and a child of the command may keep it open.
    reader = Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    reader.join(_COMMAND_TIMEOUT)
    if not printed:
        raise subprocess.TimeoutExpired(process.args, _COMMAND_TIMEOUT)
    if len(printed[0]) <= _MAX_OUTPUT:
        process.wait(max(ends - time.monotonic(), 0.0))
    return printed[0]


def find_key(profile: Profile, url_origin: str) -> KeySource:
    """Return where the API key comes from.

    The key of one account must not go to the URL of another. So a profile that the user named
    precedes BCTRL_API_KEY, as does the default one for its own URL if it has a key; and the key of
    the default profile is not for BCTRL_BASE_URL.

    Args:
        profile: The profile in effect.
        url_origin: Where the URL of the API comes from.

    Raises:
        BctrlConfigError: There is no key for this URL.
    """
    has_key = bool(profile.api_key_env or profile.api_key_command)
    has_both = has_key and url_origin == profile.origin("base_url")
    if not (profile.is_named or has_both):
        if os.environ.get(VARIABLE):
            return KeySource(VARIABLE)
        if not has_key:
            raise BctrlConfigError(f"no API key: set {VARIABLE}")
        if url_origin == URL_VARIABLE:
            raise BctrlConfigError(
                f"no API key: set {VARIABLE} as well as {URL_VARIABLE}",
                advice=f"The key of {profile} is for its own URL",
            )
    if not has_key:
        raise BctrlConfigError(
            f"no API key in {profile}", advice="Add api_key_env or api_key_command"
        )
    return KeySource(profile.api_key_env or "", profile.api_key_command or (), profile)
