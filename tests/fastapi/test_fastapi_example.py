"""The FastAPI example and its guide: in-process, under uvicorn, in Chromium."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from support.browser import CHROMIUM, Tab
from support.helpers import BOUND, add_runtimes, free_port, until, wait_for_requests
from support.servers import emulator_in_a_thread
from support.uvicorn_server import EXAMPLE, KEY, TOKEN, Uvicorn, uvicorn

from bctrl_async.emulator import Emulator, Fault, Reply

Patch = pytest.MonkeyPatch

LOGIN = {"Authorization": f"Bearer {TOKEN}"}
GUIDES = EXAMPLE.parents[1] / "how-to"
FIRST_APP = (
    (GUIDES / "fastapi.md").read_text("utf-8").split("```")[1].removeprefix("python\n")
)
OWN_SITE = "https://stops.example.com"
PRODUCTION = (GUIDES / "fastapi-production.md").read_text("utf-8")


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """An emulator with the runtimes r0 to r9, which runs beside the loop of the app."""
    with emulator_in_a_thread() as running:
        yield running


@pytest.fixture
def example(monkeypatch: Patch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    return importlib.import_module("app")


@pytest.fixture
def client(
    example: ModuleType, emulator: Emulator, monkeypatch: Patch
) -> Iterator[TestClient]:
    """A client of the example, which sends the token."""
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
    monkeypatch.setenv("APP_TOKEN", TOKEN)
    with TestClient(example.app, headers=LOGIN) as client:
        yield client


def wait(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + BOUND
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(client: TestClient, run: str) -> dict[str, Any]:
    """Wait for the end of a run; return its progress."""
    wait(lambda: client.get(f"/runs/{run}").json()["report"])
    progress: dict[str, Any] = client.get(f"/runs/{run}").json()
    return progress


class TestRuns:
    def test_a_run_has_its_progress_and_then_its_report(
        self, client: TestClient, example: ModuleType, emulator: Emulator
    ) -> None:
        targets = [*emulator.runtimes, ("ws-1", "gone"), ("ws-1", "..")]
        answer = client.post("/runs", json=targets)
        assert answer.status_code == 202
        progress = ended(client, answer.json())
        assert client.post("/runs", json=[["only one"]]).status_code == 422
        assert client.get("/").headers["Content-Type"].startswith("text/html")
        document = example.app.openapi()
        schema = {
            "$ref": "#/components/schemas/Progress",
            "components": document["components"],
        }
        Draft202012Validator(schema).validate(progress)
        assert progress["counts"] == {"stopped": 10, "not_found": 1, "invalid": 1}
        assert progress["total"] == progress["report"]["total"] == len(targets)
        assert {each["alias"] for each in progress["report"]["failures"]} == {
            "..",
            "gone",
        }

    def test_the_report_is_limited_to_the_first_failures(
        self, client: TestClient
    ) -> None:
        run = client.post("/runs", json=[("ws-1", "..")] * 1001).json()
        report = ended(client, run)["report"]
        assert (report["counts"], len(report["failures"])) == ({"invalid": 1001}, 1000)

    def test_a_report_is_not_kept_for_long(
        self, client: TestClient, example: ModuleType, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(example, "KEEP", 0.0)
        run = client.post("/runs", json=[("ws-1", "r1")]).json()
        wait(lambda: not example.RUNS)
        assert client.get(f"/runs/{run}").status_code == 404


class TestWhoMayStop:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer l\u00e9t-me-in"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": "", "Cookie": f"token={TOKEN}"},
        ],
    )
    @pytest.mark.parametrize(
        "call", ["POST /runs", "GET /runs/r", "POST /runs/r/cancel"]
    )
    def test_a_request_without_the_token_stops_nothing(
        self, client: TestClient, emulator: Emulator, call: str, headers: dict[str, str]
    ) -> None:
        """Fault: whoever could reach the example could stop everything."""
        encoded = {name.encode(): value.encode() for name, value in headers.items()}
        answer = client.request(*call.split(), json=[("ws-1", "r1")], headers=encoded)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (
            401,
            "Bearer",
        )
        assert emulator.requests == []

    @pytest.mark.parametrize("token", ["", TOKEN])
    def test_without_a_configured_token_nobody_is_let_in(
        self, client: TestClient, emulator: Emulator, token: str, monkeypatch: Patch
    ) -> None:
        monkeypatch.setenv("APP_TOKEN", "")
        headers = {"Authorization": f"Bearer {token}"}
        answer = client.post("/runs", json=[("ws-1", "r1")], headers=headers)
        assert (answer.status_code, "APP_TOKEN" in answer.text) == (403, True)
        assert emulator.requests == []

    @pytest.mark.parametrize(
        ("headers", "is_own"),
        [
            ({"Sec-Fetch-Site": "cross-site"}, False),
            ({"Sec-Fetch-Site": "same-site", "Origin": OWN_SITE}, False),
            ({"Origin": "https://evil.example"}, False),
            ({"Origin": f"{OWN_SITE}:81"}, False),
            ({"Origin": "null"}, False),
            ({}, False),
            # The name of another site may lead to the app: DNS rebinding.
            ({"Origin": "https://evil.example", "Host": "evil.example"}, False),
            ({"Sec-Fetch-Site": "same-origin", "Host": "evil.example"}, False),
            ({"Sec-Fetch-Site": "same-origin", "Origin": OWN_SITE}, True),
            ({"Sec-Fetch-Site": "none"}, True),
            ({"Origin": OWN_SITE}, True),
        ],
    )
    def test_the_guide_refuses_other_sites(
        self, headers: dict[str, str], *, is_own: bool
    ) -> None:
        """Fault: a page of any site could make a visitor's browser stop runtimes."""
        [code] = re.findall(
            "```python\n([^`]*async def refuse_other_sites[^`]*)```", PRODUCTION
        )
        app = FastAPI()
        names: dict[str, Any] = {"app": app}
        exec(code, names)  # noqa: S102 - our docs.
        app.post("/")(names["refuse_other_sites"])
        client = TestClient(app, base_url=OWN_SITE)
        assert client.post("/", headers=headers).is_success is is_own


def stopped(emulator: Emulator) -> int:
    return sum(runtime["status"] == "stopped" for runtime in emulator.runtimes.values())


@pytest.fixture
async def slow() -> AsyncIterator[Emulator]:
    async with Emulator(port=0, latency=0.05) as running:
        yield running


@pytest.mark.skipif(
    sys.platform == "win32", reason="SIGTERM does not shut down gracefully"
)
class TestShutdown:
    async def test_it_drains_each_run_logs_its_report_and_exits(
        self, slow: Emulator
    ) -> None:
        targets = add_runtimes(slow, 8000)
        async with uvicorn(slow, "--workers", "2") as server:
            await server.wait_for("Application startup complete", 2)
            async with server.client() as client:
                for part in range(8):
                    await client.post("/runs", json=targets[part::8])
            await wait_for_requests(slow, 500)
            await server.end()
            await server.wait_for("Finished server process", 2)

        assert not server.logged("Cancel|Traceback|ERROR"), "".join(server.lines)
        assert [report.total() for report in server.reports] == [1000] * 8
        assert sum(report["stopped"] for report in server.reports) == stopped(slow)
        assert len(slow.requests) == stopped(slow) < 8000

    async def test_it_abandons_stops_that_are_not_answered(
        self, slow: Emulator
    ) -> None:
        targets = add_runtimes(slow, 100)
        aliases = [alias for _, alias in targets]
        slow.hold("ws-1", *aliases)
        async with uvicorn(slow) as server:
            async with server.client() as client:
                await client.post("/runs", json=targets)
            await wait_for_requests(slow, 32)
            await server.end()
            slow.release("ws-1", *aliases)
        assert server.reports == [{"not_sent": 68, "unknown": 32}]
        assert not server.logged("Cancel"), "".join(server.lines)

    async def stop_and_end(
        self, api: Emulator, folder: Path, grace: str, attempt: float, limit: float
    ) -> httpx2.Response:
        """Return the answer of the guide's app to a stop in flight."""
        [code] = re.findall(
            r"^```python\n(import asyncio\n.*?)^```$",
            PRODUCTION,
            re.MULTILINE | re.DOTALL,
        )
        assert "--timeout-graceful-shutdown 20`" in PRODUCTION
        for text, short in (
            ("asyncio.timeout(18)", f"asyncio.timeout({limit})"),
            ("timeout=8,", f"timeout={attempt},"),
            ("patience=8)", f"patience={attempt})"),
        ):
            assert text in code
            code = code.replace(text, short)
        start = (
            "from fastapi import FastAPI\nfrom bctrl_async.fastapi import lifespan\n"
        )
        (folder / "app.py").write_text(
            f"{start}app = FastAPI(lifespan=lifespan())\n{code}"
        )
        add_runtimes(api, 1)
        async with (
            uvicorn(api, "--timeout-graceful-shutdown", grace, folder=folder) as server,
            server.client() as client,
        ):
            stopping = asyncio.create_task(
                client.post("/workspaces/ws-1/runtimes/r0/stop")
            )
            await until(lambda: api.received or stopping.done())
            await server.end()
            await server.wait_for("Application shutdown complete")
            return await stopping

    @pytest.mark.parametrize(
        ("faults", "lost"),
        [
            ([Fault.HANG], 2),
            (
                [
                    Reply(429, code="rate_limited", headers={"Retry-After": "2"}),
                    Fault.HANG,
                ],
                0,
            ),
        ],
        ids=["a look-up after a conflict", "attempts after throttling"],
    )
    async def test_a_stop_of_the_guide_is_over_before_it(
        self, slow: Emulator, tmp_path: Path, faults: list[Fault | Reply], lost: int
    ) -> None:
        slow.inject(*faults)
        slow.inject(*[Fault.HANG] * lost, method="GET")
        answer = await self.stop_and_end(slow, tmp_path, "6", attempt=2.4, limit=3.6)
        body = answer.json()
        assert (answer.status_code, body["type"]) == (
            504,
            "urn:bctrl-async:problem:timeout",
        )
        assert (body["mayHaveStopped"], body["alias"]) == (True, "r0")

    async def test_it_cancels_a_longer_stop(
        self, slow: Emulator, tmp_path: Path
    ) -> None:
        slow.inject(Fault.HANG)
        answer = await self.stop_and_end(slow, tmp_path, "1", attempt=60, limit=60)
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")


@pytest.mark.skipif(
    sys.platform == "win32", reason="SIGTERM does not shut down gracefully"
)
async def test_the_app_of_the_guide_answers_many_stops_at_once(
    slow: Emulator, tmp_path: Path
) -> None:
    """Fault: under uvloop some answers were a bare 500, though all were stopped."""
    (tmp_path / "app.py").write_text(FIRST_APP)
    targets = add_runtimes(slow, 400)
    async with uvicorn(slow, folder=tmp_path) as server, server.client() as client:
        answers = await asyncio.gather(
            *(
                client.post(f"/workspaces/ws-1/runtimes/r{number}/stop")
                for number in range(100)
            )
        )
        aliases = [alias for _, alias in targets[100:]]
        events = await client.post("/workspaces/ws-1/stop", json=aliases)

    assert {answer.status_code for answer in answers} == {200}
    assert '"counts":{"stopped":300}' in events.text
    assert stopped(slow) == len(slow.requests) == 400


STATE = "document.getElementById('state').textContent"
HAS_REPORT = f"{STATE}.includes(' after ')"
ROWS = "document.getElementById('rows').textContent"
IS_RUNNING = "document.querySelector('progress').value > 0"


@pytest.fixture
async def server(slow: Emulator) -> AsyncIterator[Uvicorn]:
    async with uvicorn(slow) as server:
        yield server


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
@pytest.mark.skipif(
    sys.platform == "win32", reason="SIGTERM does not shut down gracefully"
)
class TestPage:
    async def test_many_are_stopped_after_a_question_and_a_reload_comes_back(
        self, slow: Emulator, server: Uvicorn, tab: Tab
    ) -> None:
        targets = add_runtimes(slow, 300)
        aliases = [alias for _, alias in targets[100:]]
        slow.hold("ws-1", *aliases)
        await begin(tab, server, 301)
        await tab.wait_for(IS_RUNNING)
        assert await tab.run("window.asked") == "Stop 301 runtimes of ws-1?"
        await tab.reload()
        await tab.wait_for(IS_RUNNING)
        slow.release("ws-1", *aliases)
        await tab.wait_for(HAS_REPORT)
        said = await tab.run(STATE)
        assert said.startswith("300 of 301 no longer running after ")
        assert said.endswith(": 300 stopped, 1 not_found.")
        assert (await tab.run(ROWS)).startswith("ws-1 r300: not_found. ")
        assert await tab.run("document.activeElement.id") == "state"
        assert len(slow.requests) == 301
        assert tab.errors == []

    async def test_a_no_stops_nothing(
        self, slow: Emulator, server: Uvicorn, tab: Tab
    ) -> None:
        await tab.open(server.url)
        await tab.run("""{
            window.confirm = text => { window.asked = text; return false }
            document.getElementById("token").value = "token"
            document.getElementById("aliases").value = "r0\\nr1"
            document.getElementById("stop").click()
        }""")
        await tab.wait_for("window.asked")
        assert slow.requests == []

    async def test_a_cancelled_run_says_so(
        self, slow: Emulator, server: Uvicorn, tab: Tab
    ) -> None:
        add_runtimes(slow, 1000)
        await begin(tab, server, 1000)
        await tab.wait_for(IS_RUNNING)
        await tab.run("document.getElementById('cancel').click()")
        await tab.wait_for(HAS_REPORT)
        counts = f"{stopped(slow)} stopped, {1000 - stopped(slow)} not_sent."
        assert (await tab.run(STATE)).endswith(f"{counts} It was cancelled.")
        assert len(slow.requests) == stopped(slow) < 1000

    async def test_a_wrong_token_and_an_error_of_the_api_are_said(
        self, slow: Emulator, server: Uvicorn, tab: Tab
    ) -> None:
        add_runtimes(slow, 1)
        slow.inject(Reply(403, code="plan.expired"))
        await begin(tab, server, 1, token="wrong")
        await tab.wait_for(f"{STATE} === 'The token is wrong.'")
        await tab.run(f"document.getElementById('token').value = '{TOKEN}'")
        await tab.run("document.getElementById('stop').click()")
        await tab.wait_for(HAS_REPORT)
        assert (await tab.run(ROWS)).startswith("ws-1 r0: rejected. ")
        assert await tab.run("window.asked ?? ''") == ""
        assert len(slow.requests) == 1

    async def test_a_lost_service_and_a_lost_run_are_said(
        self, slow: Emulator, tab: Tab
    ) -> None:
        port = str(free_port())
        add_runtimes(slow, 1000)
        async with uvicorn(slow, "--port", port) as server:
            await begin(tab, server, 1000)
            await tab.wait_for(IS_RUNNING)
            os.killpg(server.process.pid, signal.SIGKILL)
            await tab.wait_for(f"{STATE}.includes('connection is lost')")
        async with uvicorn(slow, "--port", port):
            await tab.wait_for(f"{STATE}.includes('no such run')")

    async def test_no_script_runs_but_that_of_the_page(
        self, server: Uvicorn, tab: Tab
    ) -> None:
        await tab.open(server.url)
        await tab.run("""{
            const script = document.createElement("script")
            script.textContent = "window.stolen = true"
            document.body.append(script)
        }""")
        assert await tab.run("window.stolen") is None
        assert "Content Security Policy" in "".join(tab.errors)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
class TestStream:
    """The app of the guide, whose events `stream.js` reads in a browser."""

    @pytest.fixture
    async def server(self, slow: Emulator, tmp_path: Path) -> AsyncIterator[Uvicorn]:
        # The report of a run is logged as information.
        logging = "import logging\nlogging.basicConfig(level=logging.INFO)\n"
        (tmp_path / "app.py").write_text(FIRST_APP + logging)
        async with uvicorn(slow, folder=tmp_path) as server:
            yield server

    async def read(self, tab: Tab, server: Uvicorn, count: int, body: str) -> None:
        """Stop runtimes in a page of the app, with this body of the event loop."""
        await tab.open(f"{server.url}/openapi.json")
        script = (EXAMPLE / "stream.js").read_text("utf-8")
        aliases = [f"r{number}" for number in range(count)]
        loop = f"for await (const event of stopMany('ws-1', {aliases})) {{ {body} }}"
        start = f"window.hasEnded = (async () => {{ {loop}; return true }})()"
        await tab.run(f"{script}; window.events = []; {start}; 0")

    async def test_a_page_has_each_outcome_when_it_is_known(
        self, slow: Emulator, server: Uvicorn, tab: Tab
    ) -> None:
        add_runtimes(slow, 3)
        slow.hold("ws-1", "r2")
        await self.read(tab, server, 4, "events.push(event)")
        await tab.wait_for("events.length === 3")
        results = await tab.run(
            "events.map(each => each.alias + ' ' + each.result).sort()"
        )
        assert results == ["r0 stopped", "r1 stopped", "r3 not_found"]
        slow.release("ws-1", "r2")
        assert await tab.run("hasEnded")
        assert await tab.run("events.at(-1).counts") == {"stopped": 3, "not_found": 1}

    async def test_a_break_ends_the_run(
        self, slow: Emulator, server: Uvicorn, tab: Tab
    ) -> None:
        targets = add_runtimes(slow, 300)
        slow.hold("ws-1", *(alias for _, alias in targets[1:]))
        await self.read(tab, server, 300, "break")
        assert await tab.run("hasEnded")
        await server.wait_for("a bulk stop ended early")
        assert len(slow.requests) <= 101

    async def test_an_error_of_the_app_is_an_error_of_the_loop(
        self, server: Uvicorn, tab: Tab
    ) -> None:
        await self.read(tab, server, 0, "")
        await tab.run("hasEnded")
        script = "stopMany('ws-1', 'no list').next().catch(error => error.message)"
        assert await tab.run(script) == "The app answered 422."
