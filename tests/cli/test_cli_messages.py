"""Every message of the command that a test provokes, as it is in `messages.txt`.

To add a message, add a line `$ bctrl-async ARGUMENTS` to the file. Then
`WRITE_MESSAGES=1 .venv/bin/python -m pytest tests/cli/test_cli_messages.py` writes it anew; read
what has changed.
"""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import KEY
from helpers import Command
from journal_lines import entry_line, header_line

from bctrl_async.emulator import Emulator, Reply

SNAPSHOT = Path(__file__).with_name("messages.txt")
WIDTH = 100
MAX_LINES = 2

ENVIRONMENTS = {
    "A wrong key": {"BCTRL_API_KEY": "wrong-key"},
    "Without a key": {"BCTRL_API_KEY": ""},
    "A malformed key": {"BCTRL_API_KEY": "two words"},
    "A malformed URL": {"BCTRL_BASE_URL": "nosuch"},
    "A server that is down": {"BCTRL_API_KEY": KEY, "BCTRL_BASE_URL": "http://127.0.0.1:9"},
}
"""The variables of some parts of the snapshot, by the title of the part."""


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
        "aliases.txt": "ci-1\ncrm\n",
        "two.csv": "ws,a\nother,crm\n",
        "nobody.csv": "ws,nobody\n",
        "prose.txt": "Please stop these tonight:\n",
        "workbook.xlsx": "PK\x03\x04",
        "header.csv": "alias;host\na;h\n",
        "both.csv": "ws;a,b\n",
        "late.csv": "ws,a\n" * 100 + "nonsense\n" * 12,
        "open.csv": "ws,a\n" * 100 + 'ws,"b\nws,c\n',
        "note.csv": 'workspace,alias,note\nws,a,"of two\nlines"\n',
        "pretty.json": '{\n"workspace": "ws",\n"alias": "a"\n}\n{\n}\n',
        "twice.csv": "ws,a\nws,a\n",
        "table.txt": "STATUS  KIND     AGE  ALIAS\nactive  browser  5m   a\n",
    }.items():
        (tmp_path / name).write_text(content, "utf-8")
    old = datetime.now(UTC) - timedelta(days=2)
    lines = header_line(f"{emulator.url}/v1", old) + entry_line(("ws", "a"), old)
    (tmp_path / "old.jsonl").write_bytes(lines)
    (tmp_path / "other.jsonl").write_bytes(header_line("https://other.test/v1", old))
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
    (tmp_path / "config.toml").touch(0o600)
    monkeypatch.setenv("BCTRL_CONFIG", "config.toml")


def plain(text: str) -> str:
    """Replace what differs between two runs."""
    text = text.replace(f"{Path.cwd()}{os.sep}", "")
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)
    text = re.sub(r"'127\.0\.0\.1', \d+", "'127.0.0.1', PORT", text)
    text = re.sub(r"versions .*", "versions", text)
    text = re.sub(r"req_\d+", "req_1", text)
    text = re.sub(r"2 days, 0:\d\d:\d\d old", "2 days, 0:00:00 old", text)
    return re.sub(r"\d+\.\d+ s\b", "0.00 s", text)


def wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, break_on_hyphens=False, break_long_words=False)


async def test_messages_are_those_of_the_snapshot_and_fit_two_lines(
    command: Command, monkeypatch: pytest.MonkeyPatch
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
                monkeypatch.setenv(name, value)
            continue
        code, *printed = await command(*shlex.split(line.partition(" ")[2]))
        out, err = map(plain, printed)
        if "error: " in err and code == 0:
            faults.append(f"an error, but exit 0: {line}")
        faults.extend(text for text in err.splitlines() if len(wrapped(text)) > MAX_LINES)
        shown = [part for text in f"{out}{err}".splitlines() for part in wrapped(text)]
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
