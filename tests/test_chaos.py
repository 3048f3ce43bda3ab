"""A few seeds of `chaos.py`, one for each way in which a run can end; CI runs many more."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import Ending, Storm


@pytest.mark.parametrize("seed", range(6, 6 + len(Ending)))
async def test_every_target_has_one_outcome_that_the_server_does_not_contradict(
    seed: int, tmp_path: Path
) -> None:
    books = await Storm(seed, 150, tmp_path).rage()

    assert books.problems == []
    assert books.report.total > 0
