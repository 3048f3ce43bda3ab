"""The comparison of an answer with the runtime that was asked for."""

from __future__ import annotations

import json
from typing import Literal
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtimes import WIRE, wire

from bctrl_async import BctrlResponseError
from bctrl_async._http.response import check_answer, decode_runtime

ID = str(WIRE["id"])
WORKSPACE = str(WIRE["workspaceId"])
ANOTHER = "4b0d6b3e-6f0a-4b57-9a55-0f7f8f5d3c21"
UNREADABLE = BctrlResponseError("the answer cannot be read")


def belongs(
    parsed: object, workspace_id: str = "ws-1", alias: str | None = "crm", *, body: bytes = b""
) -> bool:
    return check_answer(parsed, body, workspace_id, alias, "Bearer k") is None


@pytest.mark.parametrize(
    ("asked", "answered", "is_same"),
    [
        ("crm", "Crm", True),
        ("CAFE\u0301", "caf\u00e9", True),
        ("stra\u00dfe", "STRASSE", True),
        ("\u0390", "\u1fd3", True),
        # Each character is four in another form, and no text that is kept may be shorter.
        ("\u1f82" * 1_000, "\u03b1\u0313\u0300\u0345" * 1_000, True),
        (ID.upper(), "crm", True),
        (ID.replace("-", ""), "crm", True),
        ("crm", "mail", False),
        ("crm", "", False),
        ("cafe", "caf\u00e9", False),
        ("x" * 1_000, "x" * 100_000, False),
        (ANOTHER, "crm", False),
        (WORKSPACE, "crm", False),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_the_alias_may_be_written_otherwise_or_be_the_id(
    asked: str, answered: str, *, is_same: bool
) -> None:
    assert belongs(decode_runtime(wire(alias=answered)), alias=asked) is is_same


@given(st.text(min_size=1))
def test_a_server_that_normalizes_the_alias_is_understood(alias: str) -> None:
    for written in (alias, alias.casefold(), alias.upper().lower()):
        if written.casefold() == alias.casefold():
            assert belongs(decode_runtime(wire(alias=written)), alias=alias)


def test_a_long_alias_of_combining_characters_is_another_one_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: an answer of 300 KB stalled the event loop for a minute: normalizing is quadratic."""
    lengths: list[int] = []

    def normalized(form: Literal["NFC"], text: str) -> str:
        lengths.append(len(text))
        return normalize(form, text[:100])

    monkeypatch.setattr("bctrl_async._http.response.normalize", normalized)
    body = json.dumps({"alias": "e" + "\u0301\u0323" * 75_000}).encode()

    assert not belongs(UNREADABLE, body=body)
    assert max(lengths) <= 4 * len("crm")


@pytest.mark.parametrize(
    ("workspace_id", "is_same"),
    [
        (WORKSPACE.upper(), True),
        ("ws-1", True),
        (f"urn:uuid:{ANOTHER}", True),
        ("a-name-of-thirty-six-characters-0001", True),
        (ANOTHER.upper(), False),
    ],
)
def test_the_workspace_is_compared_only_if_it_is_a_uuid(
    workspace_id: str, *, is_same: bool
) -> None:
    assert belongs(decode_runtime(wire()), workspace_id) is is_same


@pytest.mark.parametrize(
    ("body", "is_same"),
    [
        (b'{"alias":"mail"}', False),
        (b'{"alias":"mail","id":"crm"}', True),
        (b'{"alias":"crm","driver":"\\ud83d"}', True),
        (b'{"alias":"crm","workspaceId":"%b"}' % WORKSPACE.upper().encode(), True),
        (b'{"alias":"crm","workspaceId":"%b"}' % ANOTHER.encode(), False),
        (b'{"id":"mail"}', True),
        (b'{"alias":"mail"', True),
        (b"[" * 100_000, True),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_answer_without_all_fields_is_compared_by_the_names_it_has(
    body: bytes, *, is_same: bool
) -> None:
    """Fault: an answer about another runtime that lacked one field was `accepted`."""
    assert belongs(UNREADABLE, WORKSPACE, body=body) is is_same


@pytest.mark.parametrize(
    ("listed", "workspace_id", "is_same"),
    [
        ([], ANOTHER, True),
        ([UNREADABLE], ANOTHER, True),
        ([UNREADABLE, decode_runtime(wire())], WORKSPACE, True),
        ([UNREADABLE, decode_runtime(wire())], ANOTHER, False),
    ],
)
def test_a_list_is_compared_by_its_workspace(
    listed: list[object], workspace_id: str, *, is_same: bool
) -> None:
    assert belongs(listed, workspace_id, None) is is_same
