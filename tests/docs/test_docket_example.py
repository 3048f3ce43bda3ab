"""The example of bulk stops in a queue, also with processes that die."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest.mock import Mock
from uuid import UUID, uuid4

import httpx2
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from support.commands import Process, kill, start
from support.helpers import BOUND, add_runtimes, until, wait_for_requests
from support.redis_server import SERVER, redis_server

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import Journal, read_journals

pytest.importorskip("docket", reason="it needs the extra `examples`")
from docket import Docket, Retry, Worker
from docket.dependencies import ForcedRetry

KEY = "emulator-key"
TOKEN = "let-me-in"
LOGIN = {"Authorization": f"Bearer {TOKEN}"}
REDELIVERY = timedelta(minutes=5)
"""Longer than any pause: a worker that is alive keeps its messages."""
NO_STOP = f"/stops/{UUID(int=0)}"
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "docket"


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator(port=0, latency=0.05) as running:
        yield running


class Client(httpx2.AsyncClient):
    """A client of the app."""

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        super().__init__(
            transport=transport, base_url="http://app", headers=LOGIN, timeout=BOUND
        )

    async def enqueue(
        self, targets: list[tuple[str, str]], stop_id: UUID | None = None
    ) -> str:
        """Post a bulk stop; return its location."""
        headers = {"Content-Type": "application/json"}
        if stop_id is not None:
            headers["Idempotency-Key"] = str(stop_id)
        # The client's own JSON cannot have a lone surrogate, so this is ASCII.
        answer = await self.post("/stops", content=json.dumps(targets), headers=headers)
        assert answer.status_code == 202
        location: str = answer.headers["Location"]
        assert location == f"/stops/{answer.json()['id']}"
        return location

    async def show(self, location: str) -> dict[str, Any]:
        answer = await self.get(location)
        assert answer.status_code == 200
        shown: dict[str, Any] = answer.json()
        return shown

    async def wait_for_state(self, location: str, state: str) -> None:
        async with asyncio.timeout(BOUND):
            while (await self.show(location))["state"] != state:
                await asyncio.sleep(0.005)


@pytest.fixture
def _environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulator: Emulator
) -> None:
    for name, value in {
        "DOCKET_URL": "memory://",
        "STOPS_FOLDER": str(tmp_path / "stops"),
        "APP_TOKEN": TOKEN,
        "BCTRL_BASE_URL": emulator.url,
        "BCTRL_API_KEY": KEY,
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch, _environment: None) -> ModuleType:
    """The module `stops` of the example, with a queue in memory."""
    monkeypatch.syspath_prepend(EXAMPLE)
    for name in ("stops", "web"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    stops = importlib.import_module("stops")
    # Retries follow at once, and soon if a busy machine has used up the first.
    stops.RETRY.delay = timedelta(milliseconds=20)
    stops.RETRY.maximum_delay = timedelta(seconds=2)
    return stops


@pytest.fixture
async def client(stops: ModuleType) -> AsyncIterator[Client]:
    app = importlib.import_module("web").app
    async with (
        app.router.lifespan_context(app),
        Client(httpx2.ASGITransport(app)) as client,
    ):
        assert stops.docket
        yield client


async def redeliver(docket: Docket) -> None:
    """Let the next worker take what others left, as if `REDELIVERY` had passed."""
    queue = docket.stream_key, docket.worker_group_name
    idle = int(REDELIVERY.total_seconds() * 1000) + 1
    async with docket.redis() as redis:
        for left in await redis.xpending_range(*queue, min="-", max="+", count=100):
            # By position: the queue in memory has bytes as keys.
            message, consumer, *_ = cast("tuple[bytes, ...]", tuple(left.values()))
            await redis.xclaim(*queue, consumer, 0, [message], idle=idle, justid=True)
        # By this lease, workers look for such messages in turn.
        await redis.delete(docket.redelivery_sweep_key)


def new_worker(stops: ModuleType) -> Worker:
    """Return a worker in this process that looks for tasks all the time."""
    often = timedelta(milliseconds=5)
    return Worker(
        stops.docket,
        minimum_check_interval=often,
        scheduling_resolution=often,
        redelivery_timeout=REDELIVERY,
    )


async def work(stops: ModuleType) -> None:
    """Run a worker until the queue is empty."""
    async with new_worker(stops) as running:
        await running.run_until_finished()


@asynccontextmanager
async def working(stops: ModuleType) -> AsyncIterator[None]:
    """Run a worker in the block, and shut it down as the example does."""
    async with new_worker(stops) as worker:
        running = asyncio.create_task(worker.run_forever())
        try:
            yield
        finally:
            running.cancel()
            stops.shut_down()
            await running
    stops.shutting_down.clear()
    # A worker that is shut down just as it starts a task leaves it to the next worker.
    await redeliver(stops.docket)


class TestInProcess:
    async def test_a_bulk_stop_is_accepted_and_a_worker_runs_it_to_its_report(
        self, client: Client, stops: ModuleType, emulator: Emulator
    ) -> None:
        valid = add_runtimes(emulator, 50)
        # No URL can have the last name.
        targets = [*valid, ("ws-1", "gone"), ("ws-1", ".."), ("ws-1", "\ud800")]
        location = await client.enqueue([*targets, targets[0]])
        queued = await client.show(location)
        assert (queued["state"], queued["total"]) == ("queued", 53)
        assert (queued["counts"], queued["report"]) == ({}, None)
        await work(stops)
        done = await client.show(location)
        assert (done["state"], done["total"]) == ("completed", 53)
        assert done["counts"] == {"stopped": 50, "not_found": 1, "invalid": 2}
        assert done["report"]["counts"] == done["counts"]
        assert {failure["alias"] for failure in done["report"]["failures"]} == {
            "gone",
            "..",
            "?",
        }
        # Another run would not help the failures.
        assert emulator.received == Counter(targets[:-2])

    async def test_a_repeated_request_is_one_run_and_later_tries_the_failures_again(
        self, client: Client, stops: ModuleType, emulator: Emulator
    ) -> None:
        targets = [*add_runtimes(emulator, 200), ("ws-1", "gone")]
        emulator.hold("ws-1", "r0")
        stop_id = uuid4()
        location = await client.enqueue(targets, stop_id)
        assert await client.enqueue(targets, stop_id) == location
        headers = {"Idempotency-Key": str(stop_id)}
        other = await client.post("/stops", json=targets[:1], headers=headers)
        assert other.status_code == 422
        async with working(stops):
            await wait_for_requests(emulator, 1)
            assert await client.enqueue(targets, stop_id) == location
            emulator.release("ws-1", "r0")
            await client.wait_for_state(location, "completed")
            assert emulator.received == Counter(targets)
            await client.enqueue(targets, stop_id)
            await client.wait_for_state(location, "completed")
        assert emulator.received == Counter([*targets, ("ws-1", "gone")])
        assert (await client.show(location))["report"]["resumed"] == 200
        files = sorted(path.name for path in stops.FOLDER.iterdir())
        assert files == [f"{stop_id}.jsonl", f"{stop_id}.targets.jsonl"]

    async def test_a_stop_that_starts_in_a_shutdown_sends_nothing_and_goes_back_at_once(
        self, stops: ModuleType, emulator: Emulator
    ) -> None:
        stop_id = uuid4()
        stops.save_targets(stop_id, add_runtimes(emulator, 5))
        stops.shut_down()
        retry = Retry(stops.ATTEMPTS, delay=timedelta(seconds=5))
        async with BctrlSession() as session:
            with pytest.raises(ForcedRetry):
                await stops.stop_many(stop_id, session, retry)
        assert retry.delay == timedelta()
        assert emulator.requests == []

    async def test_unanswered_stops_are_abandoned_at_shutdown_and_sent_again(
        self, client: Client, stops: ModuleType, emulator: Emulator
    ) -> None:
        vars(stops).update(DRAIN=0.01)
        emulator.inject(Fault.HANG)
        location = await client.enqueue(add_runtimes(emulator, 1))
        async with working(stops):
            await wait_for_requests(emulator, 1)
        assert (await client.show(location))["counts"] == {"unknown": 1}
        await work(stops)
        assert (await client.show(location))["report"]["counts"] == {
            "already_stopped": 1
        }

    async def test_while_another_worker_has_the_journal_the_stop_waits(
        self, client: Client, stops: ModuleType, emulator: Emulator
    ) -> None:
        targets, stop_id = add_runtimes(emulator, 5), uuid4()
        location = await client.enqueue(targets, stop_id)
        other = Journal(stops.journal_file(stop_id), base_url=emulator.url)
        async with working(stops):
            await client.wait_for_state(location, "scheduled")
            assert emulator.requests == []
            other.close()
            await client.wait_for_state(location, "completed")
        assert emulator.received == Counter(targets)

    async def test_a_stop_that_ended_early_is_run_again_and_the_last_run_reports_it(
        self, client: Client, stops: ModuleType, emulator: Emulator
    ) -> None:
        vars(stops).update(ATTEMPTS=2, MAX_FAILURES=3)
        targets, stop_id = add_runtimes(emulator, 5), uuid4()
        emulator.api_key = "another"
        location = await client.enqueue(targets, stop_id)
        await work(stops)
        assert len(emulator.requests) == 10
        done = await client.show(location)
        assert (done["state"], done["report"]["counts"]) == (
            "completed",
            {"rejected": 5},
        )
        assert len(done["report"]["failures"]) == 3

        emulator.api_key = KEY
        await client.enqueue(targets, stop_id)
        await work(stops)
        assert (await client.show(location))["report"]["counts"] == {"stopped": 5}

    async def test_a_stop_that_the_queue_has_lost_can_be_posted_again(
        self, client: Client, stops: ModuleType, emulator: Emulator
    ) -> None:
        targets, stop_id = add_runtimes(emulator, 5), uuid4()
        location = await client.enqueue(targets, stop_id)
        async with stops.docket.redis() as redis:
            await redis.delete(
                stops.docket.stream_key, stops.docket.runs_key(str(stop_id))
            )
        assert (await client.show(location))["state"] is None
        await client.enqueue(targets, stop_id)
        await work(stops)
        assert (await client.show(location))["counts"] == {"stopped": 5}

    @pytest.mark.parametrize(
        ("path", "headers", "status"),
        [
            ("/stops", {"Authorization": ""}, 401),
            ("/stops", {"Authorization": "Bearer wrong"}, 401),
            ("/stops", {"Idempotency-Key": "../escape"}, 422),
            (NO_STOP, {"Authorization": ""}, 401),
            (NO_STOP, {}, 404),
        ],
    )
    async def test_a_request_without_the_token_or_for_no_stop_is_refused(
        self,
        client: Client,
        stops: ModuleType,
        path: str,
        headers: dict[str, str],
        status: int,
    ) -> None:
        method = "POST" if path == "/stops" else "GET"
        answer = await client.request(
            method, path, json=[["ws-1", "r0"]], headers=headers
        )
        assert answer.status_code == status
        assert not stops.FOLDER.exists()

    async def test_while_the_queue_is_away_clients_are_told_to_come_back(
        self, client: Client, stops: ModuleType
    ) -> None:
        stops.docket.get_execution = Mock(
            side_effect=RedisConnectionError("connection refused")
        )
        answer = await client.get(NO_STOP)
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers


WORKER = f"""
import asyncio, datetime, worker
worker.REDELIVERY = datetime.timedelta(seconds={REDELIVERY.total_seconds()})
asyncio.run(worker.main())
"""


class Backend:
    """The processes of the example, with a queue in Redis; no API key."""

    def __init__(
        self, folder: Path, queue: str, environment: pytest.MonkeyPatch
    ) -> None:
        self.folder = folder
        self.queue = queue
        self._environment = environment
        environment.setenv("DOCKET_URL", queue)
        environment.setenv("PYTHONPATH", str(EXAMPLE))

    async def start_web(self) -> Process:
        self._environment.delenv("BCTRL_API_KEY", raising=False)
        socket = self.folder / "web"
        socket.unlink(missing_ok=True)
        return await self._start("-m", "uvicorn", "web:app", "--uds", str(socket))

    async def start_worker(self) -> Process:
        self._environment.setenv("BCTRL_API_KEY", KEY)
        return await self._start("-c", WORKER)

    def client(self) -> Client:
        """Return a client of the app, which waits until it serves."""
        return Client(
            httpx2.AsyncHTTPTransport(uds=str(self.folder / "web"), retries=8)
        )

    async def stored(self) -> bytes:
        """Return all that Redis holds."""
        async with Redis.from_url(self.queue) as redis:
            await redis.config_set("rdbcompression", "no")
            return b"".join(
                [await redis.dump(name) or b"" async for name in redis.scan_iter()]
            )

    async def _start(self, *arguments: str) -> Process:
        with (self.folder / "log").open("a") as log:
            return await start(
                sys.executable, *arguments, stdout=log.fileno(), stderr=log.fileno()
            )


@pytest.mark.usefixtures("_environment")
async def test_a_stop_outlives_the_app_and_workers_that_are_shut_down_or_killed(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = add_runtimes(emulator, 900)
    last = [alias for _, alias in targets[600:]]
    emulator.hold("ws-1", *last)
    with redis_server(SERVER) as redis:
        backend = Backend(tmp_path, redis.url, monkeypatch)
        web, shut_down = await backend.start_web(), await backend.start_worker()
        async with backend.client() as client:
            location = await client.enqueue(targets)
            await until(lambda: len(emulator.requests) >= 300)
            shut_down.terminate()
            assert await asyncio.wait_for(shut_down.wait(), BOUND) == 0
            handed_over = len(emulator.requests)
            assert handed_over < 600
            waiting = await client.show(location)
            assert waiting["state"] == "queued"
            assert waiting["counts"] == {
                "stopped": handed_over,
                "unknown": 900 - handed_over,
            }

            killed = await backend.start_worker()
            await until(lambda: len(emulator.requests) >= 600)
        # So far, each target was sent once.
        assert max(emulator.received.values()) == 1
        await kill(web, killed)
        emulator.release("ws-1", *last)
        async with Docket("stops", redis.url) as docket:
            await redeliver(docket)
        resumes = await backend.start_worker()
        held = await backend.stored()
        web = await backend.start_web()
        async with backend.client() as client:
            await client.wait_for_state(location, "completed")
            done = await client.show(location)
        held += await backend.stored()
        await kill(web, resumes)
    journal = tmp_path / f"{location.removeprefix('/')}.jsonl"
    outcomes = list(read_journals([journal], targets))
    assert Counter(outcome.target for outcome in outcomes if outcome.ok) == Counter(
        targets
    )
    assert {emulator.status(*target) for target in targets} == {"stopped"}
    results = Counter(str(outcome.result) for outcome in outcomes)
    assert done["report"]["ok"]
    assert done["counts"] == done["report"]["counts"] == results
    # Only what was in flight was sent again.
    assert results["already_stopped"] <= len(emulator.requests) - 900 <= 100
    # The queue held the id of the stop, but neither its targets nor the API key.
    texts = (location.removeprefix("/stops/"), "ws-1", KEY)
    assert [text.encode() in held for text in texts] == [True, False, False]
