"""Look with axe-core for barriers in the page of the FastAPI example, in Chromium.

`python tests/nightly/accessibility.py AXE [--pictures FOLDER]`

AXE is the file axe.min.js of the npm package axe-core. The page is brought into each of
its states, and checked there at the widths of a phone and a desktop, in light and dark.
Nothing that axe-core finds is ignored, nor what it leaves for a person to judge. A page
wider than its window is a finding too, and so is an error that the page logs. With
`--pictures`, a screenshot of each is saved as PNG. The exit code is 1 if there are
findings.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bctrl_async.emulator import Emulator, Reply

sys.path.append(str(Path(__file__).parents[1]))
from chaos_checks import FOREIGN_NOT_FOUND, LOGIN_PAGE
from support.browser import Tab, chromium, new_tab
from support.uvicorn_server import KEY, TOKEN, uvicorn

_WORKSPACE = "demo"
_RUNTIMES = 5000
_WIDTHS = (320, 390, 1280)
_SCHEMES = ("light", "dark")
_STATE = "document.getElementById('state').textContent"
_SHOWS_REPORT = f"{_STATE}.includes(' after ')"
_FIND = """axe.run({rules: {"target-size": {enabled: true}}}).then(results => ({
    passed: results.passes.length,
    found: [...results.violations, ...results.incomplete].map(
        ({id, help, nodes}) => `${id}: ${help}: ${nodes.map(n => n.html).join(" ")}`),
}))"""


async def _submit(tab: Tab, runtimes: int, *, token: str = TOKEN) -> None:
    aliases = "\n".join(f"runtime-{number:04}" for number in range(1, runtimes + 1))
    values = {"token": token, "workspace": _WORKSPACE, "aliases": aliases}
    await tab.run(
        "window.confirm = () => true; document.getElementById('state').textContent = ''"
    )
    await tab.run(
        f"Object.entries({json.dumps(values)}).forEach(([id, value]) =>"
        " document.getElementById(id).value = value)"
    )
    await tab.run("document.getElementById('stop').click()")
    # axe-core leaves it to a person what is behind the text of an area that scrolls.
    await tab.run("document.getElementById('aliases').value = 'runtime-0001'")


async def _states(tab: Tab, emulator: Emulator, url: str) -> AsyncIterator[str]:
    """Bring the page into one state after the other, and yield their names."""
    await tab.open(url)
    yield "empty"

    await _submit(tab, 1, token="wrong")
    await tab.wait_for(f"{_STATE}.includes('wrong')")
    yield "wrong-token"

    await _submit(tab, 3)
    await tab.wait_for(_SHOWS_REPORT)
    yield "no-failures"

    await _submit(tab, _RUNTIMES)
    await tab.wait_for("document.querySelector('progress').value > 300")
    yield "running"
    await tab.run("document.getElementById('cancel').click()")
    await tab.wait_for(_SHOWS_REPORT)
    yield "cancelled"

    for number, fault in enumerate([Reply(403), FOREIGN_NOT_FOUND, LOGIN_PAGE], 4901):
        emulator.poison(_WORKSPACE, f"runtime-{number}", fault)
    await _submit(tab, _RUNTIMES + 10)
    await tab.wait_for(_SHOWS_REPORT)
    yield "failures"

    await tab.open(f"{url}/?#forgotten")
    await tab.wait_for(f"{_STATE}.includes('no such run')")
    yield "unknown-run"


async def _connection_lost(tab: Tab, emulator: Emulator) -> AsyncIterator[str]:
    async with uvicorn(emulator, "--no-access-log") as server:
        await tab.open(server.url)
        await _submit(tab, _RUNTIMES + 10)
        await tab.wait_for("document.querySelector('progress').value > 0")
    await tab.wait_for(f"{_STATE}.includes('Connecting again')")
    yield "connecting-again"


@asynccontextmanager
async def _world() -> AsyncIterator[tuple[Tab, Emulator]]:
    with chromium() as browser:
        async with (
            Emulator(port=0, api_key=KEY, latency=0.05) as emulator,
            new_tab(browser) as tab,
        ):
            for number in range(1, _RUNTIMES + 1):
                emulator.add_runtime(_WORKSPACE, f"runtime-{number:04}")
            yield tab, emulator


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


async def _look(tab: Tab, axe: str, state: str, pictures: Path | None) -> int:
    """Check the page as it is; return the number of findings."""
    findings = 0
    await tab.run(f"if (!window.axe) {{ {axe} }}")
    for width, scheme in itertools.product(_WIDTHS, _SCHEMES):
        await tab.show_as(width=width, scheme=scheme)
        result = await tab.run(_FIND)
        found = result["found"]
        if (needed := await tab.run("document.documentElement.scrollWidth")) > width:
            found.append(f"the page is {needed} pixels wide")
        findings += len(found)
        verdict = f"{result['passed']} rules hold, {len(found)} findings"
        _say(f"{state:16} {width:5} {scheme:5}  {verdict}", *found)
        if pictures is not None:
            picture = pictures / f"{state}-{width}-{scheme}.png"
            await asyncio.to_thread(picture.write_bytes, await tab.screenshot())
    return findings


async def main(axe: str, pictures: Path | None) -> int:
    findings = 0
    async with _world() as (tab, emulator):
        async with uvicorn(emulator, "--no-access-log") as server:
            async for state in _states(tab, emulator, server.url):
                findings += await _look(tab, axe, state, pictures)
        async for state in _connection_lost(tab, emulator):
            findings += await _look(tab, axe, state, pictures)
        _say(*tab.errors)
        findings += len(tab.errors)
    _say(f"{findings} findings in all")
    return findings


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("axe", type=Path)
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    if arguments.pictures is not None:
        arguments.pictures.mkdir(exist_ok=True)
    found = asyncio.run(main(arguments.axe.read_text("utf-8"), arguments.pictures))
    raise SystemExit(found > 0)
