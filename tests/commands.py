"""The commands of the command line, as the app has them."""

from __future__ import annotations

from bctrl_async.cli._app import app

COMMANDS = [name for name in app if not name.startswith("-")]
