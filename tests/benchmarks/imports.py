"""CPU time of `import bctrl_async`, beside that of what it stands on.

`python tests/benchmarks/imports.py [--rounds 21] [--json]`
"""

from __future__ import annotations

from statistics import median

from harness import Goal, Report, command, measured, ratio

_BASE, _OURS = "aiohttp, msgspec", "bctrl_async"


def _measure(modules: str) -> float:
    began, ended = "import time; began = time.process_time()", "print(time.process_time() - began)"
    return measured("-c", f"{began}; import {modules}; {ended}", kind=float) * 1000


def _compare(rounds: int) -> Report:
    times: dict[str, list[float]] = {_BASE: [], _OURS: []}
    for modules in times:
        _measure(modules)  # Writes the byte code, and brings the files into memory.
    for _ in range(rounds):
        for modules, taken in times.items():
            taken.append(_measure(modules))
    to_base = ratio(times[_OURS], times[_BASE])
    return Report(
        "CPU time of an import in a fresh interpreter",
        ["import", "median ms", "min ms", "ratio"],
        [
            [modules, median(taken), min(taken), ratio(taken, times[_BASE])]
            for modules, taken in times.items()
        ],
        [Goal("import bctrl_async to import aiohttp, msgspec", to_base, 1.25)],
    )


if __name__ == "__main__":
    command(__doc__, _compare, rounds=21)
