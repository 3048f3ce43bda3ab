"""The command `emulator`."""

import asyncio
import errno
import math
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from bctrl_async.cli import _output
from bctrl_async.cli._options import MAX_RUNTIMES, check_not_empty, check_positive
from bctrl_async.emulator import Emulator, Fault

WORKSPACE = "demo"
KEY = "emulator-key"
_DESKTOP = 10
"""One in so many runtimes of the emulator is a desktop."""


def runtime_aliases(count: int) -> Iterator[str]:
    """Name this many runtimes."""
    return (f"runtime-{number:04}" for number in range(1, count + 1))


def _latency(value: float) -> float:
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"{value} is not a number of seconds from 0")
    return value


def emulator(
    context: typer.Context,
    *,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", metavar="N", min=0, max=65535, help="The port; 0 is any free one."),
    ] = 8787,
    api_key: Annotated[
        str,
        typer.Option(
            "--api-key", metavar="KEY", callback=check_not_empty, help="What clients must send."
        ),
    ] = KEY,
    runtimes: Annotated[
        int,
        typer.Option(
            "--runtimes", metavar="N", min=0, max=MAX_RUNTIMES, help="How many are active."
        ),
    ] = 10,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            "--fault", metavar="NAME=PROBABILITY", help="What goes wrong, how often; repeatable."
        ),
    ] = None,
    rate_limit: Annotated[
        float | None,
        typer.Option(
            "--rate-limit",
            metavar="N",
            callback=check_positive,
            help="Stops a second at most; faster ones get a 429.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="What the faults are drawn from.")
    ] = 0,
    latency: Annotated[
        float,
        typer.Option(
            "--latency", metavar="SECONDS", callback=_latency, help="Time before every answer."
        ),
    ] = 0.0,
) -> int:
    """Run a local server to try clients against, until Ctrl-C.

    It has a workspace called demo with active runtimes: runtime-0001,
    runtime-0002 and so on. Each is a minute older than the one before it, and
    one in ten is a desktop. With --fault rate_limited=0.1, one in ten answers
    is a 429.
    """
    try:
        server = Emulator(
            host=host,
            port=port,
            api_key=api_key,
            faults=_parse_faults(fault or []),
            seed=seed,
            latency=latency,
            rate_limit=rate_limit,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--fault'") from error
    _add_runtimes(server, runtimes)
    try:
        asyncio.run(_serve(server, api_key))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            context.fail(f"port {port} of {host} is in use: choose another with --port")
        context.fail(f"cannot listen on {host} port {port}: {error.strerror}")
    return 0


def _parse_faults(given: Sequence[str]) -> dict[Fault, float]:
    faults = {}
    for text in given:
        name, _, probability = text.partition("=")
        try:
            faults[Fault(name)] = _probability(probability)
        except ValueError:
            known = "is not NAME=PROBABILITY" if name in set(Fault) else "names no fault"
            raise typer.BadParameter(
                f"{text!r} {known}: give such as rate_limited=0.1", param_hint="'--fault'"
            ) from None
    return faults


def _probability(text: str) -> float:
    if not 0 <= (probability := float(text)) <= 1:
        raise ValueError(text)
    return probability


def _add_runtimes(server: Emulator, runtimes: int) -> None:
    now = datetime.now(UTC)
    for number, alias in enumerate(runtime_aliases(runtimes), start=1):
        # So that there is something for filters to choose from.
        kind = "browser" if number % _DESKTOP else "desktop"
        created = now - timedelta(minutes=number)
        created_at = f"{created:%Y-%m-%dT%H:%M:%S}.000Z"
        server.add_runtime(WORKSPACE, alias, kind=kind, created_at=created_at)


async def _serve(emulator: Emulator, api_key: str) -> None:
    async with emulator:
        output = _output.Output()
        _output.print_info("The emulator is running; Ctrl-C ends it. In another terminal:")
        output.print_result(f"export BCTRL_BASE_URL={_reachable_url(emulator.url)}")
        output.print_result(f"export BCTRL_API_KEY={shlex.quote(api_key)}")
        output.print_result(f"bctrl-async stop {WORKSPACE} {next(runtime_aliases(1))}")
        ended = asyncio.Event()
        with suppress(NotImplementedError):  # On Windows a SIGTERM is the end in any case.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            output.end_line()
            raise
        finally:
            _output.print_info(f"{_output.pluralize(len(emulator.requests), 'request')} received")


def _reachable_url(url: str) -> str:
    """Name this machine, where the URL names every address that it listens on."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
