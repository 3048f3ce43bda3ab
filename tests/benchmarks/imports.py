"""CPU time of `import bctrl_async`, compared with that of its dependencies.

`python tests/benchmarks/imports.py [--rounds 21] [--json]`
"""

from __future__ import annotations

from statistics import median

from harness import Goal, Report, command, measured, ratio

_BASE, _OURS = "aiohttp, msgspec", "bctrl_async"


def _measure(modules: str) -> float:
    start, end = "import time; start = time.process_time()", "print(time.process_time() - start)"
    return measured("-c", f"{start}; import {modules}; {end}", kind=float) * 1000


def _compare(rounds: int) -> Report:
    times: dict[str, list[float]] = {_BASE: [], _OURS: []}
    for modules in times:
        _measure(modules)  # Compiles the modules and warms the file cache.
    for _ in range(rounds):
        for modules, measurements in times.items():
            measurements.append(_measure(modules))
    to_base = ratio(times[_OURS], times[_BASE])
    return Report(
        "CPU time of an import in a fresh interpreter",
        ["import", "median ms", "min ms", "ratio"],
        [
            [modules, median(column), min(column), ratio(column, times[_BASE])]
            for modules, column in times.items()
        ],
        [Goal("import bctrl_async to import aiohttp, msgspec", to_base, 1.25)],
    )


if __name__ == "__main__":
    command(__doc__, _compare, rounds=21)
