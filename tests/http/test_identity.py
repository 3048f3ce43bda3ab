"""The comparison of an answer with the runtime that was asked for."""

from __future__ import annotations

from typing import Literal
from unicodedata import normalize
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtimes import runtime

from bctrl_async import BctrlResponseError, Runtime
from bctrl_async._http.response import check_answer

ID = UUID("7b1f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f")
WORKSPACE = UUID("0b2f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f")
ANOTHER = UUID("4b0d6b3e-6f0a-4b57-9a55-0f7f8f5d3c21")


def answer(alias: str) -> Runtime:
    return msgspec.structs.replace(runtime(), alias=alias, id=ID, workspace_id=WORKSPACE)


@pytest.mark.parametrize(
    ("body", "foreign"),
    [
        (b'{"alias":"mail"}', True),
        (b'{"alias":"mail","id":"crm"}', False),
        (b'{"alias":"crm","driver":"\\ud83d"}', False),
        (b'{"id":"mail"}', False),
        (b'{"alias":"mail"', False),
        (b"[" * 100_000, False),
    ],
)
def test_an_answer_without_all_fields_is_compared_by_the_names_it_has(
    body: bytes, *, foreign: bool
) -> None:
    """Fault: an answer about another runtime that lacked one field was `accepted`."""
    assert belongs(UNREADABLE, body=body) is not foreign


def test_a_workspace_that_an_invalid_answer_names_is_compared() -> None:
    body = f'{{"alias":"crm","workspaceId":"{str(WORKSPACE).upper()}"}}'.encode()
    assert belongs(UNREADABLE, str(WORKSPACE), body=body)
    assert not belongs(UNREADABLE, str(ANOTHER), body=body)


UNREADABLE = BctrlResponseError("the answer cannot be read")


def belongs(
    parsed: object, workspace_id: str = "ws-1", alias: str | None = "crm", *, body: bytes = b""
) -> bool:
    return check_answer(parsed, body, workspace_id, alias, "Bearer k") is None


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("crm", "Crm"),
        ("CAFE\u0301", "caf\u00e9"),
        ("stra\u00dfe", "STRASSE"),
        ("\u0390", "\u1fd3"),
        ("\u1f82" * 1_000, "\u03b1\u0313\u0300\u0345" * 1_000),
        (str(ID).upper(), "crm"),
        (ID.hex, "crm"),
    ],
)
def test_the_alias_may_be_written_otherwise_or_be_the_id(asked: str, answered: str) -> None:
    assert belongs(answer(answered), alias=asked)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("crm", "mail"),
        ("crm", ""),
        ("crm", "\ud800"),
        ("cafe", "caf\u00e9"),
        (str(ANOTHER), "crm"),
        (str(WORKSPACE), "crm"),
    ],
)
def test_another_alias_is_an_error(asked: str, answered: str) -> None:
    error = check_answer(answer(answered), b"", "ws-1", asked, "Bearer k")

    assert type(error) is BctrlResponseError
    assert str(error).isprintable()
    assert error.may_have_stopped
    assert error.status is None


def test_a_long_alias_of_combining_characters_is_another_one_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: an answer of 300 KB stalled the event loop for a minute: normalizing is quadratic."""
    lengths: list[int] = []

    def normalized(form: Literal["NFC"], text: str) -> str:
        lengths.append(len(text))
        return normalize(form, text[:100])

    monkeypatch.setattr("bctrl_async._http.response.normalize", normalized)
    alias = "e" + "\u0301\u0323" * 75_000
    body = msgspec.json.encode({"alias": alias})

    assert not belongs(answer(alias))
    assert not belongs(UNREADABLE, body=body)
    assert max(lengths) <= 4 * len("crm")


@given(st.text(min_size=1))
def test_a_server_that_normalizes_the_alias_is_understood(alias: str) -> None:
    for written in (alias, alias.casefold(), alias.upper().lower()):
        if written.casefold() == alias.casefold():
            assert belongs(answer(written), alias=alias)


@pytest.mark.parametrize(
    ("workspace_id", "is_same"),
    [
        (str(WORKSPACE).upper(), True),
        ("ws-1", True),
        (f"urn:uuid:{ANOTHER}", True),
        ("a-name-of-thirty-six-characters-0001", True),
        (str(ANOTHER).upper(), False),
    ],
)
def test_the_workspace_is_compared_only_if_it_is_a_uuid(
    workspace_id: str, *, is_same: bool
) -> None:
    assert belongs(answer("crm"), workspace_id) is is_same


def test_a_list_is_compared_by_its_workspace() -> None:
    unreadable = BctrlResponseError("not a valid Runtime", alias="crm")

    assert belongs([], str(ANOTHER), None)
    assert belongs([unreadable], str(ANOTHER), None)
    assert belongs([unreadable, answer("mail")], str(WORKSPACE), None)
    assert not belongs([unreadable, answer("mail")], str(ANOTHER), None)
