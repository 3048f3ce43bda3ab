"""The FastAPI example app, in this process, under a real uvicorn and in Chromium."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
from browser import CHROMIUM, Tab
from fastapi import FastAPI, HTTPException, Request
from fastapi.testclient import TestClient
from helpers import BOUND, HoldingEmulator, free_port, wait_for_requests
from jsonschema import Draft202012Validator
from servers import answering, emulator_in_a_thread, http_answer, raw_server
from uvicorn_server import EXAMPLE, KEY, TOKEN, Uvicorn, uvicorn

from bctrl_async.emulator import Emulator, Reply

LOGIN = {"Authorization": f"Bearer {TOKEN}"}
PRODUCTION = EXAMPLE.parents[1] / "how-to" / "fastapi-production.md"

needs_signals = pytest.mark.skipif(
    sys.platform == "win32", reason="SIGTERM does not shut down gracefully"
)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    return importlib.import_module("app")


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("APP_TOKEN", TOKEN)
    with emulator_in_a_thread() as emulator:
        monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
        yield emulator


def ended(client: TestClient, run: str) -> dict[str, Any]:
    """Wait for the end of a run; return its progress."""
    deadline = time.monotonic() + BOUND
    while time.monotonic() < deadline:
        progress: dict[str, Any] = client.get(f"/runs/{run}").json()
        if progress["report"]:
            return progress
        time.sleep(0.01)
    pytest.fail("the run has no report")


class TestInProcess:
    def test_a_run_has_its_progress_and_then_its_report(
        self, example: ModuleType, emulator: Emulator
    ) -> None:
        targets = [*emulator.runtimes, ("ws-1", "gone"), ("ws-1", "..")]
        with TestClient(example.app, headers=LOGIN) as client:
            answer = client.post("/runs", json=targets)
            assert answer.status_code == 202
            progress = ended(client, answer.json())
            assert ended(client, answer.json()) == progress
            assert client.post("/runs", json=[["only one"]]).status_code == 422
            assert client.get("/").headers["Content-Type"].startswith("text/html")
        document = example.app.openapi()
        schema = {"$ref": "#/components/schemas/Progress", "components": document["components"]}
        Draft202012Validator(schema).validate(progress)
        assert progress["counts"] == {"stopped": 10, "not_found": 1, "rejected": 1}
        assert progress["total"] == progress["report"]["total"] == len(targets)
        assert {each["alias"] for each in progress["report"]["failures"]} == {"..", "gone"}

    def test_the_report_is_limited_to_the_first_failures(
        self, example: ModuleType, emulator: Emulator
    ) -> None:
        with TestClient(example.app, headers=LOGIN) as client:
            run = client.post("/runs", json=[("ws-1", "..")] * 1001).json()
            report = ended(client, run)["report"]
        assert (report["counts"], len(report["failures"])) == ({"rejected": 1001}, 1000)
        assert not emulator.requests

    def test_a_report_is_not_kept_for_long(
        self, example: ModuleType, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(example, "KEEP", 0.0)
        with TestClient(example.app, headers=LOGIN) as client:
            client.post("/runs", json=[("ws-1", "r1")])
            deadline = time.monotonic() + BOUND
            while example.RUNS and time.monotonic() < deadline:
                time.sleep(0.01)
            assert client.get("/runs/unknown").status_code == 404
        assert (example.RUNS, len(emulator.requests)) == ({}, 1)


class TestWhoMayStop:
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer l\u00e9t-me-in"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Cookie": f"token={TOKEN}"},
        ],
    )
    def test_a_request_without_the_token_stops_nothing(
        self, example: ModuleType, emulator: Emulator, headers: dict[str, str]
    ) -> None:
        """Fault: whoever could reach the example could stop everything."""
        encoded = {name.encode(): value.encode() for name, value in headers.items()}
        with TestClient(example.app) as client:
            for answer in (
                client.post("/runs", json=[("ws-1", "r1")], headers=encoded),
                client.get("/runs/unknown", headers=encoded),
                client.post("/runs/unknown/cancel", headers=encoded),
            ):
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert emulator.requests == []

    @pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer "}, LOGIN])
    def test_without_a_configured_token_nobody_is_let_in(
        self,
        example: ModuleType,
        emulator: Emulator,
        headers: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("APP_TOKEN", "")
        with TestClient(example.app, headers=headers) as client:
            answer = client.post("/runs", json=[("ws-1", "r1")])
        assert (answer.status_code, "APP_TOKEN" in answer.text) == (403, True)
        assert emulator.requests == []

    @pytest.mark.parametrize(
        ("headers", "is_own"),
        [
            ({"Sec-Fetch-Site": "cross-site"}, False),
            ({"Sec-Fetch-Site": "same-site", "Origin": "http://testserver"}, False),
            ({"Origin": "https://evil.example"}, False),
            ({"Origin": "http://testserver:81"}, False),
            ({"Origin": "null"}, False),
            ({"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"}, True),
            ({"Sec-Fetch-Site": "none"}, True),
            ({"Origin": "http://testserver"}, True),
            ({}, True),
        ],
    )
    def test_the_guide_to_production_refuses_other_sites(
        self, headers: dict[str, str], *, is_own: bool
    ) -> None:
        """Fault: a page of any site could make a visitor's browser stop runtimes."""
        page = PRODUCTION.read_text("utf-8")
        found = re.search(
            r"^async def refuse_other_sites.*?(?=\n\n|^```)", page, re.MULTILINE | re.DOTALL
        )
        assert found
        names: dict[str, Any] = {"Request": Request, "HTTPException": HTTPException}
        exec(found[0], names)  # noqa: S102 - our docs.
        app = FastAPI()
        app.get("/")(names["refuse_other_sites"])
        assert TestClient(app).get("/", headers=headers).is_success is is_own


def stopped(emulator: Emulator) -> int:
    return sum(runtime["status"] == "stopped" for runtime in emulator.runtimes.values())


def named(emulator: Emulator, count: int) -> list[tuple[str, str]]:
    targets = [("ws-1", f"r{number}") for number in range(count)]
    for target in targets:
        emulator.add_runtime(*target)
    return targets


@pytest.fixture
async def slow() -> AsyncIterator[HoldingEmulator]:
    async with HoldingEmulator(latency=0.05) as running:
        yield running


@needs_signals
class TestUnderUvicorn:
    @pytest.mark.parametrize("workers", [1, 2])
    async def test_sigterm_drains_each_run_logs_its_report_and_exits(
        self, workers: int, slow: Emulator
    ) -> None:
        targets = named(slow, 8000)
        async with uvicorn(slow, "--workers", str(workers)) as server:
            await server.wait_for("Application startup complete", workers)
            async with httpx2.AsyncClient(base_url=server.url, headers=LOGIN) as client:
                for part in range(8):
                    await client.post("/runs", json=targets[part::8])
            await wait_for_requests(slow, 500)
            await server.end()
            await server.wait_for("Finished server process", workers)

        assert not server.logged("Cancel|Traceback|ERROR"), "".join(server.lines)
        assert [each["total"] for each in server.reports] == [1000] * 8
        assert sum(each["stopped"] for each in server.reports) == stopped(slow)
        assert len(slow.requests) == stopped(slow) < 8000

    async def test_stops_that_are_not_answered_are_abandoned_at_shutdown(
        self, slow: HoldingEmulator
    ) -> None:
        targets = named(slow, 100)
        slow.held.update(alias for _, alias in targets)
        async with uvicorn(slow) as server:
            async with httpx2.AsyncClient(base_url=server.url, headers=LOGIN) as client:
                await client.post("/runs", json=targets)
            await wait_for_requests(slow, 32)
            await server.end()
            slow.held.clear()
        assert server.logged("bulk stop: .* 68 not_sent, 32 unknown")
        assert not server.logged("Cancel"), "".join(server.lines)

    async def test_two_workers_share_the_rate_of_a_pace(self, tmp_path: Path) -> None:
        """Fault: N workers send N times the rate that one may send."""
        (tmp_path / "app.py").write_text(APP_WITH_PACE.format(path=str(tmp_path / "pace")))
        async with AsyncExitStack() as stack:
            emulator = await stack.enter_async_context(Emulator(port=0, api_key=KEY))
            named(emulator, 6)
            server = await stack.enter_async_context(
                uvicorn(emulator, "--workers", "2", folder=tmp_path)
            )
            await server.wait_for("Application startup complete", 2)
            workers: dict[int, httpx2.AsyncClient] = {}
            async with asyncio.timeout(BOUND):
                while len(workers) < 2:  # A connection belongs to one worker.
                    client = httpx2.AsyncClient(base_url=server.url, limits=ONE_CONNECTION)
                    await stack.enter_async_context(client)
                    workers[(await client.get("/pid")).json()] = client
            one, other = workers.values()
            began = time.monotonic()
            await asyncio.gather(
                *(one.post(f"/stop/r{number}") for number in range(3)),
                *(other.post(f"/stop/r{number}") for number in range(3, 6)),
            )
            took = time.monotonic() - began
            assert stopped(emulator) == 6
        # The first slot may be used a lease late.
        assert took >= 5 / 20 - 0.05


APP_WITH_PACE = """
import os
from fastapi import FastAPI
from bctrl_async.fastapi import BctrlDep, Runtime, lifespan
from bctrl_async.pace import FilePace, _leases

# On a busy machine, nothing is sent before the file has answered.
_leases._PATIENCE = _leases._INTERVAL = 50.0
app = FastAPI(lifespan=lifespan(pace=FilePace({path!r}, rate=20)))

@app.get("/pid")
async def pid() -> int:
    return os.getpid()

@app.post("/stop/{{alias}}")
async def stop(alias: str, session: BctrlDep) -> Runtime:
    return await session.stop_runtime("ws-1", alias)
"""
ONE_CONNECTION = httpx2.Limits(max_connections=1)


ATTACK = """<!doctype html><form method="post" enctype="text/plain" action="{url}">
<input name='[["ws-1","r0"],["ws-1","' value='"]]'></form>
<script>document.forms[0].submit()</script>"""

STATE = "document.getElementById('state').textContent"
HAS_REPORT = f"{STATE}.includes(' after ')"
IS_RUNNING = "document.querySelector('progress').value > 0"


async def begin(tab: Tab, server: Uvicorn, runtimes: int, token: str = TOKEN) -> None:
    """Fill in the form with the keyboard, submit it, and answer its question."""
    await tab.open(server.url)
    await tab.run("window.confirm = text => { window.asked = text; return true }")
    await tab.run("document.getElementById('workspace').value = ' ws-1 '")
    await tab.press("Tab")
    await tab.write(token)
    await tab.press("Tab")
    await tab.press("Tab")
    await tab.write("\n".join(f"r{number}" for number in range(runtimes)))
    await tab.press("Tab")
    await tab.press("Enter")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
class TestInBrowser:
    async def test_a_form_of_another_site_stops_nothing(self, tab: Tab) -> None:
        """Fault: a page of any site could make a visitor's browser stop runtimes."""
        async with Emulator(port=0, api_key=KEY) as emulator, uvicorn(emulator) as server:
            emulator.add_runtime("ws-1", "r0")
            page = http_answer("200 OK", ATTACK.format(url=f"{server.url}/runs").encode())
            async with raw_server(answering(page)) as other_site:
                await tab.open(other_site)
                await tab.wait_for("document.body.textContent.includes('token')")
        assert emulator.requests == []

    async def test_many_are_stopped_after_a_question_and_a_reload_comes_back(
        self, slow: HoldingEmulator, tab: Tab
    ) -> None:
        async with uvicorn(slow) as server:
            targets = named(slow, 300)
            slow.held.update(alias for _, alias in targets[100:])
            await begin(tab, server, 301)
            await tab.wait_for(IS_RUNNING)
            assert await tab.run("window.asked") == "Stop 301 runtimes of ws-1?"
            await tab.reload()
            await tab.wait_for(IS_RUNNING)
            slow.held.clear()
            await tab.wait_for(HAS_REPORT)
            said = await tab.run(STATE)
            failures = await tab.run("document.getElementById('rows').textContent")
            assert await tab.run("document.activeElement.id") == "state"
        assert said.startswith("300 not_running, 1 unconfirmed after ")
        assert said.endswith(": 300 stopped, 1 not_found.")
        assert failures.startswith("ws-1 r300: not_found. ")
        assert len(slow.requests) == 301
        assert tab.errors == []

    async def test_a_no_to_the_question_stops_nothing(self, slow: Emulator, tab: Tab) -> None:
        async with uvicorn(slow) as server:
            await tab.open(server.url)
            await tab.run("""{
                window.confirm = text => { window.asked = text; return false }
                document.getElementById("token").value = "token"
                document.getElementById("aliases").value = "r0\\nr1"
                document.getElementById("stop").click()
            }""")
            await tab.wait_for("window.asked")
        assert slow.requests == []

    async def test_a_cancelled_run_says_why_it_ended(self, slow: Emulator, tab: Tab) -> None:
        async with uvicorn(slow) as server:
            named(slow, 1000)
            await begin(tab, server, 1000)
            await tab.wait_for(IS_RUNNING)
            await tab.press("Tab")
            await tab.run("document.getElementById('cancel').click()")
            await tab.wait_for(HAS_REPORT)
            said = await tab.run(STATE)
        assert f"{stopped(slow)} stopped, {1000 - stopped(slow)} not_sent. It ended early: " in said
        assert len(slow.requests) == stopped(slow) < 1000

    async def test_an_error_of_the_api_is_said(self, slow: Emulator, tab: Tab) -> None:
        async with uvicorn(slow) as server:
            named(slow, 1)
            slow.poison("ws-1", "r0", Reply(403, code="plan.expired"))
            await begin(tab, server, 1)
            await tab.wait_for(HAS_REPORT)
            assert await tab.run("window.asked ?? ''") == ""
            failures = await tab.run("document.getElementById('rows').textContent")
        assert failures.startswith("ws-1 r0: rejected. ")

    async def test_a_wrong_token_is_said_and_can_be_mended(self, slow: Emulator, tab: Tab) -> None:
        async with uvicorn(slow) as server:
            named(slow, 1)
            await begin(tab, server, 1, token="wrong")
            await tab.wait_for(f"{STATE} === 'The token is wrong.'")
            await tab.run(f"document.getElementById('token').value = '{TOKEN}'")
            await tab.run("document.getElementById('stop').click()")
            await tab.wait_for(HAS_REPORT)
        assert len(slow.requests) == 1

    async def test_a_lost_service_is_said_and_so_is_a_run_that_it_has_lost(
        self, slow: Emulator, tab: Tab
    ) -> None:
        async with AsyncExitStack() as stack:
            port = str(free_port())
            server = await stack.enter_async_context(uvicorn(slow, "--port", port))
            named(slow, 1000)
            await begin(tab, server, 1000)
            await tab.wait_for(IS_RUNNING)
            os.killpg(server.process.pid, signal.SIGKILL)
            await server.process.wait()
            await tab.wait_for(f"{STATE}.includes('connection is lost')")
            await stack.enter_async_context(uvicorn(slow, "--port", port))
            await tab.wait_for(f"{STATE}.includes('no such run')")

    async def test_no_script_runs_but_that_of_the_page(self, slow: Emulator, tab: Tab) -> None:
        async with uvicorn(slow) as server:
            await tab.open(server.url)
            await tab.run("""{
                const script = document.createElement("script")
                script.textContent = "window.stolen = true"
                document.body.append(script)
            }""")
            assert await tab.run("window.stolen") is None
        assert "Content Security Policy" in "".join(tab.errors)
