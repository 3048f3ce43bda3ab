"""The API key, from the environment or from the variable that a profile names."""

import os
from typing import NamedTuple

from bctrl_async import BctrlConfigError
from bctrl_async.cli._profiles import Profile

VARIABLE = "BCTRL_API_KEY"
URL_VARIABLE = "BCTRL_BASE_URL"


class KeySource(NamedTuple):
    """The variable that has the API key, and the profile that names it, if any."""

    variable: str
    profile: Profile | None = None

    def __str__(self) -> str:
        return (
            self.variable
            if self.profile is None
            else f"{self.variable} (api_key_env of {self.profile})"
        )

    def read(self) -> str:
        """Return the key, or raise BctrlConfigError if the variable is not set."""
        key = os.environ.get(self.variable)
        if not key:
            raise BctrlConfigError(f"no API key from {self}: it is not set")
        return key


def find_key(profile: Profile, url_origin: str) -> KeySource:
    """Return where the API key comes from, or raise BctrlConfigError if there is none for this URL.

    The key of one account must not go to the URL of another. So a profile that the user named
    precedes BCTRL_API_KEY, as does the default one for its own URL if it has a key; and the key of
    the default profile is not for BCTRL_BASE_URL.
    """
    variable = profile.api_key_env
    has_both = variable is not None and url_origin == profile.origin("base_url")
    if not (profile.is_named or has_both):
        if os.environ.get(VARIABLE):
            return KeySource(VARIABLE)
        if variable is None:
            raise BctrlConfigError(f"no API key: set {VARIABLE}")
        if url_origin == URL_VARIABLE:
            raise BctrlConfigError(
                f"no API key: set {VARIABLE} as well as {URL_VARIABLE}",
                advice=f"The key of {profile} is for its own URL",
            )
    if variable is None:
        raise BctrlConfigError(f"no API key in {profile}", advice="Add api_key_env")
    return KeySource(variable, profile)
