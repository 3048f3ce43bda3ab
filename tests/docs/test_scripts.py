"""The scripts of docs/how-to/bulk-script.md and nightly.md, ended by signals."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.commands import begin_to_end, finish, save, start
from support.helpers import add_runtimes, wait_for_requests

from bctrl_async.emulator import Emulator

ROOT = Path(__file__).parents[2]
BULK = (sys.executable, "clean_up.py", "list.csv", "night.jsonl")

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="a loop has no signal handlers"
)


ALIASES = [f"r{number}" for number in range(300)]


def script(page: str, start: str) -> str:
    """Return the block of a page that starts like this."""
    text = (ROOT / "docs" / "how-to" / page).read_text("utf-8")
    return text[text.index(start) :].partition("\n```")[0] + "\n"


@pytest.fixture
async def api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Emulator]:
    """An emulator of 300 runtimes that answers no stop, and a list of them."""
    async with Emulator(port=0) as api:
        targets = add_runtimes(api, 300)
        api.hold("ws-1", *ALIASES)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("BCTRL_API_KEY", api.api_key)
        monkeypatch.setenv("BCTRL_BASE_URL", api.url)
        lines = "".join(f"{workspace_id},{alias}\n" for workspace_id, alias in targets)
        # Excel writes a byte order mark, and an editor may leave an empty line.
        save("list.csv", f"\ufeff{lines}\n")
        yield api


class TestBulkScript:
    @pytest.fixture(autouse=True)
    def _script(self, api: Emulator) -> None:
        del api  # It has changed the folder.
        save("clean_up.py", script("bulk-script.md", "import asyncio"))

    async def test_ctrl_c_waits_and_the_next_run_sends_the_rest(
        self, api: Emulator
    ) -> None:
        first = await start(*BULK)
        await wait_for_requests(api, 100)
        beside, _, _ = await finish(await start(*BULK))
        assert beside == 75
        await begin_to_end(first)
        api.release("ws-1", *ALIASES)
        code, out, _ = await finish(first)
        assert (code, len(api.requests)) == (130, 100)
        assert "100 of 300 no longer running" in out
        assert "100 stopped, 200 not_sent" in out
        code, _, _ = await finish(await start(*BULK))
        assert (code, len(api.requests)) == (0, 300)

    async def test_a_second_ctrl_c_waits_for_nothing(self, api: Emulator) -> None:
        process = await start(*BULK)
        await wait_for_requests(api, 100)
        # Two signals at once would count as a single signal.
        await begin_to_end(process)
        process.send_signal(signal.SIGINT)
        code, out, _ = await finish(process)
        assert code == 130
        assert "200 not_sent, 100 unknown" in out

    async def test_a_key_that_is_rejected_ends_it_with_2(self, api: Emulator) -> None:
        """Fault: it ended as a run with failures does."""
        api.release("ws-1", *ALIASES)
        api.api_key = "another"
        code, _, _ = await finish(await start(*BULK))
        assert (code, {request.status for request in api.requests}) == (2, {401})

    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ("ws,r1\nws,r0,a note\nws,r2\n", "emulator-key"),
            ('ws,r1\nws,"r0\nws,r2\n', "emulator-key"),
            ("ws,r1\n", ""),
            (None, "emulator-key"),
        ],
        ids=["a third column", "an open quote", "no key", "no list"],
    )
    async def test_if_it_cannot_start_it_sends_nothing_and_ends_with_2(
        self, api: Emulator, monkeypatch: pytest.MonkeyPatch, text: str | None, key: str
    ) -> None:
        """Fault: it ended with a traceback; an open quote swallowed lines."""
        monkeypatch.setenv("BCTRL_API_KEY", key)
        if text is not None:
            save("other.csv", text)
        code, _, err = await finish(await start(*BULK[:2], "other.csv", "night.jsonl"))
        assert (code, "no API key" in err, "Traceback" in err) == (2, not key, False)
        assert api.requests == []


async def test_sigterm_ends_the_command_of_the_nightly_script_and_the_next_goes_on(
    api: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults: a second run emptied the outcomes; the command outlived its script."""
    (tmp_path / "list.csv").rename("runtimes.csv")
    command = tmp_path / "bin" / "bctrl-async"
    command.parent.mkdir()
    save(command, f'#!/bin/sh\nexec "{sys.executable}" -m bctrl_async "$@"\n')
    nightly = tmp_path / "nightly.sh"
    # The progress says when the signal has arrived.
    save(nightly, script("nightly.md", "#!/bin/sh").replace(" -q ", " "))
    for path in (command, nightly):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    monkeypatch.chdir("/")

    first = await start(nightly)
    await wait_for_requests(api, 100)
    code, _, err = await finish(await start(nightly))
    assert (code, "in use" in err) == (75, True), err
    await begin_to_end(first, signal.SIGTERM)
    api.release("ws-1", *ALIASES)
    code, _, err = await finish(first)
    assert (code, len(api.requests)) == (130, 100), err
    code, _, err = await finish(await start(nightly))
    assert (code, len(api.requests)) == (0, 300), err
