"""Compare the fast path with the long way: mutated answers have the same effect.

`python tests/nightly/differential.py [--answers 5000] [--seed 0] [--first 0] [--jobs 2]
[--break FAULT]`

Each number of a seed is a case: three stops, one after the other, and the packets that
answer them. It is run twice in virtual time, on connections in memory, by the real
client and aiohttp's own protocol and parser. The results, the errors with their causes,
the bytes of the requests and the fate of each connection must be equal. `--first NUMBER
--answers 1` repeats a case. `--break` puts a fault into one of the two; then the exit
code is 0 if it is found.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

from aiohttp.client_proto import ResponseHandler

sys.path.append(str(Path(__file__).parents[1]))
from fuzz.answers import Case, draw
from fuzz.exchange import Seen, run
from support.ways import Ways, long_way

_CHUNK = 250
_SHOWN = 2000
_FAST_PATH = "POST by the fast path"

_set_response_params = ResponseHandler.set_response_params


def _without_decompression(protocol: ResponseHandler, **options: Any) -> None:  # noqa: ANN401
    _set_response_params(protocol, **{**options, "auto_decompress": False})


def _without_end(protocol: ResponseHandler, **options: Any) -> None:  # noqa: ANN401
    _set_response_params(protocol, **{**options, "read_until_eof": False})


FAULTS: dict[str, tuple[str, object]] = {
    "decompression": ("set_response_params", _without_decompression),
    "until-close": ("set_response_params", _without_end),
    "reuse": ("should_close", False),
}
"""Faults to put into one way: an attribute of aiohttp's protocol, and its value."""


class Difference(Exception):  # noqa: N818 - it is what the comparison looks for.
    """A case that the two ways do not treat alike, or both treat badly."""


def compare(seed: int, number: int, fault: str | None = None) -> Seen:
    """Run a case through both ways.

    Args:
        seed: The seed.
        number: The number of the case.
        fault: A fault of `FAULTS` to put into the fast path, or None.

    Returns:
        What was seen, the same in both.

    Raises:
        Difference: It was not the same, or something was left behind.
    """
    case = draw(seed, number)
    with long_way():
        long = run(case)
    with _broken(fault):
        short = run(case)
    if long != short or long.complaints:
        raise Difference("\n".join(_report(case, long, short)))
    return short


@contextmanager
def _broken(fault: str | None) -> Iterator[None]:
    with ExitStack() as stack:
        if fault is not None:
            stack.enter_context(patch.object(ResponseHandler, *FAULTS[fault]))
        yield


def _report(case: Case, long: Seen, short: Seen) -> Iterator[str]:
    yield f"  {case._replace(stops=[])}"
    for number, stop in enumerate(case.stops):
        yield f"  stop {number}: {stop._replace(answer=[])}"
        yield from (f"    {packet}"[:_SHOWN] for packet in stop.answer)
    for name, in_long in vars(long).items():
        in_short = vars(short)[name]
        for index, (left, right) in enumerate(zip_longest(in_long, in_short)):
            if left != right or name == "complaints":
                yield f"{name} {index}\n  long way:  {left}\n  fast path: {right}"


def _compare(
    numbers: range, args: Namespace
) -> tuple[Counter[str], list[tuple[int, str]]]:
    logging.getLogger("bctrl_async").addHandler(logging.NullHandler())
    counts, found = Counter[str](), []
    ways = Ways()
    with ways.counted():
        for number in numbers:
            try:
                seen = compare(args.seed, number, args.fault)
            except Difference as difference:
                found.append((number, str(difference)))
            else:
                counts.update(re.split(r"\W", result)[0] for result in seen.results)
                counts["connection used again"] += len(seen.requests) - len(
                    dict(seen.requests)
                )
    counts[_FAST_PATH] += ways.short
    gc.collect()
    return counts, found


def _arguments() -> Namespace:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    jobs = os.cpu_count() or 1
    for name, default in {"answers": 5000, "seed": 0, "first": 0, "jobs": jobs}.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"default {default}"
        )
    parser.add_argument(
        "--show", type=int, default=1, help="differences to print, default 1"
    )
    parser.add_argument("--break", dest="fault", choices=list(FAULTS))
    return parser.parse_args()


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _main() -> int:
    args = _arguments()
    began = time.monotonic()
    last = args.first + args.answers
    chunks = [
        range(at, min(at + _CHUNK, last)) for at in range(args.first, last, _CHUNK)
    ]
    counts: Counter[str] = Counter()
    differences: list[tuple[int, str]] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for chunk in as_completed(
            [pool.submit(_compare, numbers, args) for numbers in chunks]
        ):
            counted, found = chunk.result()
            counts += counted
            differences += found
    for number, text in sorted(differences)[: args.show]:
        _write(f"seed {args.seed}, case {number}:\n{text}")
        _write(
            "  python tests/nightly/differential.py "
            f"--seed {args.seed} --first {number} --answers 1"
        )
    _write(", ".join(f"{count:,} {name}" for name, count in counts.most_common()))
    _write(
        f"{args.answers - len(differences):,} of {args.answers:,} cases are equal, "
        f"{time.monotonic() - began:.0f} s"
    )
    if not counts[_FAST_PATH]:
        _write("No request took the fast path: there was nothing to compare.")
        return 1
    return int(bool(differences) == (args.fault is None))


if __name__ == "__main__":
    sys.exit(_main())
