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
from contextlib import AsyncExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
from browser import CHROMIUM, Tab
from fastapi.testclient import TestClient
from helpers import BOUND, HoldingEmulator, free_port
from jsonschema import Draft202012Validator
from servers import answering, emulator_in_a_thread, http_answer, raw_server
from uvicorn_server import EXAMPLE, GRACE, KEY, TOKEN, Uvicorn, uvicorn

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator, Fault, Reply

LOGIN = {"Authorization": f"Bearer {TOKEN}"}
STOP_ONE = "/workspaces/ws-1/runtimes/r1/stop"
RUN = "/runs/unknown"

needs_signals = pytest.mark.skipif(
    sys.platform == "win32", reason="SIGTERM does not shut down gracefully"
)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLE)
    for name in ("app", "events", "runs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("app")


@pytest.fixture
def runs(example: ModuleType) -> ModuleType:
    return sys.modules[example.Runs.__module__]


class Event(dict[str, Any]):
    """The data of a server-sent event, with its name and id."""

    name: str
    id: str | None


def events_of(text: str) -> list[Event]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.splitlines())
        if "data" in fields:
            found.append(Event(json.loads(fields["data"])))
            found[-1].name = fields["event"]
            found[-1].id = fields.get("id")
    return found


def check(value: object, component: str, document: dict[str, Any]) -> None:
    """Check that a value is what its component in the OpenAPI says."""
    schema = {"$ref": f"#/components/schemas/{component}", "components": document["components"]}
    Draft202012Validator(schema).validate(value)


def check_refusal(
    answer: httpx2.Response, document: dict[str, Any], path: str, method: str
) -> None:
    """Check that an error of the app itself is documented, and has its detail there."""
    said = document["paths"][path][method]["responses"][str(answer.status_code)]
    Draft202012Validator(said["content"][answer.headers["Content-Type"]]["schema"]).validate(
        answer.json()
    )
    assert answer.json()["detail"] in said["description"]


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
            assert client.head("/").status_code == 200
            assert client.get("/docs").status_code == 200
        assert emulator.status("ws-1", "r1") == "stopped"

    def test_it_stops_many_runtimes_and_streams_progress_and_a_report(
        self, example: ModuleType, emulator: Emulator
    ) -> None:
        targets = [*emulator.runtimes, ("ws-1", "gone"), ("ws-1", "..")]
        with TestClient(example.app, headers=LOGIN) as client:
            answer = client.post("/stop", json=targets)
            assert answer.status_code == 200
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            *progress, report = events_of(answer.text)
            for name, event in (("Progress", progress[0]), ("StopReport", report)):
                check(event, name, example.app.openapi())
            assert client.post("/stop", json=[["only one"]]).status_code == 422
        assert {event.name for event in progress} == {"progress"}
        assert progress[0]["total"] == report["total"] == len(targets)
        assert {"inFlight", "isThrottled", "isUnanswered", "counts"} < progress[0].keys()
        assert report.name == "report"
        assert report["counts"] == {"stopped": 10, "not_found": 1, "rejected": 1}
        assert {failure["alias"] for failure in report["failures"]} == {"..", "gone"}
        assert not report["ok"]

    def test_an_alias_may_have_a_slash_but_no_path(
        self, example: ModuleType, emulator: Emulator
    ) -> None:
        """Fault: an alias with a slash was answered with a plain 404 of the router."""
        emulator.add_runtime("ws-1", "team/r1")
        with TestClient(example.app, headers=LOGIN) as client:
            answer = client.post("/workspaces/ws-1/runtimes/team%2Fr1/stop")
            path = client.post("/workspaces/ws-1/runtimes/..%2F..%2Fx/stop")
        assert answer.json()["alias"] == "team/r1"
        assert path.status_code == 422
        assert path.json()["detail"] == (
            "Alias '../../x' could be taken for a path. Remove its '.' or '..' segments."
        )
        assert emulator.received == {("ws-1", "team/r1"): 1}

    def test_the_report_is_limited_to_the_first_failures(
        self, example: ModuleType, runs: ModuleType, emulator: Emulator
    ) -> None:
        targets = [("ws-1", "..")] * (runs.MAX_FAILURES + 1)
        with TestClient(example.app, headers=LOGIN) as client:
            report = events_of(client.post("/stop", json=targets).text)[-1]
        assert report["counts"] == {"rejected": len(targets)}
        assert len(report["failures"]) == runs.MAX_FAILURES
        assert not emulator.requests

    async def test_unanswered_stops_are_abandoned_at_shutdown(
        self, runs: ModuleType, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runs, "DRAIN", 0.05)
        emulator.inject(Fault.HANG)
        all_runs = runs.Runs()
        async with BctrlSession() as session, asyncio.timeout(BOUND):
            run = all_runs.start("anna", session.stop_runtimes([("ws-1", "r1")]))
            while not emulator.received:
                await asyncio.sleep(0)
            all_runs.shut_down()
            late = all_runs.start("anna", session.stop_runtimes([("ws-1", "r2")]))
            await all_runs.wait()
        assert json.loads(run.report)["counts"] == {"unknown": 1}
        assert json.loads(late.report)["counts"] == {"not_sent": 1}
        assert all_runs.running == []
        assert emulator.received == {("ws-1", "r1"): 1}

    async def test_a_client_that_comes_back_in_time_is_not_left_out_later(
        self, runs: ModuleType, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runs, "REJOIN", 0.0)
        is_back = asyncio.Event()

        async def targets() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "r1"
            await is_back.wait()
            yield "ws-1", "r2"

        async with BctrlSession() as session, asyncio.timeout(BOUND):
            run = runs.Runs().start("anna", session.stop_runtimes(targets()))
            with run.followed():
                pass
            with run.followed():
                for _ in range(10):  # Meanwhile the time to come back ends.
                    await asyncio.sleep(0)
                is_back.set()
                await run.task
        assert json.loads(run.report)["counts"] == {"stopped": 2}
        assert len(emulator.requests) == 2

    def test_the_report_can_be_read_again_until_the_client_has_it(
        self, example: ModuleType, emulator: Emulator
    ) -> None:
        with TestClient(example.app, headers=LOGIN) as client:
            first = client.post("/stop", json=list(emulator.runtimes))
            again = client.get(first.headers["Content-Location"])
            had_it = {"Last-Event-ID": events_of(again.text)[-1].id or ""}
            assert client.get(first.headers["Content-Location"], headers=had_it).status_code == 204
        assert again.status_code == 200
        assert events_of(again.text) == events_of(first.text)[-1:]
        assert len(emulator.requests) == len(emulator.runtimes)

    def test_too_many_runs_at_once_are_refused(
        self,
        example: ModuleType,
        runs: ModuleType,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(runs, "MAX_RUNNING", 0)
        with TestClient(example.app, headers=LOGIN) as client:
            answer = client.post("/stop", json=[("ws-1", "r1")])
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "10")
        check_refusal(answer, example.app.openapi(), "/stop", "post")
        assert emulator.requests == []

    @pytest.mark.parametrize(
        ("limit", "statuses"), [("MAX_FINISHED", [404, 200]), ("KEEP", [404, 404])]
    )
    def test_few_reports_are_kept_and_not_for_long(
        self,
        *,
        limit: str,
        statuses: list[int],
        example: ModuleType,
        runs: ModuleType,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(runs, limit, 1 if limit == "MAX_FINISHED" else 0.0)
        with TestClient(example.app, headers=LOGIN) as client:
            answers = [client.post("/stop", json=[("ws-1", alias)]) for alias in ("r1", "r2")]
            again = [client.get(answer.headers["Content-Location"]) for answer in answers]
        assert [answer.status_code for answer in again] == statuses
        assert len(emulator.requests) == 2

    async def test_a_run_that_took_long_keeps_its_report(
        self,
        runs: ModuleType,
        session: BctrlSession,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Fault: the reports of the runs that began first were dropped, also as they ended."""
        monkeypatch.setattr(runs, "MAX_FINISHED", 1)
        ended = asyncio.Event()

        async def targets() -> AsyncIterator[tuple[str, str]]:
            await ended.wait()
            yield "ws-1", "crm"

        kept = runs.Runs()
        long = kept.start("ada", session.stop_runtimes(targets()))
        short = kept.start("ada", session.stop_runtimes([("ws-1", "crm")]))
        await short.task
        ended.set()
        await long.task

        assert kept.find(long.id, "ada") is long
        assert kept.find(short.id, "ada") is None


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
                client.get(RUN, headers=encoded),
                client.post(f"{RUN}/cancel", headers=encoded),
            ):
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                check_refusal(answer, example.app.openapi(), "/stop", "post")
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
        assert (answer.status_code, "APP_TOKEN" in answer.text) == (403, True)
        path = "/workspaces/{workspace_id}/runtimes/{alias}/stop"
        check_refusal(answer, example.app.openapi(), path, "post")
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
                client.get(RUN, headers=headers),
                client.post(f"{RUN}/cancel", headers=headers),
            ):
                assert answer.status_code == 403
                check_refusal(answer, example.app.openapi(), "/stop", "post")
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

    def test_a_run_is_unknown_to_all_but_the_user_who_started_it(
        self, example: ModuleType, emulator: Emulator
    ) -> None:
        """Fault: who saw the address of a run could read its report, and cancel it."""
        with TestClient(example.app, headers=LOGIN) as client:
            run = client.post("/stop", json=[("ws-1", "r1")]).headers["Content-Location"]
            example.app.dependency_overrides[example.require_token] = lambda: "another"
            for path in (run, RUN):
                assert client.get(path).status_code == 404
                assert client.post(f"{path}/cancel").status_code == 404
            assert client.get(run).json() == client.get(RUN).json()
            check_refusal(client.get(RUN), example.app.openapi(), "/runs/{run_id}", "get")
            example.app.dependency_overrides.clear()
            assert client.get(run).status_code == 200
            assert client.post(f"{run}/cancel").status_code == 204
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
        assert "POST" in answer.headers["Allow"]
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert emulator.requests == []


def targets_of(emulator: Emulator, count: int) -> list[tuple[str, str]]:
    targets = [("ws-1", f"r{number}") for number in range(count)]
    for target in targets:
        emulator.add_runtime(*target)
    return targets


def stopped(emulator: Emulator) -> int:
    return sum(runtime["status"] == "stopped" for runtime in emulator.runtimes.values())


async def received(emulator: Emulator, count: int) -> None:
    async with asyncio.timeout(BOUND):
        while len(emulator.requests) < count:
            await asyncio.sleep(0.001)


def copy_of_the_example(tmp_path: Path, **constants: float) -> Path:
    """Copy the example, and set constants of `runs.py`."""
    ignored = shutil.ignore_patterns("__pycache__")
    folder = Path(shutil.copytree(EXAMPLE, tmp_path / "example", ignore=ignored))
    module = folder / "runs.py"
    text = module.read_text("utf-8")
    for name, value in constants.items():
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    module.write_text(text, "utf-8")
    return folder


@pytest.fixture
async def slow() -> AsyncIterator[HoldingEmulator]:
    async with HoldingEmulator(latency=0.05) as running:
        yield running


async def stop_many(server: Uvicorn, targets: list[tuple[str, str]]) -> list[Event]:
    async with httpx2.AsyncClient(base_url=server.url, headers=LOGIN, timeout=BOUND) as client:
        answer = await client.post("/stop", json=targets)
    return events_of(answer.text)


@needs_signals
class TestUnderUvicorn:
    async def test_a_run_ends_cleanly_if_its_client_disconnects_and_does_not_come_back(
        self, slow: Emulator, tmp_path: Path
    ) -> None:
        targets = targets_of(slow, 5000)
        async with uvicorn(slow, folder=copy_of_the_example(tmp_path, REJOIN=0.1)) as server:
            async with httpx2.AsyncClient(
                base_url=server.url, headers=LOGIN, timeout=BOUND
            ) as client:
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

    async def test_a_client_that_comes_back_finds_its_run_going_on(
        self, slow: HoldingEmulator
    ) -> None:
        targets = targets_of(slow, 1000)
        slow.held.update(alias for _, alias in targets[200:])
        async with (
            uvicorn(slow) as server,
            httpx2.AsyncClient(base_url=server.url, headers=LOGIN, timeout=BOUND) as client,
        ):
            async with client.stream("POST", "/stop", json=targets) as answer:
                await anext(answer.aiter_lines())
                await received(slow, 100)
            run = answer.headers["Content-Location"]
            async with client.stream("GET", run) as one, client.stream("GET", run) as other:
                slow.held.clear()
                await asyncio.gather(one.aread(), other.aread())
            progress, report = events_of(one.text)[0], events_of(one.text)[-1]
            assert (await client.get("/health")).json() == {"ok": True, "running": 0}
        assert progress.name == "progress"
        assert sum(progress["counts"].values()) >= 100 - 32
        assert report == events_of(other.text)[-1]
        assert report["counts"] == {"stopped": 1000}
        assert len(slow.requests) == stopped(slow) == 1000

    async def test_a_cancelled_run_sends_nothing_new_and_reports(self, slow: Emulator) -> None:
        targets = targets_of(slow, 5000)
        async with (
            uvicorn(slow) as server,
            httpx2.AsyncClient(base_url=server.url, headers=LOGIN, timeout=BOUND) as client,
            client.stream("POST", "/stop", json=targets) as answer,
        ):
            await received(slow, 100)
            cancelled = await client.post(f"{answer.headers['Content-Location']}/cancel")
            text = "".join([part async for part in answer.aiter_text()])
        assert cancelled.status_code == 204
        report = events_of(text)[-1]
        assert report["counts"] == {"stopped": stopped(slow), "not_sent": 5000 - stopped(slow)}
        assert report["ended_early"] is not None
        assert len(slow.requests) == stopped(slow) < 5000

    async def test_a_run_whose_client_just_disconnected_is_logged_before_exit(
        self, example: ModuleType, slow: HoldingEmulator, tmp_path: Path
    ) -> None:
        targets = targets_of(slow, 5000)
        slow.held.update(alias for _, alias in targets)
        async with uvicorn(slow, folder=copy_of_the_example(tmp_path, DRAIN=BOUND)) as server:
            async with (
                httpx2.AsyncClient(base_url=server.url, headers=LOGIN, timeout=BOUND) as client,
                client.stream("POST", "/stop", json=targets) as answer,
            ):
                lines = answer.aiter_lines()
                await anext(lines)
                await received(slow, example.IN_FLIGHT)
            ending = asyncio.create_task(server.end())
            await server.wait_for("Shutting down")
            slow.held.clear()
            assert await ending < GRACE / 2
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
            async with asyncio.timeout(BOUND):
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
        folder = copy_of_the_example(tmp_path)
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
            async with httpx2.AsyncClient(
                base_url=server.url, headers=LOGIN, timeout=BOUND
            ) as client:
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
from bctrl_async.pace import FilePace

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


async def begin(tab: Tab, server: Uvicorn, runtimes: int, token: str = TOKEN) -> None:
    """Fill in the form with the keyboard, and submit it."""
    await tab.open(server.url)
    for text in (token, "ws-1", str(runtimes)):
        await tab.press("Tab")
        await tab.write(text)
    await tab.press("Tab")
    await tab.press("Enter")


FILL_IN = """
document.getElementById("token").value = "{token}"
document.getElementById("workspace").value = "{workspace}"
document.getElementById("runtimes").value = {runtimes}
"""
HAS_REPORT = "document.querySelector('h2').textContent === 'Report'"
IS_RUNNING = "document.querySelector('progress').value > 0"
BUTTON = "document.querySelector('[type=submit]').textContent"
FIELDS = "[...document.querySelectorAll('label + input')].map(each => [each.value, each.disabled])"
ROWS = "[...document.querySelectorAll('#results tr')].map(row => row.innerText.split('\\t'))"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
class TestInBrowser:
    @pytest.mark.parametrize("path", ["/stop", "/workspaces/ws-1/runtimes/r0/stop"])
    async def test_a_form_of_another_site_stops_nothing(self, path: str, tab: Tab) -> None:
        """Fault: a page of any site could make a visitor's browser stop runtimes."""
        async with Emulator(port=0, api_key=KEY) as emulator, uvicorn(emulator) as server:
            emulator.add_runtime("ws-1", "r0")
            page = http_answer("200 OK", ATTACK.format(url=server.url + path).encode())
            async with raw_server(answering(page)) as other_site:
                await tab.open(other_site)
                await tab.wait_for("document.body.textContent.includes('another site')")
        assert emulator.requests == []

    async def test_a_reload_comes_back_to_the_run(self, slow: HoldingEmulator, tab: Tab) -> None:
        async with uvicorn(slow) as server:
            named(slow, 1000)
            slow.held.update(alias for _, alias in list(slow.runtimes)[200:])
            await begin(tab, server, 1001)
            await tab.wait_for(IS_RUNNING)
            await tab.reload()
            await tab.wait_for(IS_RUNNING)
            assert await tab.run("document.querySelector('[type=submit]').disabled")
            assert await tab.run(FIELDS) == [[TOKEN, True], ["ws-1", True], ["1001", True]]
            slow.held.clear()
            await tab.wait_for(HAS_REPORT)
            await tab.reload()
            await tab.wait_for(HAS_REPORT)
            rows = await tab.run(ROWS)
            assert await tab.run(BUTTON) == "Stop 1,001 runtimes"
            assert await tab.run(FIELDS) == [[TOKEN, False], ["ws-1", False], ["1001", False]]
        assert [(row[0], row[2]) for row in rows] == [("stopped", "1,000"), ("not found", "1")]
        assert len(slow.requests) == 1001
        assert tab.errors == []

    async def test_failures_are_grouped_by_their_reasons(self, slow: Emulator, tab: Tab) -> None:
        async with uvicorn(slow) as server:
            named(slow, 10)
            for alias in ("runtime-0003", "runtime-0007"):
                slow.poison("ws-1", alias, Reply(403, code="plan.expired"))
            await begin(tab, server, 11)
            await tab.wait_for(HAS_REPORT)
            await tab.run("document.querySelectorAll('details').forEach(each => each.open = true)")
            rows = await tab.run(ROWS.replace("results", "reasons"))
        [rejected, rejected_names], [not_found, not_found_names] = rows[:2], rows[2:]
        assert rejected[0] == "rejected"
        assert "plan.expired" in rejected[1]
        assert rejected[2] == "2"
        assert "ws-1/runtime-0003" in rejected_names[0]
        assert "ws-1/runtime-0007" in rejected_names[0]
        assert not_found[0::2] == ["not found", "1"]
        assert re.search(r"ws-1/runtime-0011\s+request \w", not_found_names[0])

    async def test_the_keyboard_keeps_its_place(self, slow: Emulator, tab: Tab) -> None:
        """Fault: the focus was lost with the button that was disabled."""
        async with uvicorn(slow) as server:
            named(slow, 5000)
            await begin(tab, server, 5000)
            await tab.wait_for(IS_RUNNING)
            assert await tab.run("document.activeElement.textContent") == "Cancel"
            await tab.press("Enter")
            await tab.wait_for(HAS_REPORT)
            await tab.wait_for("document.activeElement.textContent === 'Report'")
            announced = await tab.run("document.querySelector('[role=status]').textContent")
        assert f"{stopped(slow):,} of 5,000 runtimes are no longer running" in announced
        assert f", {5000 - stopped(slow):,} unconfirmed." in announced
        assert announced.endswith("The run ended early.")
        assert len(slow.requests) == stopped(slow) < 5000

    async def test_a_click_on_cancel_before_the_run_has_an_id_cancels_it(
        self, slow: Emulator, tab: Tab
    ) -> None:
        """Fault: the page cancelled `/runs/null`, and the run went on."""
        async with uvicorn(slow) as server:
            named(slow, 5000)
            await tab.open(server.url)
            await tab.run(FILL_IN.format(token=TOKEN, workspace=" ws-1 ", runtimes=5000))
            await tab.run("""{
                const fetched = window.fetch
                window.asked = []
                window.fetch = async request => {
                    window.asked.push(new URL(request.url).pathname)
                    if (window.asked.length === 1) document.getElementById("cancel").click()
                    return fetched(request)
                }
                document.querySelector("[type=submit]").click()
            }""")
            await tab.wait_for(HAS_REPORT)
            stop, cancel = await tab.run("window.asked")
        assert stop == "/stop"
        assert re.fullmatch(r"/runs/[\w-]+/cancel", cancel)
        assert cancel != "/runs/null/cancel"
        # The workspace was found without the spaces around its name.
        assert len(slow.requests) == stopped(slow) < 5000

    async def test_a_cancel_that_failed_is_said(self, slow: Emulator, tab: Tab) -> None:
        async with uvicorn(slow) as server:
            named(slow, 5000)
            await begin(tab, server, 5000)
            await tab.wait_for(IS_RUNNING)
            await tab.run("window.fetch = async () => { throw new TypeError() }")
            await tab.press("Enter")
            await tab.wait_for("document.querySelector('[role=alert]').textContent")
            said = await tab.run("document.querySelector('[role=alert]').textContent")
            assert await tab.run("document.getElementById('cancel').textContent") == "Cancel"
        assert said.startswith("The run was not cancelled. The service cannot be reached.")

    async def test_runtimes_that_still_run_are_said_in_the_title_and_the_text(
        self, slow: Emulator, tab: Tab
    ) -> None:
        """Fault: the title was "Done" while each runtime was running."""
        async with uvicorn(slow) as server:
            named(slow, 20)
            for (_, alias), runtime in slow.runtimes.items():
                slow.inject(Reply(200, body=runtime, takes_effect=False), alias=alias)
            await begin(tab, server, 20)
            await received(slow, 40)  # Each runtime is polled until the run is cancelled.
            await tab.press("Enter")
            await tab.wait_for(HAS_REPORT)
            title = await tab.run("document.title")
            state = await tab.run("document.getElementById('state').textContent")
        assert title == "Still running · Stop runtimes"
        assert "0 of 20 runtimes are no longer running, 20 still running. The API acc" in state

    async def test_a_wrong_token_is_said_and_can_be_mended(self, slow: Emulator, tab: Tab) -> None:
        async with uvicorn(slow) as server:
            named(slow, 1)
            await begin(tab, server, 1, token="wrong")
            await tab.wait_for("document.querySelector('[role=alert]').textContent")
            assert await tab.run("document.activeElement.getAttribute('aria-invalid')") == "true"
            assert await tab.run("sessionStorage.getItem('token')") is None
            assert not await tab.run("document.querySelector('[role=status]').textContent")
            await tab.run("document.activeElement.select()")
            await tab.write(TOKEN)
            await tab.press("Enter")
            await tab.wait_for(HAS_REPORT)
            assert not await tab.run("document.querySelector('[role=alert]').textContent")
            said = await tab.run("document.getElementById('state').textContent")
        assert said.endswith("1 of 1 runtime is no longer running.")
        assert len(slow.requests) == 1

    async def test_a_tab_without_the_token_asks_for_it_to_show_the_run(
        self, slow: Emulator, tab: Tab
    ) -> None:
        async with uvicorn(slow) as server:
            named(slow, 1)
            await begin(tab, server, 1)
            await tab.wait_for(HAS_REPORT)
            await tab.run("sessionStorage.clear()")
            await tab.reload()
            assert await tab.run(BUTTON) == "Show the run"
            await tab.write(TOKEN)
            await tab.press("Enter")
            await tab.wait_for(HAS_REPORT)
        assert len(slow.requests) == 1

    async def test_a_lost_service_is_said(self, slow: Emulator, tab: Tab) -> None:
        async with uvicorn(slow) as server:
            named(slow, 5000)
            await begin(tab, server, 5000)
            await tab.wait_for(IS_RUNNING)
            os.killpg(server.process.pid, signal.SIGKILL)
            await server.process.wait()
            # Until then a progress that is still on its way would be taken for the last news.
            await tab.wait_for("document.getElementById('state').textContent.includes('is lost')")
            await tab.run("Date.now = () => Infinity")  # No need to wait until it gives up.
            await tab.wait_for("document.querySelector('[role=alert]').textContent")
            said = await tab.run("document.querySelector('[role=alert]').textContent")
            button = await tab.run(BUTTON)
        assert ("connection to the service is lost" in said, button) == (True, "Show the run")

    async def test_a_run_that_the_service_has_lost_keeps_its_last_counts(
        self, slow: Emulator, tab: Tab
    ) -> None:
        """Fault: what had been stopped was wiped, with no word of what to do."""
        async with AsyncExitStack() as stack:
            port = str(free_port())
            server = await stack.enter_async_context(uvicorn(slow, "--port", port))
            named(slow, 5000)
            await begin(tab, server, 5000)
            await tab.wait_for("document.querySelector('#results tr')")
            os.killpg(server.process.pid, signal.SIGKILL)
            await server.process.wait()
            await stack.enter_async_context(uvicorn(slow, "--port", port))
            await tab.wait_for("document.querySelector('[role=alert]').textContent")
            said = await tab.run("document.querySelector('[role=alert]').textContent")
            [[result, _, count]] = await tab.run(ROWS)
            state = await tab.run("document.getElementById('state').textContent")
            announced = await tab.run("document.querySelector('[role=status]').textContent")
            assert await tab.run(BUTTON) == "Stop 5,000 runtimes"
        assert "no such run" in said
        assert said.endswith("Press Stop again: stopping twice is safe.")
        assert result == "stopped"
        assert state == f"{count} of 5,000 runtimes had an outcome."
        assert not announced

    async def test_an_invalid_workspace_is_said_with_the_rule_that_it_breaks(
        self, slow: Emulator, tab: Tab
    ) -> None:
        """Fault: it was "rejected by the API", which had received nothing."""
        async with uvicorn(slow) as server:
            await begin(tab, server, 2)
            await tab.wait_for(HAS_REPORT)
            await tab.run("document.getElementById('workspace').value = '../../etc'")
            await tab.run("document.querySelector('[type=submit]').click()")
            await tab.wait_for("document.querySelector('#results').innerText.includes('invalid')")
            rows = await tab.run(ROWS.replace("results", "reasons"))
        assert len(slow.requests) == 2
        assert [row[0] for row in rows] == ["rejected", "2 names"]
        assert rows[0][1].startswith("Workspace id '../../etc' could be taken for a path.")

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


def named(emulator: Emulator, count: int) -> None:
    """Add the runtimes whose names the page makes."""
    for number in range(1, count + 1):
        emulator.add_runtime("ws-1", f"runtime-{number:04}")
