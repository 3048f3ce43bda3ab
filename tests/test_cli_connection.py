"""The options that the commands share: the connection, `--verbose` and `--quiet`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import KEY
from helpers import Command
from journal_lines import entry_line, header_line

from bctrl_async.cli._connection import Connection
from bctrl_async.cli._options import Setting
from bctrl_async.emulator import Emulator, Fault


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    for alias in ("a", "b"):
        emulator.add_runtime("ws", alias)
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)


# Without --no-verify, a stop that failed would be polled for.
commands = pytest.mark.parametrize("args", [("stop", "--no-verify", "ws", "a"), ("list", "ws")])


def inject(emulator: Emulator, *faults: Fault) -> None:
    for method in ("POST", "GET"):
        emulator.inject(*faults, method=method)


class TestRetries:
    @pytest.mark.parametrize("attempts", [1, 3])
    @commands
    async def test_attempts_limits_the_requests_of_a_call(
        self, emulator: Emulator, command: Command, args: tuple[str, ...], attempts: int
    ) -> None:
        inject(emulator, *[Fault.SERVER_ERROR] * 4)
        code, _, _ = await command(*args, "--attempts", str(attempts))
        assert code == 1
        assert len(emulator.requests) == attempts

    @commands
    async def test_without_patience_a_429_ends_a_call(
        self, emulator: Emulator, command: Command, args: tuple[str, ...]
    ) -> None:
        inject(emulator, Fault.RATE_LIMITED)
        code, _, _ = await command(*args, "--patience", "0")
        assert code == 1
        assert len(emulator.requests) == 1

    @commands
    async def test_a_call_waits_as_long_as_its_patience(
        self, emulator: Emulator, command: Command, args: tuple[str, ...]
    ) -> None:
        inject(emulator, Fault.RATE_LIMITED)
        code, _, _ = await command(*args, "--patience", "30s")
        assert code == 0
        assert len(emulator.requests) == 2


@pytest.mark.parametrize("args", ["list ws", "stop --no-verify ws a"])
async def test_the_advice_on_a_timeout_names_the_option(
    emulator: Emulator, command: Command, args: str
) -> None:
    inject(emulator, Fault.HANG)
    code, out, err = await command(*args.split(), "--timeout", "200ms", "--attempts", "1")
    assert code == 1
    assert "Allow a longer --timeout; retrying is safe" in out + err


class TestVerbosity:
    @commands
    async def test_retries_are_shown_with_verbose_only(
        self, emulator: Emulator, command: Command, args: tuple[str, ...]
    ) -> None:
        for option, shown in (("-v", 1), ("--verbose", 1), (None, 0)):
            inject(emulator, Fault.SERVER_ERROR)
            _, _, err = await command(*filter(None, [*args, option]))
            assert err.count("bctrl-async: info: attempt 1 to ") == shown
            assert err.count("bctrl-async: ") == shown

    async def test_quiet_hides_the_summary_on_stderr_and_no_result(
        self, emulator: Emulator, command: Command
    ) -> None:
        loud = await command("stop", "-o", "json", "ws", "a")
        quiet = await command("stop", "-o", "json", "-q", "ws", "a")
        assert loud[2].startswith("1 of 1 no longer running")
        assert (quiet[0], quiet[1].count("\n"), quiet[2]) == (0, 1, "")
        assert emulator.received["ws", "a"] == 2

    async def test_quiet_hides_warnings_and_no_error(
        self, emulator: Emulator, command: Command, tmp_path: Path
    ) -> None:
        journal = tmp_path / "journal.jsonl"
        old = datetime.now(UTC) - timedelta(days=2)
        lines = header_line(f"{emulator.url}/v1", old) + entry_line(("ws", "a"), old)
        journal.write_bytes(lines)
        _, _, err = await command("stop", "--journal", journal, "ws", "a")
        assert err.startswith("bctrl-async: warning: ")
        quiet = await command("stop", "--quiet", "--journal", journal, "ws", "a")
        assert quiet == (0, "", "")
        code, _, err = await command("list", "--quiet", "nosuch")
        assert code == 1
        assert err.startswith("bctrl-async: error: ")

    async def test_both_are_a_usage_error(self, emulator: Emulator, command: Command) -> None:
        code, _, err = await command("stop", "-v", "-q", "ws", "a")
        assert code == 2
        assert "--verbose cannot be combined with --quiet" in err
        assert not emulator.requests


async def test_an_unexpected_error_is_one_line_without_its_text(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: it left the command as a box with the lines of the code."""

    def broken(*_: object) -> None:
        raise RuntimeError("http://user:s3cret@proxy")

    monkeypatch.setattr("bctrl_async.cli._list._print_table", broken)
    code, out, err = await command("list", "ws")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("bctrl-async: error: unexpected RuntimeError at line ")
    assert err.endswith(
        " of bctrl_async.cli._list. This is a fault of bctrl-async: please report it\n"
    )


def test_the_password_of_a_proxy_is_not_in_the_repr_of_the_options() -> None:
    assert "s3cret" not in repr(Connection(proxy=Setting.of("http://user:s3cret@proxy")))


async def test_a_space_at_the_end_of_an_alias_is_visible(command: Command) -> None:
    _, out, _ = await command("stop", "--no-verify", "ws", "a ")
    assert out.startswith("'a '  ")
