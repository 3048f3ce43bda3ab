"""The script of docs/how-to/nightly.md."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BOUND, wait_for_line, wait_for_requests

from bctrl_async.emulator import Emulator, Fault

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "nightly.md"
KEY = "emulator-key"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no sh")


class Night:
    """The script, in a folder with a list of two runtimes."""

    def __init__(self, folder: Path, api: Emulator) -> None:
        found = re.search(
            r"^```sh\n(#!/bin/sh\n.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
        )
        assert found
        self.folder = folder
        self.script = folder / "nightly.sh"
        self.script.write_text(found[1])
        command = folder / "bin" / "bctrl-async"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bctrl_async "$@"\n')
        for path in (self.script, command):
            path.chmod(0o755)
        (folder / "runtimes.csv").write_text("ws,r0\nws,r1\n")
        self._environment = {
            **os.environ,
            "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "STATE_DIRECTORY": str(folder),
            "BCTRL_API_KEY": KEY,
            "BCTRL_BASE_URL": api.url,
        }

    async def begin(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            self.script, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    async def run(self) -> tuple[int | None, str]:
        """Return the exit code and the output of a run."""
        return await ended(await self.begin())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    output, _ = await asyncio.wait_for(process.communicate(), BOUND)
    return process.returncode, output.decode()


async def test_a_second_run_of_the_night_sends_nothing(tmp_path: Path) -> None:
    async with Emulator(port=0, api_key=KEY) as api:
        night = Night(tmp_path, api)
        for alias in ("r0", "r1"):
            api.add_runtime("ws", alias)
        codes = [(await night.run())[0] for _ in range(2)]
    assert codes == [0, 0]
    assert len(api.requests) == 2


async def test_a_run_beside_another_leaves_its_record_alone_and_sigterm_ends_the_command(
    tmp_path: Path,
) -> None:
    """Fault: the second run emptied the outcomes of the first; the command survived its script."""
    async with Emulator(port=0, api_key=KEY) as api:
        night = Night(tmp_path, api)
        for alias in ("r0", "r1"):
            api.add_runtime("ws", alias)
        # Also when it is sent again, since a busy machine may take its time.
        api.poison("ws", "r0", Fault.HANG)
        first = await night.begin()
        await wait_for_requests(api, 2)
        before = files_of(tmp_path)

        code, said = await night.run()

        assert (code, "in use" in said) == (75, True), said
        after = files_of(tmp_path)
        assert after.keys() == before.keys()
        assert [name for name in before if not after[name].startswith(before[name])] == []
        first.send_signal(signal.SIGTERM)
        # Two signals at once would be one.
        await wait_for_line(first.stdout, "Ctrl-C again to abort")
        # The second signal does not wait for the stop that hangs.
        first.send_signal(signal.SIGTERM)
        code, said = await ended(first)
    assert code == 130, said
