"""The event loop of the command, whose threads nobody waits for."""

from __future__ import annotations

import asyncio

import pytest

from bctrl_async.cli import _loop


def test_what_a_thread_raises_is_raised_where_it_is_awaited() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().run_in_executor(None, int, "x")

    with pytest.raises(ValueError, match="invalid literal"):
        _loop.run(main())
