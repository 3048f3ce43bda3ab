"""The commands `emulator` and `demo`."""

import asyncio
import shlex
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated

from cyclopts import Parameter

from bctrl_async import (
    BctrlConfigError,
    BctrlSession,
    RetryPolicy,
    RuntimeRef,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.cli._options import MAX_RUNTIMES, Rate, Seed, Text, Wait, whole_number
from bctrl_async.cli._output import MAX_SHOWN, Output, pluralize, print_info, summarize
from bctrl_async.cli._progress import run_with_progress
from bctrl_async.emulator import Emulator, Fault, ReceivedRequest

_WORKSPACE = "demo"
_KEY = "emulator-key"
_DEMO_FAULTS = dict.fromkeys(
    (
        Fault.LATENCY,
        Fault.SERVER_ERROR,
        Fault.DROP_BEFORE,
        Fault.DROP_AFTER,
        Fault.UNKNOWN_VALUES,
    ),
    0.05,
)
_SLOW_STOP = 1.0
"""Seconds that some runtimes of the demo take to end."""
_VERIFY_FOR = 5.0
"""Seconds of polling in the demo, for which a user waits at its end."""
_ATTEMPTS = 8
"""The attempts of a stop in the demo, so many that none of them stays unknown."""


def _alias(number: int) -> str:
    return f"runtime-{number:04}"


def emulator(
    *,
    host: Annotated[
        Text, Parameter(metavar="ADDRESS", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, whole_number(0, 65535), Parameter(help="0 picks a free port.")
    ] = 8787,
    api_key: Annotated[
        Text, Parameter(metavar="KEY", help="Key that is accepted.")
    ] = _KEY,
    runtimes: Annotated[
        int, whole_number(0, MAX_RUNTIMES), Parameter(help="Active runtimes.")
    ] = 1000,
    fault: Annotated[
        Sequence[str],
        Parameter(
            metavar="NAME=PROBABILITY",
            show_default=False,
            completer=lambda _: [f"{fault}=0.1" for fault in Fault],
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
    stop_takes: Annotated[
        Wait,
        Parameter(
            show_default="0",
            help="Time from a stop until its runtime ends, such as 20s.",
        ),
    ] = 0.0,
    verbose: Annotated[
        bool,
        Parameter(
            alias="-v", show_default=False, help="Print a line for each request."
        ),
    ] = False,
) -> int:
    """Run a local server of the API for tests, until Ctrl-C.

    Its workspace demo has active runtimes: runtime-0001, runtime-0002, ... Each
    is a minute older than the last, and one in ten is a desktop. For example,
    --fault rate_limited=0.1 answers one request in ten with 429.

    For example:
      bctrl-async emulator --runtimes 1000 --rate-limit 50
      bctrl-async emulator --fault rate_limited=0.1 --fault drop_after=0.05 -v

    Faults:
      latency, rate_limited, server_error, bad_gateway, drop_before, drop_after,
      hang, truncated_json, malformed_json, unknown_values, failed, accepted
    """
    on_request = _print_request if verbose else None
    try:
        server = Emulator(
            host=host,
            port=port,
            api_key=api_key,
            faults=dict(_parse_fault(text) for text in fault),
            seed=seed,
            latency=latency,
            stop_takes=stop_takes,
            rate_limit=rate_limit,
            on_request=on_request,
        )
    except ValueError as error:
        raise BctrlConfigError(str(error)) from error
    _add_runtimes(server, runtimes)
    try:
        output = Output()
        asyncio.run(_serve(server, api_key, output))
    except OSError as error:
        # The text of asyncio has the address before the reason.
        reason = str(error.strerror).rpartition(": ")[2]
        problem = f"cannot listen on {host} port {port}: {reason}"
        raise BctrlConfigError(problem, advice="Choose another with --port") from error
    return output.exit_code()


def _parse_fault(text: str) -> tuple[Fault, float]:
    name, _, probability = text.partition("=")
    with suppress(ValueError):
        if 0 <= float(probability) <= 1:
            return Fault(name), float(probability)
    raise ValueError(f"invalid --fault: {text!r} is not a fault as in rate_limited=0.1")


def _add_runtimes(server: Emulator, count: int) -> None:
    now = datetime.now(UTC)
    for number in range(1, count + 1):
        # Kinds and ages differ so that filters have an effect.
        kind = "browser" if number % 10 else "desktop"
        created_at = (now - timedelta(minutes=number)).isoformat()
        server.add_runtime(_WORKSPACE, _alias(number), kind=kind, created_at=created_at)


async def _serve(server: Emulator, api_key: str, output: Output) -> None:
    async with server:
        print_info(
            "The emulator is running; stop it with Ctrl-C. In another terminal, run:"
        )
        # No client can connect to the address that stands for all interfaces.
        url = server.url.replace("//0.0.0.0:", "//127.0.0.1:")
        url = url.replace("//[::]:", "//[::1]:")
        output.print_result(f"export BCTRL_BASE_URL={url}")
        output.print_result(f"export BCTRL_API_KEY={shlex.quote(api_key)}")
        output.print_result(f"bctrl-async stop {_WORKSPACE} {_alias(1)}")
        if output.write_failed:
            return
        terminated = asyncio.Event()
        with suppress(NotImplementedError):  # Windows ends the process on SIGTERM.
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, terminated.set)
        try:
            await terminated.wait()
        finally:
            counts = f"{pluralize(len(server.requests), 'request')} received"
            if server.ending:
                counts += f", {pluralize(len(server.ending), 'runtime')} still ending"
            print_info(f"\n{counts}")


def _print_request(request: ReceivedRequest) -> None:
    # A query may contain secrets, and is not part of the operation.
    path = request.raw_path.partition("?")[0]
    line = f"{request.status or '---'} {request.method:<4} {path}"
    if request.fault is not None:
        line += f" {request.fault}"
    print_info(line)


def demo(
    *,
    runtimes: Annotated[
        int, whole_number(1, MAX_RUNTIMES), Parameter(help="Runtimes to stop.")
    ] = 300,
) -> int:
    """Stop many runtimes on a misbehaving server; needs no key and no network.

    A local emulator answers late, throttles, fails and drops connections, and
    one runtime in ten takes a second to end. At the end its state is compared
    with the report; the exit code is 0 if they agree.
    """
    server = Emulator(
        port=0,
        api_key=_KEY,
        faults=_DEMO_FAULTS,
        seed=4,
        latency=0.1,
        fault_latency=0.5,
        rate_limit=100,
    )
    targets = [
        RuntimeRef(_WORKSPACE, _alias(number)) for number in range(1, runtimes + 1)
    ]
    for number, target in enumerate(targets, start=1):
        # One name in fifty has no runtime, so that some are not found.
        if number % 50:
            is_slow = number % 10 == 1
            server.add_runtime(*target, stop_takes=_SLOW_STOP if is_slow else 0.0)
    outcomes: list[StopOutcome] = []
    output = Output()
    names = pluralize(runtimes, "runtime")
    print_info(
        f"Stopping {names} on a faulty emulator that allows 100/s; one in ten takes a "
        "second to end."
    )

    async def stop_all() -> tuple[StopReport, bool]:
        async with server:
            retry = RetryPolicy(attempts=_ATTEMPTS, base=0.05, cap=0.4)
            session = BctrlSession(
                _KEY, base_url=server.url, max_connections=40, retry=retry
            )
            async with session:
                batch = session.stop_runtimes(
                    targets, on_outcome=outcomes.append, verify=_VERIFY_FOR
                )
                is_interrupted = await run_with_progress(batch, session, output)
                return batch.report, is_interrupted

    report, is_interrupted = asyncio.run(stop_all())
    output.print_result(summarize(report, is_interrupted=is_interrupted))
    requests = pluralize(len(server.requests), "request")
    output.print_result(f"It took {requests}; {report.throttled:,} were throttled.")
    statuses = {target: server.status(*target) for target in targets}
    for workspace_id, alias in server.ending:
        statuses[RuntimeRef(workspace_id, alias)] = "ending"
    wrong = [
        outcome
        for outcome in outcomes
        if not _is_correct(outcome, statuses[outcome.target])
    ]
    _print_comparison(output, wrong, statuses)
    if is_interrupted:
        raise KeyboardInterrupt
    return output.exit_code(is_failure=bool(wrong))


def _print_comparison(
    output: Output,
    wrong: Sequence[StopOutcome],
    statuses: Mapping[RuntimeRef, str | None],
) -> None:
    """Print wrong outcomes beside the true statuses, or what the emulator confirms."""
    if not wrong:
        counts = Counter(statuses.values())
        missing = counts[None]
        stopped = (
            f"{counts['stopped']} of {len(statuses) - missing} runtimes are stopped"
        )
        if counts["ending"]:
            stopped += f", {counts['ending']} still ending"
        names = f"{missing} of {len(statuses)} names have no runtime"
        output.print_result(f"The emulator confirms: {stopped}; {names}.")
        return
    output.print_result(
        f"The emulator disagrees about {len(wrong)} of {len(statuses)}:"
    )
    for outcome in wrong[:MAX_SHOWN]:
        status = statuses[outcome.target] or "missing"
        output.print_result(
            f"{outcome.target.alias}: {outcome.result}, but it is {status}."
        )


def _is_correct(outcome: StopOutcome, status: str | None) -> bool:
    if outcome.result is StopResult.NOT_FOUND:
        return status is None
    if outcome.result.needs_poll and not outcome.ok:
        # An outcome that is not confirmed claims nothing.
        return True
    return outcome.ok == (status == "stopped")
