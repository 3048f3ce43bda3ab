"""Write the inventories that intersphinx reads from this folder: `trim.py FOLDER`.

A build must not need a network, and whole inventories are large. FOLDER has the
`objects.inv` of each project in `_KEPT` as PROJECT.inv, such as
https://docs.python.org/3/objects.inv as python.inv. If the build says that a name of
one of them has no target, add its module.
"""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path

_MODULES = (
    r"asyncio|collections|collections\.abc|contextlib|datetime|logging|os|pathlib|ssl"
    r"|typing|uuid"
)
_KINDS = "py:(class|data|exception|function|module)"
_KEPT = {
    # Without a module: the builtins.
    "python": rf"(({_MODULES})\.)?\w+ {_KINDS}",
    "aiohttp": rf"aiohttp\.\w+ {_KINDS}",
    "pytest": rf"pytest\.\w+ {_KINDS}",
    "yarl": rf"yarl\.\w+ {_KINDS}",
}
# Names that a type has in annotations, and its own documentation not.
_ADDED = {
    "aiohttp": """
aiohttp.client.ClientSession py:class 1 client_reference.html#aiohttp.ClientSession -
aiohttp.tracing.TraceConfig py:class 1 tracing_reference.html#aiohttp.TraceConfig -
""",
    "fastapi": """
fastapi.applications.FastAPI py:class 1 reference/fastapi/#fastapi.FastAPI -
""",
    "opentelemetry": """
opentelemetry.metrics.MeterProvider py:class 1 api/metrics.html#$ -
opentelemetry.trace.TracerProvider py:class 1 api/trace.html#$ -
""",
}


def _kept(inventory: Path, kept: str) -> list[str]:
    # After four lines of header, the file is compressed.
    compressed = inventory.read_bytes().split(b"\n", 4)[4]
    return [
        line
        for line in zlib.decompress(compressed).decode().splitlines()
        if re.match(kept, line)
    ]


def _trim(folder: Path) -> None:
    for project in sorted({*_KEPT, *_ADDED}):
        lines = _ADDED.get(project, "").strip().splitlines()
        if project in _KEPT:
            lines += _kept(folder / f"{project}.inv", _KEPT[project])
        header = (
            f"# Sphinx inventory version 2\n# Project: {project}\n# Version:\n# zlib\n"
        )
        content = zlib.compress("".join(f"{line}\n" for line in lines).encode(), 9)
        Path(__file__).with_name(f"{project}.inv").write_bytes(
            header.encode() + content
        )
        print(f"{project}: {len(lines)} names")


if __name__ == "__main__":
    _trim(Path(sys.argv[1]))
