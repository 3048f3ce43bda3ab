"""The script of docs/how-to/bulk-script.md."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BOUND, HoldingEmulator, wait_for_line, wait_for_requests

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "bulk-script.md"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a loop has no signal handlers")


class Script:
    """The script, in a folder with a list of 300 runtimes."""

    def __init__(self, folder: Path, api: HoldingEmulator) -> None:
        found = re.search(
            r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
        )
        assert found
        (folder / "clean_up.py").write_text(found[1])
        targets = [("ws", f"r{number}") for number in range(300)]
        for target in targets:
            api.add_runtime(*target)
        (folder / "list.csv").write_text("".join(f"{ws},{alias}\n" for ws, alias in targets))
        self.list: Path = folder / "list.csv"
        self._folder = folder
        self.environment: dict[str, str] = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BCTRL_API_KEY": api.api_key,
            "BCTRL_BASE_URL": api.url,
        }

    async def begin(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "clean_up.py", "list.csv", "night.jsonl"),
            cwd=self._folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    output, _ = await asyncio.wait_for(process.communicate(), BOUND)
    return process.returncode, output.decode()


async def test_ctrl_c_waits_for_requests_in_flight_and_the_next_run_sends_the_rest(
    tmp_path: Path,
) -> None:
    async with HoldingEmulator() as api:
        script = Script(tmp_path, api)
        api.held.update(f"r{number}" for number in range(300))
        first = await script.begin()
        await wait_for_requests(api, 100)
        beside = await script.begin()
        assert (await ended(beside))[0] == 75

        first.send_signal(signal.SIGINT)
        await wait_for_line(first.stdout, "Ctrl-C again to abort")
        api.held.clear()
        code, said = await ended(first)

        assert (code, len(api.requests)) == (130, 100)
        assert "100 of 300 no longer running" in said
        assert "100 stopped, 200 not_sent" in said
        code, said = await ended(await script.begin())
    assert code == 0
    assert len(api.requests) == 300


async def test_a_second_ctrl_c_waits_for_nothing(tmp_path: Path) -> None:
    async with HoldingEmulator() as api:
        script = Script(tmp_path, api)
        api.held.update(f"r{number}" for number in range(300))
        process = await script.begin()
        await wait_for_requests(api, 100)
        process.send_signal(signal.SIGINT)
        # Two signals at once would be one.
        await wait_for_line(process.stdout, "Ctrl-C again to abort")
        process.send_signal(signal.SIGINT)
        code, said = await ended(process)
        api.held.clear()
    assert code == 130
    assert "200 not_sent, 100 unknown" in said


async def test_a_run_that_cannot_start_or_whose_key_is_rejected_ends_with_2(
    tmp_path: Path,
) -> None:
    """Fault: it ended with a traceback, or as a run with failures does."""
    async with HoldingEmulator() as api:
        script = Script(tmp_path, api)
        api.api_key = "another"
        assert (await ended(await script.begin()))[0] == 2
        del script.environment["BCTRL_API_KEY"]
        code, said = await ended(await script.begin())
        assert (code, "no API key" in said, "Traceback" in said) == (2, True, False)
        for line in ("ws,r0,a note", 'ws,"r0', ""):
            # Fault: a quote that was not closed swallowed the lines after it.
            script.list.write_text(f"ws,r1\n{line}\nws,r2\n")
            code, said = await ended(await script.begin())
            assert (code, "no API key" in said, "Traceback" in said) == (2, False, False)
        script.list.unlink()
        assert (await ended(await script.begin()))[0] == 2
    assert {request.status for request in api.requests} == {401}
