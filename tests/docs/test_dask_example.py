"""The example of a list on a dask cluster, also with processes that die."""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.commands import Process, kill, start
from support.helpers import BOUND, add_runtimes, until, wait_for_requests
from support.journal_lines import read_lines
from support.warm_server import program

from bctrl_async import BctrlAuthenticationError, RuntimeRef
from bctrl_async.emulator import Emulator
from bctrl_async.journal import Journal, read_journals

KEY = "emulator-key"
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "dask"
CHUNK = 5
PROGRAM_CHUNK = 200
"""The targets of a chunk of the program, in which a kill hits requests in flight."""
LISTEN = "host='127.0.0.1', dashboard_address=':0'"

# Few functions of dask have types. Its own log would show each worker that comes and
# goes.
dask: Any = pytest.importorskip("distributed", reason="it needs the extra `examples`")
logging.getLogger("distributed").setLevel(logging.CRITICAL)


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator(port=0) as running:
        yield running


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> ModuleType:
    """The example, with small chunks, in an environment that has the key."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delitem(sys.modules, "stop_on_dask", raising=False)
    module = importlib.import_module("stop_on_dask")
    vars(module)["CHUNK"] = CHUNK
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
    return module


@pytest.fixture
async def client() -> AsyncIterator[Any]:
    """A client of a cluster with two workers in this process."""
    listen = {"host": "127.0.0.1", "dashboard_address": ":0"}
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(dask.Scheduler(port=0, **listen))
        for _ in range(2):
            worker = dask.Worker(scheduler.address, nthreads=1, dashboard_address=":0")
            await stack.enter_async_context(worker)
        connect = dask.Client(
            scheduler.address, asynchronous=True, set_as_default=False
        )
        yield await stack.enter_async_context(connect)


class Stops:
    """Runs of the example in this process, with the same list and the same journal."""

    def __init__(self, example: ModuleType, client: Any, path: Path) -> None:  # noqa: ANN401 - dask has no types.
        self._example = example
        self._client = client
        self._path = path
        self.targets: list[RuntimeRef] = []

    async def run(self) -> None:
        with Journal(self._path) as journal:
            outcomes = read_journals([self._path], self.targets)
            pending = [outcome.target for outcome in outcomes if not outcome.ok]
            await self._example.stop_all(self._client, pending, journal)

    def results(self) -> Counter[str]:
        """Count the last word on each target by its result."""
        return Counter(
            str(each.result) for each in read_journals([self._path], self.targets)
        )


@pytest.fixture
def stops(
    example: ModuleType,
    client: Any,  # noqa: ANN401 - dask has no types.
    emulator: Emulator,
    tmp_path: Path,
) -> Stops:
    stops = Stops(example, client, tmp_path / "tonight.jsonl")
    stops.targets = [RuntimeRef(*target) for target in add_runtimes(emulator, 32)]
    return stops


def count_tasks(dask_worker: Any) -> int:  # noqa: ANN401 - dask has no types.
    """Count the tasks that a worker has, on the worker."""
    return len(dask_worker.state.tasks)


async def lose(dask_scheduler: Any, address: str) -> None:  # noqa: ANN401 - dask has no types.
    """Treat a worker as dead, on the scheduler, once it has a single chunk left."""
    async with asyncio.timeout(BOUND):
        while len(dask_scheduler.tasks) > 1:
            await asyncio.sleep(0.005)
    await dask_scheduler.remove_worker(address, stimulus_id="test")


class TestInProcess:
    async def test_a_list_is_stopped_in_chunks_and_the_next_run_sends_what_is_pending(
        self, stops: Stops, emulator: Emulator
    ) -> None:
        late = RuntimeRef("ws-1", "late")
        stops.targets.append(late)
        await stops.run()
        assert stops.results() == {"stopped": 32, "not_found": 1}
        assert emulator.received == Counter(stops.targets)

        emulator.add_runtime(*late)
        await stops.run()

        assert stops.results() == {"stopped": 33}
        assert emulator.received == Counter([*stops.targets, late])

    async def test_after_a_cancel_only_chunks_that_have_started_end(
        self,
        stops: Stops,
        emulator: Emulator,
        client: Any,  # noqa: ANN401 - dask has no types.
    ) -> None:
        aliases = [alias for _, alias in stops.targets]
        emulator.hold("ws-1", *aliases)
        running = asyncio.create_task(stops.run())
        await wait_for_requests(emulator, 2 * CHUNK)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert stops.results() == {"unknown": 32}
        # The workers soon know that nobody waits for the chunks that they have not
        # started.
        while max((await client.run(count_tasks)).values()) > 1:
            await asyncio.sleep(0.005)
        started = emulator.received.copy()
        assert started.total() == 2 * CHUNK
        emulator.release("ws-1", *aliases)

        await stops.run()

        assert emulator.received == Counter(stops.targets) + started
        assert stops.results() == {
            "already_stopped": 2 * CHUNK,
            "stopped": 32 - 2 * CHUNK,
        }

    async def test_only_what_has_not_come_back_of_a_lost_worker_is_sent_again(
        self,
        stops: Stops,
        emulator: Emulator,
        client: Any,  # noqa: ANN401 - dask has no types.
    ) -> None:
        """Fault: dask repeated chunks whose outcomes were in the journal."""
        emulator.hold("ws-1", "r31")
        running = asyncio.create_task(stops.run())
        await wait_for_requests(emulator, 32)
        await until(lambda: stops.results()["stopped"] == 30)

        lost = next(iter(await client.nthreads()))
        await client.run_on_scheduler(lose, address=lost)
        emulator.release("ws-1", "r31")
        await running

        assert {emulator.received[target] for target in stops.targets[:30]} == {1}
        assert stops.results().keys() <= {"stopped", "already_stopped"}

    async def test_a_worker_without_a_key_leaves_its_chunks_pending(
        self,
        stops: Stops,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.delenv("BCTRL_API_KEY")
        await stops.run()

        assert len(caplog.records) == 7
        assert (
            "5 targets did not come back: BctrlConfigError('no API key." in caplog.text
        )
        assert stops.results() == {"unknown": 32}
        assert emulator.requests == []
        # The plugin of the first run is still there.
        monkeypatch.setenv("BCTRL_API_KEY", KEY)
        await stops.run()
        assert stops.results() == {"stopped": 32}

    async def test_a_rejected_key_ends_the_run(
        self, stops: Stops, emulator: Emulator
    ) -> None:
        emulator.api_key = "another"
        stops.targets = [
            RuntimeRef(*target) for target in add_runtimes(emulator, 1_000)
        ]
        with pytest.raises(BctrlAuthenticationError):
            await stops.run()

        assert len(emulator.requests) < 500
        assert "stopped" not in stops.results()


SCHEDULER = f"""
import asyncio, sys
from distributed import Scheduler

async def main():
    async with Scheduler({LISTEN}, port=int(sys.argv[1])) as scheduler:
        print(scheduler.address, flush=True)
        await scheduler.finished()

asyncio.run(main())
"""
WORKER = f"""
import asyncio, sys
from distributed import Worker

async def main():
    async with Worker(sys.argv[1], nthreads=1, {LISTEN}) as worker:
        await worker.finished()

asyncio.run(main())
"""


class Processes:
    """A cluster of processes, and the program of the example, with smaller chunks."""

    def __init__(self, stack: AsyncExitStack, folder: Path, emulator: Emulator) -> None:
        self._stack = stack
        self._folder = folder
        self._url = emulator.url
        self.targets = add_runtimes(emulator, 6 * PROGRAM_CHUNK)
        lines = "".join(
            f"{workspace_id},{alias}\n" for workspace_id, alias in self.targets
        )
        (folder / "list.csv").write_text(lines)
        code = (EXAMPLE / "stop_on_dask.py").read_text()
        assert code.count("\nCHUNK = 1_000\n") == 1
        code = code.replace("CHUNK = 1_000", f"CHUNK = {PROGRAM_CHUNK}")
        for name, source in {
            "scheduler": SCHEDULER,
            "worker": WORKER,
            "stop_on_dask": code,
        }.items():
            (folder / f"{name}.py").write_text(source)
        self.journal = folder / "tonight.jsonl"

    async def start_cluster(self) -> list[Process]:
        """Start a scheduler and two workers."""
        scheduler = await self._start("scheduler", "0")
        assert scheduler.stdout is not None
        self._address = (await scheduler.stdout.readline()).decode().strip()
        # The program says which server it is.
        workers = [
            await self._start("worker", self._address, BCTRL_API_KEY=KEY) for _ in "12"
        ]
        return [scheduler, *workers]

    async def start_program(self) -> Process:
        arguments = self._address, "list.csv", self.journal.name
        variables = {"BCTRL_BASE_URL": self._url}
        return await self._start("stop_on_dask", *arguments, **variables)

    async def _start(self, *arguments: str, **variables: str) -> Process:
        with (
            (self._folder / "log").open("a") as log,
            pytest.MonkeyPatch.context() as patch,
        ):
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.chdir(self._folder)
            process = await start(*program("runpy"), *arguments, stderr=log.fileno())
        self._stack.push_async_callback(kill, process)
        return process


@asynccontextmanager
async def processes(folder: Path, emulator: Emulator) -> AsyncIterator[Processes]:
    async with AsyncExitStack() as stack:
        yield Processes(stack, folder, emulator)


@pytest.mark.parametrize("victim", ["scheduler", "worker", "program"])
async def test_after_a_kill_the_list_is_resumed_and_each_target_has_one_last_word(
    emulator: Emulator, tmp_path: Path, victim: str
) -> None:
    async with processes(tmp_path, emulator) as cluster:
        scheduler, worker, _ = await cluster.start_cluster()
        last = [alias for _, alias in cluster.targets[-PROGRAM_CHUNK:]]
        emulator.hold("ws-1", *last)
        running = await cluster.start_program()
        # The workers are amid the third chunk and the fourth.
        await until(lambda: len(emulator.requests) >= 3.5 * PROGRAM_CHUNK)
        await kill(
            {"scheduler": scheduler, "worker": worker, "program": running}[victim]
        )
        emulator.release("ws-1", *last)
        code = await asyncio.wait_for(running.wait(), 4 * BOUND)

        outcomes = list(read_journals([cluster.journal], cluster.targets))
        assert [outcome.target for outcome in outcomes] == cluster.targets
        for outcome in outcomes:
            if outcome.ok:
                assert emulator.status(*outcome.target) == "stopped"
        pending = [outcome for outcome in outcomes if not outcome.ok]
        assert {str(outcome.result) for outcome in pending} <= {"unknown"}
        assert (code == 0) is (not pending) is (victim == "worker")
        if victim == "worker":
            return
        if victim == "scheduler":
            await cluster.start_cluster()
        running = await cluster.start_program()
        assert await asyncio.wait_for(running.wait(), 4 * BOUND) == 0

        assert all(
            each.ok for each in read_journals([cluster.journal], cluster.targets)
        )
        entries = read_lines(cluster.journal.read_bytes()).entries
        assert Counter(each["alias"] for each in entries) == Counter(
            alias for _, alias in cluster.targets
        )
