"""The command `bctrl-async`."""

from bctrl_async.cli._app import main

__all__ = ["main"]
