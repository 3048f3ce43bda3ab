"""Random tables with notes, decoys and a damaged quote, read as lists of targets.

`python tests/nightly/tables.py [--tables 20000] [--first 0]`

A decoy is a row that a note contains. In a file, none may be stopped, and no target
that is listed may be lost without a line that says so.
"""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from argparse import ArgumentParser
from collections import Counter
from typing import Literal

from bctrl_async import RuntimeRef
from bctrl_async.cli._lines import BadLine, Item, LineParser

_CHECKED = 100


def table(rng: random.Random) -> tuple[set[RuntimeRef], str, bool]:
    """Return a random table's targets, its text, and whether it was damaged."""
    listed = [
        RuntimeRef(f"ws{rng.randrange(3)}", f"r{n}") for n in range(rng.randint(1, 8))
    ]
    text = _json_lines(rng, listed) if rng.random() < 0.1 else _csv(rng, listed)
    is_damaged = rng.random() < 0.5
    if is_damaged:
        # Two quotes could make another table that is well formed.
        quotes = [place for place, character in enumerate(text) if character == '"']
        if quotes and rng.random() < 0.5:
            place = rng.choice(quotes)
            text = text[:place] + text[place + 1 :]
        else:
            place = rng.randrange(len(text) + 1)
            text = f'{text[:place]}"{text[place:]}'
    return set(listed), text, is_damaged


def _csv(rng: random.Random, listed: list[RuntimeRef]) -> str:
    header = ["workspace_id", "alias", *rng.choice([["note"], ["note", "x"], []])]
    rng.shuffle(header)
    file = io.StringIO()
    delimiter = rng.choice(",;\t")
    quoting: Literal[0, 1] = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    ends = rng.choice(["\n", "\r\n"])
    rows = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=ends)
    has_header = len(header) > 2 or header[0] == "alias" or rng.random() < 0.5
    if has_header:
        rows.writerow(header)
    for ref in listed:
        # Spaces around a cell that is not quoted are not a part of a name.
        space = " " * (quoting == csv.QUOTE_MINIMAL and rng.random() < 0.2)
        values = {
            "workspace_id": ref.workspace_id + space,
            "alias": space + ref.alias + space,
        }
        rows.writerow(
            [values.get(name) or _note(rng, header, delimiter) for name in header]
        )
        if rng.random() < 0.1:
            file.write(rng.choice(["\n", '# no " more\n', "# ws0,decoy\n"]))
    return file.getvalue()


def _note(rng: random.Random, header: list[str], delimiter: str) -> str:
    """Return a note, some of whose lines are rows of the same table."""
    values = {
        "workspace_id": f"ws{rng.randrange(3)}",
        "alias": f"decoy{rng.randrange(9)}",
    }
    decoy = delimiter.join(
        values.get(name, rng.choice(["", "y", 'a "b"'])) for name in header
    )
    parts = [
        decoy,
        f'"{decoy}"',
        "fine",
        "",
        '5" wide',
        '"',
        '""',
        delimiter,
        "ws0",
        "# see",
    ]
    breaks = [" ", "\n", "\r\n", "\n\n"] if rng.random() < 0.5 else [" "]
    # A first cell that begins with # makes its line a comment.
    first = rng.choice(["", "see "])
    texts = [rng.choice(parts) + rng.choice(breaks) for _ in range(rng.randint(0, 4))]
    return first + "".join(texts).lstrip("# ")


def _json_lines(rng: random.Random, listed: list[RuntimeRef]) -> str:
    header = ["workspace_id", "alias"]
    values = [
        {
            **ref._asdict(),
            "note": rng.choice(["", '{"workspace_id": "ws0", "alias": "decoy"}']),
        }
        for ref in listed
    ]
    if rng.random() < 0.3:
        return json.dumps(values, indent=rng.choice([None, 2]))
    return "".join(f"{json.dumps(v)}\n" for v in values) + _note(rng, header, ",") * (
        rng.random() < 0.1
    )


def read(text: str) -> tuple[set[RuntimeRef], bool]:
    """Return the targets to be stopped, and True if a line says what is not."""
    parser = LineParser()
    lines = [*io.BytesIO(text.encode()), b""]
    try:
        items: list[Item] = [item for line in lines for item in parser.parse(line)]
    except BadLine:
        return set(), True
    bad = [item for item in items if isinstance(item, BadLine)]
    if any(isinstance(item, BadLine) for item in items[:_CHECKED]):
        return set(), True
    return {item for item in items if isinstance(item, RuntimeRef)}, bool(bad)


def check(seed: int) -> tuple[str, str]:
    """Return the fate of a seed's table: a problem, `refused` or `read`; its text."""
    rng = random.Random(seed)
    listed, text, is_damaged = table(rng)
    stopped, says = read(text)
    # A name to which the damage added a quote names no runtime, and the server says so.
    renamed = {ref for ref in stopped - listed if '"' in "".join(ref)}
    if stopped - listed - renamed:
        return "STOPPED WHAT WAS NOT LISTED", text
    if len(stopped) < len(listed) and not says:
        return "LOST SILENTLY", text
    return (
        f"{'damaged' if is_damaged else 'whole'}, {'refused' if says else 'read'}",
        text,
    )


def _main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tables", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    for seed in range(args.first, args.first + args.tables):
        found, text = check(seed)
        counts[found] += 1
        if found.isupper() and counts[found] <= 3:
            sys.stdout.write(f"seed {seed}: {found}\n{text}\n")
    sys.stdout.write(f"{dict(sorted(counts.items()))}\n")
    return int(any(found.isupper() for found in counts))


if __name__ == "__main__":
    sys.exit(_main())
