"""A few seeds of `chaos.py`, one for each ending; CI runs more."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import ChaosRun, Ending


@pytest.mark.parametrize("seed", range(61, 61 + len(Ending)))
async def test_every_target_has_one_outcome_that_matches_the_server(
    seed: int, tmp_path: Path
) -> None:
    verdict = await ChaosRun(seed, 100, tmp_path).run()

    assert verdict.problems == []
    assert verdict.report.total > 0
