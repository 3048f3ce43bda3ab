"""A few seeds of `simulate.py`, and proofs that it finds faults."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from sim.faults import FAULTS
from sim.runner import simulate
from sim.server import ListFault, SimulatedServer

from bctrl_async import BctrlError, BctrlSession, RetryPolicy, Runtime

SCRIPT = Path(__file__).with_name("simulate.py")
SEEDS = [*range(60), 2358, 5448, 16451, 17879, 19500, 23311, 31668, 89738]
"""The first, and some of thirteen in 100,000 that failed: clusters of dead targets,
probes that their callers cancel, canaries that are never answered, the timer of a
forgotten lane, and a slot or a timer that a closed session has left."""
FOUND_BY = {
    "accepted-ok": 45,
    "another-runtime": 62,
    "caught-up": 519,
    "costly-429": 42,
    "costly-descriptor": 626,
    "dead-target": 90,
    "dead-upstream": 1461,
    "deaf-lists": 1377,
    "ended-start": 76,
    "foreign-4xx": 119,
    "foreign-503": 211,
    "forgotten-list": 20,
    "gateway-retry-after": 2624,
    "hasty-lists": 788,
    "held-input": 318,
    "held-retries": 113,
    "held-workers": 15,
    "last-list": 216,
    "late-answer": 70,
    "late-poll": 1545,
    "limit-by-targets": 316,
    "lost-slot": 291,
    "lone-503": 2375,
    "long-list": 1151,
    "lookup-raises": 266,
    "no-lane": 37,
    "no-lists": 1545,
    "no-move": 1782,
    "one-tenant": 252,
    "own-work": 119,
    "page-accepted": 23,
    "skipped-look": 440,
    "stray-answer": 23,
    "trusted-word": 1523,
    "uncorrected": 1450,
    "unread-journal": 66,
    "unread-ok": 16,
    "unseen-start": 76,
}
"""The first seeds that find rare faults. Others are tried if they no longer do."""


def run(*args: str, hash_seed: str = "random") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *args],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONIOENCODING": "utf-8"},
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_every_outcome_is_true_and_nothing_is_left_behind(seed: int) -> None:
    verdict = simulate(seed)

    assert verdict.problems == [], "\n".join([verdict.plan, *verdict.trace])


@pytest.mark.parametrize("seed", range(20))
def test_runs_that_share_a_journal_leave_a_true_journal(seed: int) -> None:
    verdict = simulate(seed, shares_journal=True)

    assert verdict.problems == [], "\n".join([verdict.plan, *verdict.trace])


@pytest.mark.parametrize("options", [[], ["--share-journal"]])
def test_the_same_seeds_give_the_same_traces(options: list[str]) -> None:
    first, second = (
        run("--seeds", "10", "--trace", *options, hash_seed=seed) for seed in ("1", "2")
    )

    assert first.stdout.count("\n") > 100
    assert first.stdout == second.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_is_put_back_is_found(fault: str) -> None:
    rule = FAULTS[fault].rule
    seeds = [FOUND_BY.get(fault, 0), *range(1000)]

    assert any(rule in dict(simulate(seed, fault).problems) for seed in seeds)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (ListFault.LATE, None),
        (ListFault.PARTIAL, "a page of a longer list"),
        (ListFault.UNREADABLE, "is not JSON"),
        (ListFault.UNREADABLE_ITEM, "not a valid Runtime"),
        (ListFault.DUPLICATE, None),
        (ListFault.ERROR, "the server answered"),
    ],
)
async def test_the_simulated_server_has_lists_that_fail_after_those_that_do_not(
    fault: ListFault, error: str | None
) -> None:
    async with (
        SimulatedServer(
            stop_seconds={},
            list_faults={fault: 1.0},
            good_lists=1,
            timeout=0.01,
            seed=0,
            port=0,
        ) as server,
        BctrlSession("emulator-key", base_url=server.url) as session,
    ):
        server.add_runtime("ws-1", "a")
        server.add_runtime("ws-1", "b", status="stopped")
        good = await session.list_runtimes("ws-1")
        runtimes: list[Runtime] = []
        with pytest.raises(BctrlError, match=error) if error else nullcontext():
            policy = RetryPolicy(attempts=1, patience=0)
            runtimes = await session.list_runtimes("ws-1", retry=policy)

    assert [runtime.status for runtime in good] == ["active", "stopped"]
    copies = 2 if fault is ListFault.DUPLICATE else 1
    assert len(runtimes) == (0 if error else 2 * copies)
    assert all(runtime in runtimes for runtime in good if not error)
    assert server.lists == {None: 1, fault: 1}


def test_a_fault_is_shown_with_its_events_and_the_command_that_repeats_it() -> None:
    shown = run("--seeds", "10", "--jobs", "1", "--break", "aborted-not-sent")

    assert shown.returncode == 0
    assert "not_sent, but the server may have received it" in shown.stdout
    assert "--seeds 1 --trace --break aborted-not-sent" in shown.stdout
    assert "-> POST ws-1/" in shown.stdout
