"""Texts of an answer are bounded when it is parsed: a few KiB are kept of a stop, however long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import KEY
from helpers import Command
from runtimes import runtime
from servers import http_answer, served

from bctrl_async import (
    BctrlResponseError,
    RetryPolicy,
    Runtime,
    RuntimeKind,
    RuntimeStatus,
    RuntimeSummary,
    StopResult,
)
from bctrl_async._http.response import MAX_TEXT

ONCE = RetryPolicy(attempts=1, patience=0)
LONG = "é\\" * 10_000
SUMMARY = RuntimeSummary(
    current_driver=LONG, default_context_id=LONG, default_page_id=LONG, storage_workspace=LONG
)
FIELDS: dict[str, Any] = {
    "driver": LONG,
    "created_at": LONG,
    "updated_at": LONG,
    "kind": LONG,
    "summary": SUMMARY,
}
CRM = ("ws-1", "crm")


def body_of(status: str = "stopped", alias: str = "crm", **changes: Any) -> bytes:  # noqa: ANN401 - any field.
    return msgspec.json.encode(msgspec.structs.replace(runtime(status, alias), **changes))


def answer(body: bytes) -> bytes:
    return http_answer("200 OK", body)


def longest(found: Runtime) -> int:
    """Return the number of characters of the longest text of a runtime."""
    values = [*msgspec.structs.astuple(found), *msgspec.structs.astuple(found.summary or found)]
    return max(len(value) for value in values if isinstance(value, str))


async def test_a_stop_with_endless_texts_is_stopped_and_keeps_their_beginnings() -> None:
    async with served(answer(body_of(**FIELDS))) as session:
        stopped = await session.stop_runtime(*CRM)

    assert stopped.status is RuntimeStatus.STOPPED
    assert type(stopped.kind) is RuntimeKind
    assert longest(stopped) == MAX_TEXT


async def test_a_journal_and_a_report_keep_little_of_an_endless_answer(tmp_path: Path) -> None:
    """Fault: 100,000 stops whose answers took 5 KB on the wire would have taken 97 GB."""
    path = tmp_path / "run.jsonl"
    body = body_of("x" * 200_000, **FIELDS)
    async with served(answer(body), retry=ONCE) as session:
        report = await session.stop_runtimes([CRM], journal=path, verify=False)

    [outcome] = report.failures
    assert outcome.result is StopResult.ACCEPTED
    assert outcome.runtime is not None
    assert longest(outcome.runtime) == MAX_TEXT
    assert path.stat().st_size < 2**17
    assert len(msgspec.json.encode(report.to_dict())) < 2**17


@pytest.mark.parametrize(
    ("asked", "answered", "is_same"),
    [
        # Each character is four in another form.
        ("\u1f82" * 1_000, "\u03b1\u0313\u0300\u0345" * 1_000, True),
        ("x" * 1_000, "x" * 100_000, False),
    ],
)
async def test_an_alias_that_is_cut_is_still_another_one(
    asked: str, answered: str, *, is_same: bool
) -> None:
    async with served(answer(body_of(alias=answered, driver=LONG)), retry=ONCE) as session:
        report = await session.stop_runtimes([("ws-1", asked)], verify=False)

    assert report.counts == {StopResult.STOPPED if is_same else StopResult.UNKNOWN: 1}


async def test_the_runtimes_of_a_list_are_bounded_and_so_is_the_alias_of_an_invalid_one() -> None:
    invalid = msgspec.json.encode({"alias": LONG})
    errors: list[BctrlResponseError] = []
    body = b'{"runtimes":[%b,%b]}' % (body_of(driver=LONG), invalid)
    async with served(answer(body), retry=ONCE) as session:
        [found] = await session.list_runtimes("ws-1", on_unreadable=errors.append)

    assert longest(found) == MAX_TEXT
    assert [len(error.alias or "") for error in errors] == [MAX_TEXT]


async def test_a_table_is_not_as_wide_as_an_endless_status(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a list of 1.7 KB on the wire was printed as 24 MB."""
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    runtimes = [body_of("long " * 1_000), *[body_of("active")] * 99]
    async with served(answer(b'{"runtimes":[%b]}' % b",".join(runtimes))) as session:
        monkeypatch.setenv("BCTRL_BASE_URL", session.base_url)
        code, out, _ = await command("list", "ws-1")

    assert code == 0
    assert len(out) < 100 * 60 + 4_096
    assert out.splitlines()[1].startswith("long long ")
