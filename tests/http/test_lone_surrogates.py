"""Half of a surrogate pair, in an answer or a name, costs nothing but itself."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import msgspec
import pytest
from runtimes import WIRE, wire
from servers import http_answer, served

from bctrl_async import BctrlResponseError, RetryPolicy, StopReport, StopResult
from bctrl_async.journal import read_journals

ONCE = RetryPolicy(attempts=1, patience=0)
HALVES = {
    "createdAt": "\udfff",
    "driver": "d\ud83d",
    "kind": "\ud800",
    "status": "sl\udc00w",
    "summary": {"launchMode": "\ud800", "currentDriver": "\ud83d"},
}
ERROR = {"code": "a.\ud800", "error": "\ud800", "hint": "\udfff", "requestId": "r\ud800"}
ANSWERS = {
    "runtime": http_answer("200 OK", wire(**HALVES)),
    "raw": http_answer("200 OK", wire(**HALVES).replace(b"\\ud83d", b"\xed\xa0\xbd")),
    "another": http_answer("200 OK", wire(**HALVES, alias="\ud800")),
    "not JSON": http_answer("200 OK", b'{"alias":"\\ud800'),
    "error": http_answer("403 No", json.dumps(ERROR).encode()),
    "text": http_answer("500 No", b"\xed\xa0\xbd \\ud800"),
    "header": http_answer("500 No", b"", "X-Request-Id: ?").replace(b"?", b"\xed\xa0\xbd"),
}
"""Answers that have half of a pair in each text."""
INVALID = ("ws-\ud800", "\udfff")
"""A target with half of a pair in each name."""


@pytest.mark.parametrize("name", ANSWERS)
async def test_outcomes_are_written_read_pickled_and_encoded(name: str, tmp_path: Path) -> None:
    """Fault: a report with an invalid target could not be encoded, whatever `to_dict` promises."""
    path = tmp_path / "run.jsonl"
    async with served(ANSWERS[name], retry=ONCE) as session:
        report = await session.stop_runtimes([("ws-1", "crm"), INVALID], journal=path, verify=False)

    assert report.total == len(report.failures) == 2
    sent = next(outcome for outcome in report.failures if outcome.attempts)
    [recorded] = read_journals([path], [("ws-1", "crm")])
    assert (recorded.result, recorded.runtime) == (sent.result, sent.runtime)
    copied: StopReport = pickle.loads(pickle.dumps(report))  # noqa: S301 - its own.
    assert copied.to_dict() == report.to_dict()
    encoded = msgspec.json.encode(report.to_dict())
    assert json.loads(encoded)["total"] == 2
    assert json.dumps(report.to_dict(), ensure_ascii=False).encode()
    assert str(report.failures).encode()


@pytest.mark.parametrize("encoding", ["escaped", "utf-8", "utf-16"])
@pytest.mark.parametrize("status", ["active", "stopped"])
async def test_an_alias_with_half_of_a_character_is_nobodys(encoding: str, status: str) -> None:
    """Fault: such an alias was read as `a?`, so another runtime was stopped, or said to be."""
    runtime = {**WIRE, **HALVES, "alias": "a\ud800", "status": status}
    is_escaped = encoding == "escaped"

    def answer(fields: object) -> bytes:
        text = json.dumps(fields, ensure_ascii=is_escaped)
        return http_answer(
            "200 OK", text.encode("utf-8" if is_escaped else encoding, "surrogatepass")
        )

    async with served(answer({"runtimes": [runtime]}), retry=ONCE) as session:
        report = await session.stop_workspace("ws-1", where=lambda _: True)
        assert report.counts == {StopResult.REJECTED: 1}
        assert "its alias has half of a character" in str(report.failures[0].error)
    async with served(answer(runtime), retry=ONCE) as session:
        names = ("a?", "a", "a\ufffd")
        report = await session.stop_runtimes([("ws-1", name) for name in names], verify=False)
        assert report.counts == {StopResult.UNKNOWN: 3}
        assert all("another runtime" in str(each.error) for each in report.failures)


@pytest.mark.parametrize("alias", ["a?", "\x7f"])
async def test_half_of_a_character_elsewhere_leaves_the_alias_as_it_is(alias: str) -> None:
    invalid = b'{"alias": "odd", "driver": "\\ud83d"}'
    listed = b'{"runtimes": [%b, %b]}' % (wire(**HALVES, alias=alias), invalid)
    errors: list[BctrlResponseError] = []
    async with served(http_answer("200 OK", listed)) as session:
        [runtime] = await session.list_runtimes("ws-1", on_unreadable=errors.append)
    assert (runtime.alias, runtime.driver, runtime.kind, runtime.status) == (
        alias,
        "d?",
        "?",
        "sl?w",
    )
    assert runtime.summary is not None
    assert runtime.summary.launch_mode == "?"
    assert [error.alias for error in errors] == ["odd"]
