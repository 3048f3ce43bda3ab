"""The command `emulator`."""

import asyncio
import errno
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated

from bctrl_async.cli import _output
from bctrl_async.cli._options import UsageError, check_runtimes, option
from bctrl_async.emulator import Emulator, Fault

WORKSPACE = "demo"
KEY = "emulator-key"
_DESKTOP = 10
"""One in so many runtimes of the emulator is a desktop."""


def aliases(count: int) -> Iterator[str]:
    """Name this many runtimes."""
    return (f"runtime-{number:04}" for number in range(1, count + 1))


def emulator(
    *,
    host: Annotated[str, option("Where to listen; default 127.0.0.1.", "ADDRESS")] = "127.0.0.1",
    port: Annotated[int, option("Default 8787; 0 is any free one.", "N")] = 8787,
    api_key: Annotated[str, option(f"What clients must send; default {KEY}.", "KEY")] = KEY,
    runtimes: Annotated[int, option("How many are active; default 10.", "N")] = 10,
    fault: Annotated[
        list[str] | None, option("What goes wrong, how often; repeatable.", "NAME=PROBABILITY")
    ] = None,
    rate_limit: Annotated[
        float | None, option("Stops a second at most; faster ones get a 429.", "N")
    ] = None,
    seed: Annotated[int, option("What the faults are drawn from; default 0.", "N")] = 0,
    latency: Annotated[float, option("Time before every answer; default 0.", "SECONDS")] = 0.0,
) -> int:
    """Run a local server to try clients against, until Ctrl-C.

    It has a workspace called demo with active runtimes: runtime-0001, runtime-0002 and so on. Each
    is a minute older than the one before it, and one in ten is a desktop. With --fault
    rate_limited=0.1, one in ten answers is a 429.
    """
    check_runtimes(runtimes, at_least=0)
    try:
        server = Emulator(
            host=host,
            port=port,
            api_key=api_key,
            faults=_faults(fault or []),
            seed=seed,
            latency=latency,
            rate_limit=rate_limit,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    now = datetime.now(UTC)
    for number, alias in enumerate(aliases(runtimes), start=1):
        # So that there is something for filters to choose from.
        kind = "browser" if number % _DESKTOP else "desktop"
        created = now - timedelta(minutes=number)
        created_at = f"{created:%Y-%m-%dT%H:%M:%S}.000Z"
        server.add_runtime(WORKSPACE, alias, kind=kind, created_at=created_at)
    try:
        asyncio.run(_serve(server, api_key))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = f"port {port} of {host} is in use: choose another with --port"
        else:
            problem = f"cannot listen on {host} port {port}: {error.strerror}"
        raise UsageError(problem) from error
    return 0


def _faults(given: Sequence[str]) -> dict[Fault, float]:
    faults = {}
    for text in given:
        name, _, probability = text.partition("=")
        try:
            faults[Fault(name)] = float(probability)
        except ValueError:
            known = "is no NAME=PROBABILITY" if name in set(Fault) else "names no fault"
            raise ValueError(f"--fault {text} {known}: give such as rate_limited=0.1") from None
    return faults


async def _serve(emulator: Emulator, api_key: str) -> None:
    async with emulator:
        output = _output.Output()
        _output.note("The emulator is running; Ctrl-C ends it. In another terminal:")
        output.say(f"export BCTRL_BASE_URL={_callable(emulator.url)}")
        output.say(f"export BCTRL_API_KEY={shlex.quote(api_key)}")
        output.say(f"bctrl-async stop {WORKSPACE} {next(aliases(1))}")
        ended = asyncio.Event()
        with suppress(NotImplementedError):  # On Windows a SIGTERM is the end in any case.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            output.leave_line()
            raise
        finally:
            _output.note(f"{_output.several(len(emulator.requests), 'request')} received")


def _callable(url: str) -> str:
    """Name this machine, where the URL names every address that it listens on."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
