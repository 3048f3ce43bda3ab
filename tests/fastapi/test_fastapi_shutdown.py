"""What becomes of a stop in flight when the server of a FastAPI app is shut down."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from helpers import BOUND
from uvicorn_server import EXAMPLE, KEY, TOKEN, Uvicorn, uvicorn

from bctrl_async.emulator import Emulator, Fault, Reply

APP = """
from fastapi import FastAPI

from bctrl_async import RetryPolicy
from bctrl_async.fastapi import BctrlDep, Runtime, add_exception_handlers, lifespan

app = FastAPI(lifespan=lifespan())
add_exception_handlers(app)
once = RetryPolicy(attempts=1, patience=0)


@app.post("/stop/{alias}")
async def stop(alias: str, session: BctrlDep, timeout: float = 60.0) -> Runtime:
    return await session.stop_runtime("ws-1", alias, timeout=timeout, retry=once)
"""

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="SIGTERM does not shut down gracefully"
)


@pytest.fixture
async def hanging() -> AsyncIterator[Emulator]:
    async with Emulator(port=0, api_key=KEY) as running:
        running.add_runtime("ws-1", "crm")
        running.inject(Fault.HANG)
        yield running


async def stop_and_end(server: Uvicorn, api: Emulator, path: str) -> httpx2.Response:
    """Return the answer to a stop that is in flight while the server is ended."""
    login = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx2.AsyncClient(base_url=server.url, headers=login, timeout=BOUND) as client:
        stopping = asyncio.create_task(client.post(path))
        async with asyncio.timeout(BOUND):
            while not (api.received or stopping.done()):
                await asyncio.sleep(0.001)
        await server.end()
        return await stopping


async def test_a_stop_that_gives_up_in_time_is_answered_with_a_problem(
    hanging: Emulator, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP, "utf-8")
    async with uvicorn(hanging, folder=tmp_path) as server:
        answer = await stop_and_end(server, hanging, "/stop/crm?timeout=1.5")
    assert answer.status_code == 504
    assert answer.json()["type"] == "urn:bctrl-async:problem:timeout"
    assert answer.json()["mayHaveStopped"] is True
    assert not server.logged("Cancel|Traceback|ERROR"), "".join(server.lines)


def app_of_the_guide(folder: Path, *, attempt: float, limit: float) -> Path:
    """Write the app of the guide to production into a folder, with shorter time limits."""
    page = (EXAMPLE.parents[1] / "how-to" / "fastapi-production.md").read_text("utf-8")
    [code] = re.findall(r"^```python\n(import asyncio\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert "--timeout-graceful-shutdown 20`" in page
    for text, short in (
        ("asyncio.timeout(18)", f"asyncio.timeout({limit})"),
        ("timeout=8,", f"timeout={attempt},"),
        ("patience=8)", f"patience={attempt})"),
    ):
        assert text in code
        code = code.replace(text, short)
    start = "from fastapi import FastAPI\nfrom bctrl_async.fastapi import lifespan\n"
    app = f"{start}app = FastAPI(lifespan=lifespan())\n{code}"
    (folder / "app.py").write_text(app, "utf-8")
    return folder


@pytest.mark.parametrize(
    ("faults", "lost"),
    [
        ([], 2),
        ([Reply(429, code="rate_limited", headers={"Retry-After": "2"}), Fault.HANG], 0),
    ],
    ids=["a look-up after a conflict", "attempts after throttling"],
)
async def test_a_stop_of_the_guide_is_over_before_the_shutdown(
    hanging: Emulator, tmp_path: Path, faults: list[Fault | Reply], lost: int
) -> None:
    hanging.inject(*faults)
    hanging.inject(*[Fault.HANG] * lost, method="GET")
    folder = app_of_the_guide(tmp_path, attempt=2.4, limit=3.6)
    async with uvicorn(hanging, "--timeout-graceful-shutdown", "6", folder=folder) as server:
        answer = await stop_and_end(server, hanging, "/workspaces/ws-1/runtimes/crm/stop")
    body = answer.json()
    assert (answer.status_code, body["type"]) == (504, "urn:bctrl-async:problem:timeout")
    assert (body["mayHaveStopped"], body["alias"]) == (True, "crm")


async def test_a_stop_that_does_not_is_cancelled_and_the_server_ends_nevertheless(
    hanging: Emulator, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP, "utf-8")
    async with uvicorn(hanging, "--timeout-graceful-shutdown", "1", folder=tmp_path) as server:
        answer = await stop_and_end(server, hanging, "/stop/crm")
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert server.logged("Application shutdown complete")
