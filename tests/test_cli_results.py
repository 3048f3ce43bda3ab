"""The seven results as exit codes: 0 only if no runtime runs or may run."""

from __future__ import annotations

import json

import pytest
from conftest import KEY
from helpers import Command, unused_url

from bctrl_async.emulator import Emulator, Fault, Reply

Row = tuple[str, list[Fault | Reply], tuple[str, int], tuple[str, int]]
ROWS: list[Row] = [
    # Row, what the server does with every stop, result and code with --verify, with --no-verify.
    ("stopped", [], ("stopped", 0), ("stopped", 0)),
    ("accepted", [Fault.ACCEPTED], ("accepted", 1), ("accepted", 1)),
    ("failed", [Fault.FAILED], ("accepted", 0), ("accepted", 0)),
    ("already stopped", [], ("already_stopped", 0), ("already_stopped", 0)),
    ("not found", [], ("not_found", 1), ("not_found", 1)),
    ("rejected", [Reply(403, code="workspace.forbidden")], ("rejected", 1), ("rejected", 1)),
    ("throttled", [Fault.RATE_LIMITED], ("rejected", 1), ("rejected", 1)),
    ("not sent", [], ("not_sent", 1), ("not_sent", 1)),
    ("unknown", [Fault.BAD_GATEWAY], ("unknown", 1), ("unknown", 1)),
    ("lost", [], ("stopped", 0), ("unknown", 1)),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
async def test_the_exit_code_is_0_only_if_no_runtime_runs(
    command: Command,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    *,
    row: Row,
    verify: bool,
) -> None:
    name, faults, with_verify, without = row
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    if name != "not found":
        emulator.add_runtime("ws", "a", status="stopped" if name == "already stopped" else "active")
    for fault in faults:
        emulator.poison("ws", "a", fault)
    if name == "lost":
        emulator.inject(Fault.DROP_AFTER, method="POST")
    if name == "accepted":
        emulator.inject(*[Reply(200, body={**emulator.runtimes["ws", "a"]})] * 99, method="GET")
    options = ["--verify" if verify else "--no-verify", "--attempts", "1", "--patience", "0"]
    options += ["--deadline", "500ms"] if verify and name in {"accepted", "unknown"} else []
    with unused_url() as unused:
        url = unused if name == "not sent" else emulator.url
        args = (*options, "-o", "json", "--base-url", url, "ws", "a")
        code, out, _ = await command("stop", *args)

    result, exit_code = with_verify if verify else without
    record = json.loads(out)
    assert (code, record["result"], record["ok"]) == (exit_code, result, code == 0)
    assert (record["state"] == "not_running", record["error"] is None) == (code == 0, code == 0)
    if code == 0:
        assert emulator.status("ws", "a") in {"stopped", "failed"}
