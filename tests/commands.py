"""The commands of the command line, as the app has them."""

from __future__ import annotations

from typing import cast

from click import Group
from typer.main import get_command

from bctrl_async.cli._app import app

COMMANDS = list(cast("Group", get_command(app)).commands)
