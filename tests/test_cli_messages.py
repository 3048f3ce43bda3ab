"""Every message of the command that a test provokes, as it is in `messages.txt`.

`WRITE_MESSAGES=1 .venv/bin/python -m pytest tests/test_cli_messages.py` writes the file anew; then
read what has changed.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import KEY
from journal_lines import entry_line, header_line

from bctrl_async import cli
from bctrl_async.emulator import Emulator, Reply

SNAPSHOT = Path(__file__).with_name("messages.txt")
WIDTH = 100
MAX_LINES = 2

USAGE = """
nosuch
--nosuch
stop
stop ws
stop --all
stop --all ws a
stop --all ws --from all.csv
stop ws --all
stop --from all.csv ws a
stop --from
stop --from all.csv --from all.csv
stop --from missing.csv
stop --allow-empty ws a
stop --status active ws a
stop ws --all --kind browser --kind desktop
stop --pace shared.pace ws a
stop --journal-max-age 1h ws a
stop --journal-max-age 1 --journal run.jsonl ws a
stop --nosuch ws a
stop ws -dash
stop --api-key k ws a
stop --shard 3 --from all.csv
stop --shard 4/3 --from all.csv
stop --concurrency 0 ws a
stop --concurrency few ws a
stop --rate 0 ws a
stop --rate fast ws a
stop --deadline 90 ws a
stop --deadline soon ws a
stop --deadline 0s ws a
stop --timeout 0s ws a
stop --attempts 0 ws a
stop --patience 5 ws a
stop --verbose --quiet ws a
stop --output yaml ws a
stop --base-url nosuch ws a
stop --base-url http://bctrl.test ws a
stop --rate 5 --pace redis:6379 ws a
list --proxy nosuch ws
list --ca-file missing.pem ws
list --profile nosuch ws
stop .. --all --yes
list
list --older-than 2 ws
list --older-than 0s ws
list --sort size ws
list -o yaml ws
get ws
get ws -dash
get ws ..
list -dash
report
report missing.jsonl
report all.csv
report --allow-empty run.jsonl
journal show run.jsonl
emulator --fault nosuch=1
emulator --fault hang
emulator --fault hang=2
emulator --fault hang=.6 --fault accepted=.6
emulator --port 65536
emulator --rate-limit 0
demo --runtimes 0
"""
"""Each exits with 2, except that a file that is missing or in use may be there later."""

INPUT = """
stop --from empty
stop --from prose.txt
stop --from workbook.xlsx
stop --from header.csv
stop --from both.csv
stop --dry-run --from late.csv
stop --from late.csv
stop --from open.csv
stop --from note.csv
stop --from pretty.json
stop --dry-run --from twice.csv
report run.jsonl --from other.csv
"""

SERVER = """
stop ws nobody
stop --from other.csv
stop ws --all --yes --kind robot
stop nowhere --all --yes
list nowhere
list ws --status acitve
get ws nobody
get nowhere a
get ws forbidden
stop --journal old.jsonl ws a
"""

UNAUTHORIZED = """
stop ws a
list ws
get ws a
"""

UNREACHABLE = """
list ws
get ws a
stop ws --all --yes
"""

NO_KEY = """
stop ws a
list ws
get ws a
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator, tmp_path: Path) -> None:
    emulator.add_runtime("ws", "a")
    emulator.add_runtime("ws", "forbidden")
    emulator.inject(*[Reply(403, code="workspace.forbidden")] * 9, alias="forbidden", method="GET")
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "all.csv": "ws,a\n",
        "other.csv": "ws,nobody\nws,nobody2\n",
        "empty": "",
        "prose.txt": "Please stop these tonight:\n",
        "workbook.xlsx": "PK\x03\x04",
        "header.csv": "alias;host\na;h\n",
        "both.csv": "ws;a,b\n",
        "late.csv": "ws,a\n" * 100 + "nonsense\n" * 12,
        "open.csv": "ws,a\n" * 100 + 'ws,"b\nws,c\n',
        "note.csv": 'workspace,alias,note\nws,a,"of two\nlines"\n',
        "pretty.json": '{\n"workspace": "ws",\n"alias": "a"\n}\n{\n}\n',
        "twice.csv": "ws,a\nws,a\n",
    }.items():
        (tmp_path / name).write_text(content, "utf-8")
    old = datetime.now(UTC) - timedelta(days=2)
    lines = header_line(f"{emulator.url}/v1", old) + entry_line(("ws", "a"), old)
    (tmp_path / "old.jsonl").write_bytes(lines)
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
    (tmp_path / "config.toml").touch(0o600)
    monkeypatch.setenv("BCTRL_CONFIG", "config.toml")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("bctrl_async.RetryPolicy.backoff", lambda *_: 0.0)
    monkeypatch.setattr("bctrl_async.cli._progress._LINE_EVERY", 3600)


def plain(text: str) -> str:
    """Replace what differs between two runs."""
    text = text.replace(f"{Path.cwd()}{os.sep}", "")
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)
    text = re.sub(r"'127\.0\.0\.1', \d+", "'127.0.0.1', PORT", text)
    text = re.sub(r"req_\d+", "req_1", text)
    text = re.sub(r"2 days, 0:\d\d:\d\d old", "2 days, 0:00:00 old", text)
    return re.sub(r"\d+\.\d+ s\b", "0.00 s", text)


def wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, break_on_hyphens=False, break_long_words=False)


@pytest.fixture
def unused_url() -> Iterator[str]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


async def test_messages_are_those_of_the_snapshot_and_fit_two_lines(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    unused_url: str,
) -> None:
    """Fault: messages named arguments of Python, or gave an advice twice."""
    parts: list[str] = []
    faults: list[str] = []

    async def run(title: str, commands: str) -> None:
        parts.append(f"# {title}")
        for line in commands.strip().splitlines():
            code = await asyncio.to_thread(cli.main, line.split())
            out, err = capfd.readouterr()
            err = plain(err)
            if "error: " in err and code == 0:
                faults.append(f"an error, but exit 0: {line}")
            messages = [message for text in err.splitlines() for message in wrapped(text)]
            faults.extend(text for text in err.splitlines() if len(wrapped(text)) > MAX_LINES)
            shown = [line for text in plain(out).splitlines() for line in wrapped(text)]
            parts.append("\n".join([f"$ bctrl-async {line}", *shown, *messages, f"exit {code}"]))

    await run("Usage", USAGE)
    await run("Input", INPUT)
    await run("The server's answers", SERVER)
    monkeypatch.setenv("BCTRL_API_KEY", "wrong-key")
    await run("A wrong key", UNAUTHORIZED)
    monkeypatch.delenv("BCTRL_API_KEY")
    await run("Without a key", NO_KEY)
    monkeypatch.setenv("BCTRL_API_KEY", "two words")
    await run("A malformed key", "stop ws a")
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", unused_url)
    await run("A server that is down", UNREACHABLE)

    text = "\n\n".join(parts) + "\n"
    python_names = re.findall(
        r"\b(?:api_key|base_url|max_connections|older_than|missing_ok|journal_max_age|rate_limit|on_\w+|BctrlSession|RetryPolicy)\b",
        text,
    )
    if os.environ.get("WRITE_MESSAGES"):
        SNAPSHOT.write_text(text, "utf-8")
    assert (faults, python_names) == ([], [])
    assert text == SNAPSHOT.read_text("utf-8")
