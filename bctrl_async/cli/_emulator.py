"""The command `emulator`.

It imports the emulator only where it runs it: the server of aiohttp, which the emulator needs,
would make every other command start later by a tenth.
"""

import asyncio
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from bctrl_async import BctrlConfigError
from bctrl_async.cli._options import MAX_RUNTIMES, Rate, Seed, Text, Wait, whole_number
from bctrl_async.cli._output import FAILED, Output, escape, pluralize, print_info

if TYPE_CHECKING:
    from bctrl_async.emulator import Emulator, Fault, ReceivedRequest

WORKSPACE = "demo"
KEY = "emulator-key"
_DESKTOP_EVERY = 10


def runtime_aliases(count: int) -> Iterator[str]:
    """Return the aliases of the emulator's runtimes."""
    return (f"runtime-{number:04}" for number in range(1, count + 1))


def _suggest_faults(_: object) -> list[str]:
    from bctrl_async.emulator import Fault  # noqa: PLC0415 - imports a server.

    return [f"{fault}=0.1" for fault in Fault]


def emulator(
    *,
    host: Annotated[Text, Parameter(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, whole_number(0, 65535), Parameter(help="0 picks a free port.")] = 8787,
    api_key: Annotated[Text, Parameter(metavar="KEY", help="Key that is accepted.")] = KEY,
    runtimes: Annotated[
        int, whole_number(0, MAX_RUNTIMES), Parameter(help="Active runtimes.")
    ] = 1000,
    fault: Annotated[
        Sequence[str],
        Parameter(
            metavar="NAME=PROBABILITY",
            show_default=False,
            completer=_suggest_faults,
            help="Inject a fault; repeatable.",
        ),
    ] = (),
    rate_limit: Annotated[
        Rate | None, Parameter(help="Answer 429 beyond N requests per second.")
    ] = None,
    seed: Seed = 0,
    latency: Annotated[
        Wait, Parameter(show_default="0", help="Delay of every answer, such as 50ms.")
    ] = 0.0,
    verbose: Annotated[
        bool, Parameter(alias="-v", show_default=False, help="Print a line for each request.")
    ] = False,
) -> int:
    """Run a local server of the API for tests, until Ctrl-C.

    Its workspace demo has active runtimes: runtime-0001, runtime-0002, ... Each
    is a minute older than the one before, and one in ten is a desktop. For
    example, --fault rate_limited=0.1 answers one request in ten with 429.

    For example:
      bctrl-async emulator --runtimes 1000 --rate-limit 50
      bctrl-async emulator --fault rate_limited=0.1 --fault drop_after=0.05 -v

    Faults:
      latency, rate_limited, server_error, bad_gateway, drop_before, drop_after,
      close_kept_alive, hang, slow_drip, truncated_json, malformed_json, oversized,
      compressed_bomb, unknown_values, failed, accepted, stray_answer,
      late_stray_answer
    """
    from bctrl_async.emulator import Emulator  # noqa: PLC0415 - imports a server.

    try:
        server = Emulator(
            host=host,
            port=port,
            api_key=api_key,
            faults=_parse_faults(fault),
            seed=seed,
            latency=latency,
            rate_limit=rate_limit,
            on_request=_print_request if verbose else None,
        )
    except ValueError as error:
        raise BctrlConfigError(str(error)) from error
    _add_runtimes(server, runtimes)
    try:
        output = Output()
        asyncio.run(_serve(server, api_key, output))
    except OSError as error:
        problem = f"cannot listen on {host} port {port}: {error.strerror}"
        raise BctrlConfigError(problem, advice="Choose another with --port") from error
    return FAILED if output.write_failed else 0


def _parse_faults(given: Sequence[str]) -> "dict[Fault, float]":
    from bctrl_async.emulator import Fault  # noqa: PLC0415 - imports a server.

    faults = {}
    for text in given:
        name, _, probability = text.partition("=")
        try:
            faults[Fault(name)] = _parse_probability(probability)
        except ValueError:
            problem = "is not NAME=PROBABILITY" if name in set(Fault) else "is not a known fault"
            raise BctrlConfigError(
                f"invalid --fault: {text!r} {problem}, such as rate_limited=0.1"
            ) from None
    return faults


def _parse_probability(text: str) -> float:
    if not 0 <= (probability := float(text)) <= 1:
        raise ValueError(text)
    return probability


def _add_runtimes(server: "Emulator", count: int) -> None:
    now = datetime.now(UTC)
    for number, alias in enumerate(runtime_aliases(count), start=1):
        # Kinds and ages differ so that filters have an effect.
        kind = "browser" if number % _DESKTOP_EVERY else "desktop"
        created = now - timedelta(minutes=number)
        created_at = f"{created:%Y-%m-%dT%H:%M:%S}.000Z"
        server.add_runtime(WORKSPACE, alias, kind=kind, created_at=created_at)


async def _serve(server: "Emulator", api_key: str, output: Output) -> None:
    async with server:
        print_info("The emulator is running; stop it with Ctrl-C. In another terminal, run:")
        output.print_result(f"export BCTRL_BASE_URL={_reachable_url(server.url)}")
        output.print_result(f"export BCTRL_API_KEY={shlex.quote(api_key)}")
        output.print_result(f"bctrl-async stop {WORKSPACE} {next(runtime_aliases(1))}")
        if output.write_failed:
            return
        terminated = asyncio.Event()
        with suppress(NotImplementedError):  # On Windows SIGTERM ends the process anyway.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
        try:
            await terminated.wait()
        except asyncio.CancelledError:
            output.end_line()
            raise
        finally:
            print_info(f"{pluralize(len(server.requests), 'request')} received")


def _print_request(request: "ReceivedRequest") -> None:
    # A query may contain secrets, and is not part of the operation.
    path, query, _ = request.raw_path.partition("?")
    parts = [str(request.status or "---"), request.method.ljust(4), path + "?..." * bool(query)]
    names = [name for name in (request.workspace_id, request.alias) if name is not None]
    if "%" in path and names:
        parts.append(f"({', '.join(map(escape, names))})")
    if request.fault is not None:
        parts.append(str(request.fault))
    print_info(" ".join(parts))


def _reachable_url(url: str) -> str:
    """Replace the address that stands for all interfaces, which no client can connect to."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
