"""One seed of `shards.py`: shards that are killed with SIGKILL, and started again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from shards import ShardsRun

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL"
)


async def test_four_shards_killed_at_any_moment_settle_every_target_once(
    tmp_path: Path,
) -> None:
    verdict = await ShardsRun(4, 400, tmp_path, kills=2).run()

    assert verdict.problems == []
    assert verdict.kills > 0
