"""The option `--pace` of the command."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import pytest
from helpers import Command, HoldingEmulator, unused_url

from bctrl_async.pace import FilePace

RATE = 5

pytestmark = pytest.mark.usefixtures("patient", "holding")


@pytest.mark.parametrize("args", ["--pace pace ws a", "--pace pace ws --all --yes", "ws a"])
async def test_it_keeps_to_what_another_process_wrote_in_the_file(
    args: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the password of a server can only be given where other users see it."""
    monkeypatch.chdir(tmp_path)
    if "--pace" not in args:
        monkeypatch.setenv("BCTRL_PACE", "pace")
    next_begins = time.monotonic() + 1 / RATE
    store = FilePace("pace", rate=RATE).open()
    await store.lease("another process", 1, math.inf)
    await store.close()
    code, _, err = await command("stop", "--rate", str(RATE), *args.split())
    assert (code, err) == (0, "")
    assert time.monotonic() >= next_begins


async def test_a_dry_run_asks_no_store(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "pace"
    code, _, _ = await command("stop", "--dry-run", "--rate", str(RATE), "--pace", path, "ws", "a")
    assert (code, path.exists()) == (0, False)


async def test_without_the_extra_a_url_is_a_usage_error_that_says_what_to_install(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    for module in ("redis", "pace._redis"):
        monkeypatch.delitem(sys.modules, f"bctrl_async.{module}", raising=False)
    code, _, err = await command("stop", "--rate", "9", "--pace", "redis://h", "ws", "a")
    assert "cannot use --pace: bctrl_async.redis needs redis-py: python -m pip install" in err
    assert (code, err.count("\n")) == (2, 1)


async def test_a_store_that_is_away_is_a_warning_without_its_password_and_the_stops_go_on(
    command: Command, holding: HoldingEmulator
) -> None:
    with unused_url() as url:
        place = url.replace("http://", "redis://:secret@")
        code, out, err = await command("stop", "--rate", str(RATE), "--pace", place, "ws", "a")
    assert code == 0
    assert err.startswith(
        "bctrl-async: warning: the shared pace cannot be asked (ConnectionError): "
    )
    assert "secret" not in out + err
    assert holding.status("ws", "a") == "stopped"
