"""Texts that no human wrote: endless texts, and half of a surrogate pair."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import msgspec
import pytest
from support.runtimes import WIRE
from support.servers import http_answer, served

from bctrl_async import (
    BctrlResponseError,
    RetryPolicy,
    Runtime,
    RuntimeKind,
    RuntimeStatus,
    StopReport,
    StopResult,
)
from bctrl_async._http.response import MAX_TEXT
from bctrl_async.journal import read_journals

ONCE = RetryPolicy(attempts=1, patience=0)
CRM = ("ws-1", "crm")


def answer(fields: object, encoding: str = "escaped") -> bytes:
    """Return an answer with this JSON, half of a pair in an escape or as bytes."""
    if encoding == "escaped":
        return http_answer("200 OK", json.dumps(fields).encode())
    text = json.dumps(fields, ensure_ascii=False)
    return http_answer("200 OK", text.encode(encoding, "surrogatepass"))


LONG = "é\\" * 4_000
ENDLESS = {
    **WIRE,
    **dict.fromkeys(("driver", "createdAt", "updatedAt", "kind"), LONG),
    "summary": dict.fromkeys(
        ("currentDriver", "defaultPageId", "storageWorkspace"), LONG
    ),
}


def longest(found: Runtime) -> int:
    """Return the number of characters of the longest text of a runtime."""
    values = [
        *msgspec.structs.astuple(found),
        *msgspec.structs.astuple(found.summary or found),
    ]
    return max(len(value) for value in values if isinstance(value, str))


class TestEndless:
    """Few KiB are kept of a runtime, however long its texts are."""

    async def test_a_stop_is_stopped_and_keeps_their_beginnings(self) -> None:
        async with served(answer(ENDLESS)) as session:
            stopped = await session.stop_runtime(*CRM)

        assert stopped.status is RuntimeStatus.STOPPED
        assert type(stopped.kind) is RuntimeKind
        assert longest(stopped) == MAX_TEXT

    async def test_a_journal_and_a_report_keep_little(self, tmp_path: Path) -> None:
        """Fault: 100,000 stops with 5 KB each on the wire would have taken 97 GB."""
        path = tmp_path / "run.jsonl"
        async with served(
            answer(ENDLESS | {"status": "x" * 200_000}), retry=ONCE
        ) as session:
            report = await session.stop_runtimes([CRM], journal=path, verify=False)

        assert report.counts == {StopResult.ACCEPTED: 1}
        assert path.stat().st_size < 2**17
        assert len(msgspec.json.encode(report.to_dict())) < 2**17

    async def test_a_list_keeps_little_of_the_valid_and_the_invalid(self) -> None:
        errors: list[BctrlResponseError] = []
        async with served(answer({"runtimes": [ENDLESS, {"alias": LONG}]})) as session:
            [found] = await session.list_runtimes("ws-1", on_unreadable=errors.append)

        assert longest(found) == MAX_TEXT
        assert [len(error.alias or "") for error in errors] == [MAX_TEXT]


HALVES = {
    "createdAt": "\udfff",
    "driver": "d\ud83d",
    "kind": "\ud800",
    "status": "sl\udc00w",
    "summary": {"launchMode": "\ud800", "currentDriver": "\ud83d"},
}
ERROR = {
    "code": "a.\ud800",
    "error": "\ud800",
    "hint": "\udfff",
    "requestId": "r\ud800",
}
ANSWERS = {
    "runtime": answer({**WIRE, **HALVES}),
    "raw": answer({**WIRE, **HALVES}, "utf-8"),
    "not JSON": http_answer("200 OK", b'{"alias":"\\ud800'),
    "error": http_answer("403 No", json.dumps(ERROR).encode()),
    "text": http_answer("500 No", b"\xed\xa0\xbd \\ud800"),
    "header": http_answer("500 No", b"", "X-Request-Id: ?").replace(
        b"?", b"\xed\xa0\xbd"
    ),
}
"""Answers that have half of a pair in each text."""
INVALID = ("ws-\ud800", "\udfff")
"""A target with half of a pair in each name."""


class TestHalves:
    """Half of a pair costs nothing but itself."""

    @pytest.mark.parametrize("name", ANSWERS)
    async def test_outcomes_are_written_and_encoded(
        self, name: str, tmp_path: Path
    ) -> None:
        """Fault: a report with an invalid target could not be encoded."""
        path = tmp_path / "run.jsonl"
        async with served(ANSWERS[name], retry=ONCE) as session:
            report = await session.stop_runtimes(
                [CRM, INVALID], journal=path, verify=False
            )

        assert report.total == len(report.failures) == 2
        sent = next(outcome for outcome in report.failures if outcome.attempts)
        [recorded] = read_journals([path], [CRM])
        assert (recorded.result, recorded.runtime) == (sent.result, sent.runtime)
        copied: StopReport = pickle.loads(pickle.dumps(report))  # noqa: S301 - its own.
        assert copied.to_dict() == report.to_dict()
        assert json.loads(msgspec.json.encode(report.to_dict()))["total"] == 2
        assert json.dumps(report.to_dict(), ensure_ascii=False).encode()
        assert str(report.failures).encode()

    @pytest.mark.parametrize("encoding", ["escaped", "utf-8", "utf-16"])
    @pytest.mark.parametrize("status", ["active", "stopped"])
    async def test_an_alias_with_one_is_nobodys(
        self, encoding: str, status: str
    ) -> None:
        """Fault: this alias was read as `a?`, so another runtime was stopped."""
        runtime = {**WIRE, **HALVES, "alias": "a\ud800", "status": status}
        async with served(
            answer({"runtimes": [runtime]}, encoding), retry=ONCE
        ) as session:
            report = await session.stop_workspace("ws-1", where=lambda _: True)
        assert report.counts == {StopResult.REJECTED: 1}
        assert "its alias has half of a character" in str(report.failures[0].error)

        targets = [("ws-1", "a?"), ("ws-1", "a"), ("ws-1", "a\ufffd")]
        async with served(answer(runtime, encoding), retry=ONCE) as session:
            report = await session.stop_runtimes(targets, verify=False)
        assert report.counts == {StopResult.UNKNOWN: 3}
        assert all(
            "another runtime" in str(outcome.error) for outcome in report.failures
        )

    @pytest.mark.parametrize("alias", ["a?", "\x7f"])
    async def test_elsewhere_it_leaves_the_alias_as_it_is(self, alias: str) -> None:
        invalid = {"alias": "odd", "driver": "\ud83d"}
        errors: list[BctrlResponseError] = []
        listed = answer({"runtimes": [{**WIRE, **HALVES, "alias": alias}, invalid]})
        async with served(listed) as session:
            [found] = await session.list_runtimes("ws-1", on_unreadable=errors.append)
        assert (found.alias, found.driver, found.kind, found.status) == (
            alias,
            "d?",
            "?",
            "sl?w",
        )
        assert found.summary is not None
        assert found.summary.launch_mode == "?"
        assert [error.alias for error in errors] == ["odd"]
