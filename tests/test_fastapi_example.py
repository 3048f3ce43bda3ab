"""The FastAPI example app, in this process and under a real uvicorn."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from servers import answering, emulator_in_a_thread, http_answer, raw_server

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator, Fault

KEY = "emulator-key"
TOKEN = "let-me-in"
LOGIN = {"Authorization": f"Bearer {TOKEN}"}
STOP_ONE = "/workspaces/ws-1/runtimes/r1/stop"
EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "fastapi"
GRACE = 10

needs_signals = pytest.mark.skipif(
    sys.platform == "win32", reason="SIGTERM does not shut down gracefully"
)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    return importlib.import_module("app")


class Event(dict[str, Any]):
    """The data of a server-sent event, with its name."""

    name: str


def events_of(text: str) -> list[Event]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.splitlines())
        if "data" in fields:
            found.append(Event(json.loads(fields["data"])))
            found[-1].name = fields["event"]
    return found


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("APP_TOKEN", TOKEN)
    with emulator_in_a_thread() as emulator:
        monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
        yield emulator


class TestInProcess:
    def test_it_stops_one_runtime_and_reports_its_health(
        self, example: ModuleType, emulator: Emulator
    ) -> None:
        with TestClient(example.app, headers=LOGIN) as client:
            assert client.get("/health").json() == {"ok": True, "running": 0}
            for _ in range(2):
                answer = client.post(STOP_ONE)
                assert answer.json()["status"] == "stopped"
            assert client.get("/").headers["Content-Type"].startswith("text/html")
            assert client.get("/docs").status_code == 200
        assert emulator.status("ws-1", "r1") == "stopped"

    def test_it_stops_many_runtimes_and_streams_progress_and_a_report(
        self, example: ModuleType, emulator: Emulator
    ) -> None:
        targets = [*emulator.runtimes, ("ws-1", "gone"), ("ws-1", "..")]
        with TestClient(example.app, headers=LOGIN) as client:
            answer = client.post("/stop", json=targets)
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            *progress, report = events_of(answer.text)
            assert client.post("/stop", json=[["only one"]]).status_code == 422
        assert {event.name for event in progress} == {"progress"}
        assert progress[0]["total"] == report["total"] == len(targets)
        assert {"inFlight", "isThrottled", "isUnanswered", "counts"} < progress[0].keys()
        assert report.name == "report"
        assert report["counts"] == {"stopped": 10, "not_found": 1, "rejected": 1}
        assert {failure["alias"] for failure in report["failures"]} == {"..", "gone"}
        assert not report["ok"]

    def test_the_report_is_limited_to_the_first_failures(
        self, example: ModuleType, emulator: Emulator
    ) -> None:
        targets = [("ws-1", "..")] * (example.MAX_FAILURES + 1)
        with TestClient(example.app, headers=LOGIN) as client:
            report = events_of(client.post("/stop", json=targets).text)[-1]
        assert report["counts"] == {"rejected": len(targets)}
        assert len(report["failures"]) == example.MAX_FAILURES
        assert not emulator.requests

    async def test_unanswered_stops_are_abandoned_at_shutdown(
        self, example: ModuleType, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(example, "DRAIN", 0.05)
        emulator.inject(Fault.HANG)
        runs = example.Runs()
        async with BctrlSession() as session, asyncio.timeout(10):
            run = runs.start(session.stop_runtimes([("ws-1", "r1")]))
            while not emulator.received:
                await asyncio.sleep(0)
            runs.shut_down()
            late = runs.start(session.stop_runtimes([("ws-1", "r2")]))
            await runs.wait()
        assert run.task.result().counts == {"unknown": 1}
        assert late.task.result().counts == {"not_sent": 1}
        assert len(runs) == 0
        assert emulator.received == {("ws-1", "r1"): 1}


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
                client.post(STOP_ONE, headers=encoded),
                client.post("/stop", json=[("ws-1", "r1")], headers=encoded),
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
            answer = client.post(STOP_ONE)
        assert (answer.status_code, "APP_TOKEN" in answer.text) == (503, True)
        assert emulator.requests == []

    @pytest.mark.parametrize(
        "headers",
        [
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site", "Origin": "http://testserver"},
            {"Origin": "https://evil.example"},
            {"Origin": "http://testserver:81"},
            {"Origin": "null"},
        ],
    )
    def test_a_request_from_another_site_stops_nothing_even_with_the_token(
        self, example: ModuleType, emulator: Emulator, headers: dict[str, str]
    ) -> None:
        """Fault: a page of any site could make a visitor's browser stop runtimes."""
        with TestClient(example.app, headers=LOGIN) as client:
            for answer in (
                client.post(STOP_ONE, headers=headers),
                client.post("/stop", json=[("ws-1", "r1")], headers=headers),
            ):
                assert answer.status_code == 403
        assert emulator.requests == []

    @pytest.mark.parametrize(
        "headers",
        [
            {"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"},
            {"Sec-Fetch-Site": "none"},
            {"Origin": "http://testserver"},
        ],
    )
    def test_a_request_of_the_page_itself_is_let_in(
        self, example: ModuleType, emulator: Emulator, headers: dict[str, str]
    ) -> None:
        with TestClient(example.app, headers=LOGIN) as client:
            assert client.post(STOP_ONE, headers=headers).status_code == 200
        assert len(emulator.requests) == 1

    def test_another_site_gets_no_permission_by_cors(
        self, example: ModuleType, emulator: Emulator
    ) -> None:
        preflight = {
            "Origin": "https://evil.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        with TestClient(example.app) as client:
            answer = client.options("/stop", headers=preflight)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert emulator.requests == []


class Uvicorn:
    """The example under uvicorn.

    Attributes:
        process: The main process.
        url: The base URL.
        lines: The log lines so far.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(line.decode())

    def logged(self, pattern: str) -> list[re.Match[str]]:
        return [found for line in self.lines if (found := re.search(pattern, line))]

    async def wait_for(self, pattern: str, times: int = 1) -> re.Match[str]:
        try:
            async with asyncio.timeout(15):
                while len(found := self.logged(pattern)) < times:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pytest.fail(f"{pattern!r} is not in the log:\n{''.join(self.lines)}")
        return found[-1]

    @property
    def reports(self) -> list[Counter[str]]:
        """The logged counts of each bulk stop, checked to add up to its total."""
        found = []
        for line in self.logged(r"bulk stop: total=(\d+) ([a-z_0-9= ]+)"):
            pairs = (pair.split("=") for pair in line[2].split())
            counts = Counter({name: int(count) for name, count in pairs})
            assert counts.total() == int(line[1])
            found.append(counts)
        return found

    async def end(self) -> float:
        """Send SIGTERM to the main process; return the seconds until it ended."""
        began = asyncio.get_running_loop().time()
        self.process.terminate()
        async with asyncio.timeout(GRACE):
            await self.process.wait()
        return asyncio.get_running_loop().time() - began


@asynccontextmanager
async def uvicorn(
    emulator: Emulator, *options: str, folder: Path = EXAMPLE
) -> AsyncIterator[Uvicorn]:
    environment = {
        **os.environ,
        "BCTRL_API_KEY": KEY,
        "BCTRL_BASE_URL": emulator.url,
        "APP_TOKEN": TOKEN,
    }
    command = ["-m", "uvicorn", "--app-dir", str(folder), "app:app", "--port", "0"]
    grace = ["--timeout-graceful-shutdown", str(GRACE)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        *grace,
        *options,
        env=environment,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    server = Uvicorn(process)
    reading = asyncio.create_task(server.read())
    try:
        server.url = (await server.wait_for(r"running on (http://\S+)"))[1]
        await server.wait_for("Application startup complete")
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await reading


def targets_of(emulator: Emulator, count: int) -> list[tuple[str, str]]:
    targets = [("ws-1", f"r{number}") for number in range(count)]
    for target in targets:
        emulator.add_runtime(*target)
    return targets


def stopped(emulator: Emulator) -> int:
    return sum(runtime["status"] == "stopped" for runtime in emulator.runtimes.values())


async def received(emulator: Emulator, count: int) -> None:
    async with asyncio.timeout(15):
        while len(emulator.requests) < count:
            await asyncio.sleep(0.001)


@pytest.fixture
async def slow() -> AsyncIterator[Emulator]:
    async with Emulator(port=0, api_key=KEY, latency=0.05) as running:
        yield running


async def stop_many(server: Uvicorn, targets: list[tuple[str, str]]) -> list[Event]:
    async with httpx2.AsyncClient(base_url=server.url, headers=LOGIN, timeout=30) as client:
        answer = await client.post("/stop", json=targets)
    return events_of(answer.text)


@needs_signals
class TestUnderUvicorn:
    async def test_a_client_that_disconnects_ends_its_run_at_once_and_cleanly(
        self, slow: Emulator
    ) -> None:
        targets = targets_of(slow, 5000)
        async with uvicorn(slow) as server:
            async with httpx2.AsyncClient(base_url=server.url, headers=LOGIN, timeout=30) as client:
                async with client.stream("POST", "/stop", json=targets) as answer:
                    lines = answer.aiter_lines()
                    await anext(lines)
                    await received(slow, 200)
                at_disconnect = len(slow.requests)
                await server.wait_for("bulk stop")
                assert (await client.get("/health")).json() == {"ok": True, "running": 0}
            [counts] = server.reports
            # Stops in flight were answered; the API never saw the others.
            assert counts == {"stopped": stopped(slow), "not_sent": 5000 - stopped(slow)}
            assert len(slow.requests) == stopped(slow) < at_disconnect + 1000

    async def test_a_run_whose_client_just_disconnected_is_logged_before_exit(
        self, example: ModuleType
    ) -> None:
        async with Emulator(port=0, api_key=KEY, latency=1.0) as slow:
            targets = targets_of(slow, 5000)
            async with uvicorn(slow) as server:
                async with (
                    httpx2.AsyncClient(base_url=server.url, headers=LOGIN, timeout=30) as client,
                    client.stream("POST", "/stop", json=targets) as answer,
                ):
                    lines = answer.aiter_lines()
                    await anext(lines)
                    await received(slow, example.IN_FLIGHT)
                assert await server.end() < GRACE / 2
                await server.wait_for("bulk stop")
        assert server.reports == [
            Counter({"stopped": example.IN_FLIGHT, "not_sent": 5000 - example.IN_FLIGHT})
        ]

    @pytest.mark.parametrize("workers", [1, 2])
    async def test_sigterm_during_bulk_stops_drains_reports_and_exits(
        self, workers: int, slow: Emulator
    ) -> None:
        targets = targets_of(slow, 8000)
        async with uvicorn(slow, "--workers", str(workers)) as server:
            await server.wait_for("Application startup complete", workers)
            running = [
                asyncio.create_task(stop_many(server, targets[part::8])) for part in range(8)
            ]
            await received(slow, 1000)
            took = await server.end()
            async with asyncio.timeout(5):
                reports = [events[-1] for events in await asyncio.gather(*running)]
            await server.wait_for("Finished server process", workers)

        assert took < GRACE / 2
        assert not server.logged("Cancel|Traceback|ERROR"), "".join(server.lines)
        assert {report.name for report in reports} == {"report"}
        assert {report["total"] for report in reports} == {1000}
        reported = sum((Counter(report["counts"]) for report in reports), Counter[str]())
        assert len(server.reports) == 8
        assert reported == sum(server.reports, Counter())
        assert reported == {"stopped": stopped(slow), "not_sent": 8000 - stopped(slow)}
        assert len(slow.requests) == stopped(slow) < 8000

    async def test_a_reload_during_a_bulk_stop_drains_reports_and_serves_again(
        self, slow: Emulator, tmp_path: Path
    ) -> None:
        folder = tmp_path / "example"
        shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
        targets = targets_of(slow, 8000)
        options = ("--reload", "--reload-dir", str(folder))
        async with uvicorn(slow, *options, folder=folder) as server:
            running = asyncio.create_task(stop_many(server, targets))
            await received(slow, 200)
            module = folder / "app.py"
            module.write_text(module.read_text("utf-8") + "\nNEW = True\n", "utf-8")
            async with asyncio.timeout(GRACE):
                report = (await running)[-1]
            await server.wait_for("Application startup complete", 2)
            async with httpx2.AsyncClient(base_url=server.url, headers=LOGIN, timeout=30) as client:
                assert (await client.get("/health")).json() == {"ok": True, "running": 0}
            assert server.reports == [Counter(report["counts"])]
            assert report["counts"]["stopped"] == stopped(slow) == len(slow.requests) < 8000
            assert await server.end() < GRACE / 2

    async def test_two_workers_share_the_rate_of_a_pace(self, tmp_path: Path) -> None:
        """Fault: N workers send N times the rate that one may send."""
        (tmp_path / "app.py").write_text(APP_WITH_PACE.format(path=str(tmp_path / "pace")))
        async with AsyncExitStack() as stack:
            emulator = await stack.enter_async_context(Emulator(port=0, api_key=KEY))
            targets_of(emulator, 6)
            server = await stack.enter_async_context(
                uvicorn(emulator, "--workers", "2", folder=tmp_path)
            )
            await server.wait_for("Application startup complete", 2)
            workers: dict[int, httpx2.AsyncClient] = {}
            async with asyncio.timeout(10):
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
from bctrl_async.fastapi import BctrlDep, RuntimeBody, lifespan
from bctrl_async.pace import FilePace

app = FastAPI(lifespan=lifespan(pace=FilePace({path!r}, rate=20)))

@app.get("/pid")
async def pid() -> int:
    return os.getpid()

@app.post("/stop/{{alias}}")
async def stop(alias: str, session: BctrlDep) -> RuntimeBody:
    return await session.stop_runtime("ws-1", alias)
"""
ONE_CONNECTION = httpx2.Limits(max_connections=1)

ATTACK = """<!doctype html><form method="post" enctype="text/plain" action="{url}">
<input name='[["ws-1","r0"],["ws-1","' value='"]]'></form>
<script>document.forms[0].submit()</script>"""


class TestInBrowser:
    @pytest.mark.parametrize("path", ["/stop", "/workspaces/ws-1/runtimes/r0/stop"])
    async def test_a_form_of_another_site_stops_nothing(self, path: str, tmp_path: Path) -> None:
        """Fault: a page of any site could make a visitor's browser stop runtimes."""
        chromium = shutil.which("chromium")
        if chromium is None:
            pytest.skip("there is no Chromium")
        async with Emulator(port=0, api_key=KEY) as emulator, uvicorn(emulator) as server:
            emulator.add_runtime("ws-1", "r0")
            page = http_answer("200 OK", ATTACK.format(url=server.url + path).encode())
            async with raw_server(answering(page)) as other_site, asyncio.timeout(60):
                browser = await asyncio.create_subprocess_exec(
                    *(chromium, "--headless", "--no-sandbox", "--disable-gpu"),
                    *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom"),
                    other_site,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                )
                shown, _ = await browser.communicate()
        assert b"another site" in shown
        assert emulator.requests == []
