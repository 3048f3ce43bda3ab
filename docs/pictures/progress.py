"""Draw the command's progress display as SVG, from a run on the emulator.

`python docs/pictures/progress.py` writes progress.svg beside itself.
"""

from __future__ import annotations

import asyncio
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from bctrl_async import BctrlSession, StopBatch, StopOutcome
from bctrl_async.cli._progress import Display
from bctrl_async.emulator import Emulator, Fault

_FOLDER = Path(__file__).parent
_TARGETS = [("ws-1", f"crm-{number}") for number in range(3000)]
_FAULTS = {Fault.ACCEPTED: 0.01, Fault.DROP_AFTER: 0.01, Fault.SERVER_ERROR: 0.01}
_DRAWN_AT = 800
_WIDTH = 52
"""Columns; the text of more would be too small on a phone."""


async def main() -> None:
    """Draw a bulk stop in progress: 500 requests a second, and 3 s to end."""
    async with Emulator(
        port=0, faults=_FAULTS, seed=1, latency=0.02, rate_limit=500, stop_takes=3.0
    ) as emulator:
        for target in _TARGETS:
            emulator.add_runtime(*target)
        async with BctrlSession("emulator-key", base_url=emulator.url) as session:

            def draw(_: StopOutcome) -> None:
                # The display measures the rate between two calls.
                display.view()
                if batch.counts.total() == _DRAWN_AT:
                    _write(console, display)

            batch: StopBatch = session.stop_runtimes(_TARGETS, on_outcome=draw)
            file = io.StringIO()
            console = Console(width=_WIDTH, record=True, file=file, force_terminal=True)
            display = Display(batch, session, console)
            await batch


def _write(console: Console, display: Display) -> None:
    prompt = "$ bctrl-async stop --from runtimes.csv"
    console.print(Text(prompt, style="bold"))
    console.print(display.view())
    svg = console.export_svg(title="bctrl-async stop")
    # The font would be loaded from a third-party server.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    _FOLDER.joinpath("progress.svg").write_text(svg)


if __name__ == "__main__":
    asyncio.run(main())
