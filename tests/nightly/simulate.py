"""Simulate the client against the emulator in virtual time, over a seeded network.

`python tests/nightly/simulate.py [--seeds 1000] [--first 0] [--jobs 2] [--trace]
[--share-journal] [--break FAULT] [--long-way] [--eager]`

Each seed is one run of the real client, aiohttp and the emulator: a bulk stop, the
command's bulk stop, or single calls. The seed decides all that is left to chance:
faults of the network and the server, cancellations, endings, arguments. `--first SEED
--seeds 1 --trace` repeats a run exactly and prints what happened. With
`--share-journal` each run is several bulk stops with one journal, while their runtimes
are started again. `--break` puts a known fault back into the client; then the exit code
is 0 if it is found. With `--long-way` every request goes through
`aiohttp.ClientSession.request`, as where a tracer has wrapped it. With `--eager` all
tasks start at once.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from sim.faults import FAULTS
from sim.runner import Verdict, simulate
from support.loops import EAGER_HELP, start_eagerly
from support.ways import LONG_WAY_HELP, take_long_way

_CHUNK = 25
_SHOWN_EVENTS = 100


def _simulate(
    seeds: range, fault: str | None, *, shares_journal: bool
) -> list[Verdict]:
    verdicts = []
    for seed in seeds:
        verdict = simulate(seed, fault, shares_journal=shares_journal)
        if not verdict.problems:
            verdict.trace, verdict.plan = [], ""
        verdicts.append(verdict)
    # A run freezes what earlier runs left: 170 KB of cycles for each.
    gc.collect()
    return verdicts


def _arguments() -> Namespace:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    jobs = os.cpu_count() or 1
    for name, default in {"seeds": 1000, "first": 0, "jobs": jobs, "show": 1}.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"default {default}"
        )
    parser.add_argument(
        "--trace", action="store_true", help="print every event of every run"
    )
    parser.add_argument(
        "--share-journal", action="store_true", help="bulk stops that share a journal"
    )
    faults = "; ".join(f"{name}: {does}" for name, (does, *_) in FAULTS.items())
    parser.add_argument("--break", dest="fault", choices=list(FAULTS), help=faults)
    parser.add_argument("--long-way", action="store_true", help=LONG_WAY_HELP)
    parser.add_argument("--eager", action="store_true", help=EAGER_HELP)
    return parser.parse_args()


def _write(*lines: str) -> None:
    sys.stdout.write("\n".join([*lines, ""]))
    sys.stdout.flush()


def _trace(args: Namespace) -> int:
    failed = 0
    for seed in range(args.first, args.first + args.seeds):
        verdict = simulate(seed, args.fault, shares_journal=args.share_journal)
        failed += bool(verdict.problems)
        _write(f"seed {seed}: {verdict.plan}", *verdict.trace, str(verdict))
    return 1 if failed else 0


def _main() -> int:
    args = _arguments()
    if args.long_way:
        take_long_way()
    if args.eager:
        start_eagerly()
    if args.trace:
        return _trace(args)
    began = time.monotonic()
    failed, requests, lists, seconds = 0, 0, 0, 0.0
    rules, results = Counter[str](), Counter[str]()
    last = args.first + args.seeds
    chunks = [
        range(at, min(at + _CHUNK, last)) for at in range(args.first, last, _CHUNK)
    ]
    run = partial(_simulate, fault=args.fault, shares_journal=args.share_journal)
    with ProcessPoolExecutor(args.jobs) as pool:
        for chunk in as_completed([pool.submit(run, seeds) for seeds in chunks]):
            for verdict in chunk.result():
                requests += verdict.requests
                lists += verdict.lists
                results += verdict.results
                seconds += verdict.seconds
                if not verdict.problems:
                    continue
                failed += 1
                rules.update({rule for rule, _ in verdict.problems})
                if failed <= args.show:
                    _write(
                        f"seed {verdict.seed}: {verdict.plan}",
                        *verdict.trace[-_SHOWN_EVENTS:],
                    )
                _write(f"{str(verdict)[:500]}\n  {_command(verdict.seed, args)}")
    took = time.monotonic() - began
    _write(
        *(
            f"{count:6} seeds broke the rule: {rule}"
            for rule, count in rules.most_common()
        )
    )
    _write(
        "Results: "
        + ", ".join(f"{count:,} {name}" for name, count in results.most_common())
    )
    _write(
        f"{args.seeds - failed} of {args.seeds} seeds passed: {requests:,} requests, "
        f"{lists:,} of them for lists, in {seconds / 3600:,.1f} h of virtual time, "
        f"{args.seeds / took:.0f} seeds a second"
    )
    if args.fault is not None:
        return 0 if FAULTS[args.fault].rule in rules else 1
    return 1 if failed else 0


def _command(seed: int, args: Namespace) -> str:
    broken = "" if args.fault is None else f" --break {args.fault}"
    way = " --long-way" if args.long_way else ""
    eager = " --eager" if args.eager else ""
    shared = " --share-journal" if args.share_journal else ""
    options = f"--first {seed} --seeds 1 --trace{shared}{broken}{way}{eager}"
    return f"python tests/nightly/simulate.py {options}"


if __name__ == "__main__":
    # A shell starts background jobs with SIGINT ignored: Ctrl-C would end no run then.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("PYTHONHASHSEED") != "0":
        # A fixed hash seed gives sets of strings the same order in every process.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)  # noqa: S606
    sys.exit(_main())
