"""Bulk stops that are killed at random moments: `tests/nightly/crash.py` has more."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from crash import crash


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
async def test_runs_killed_at_any_moment_and_resumed_stop_every_target(
    tmp_path: Path,
) -> None:
    assert "nothing lost or false" in await crash(kills=12, seed=4, folder=tmp_path)
