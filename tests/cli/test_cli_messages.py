"""A transcript of the command, `messages.txt`: its arguments, output and exit code.

To add to it, add a line `$ bctrl-async ARGUMENTS`. Then `WRITE_MESSAGES=1
.venv/bin/python -m pytest tests/cli/test_cli_messages.py` writes it anew; read what has
changed.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shlex
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import KEY
from support.commands import Command
from support.journal_lines import entry_line, header_line

from bctrl_async.emulator import Emulator, Fault, Reply

SNAPSHOT = Path(__file__).with_name("messages.txt")
WIDTH = 100
MAX_LINES = 2
FORBIDDEN = Reply(403, code="workspace.forbidden")

ENVIRONMENTS = {
    "A default workspace": {"BCTRL_WORKSPACE": "ws"},
    "A wrong key": {"BCTRL_API_KEY": "wrong-key", "BCTRL_WORKSPACE": ""},
    "Without a key": {"BCTRL_API_KEY": ""},
    "A malformed key": {"BCTRL_API_KEY": "two words"},
    "A malformed URL": {"BCTRL_BASE_URL": "nosuch"},
    "An invalid proxy": {"HTTPS_PROXY": "socks5://user:SECRET@127.0.0.1:9"},
    "A server that is down": {
        "BCTRL_API_KEY": KEY,
        "BCTRL_BASE_URL": "http://127.0.0.1:9",
    },
}
"""The variables of some parts of the snapshot, by the title of the part."""

FILES = {
    "all.csv": "ws,a\n",
    "other.csv": "ws,nobody\nws,nobody2\n",
    "empty": "",
    "aliases.txt": "ci-1\ncrm\n",
    "two.csv": "ws,a\nother,crm\n",
    "nobody.csv": "ws,nobody\n",
    "prose.txt": "Please stop these tonight:\n",
    "workbook.xlsx": "PK\x03\x04",
    "header.csv": "alias;host\na;h\n",
    "pair.csv": "host;alias\nh;a\n",
    "both.csv": "ws;a,b\n",
    "late.csv": "ws,a\n" * 100 + "nonsense\n" * 12,
    "dots.csv": "ws,a\n" * 100 + "ws,..\nnonsense\n",
    "open.csv": "ws,a\n" * 100 + 'ws,"b\nws,c\n',
    "note.csv": 'workspace,alias,note\nws,a,"of two\nlines"\n',
    "pretty.json": '{\n"workspace": "ws",\n"alias": "a"\n}\n{\n}\n',
    "nulls.jsonl": '[null,"a"]\n[null,"b"]\n',
    "twice.csv": "ws,a\nws,a\n",
    "table.txt": "STATUS  KIND     AGE  ALIAS\nactive  browser  5m   a\n",
    "many.csv": "".join(f"many,r{number}\n" for number in range(30)),
    "quota.csv": "quota,a1\nquota,a2\n",
    "night.csv": "night,a\nnight,b\nnight,a\nnight,c\n",
    "lost.csv": "night,a\n" + "".join(f"night,lost{number}\n" for number in range(6)),
    "night.txt": "a\nb\n",
}


def add_runtimes(emulator: Emulator) -> None:
    """Add the runtimes of the transcript, each kind in a workspace of its own."""
    emulator.add_runtime("ws", "forbidden")
    emulator.inject(*[FORBIDDEN] * 9, alias="forbidden", method="GET")
    for alias in (
        "stopped",
        "throttled",
        "paused",
        "日本",
        "failed",
        "dropped",
        "lost",
        "ended",
    ):
        emulator.add_runtime("lines", alias)
    emulator.add_runtime("lines", "done", status="stopped")
    emulator.inject(Fault.RATE_LIMITED, None, alias="throttled")
    emulator.inject(Fault.UNKNOWN_VALUES, alias="paused")
    emulator.inject(Fault.MALFORMED_JSON, alias="日本")
    emulator.inject(Fault.FAILED, alias="failed")
    emulator.inject(Fault.FAILED, alias="ended")
    emulator.inject(Fault.DROP_AFTER, alias="dropped")
    emulator.inject(Fault.DROP_AFTER, alias="lost")
    for number in range(30):
        emulator.add_runtime("many", f"r{number}")
        emulator.poison(
            "many", f"r{number}", FORBIDDEN if number % 3 else Fault.ACCEPTED
        )
    for number in (1, 2):
        emulator.add_runtime("quota", f"a{number}")
        emulator.poison("quota", f"a{number}", Reply(403, code=f"quota.of_{number}"))
    for kind, status, days in (("browser", "active", -1), ("desktop", "stopped", 3.2)):
        created_at = (datetime.now(UTC) - timedelta(days=days, seconds=30)).isoformat()
        emulator.add_runtime(
            "shown", kind, kind=kind, status=status, created_at=created_at
        )
    for number in range(12):
        emulator.add_runtime("undated", f"r{number}", created_at="long ago")


def write_files(emulator: Emulator) -> None:
    for name, text in FILES.items():
        Path(name).write_text(text, "utf-8")
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        Path(f"{encoding}.csv").write_text("ws,a\n", encoding)
    Path("utf-16-le.json").write_text('[["ws", "a"]]', "utf-16-le")
    Path("all.csv.gz").write_bytes(gzip.compress(b"ws,a\n", mtime=0))
    Path("all.csv.xz").write_bytes(lzma.compress(b"ws,a\n"))
    Path("all.csv.bz2").write_bytes(bz2.compress(b"ws,a\n"))
    # Python has no zstd before 3.14: this is a frame of a raw block.
    Path("all.csv.zst").write_bytes(b"\x28\xb5\x2f\xfd\x20\x05\x29\0\0ws,a\n")
    now = datetime.now(UTC)
    old = now - timedelta(days=2)
    header = header_line(f"{emulator.url}/v1", now)
    lost = {"type": "BctrlTimeoutError", "message": "no answer"}
    unknown = entry_line(
        ("night", "b"), now, running=None, result="unknown", error=lost
    )
    for name, content in {
        "old.jsonl": header_line(f"{emulator.url}/v1", old)
        + entry_line(("ws", "a"), old),
        "other.jsonl": header_line("https://other.test/v1", old),
        "1.jsonl": header + entry_line(("night", "a"), now) + unknown,
        "2.jsonl": header + entry_line(("night", "b"), now + timedelta(seconds=1)),
        "3.jsonl": header + entry_line(("night", "c"), now, result="already_stopped"),
    }.items():
        Path(name).write_bytes(content)
    Path("config.toml").touch(0o600)


@pytest.fixture(autouse=True)
def _environment(command: Command) -> None:
    command.setenv(BCTRL_CONFIG="config.toml")
    add_runtimes(command.api)
    write_files(command.api)


def plain(text: str) -> str:
    """Replace what differs between two runs."""
    text = text.replace(f"{Path.cwd()}{os.sep}", "")
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)
    text = re.sub(r"'127\.0\.0\.1', \d+", "'127.0.0.1', PORT", text)
    text = re.sub(r"versions .*", "versions", text)
    text = re.sub(r"req_\d+", "req_1", text)
    text = re.sub(r"2 days, 0:\d\d:\d\d old", "2 days, 0:00:00 old", text)
    text = re.sub(r"20\d\d-\d\d-\d\dT[\d:.]+(Z|\+00:00)", "NOW", text)
    return re.sub(r"\d+\.\d+ s\b", "0.00 s", text)


def wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, break_on_hyphens=False, break_long_words=False)


async def test_messages_are_those_of_the_snapshot_and_fit_two_lines(
    command: Command,
) -> None:
    """Fault: messages named arguments of Python, or gave an advice twice."""
    parts: list[str] = []
    faults: list[str] = []
    snapshot = SNAPSHOT.read_text("utf-8")
    for head in re.findall(r"^(?:# |\$ bctrl-async ).*", snapshot, re.MULTILINE):
        mark, _, line = head.partition(" ")
        if mark == "#":
            parts.append(head)
            for name, value in ENVIRONMENTS.get(line, {}).items():
                command.patch.setenv(name, value)
            continue
        code, *printed = await command(*shlex.split(line.partition(" ")[2]))
        out, err = map(plain, printed)
        if "error: " in err and code == 0:
            faults.append(f"an error, but exit 0: {line}")
        faults.extend(
            text for text in err.splitlines() if len(wrapped(text)) > MAX_LINES
        )
        shown = [
            part
            for text in f"{out}{err}".splitlines()
            for part in wrapped(text) or [""]
        ]
        parts.append("\n".join([head, *shown, f"exit {code}"]))

    text = "\n\n".join(parts) + "\n"
    python_names = re.findall(
        r"\b(?:api_key|base_url|max_connections|older_than|missing_ok|journal_max_age|rate_limit|on_\w+|BctrlSession|RetryPolicy)\b",
        text,
    )
    if os.environ.get("WRITE_MESSAGES"):
        SNAPSHOT.write_text(text, "utf-8")
    assert (faults, python_names) == ([], [])
    # What follows an option may be a secret.
    assert not re.search(f"SECRET|{KEY}|wrong-key", re.sub(r"\$ .*", "", text))
    assert text == snapshot
