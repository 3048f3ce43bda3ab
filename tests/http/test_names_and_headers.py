"""The parts of a request that callers choose: names in the path, and headers."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from hypothesis import example, given, strategies as st
from support.runtimes import RUNTIME
from support.servers import http_answer, raw_server, recording
from yarl import URL

from bctrl_async import BctrlConfigError, BctrlSession
from bctrl_async._http.request import checked_headers, path_segment
from bctrl_async.emulator import Emulator

PATH = "could be taken for a path"
CONTROL = "contains a control character"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty"),
        (".", PATH),
        ("..;x", PATH),
        ("a\\..", PATH),
        ("a%5c%2e%2e", PATH),
        ("%252e%252e%255c", PATH),
        # Decoding until nothing changes would take 14 ms of the event loop.
        ("%" * 334 + "25" * 333, PATH),
        ("crm\n", CONTROL),
        ("a\x7f", CONTROL),
        ("a\x85b", CONTROL),
        ("\U000e0001" * 900 + "\n", CONTROL),
        ("crm\udfff", "contains a lone surrogate"),
        ("\n" * 1_001, "has 1,001 characters, more than 1,000"),
        # It is not even decoded once.
        ("%" + "25" * 32_000 + "2e", "has 64,003 characters, more than 1,000"),
        (None, "is missing: it must be a str, not None"),
        (b"crm", "must be a str, not bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_an_invalid_name_is_rejected_before_a_byte_is_sent(
    emulator: Emulator, session: BctrlSession, name: str, problem: str
) -> None:
    """Fault: stop("..") leaves the resource.

    The vendor's SDK, elasticsearch and aiodocker do so.
    """
    for target, part in ((("ws-1", name), "alias"), ((name, "crm"), "workspace id")):
        with pytest.raises(BctrlConfigError) as caught:
            await session.stop_runtime(*target)
        error = caught.value
        assert error.summary.startswith(part)
        assert problem in error.summary
        assert (error.reason_class, error.__cause__) == ("invalid_input", None)
        assert len(str(error)) < 600
        assert str(error).isprintable()
    assert emulator.requests == []


async def test_a_prefix_of_the_base_url_and_special_characters_are_kept() -> None:
    heads: list[bytes] = []
    async with (
        raw_server(recording(heads, http_answer("200 OK", RUNTIME))) as url,
        BctrlSession(
            "k", base_url=f"{url}/through%20here/v1/", check_answers=False
        ) as session,
    ):
        await session.stop_runtime("ws 1/\u00e4", "c%2Fr?m#")
    path = b"/through%20here/v1/workspaces/ws%201%2F%C3%A4/runtimes/c%252Fr%3Fm%23/stop"
    assert heads[0].startswith(b"POST " + path + b" HTTP/1.1")


def has_dot_segment(text: str) -> bool:
    """Return True if a text has a dot segment, percent-decoded any number of times."""
    decoded = [text]
    while (again := unquote(decoded[-1])) != decoded[-1]:
        decoded.append(again)
    return any(
        segment.partition(";")[0] in {".", ".."}
        for form in decoded
        for segment in re.split(r"[/\\]", form)
    )


# Text with dots, separators and their percent-encodings, nested to any depth.
tricky_text = st.lists(
    st.sampled_from(
        [
            ".",
            "..",
            "/",
            "\\",
            "%",
            "%2e",
            "%2E",
            "%2f",
            "%5c",
            "%25",
            "25",
            ";",
            "?",
            "#",
            "a",
        ]
    )
    | st.characters(codec=None),
    max_size=12,
).map("".join)


@given(tricky_text | st.text() | st.text("%2eE5cCfF.;/\\a3B", max_size=40))
@example("%25" * 40 + "2e")
@example("a%2525")
@example("%%32%65")
@example("%c3%2e%e9%2f")
@example("..a/b")
@example("...")
@example("crm;v=1")
def test_a_name_arrives_unchanged_and_is_rejected_only_for_a_reason(text: str) -> None:
    try:
        segment = path_segment(text, "alias")
    except BctrlConfigError as error:
        is_path = PATH in error.summary
        assert not is_path or has_dot_segment(text) or text.count("%") > 5
        return

    assert not has_dot_segment(text)
    path = f"/v1/workspaces/ws/runtimes/{segment}/stop"
    assert unquote(segment, errors="strict") == text
    assert re.fullmatch(r"[A-Za-z0-9._~%-]+", segment)
    assert URL("https://api.bctrl.ai").with_path(path, encoded=True).raw_path == path


def test_valid_headers_are_accepted() -> None:
    headers = {
        "x!#$%&'*+.^_`|~-9": "every character of a token",
        "X-Empty": "",
        "X-Words": "two words\tand a tab",
    }
    assert checked_headers(headers) == headers
    assert list(checked_headers({"X": "1", "x": "2"}).values()) == ["2"]


INVALID_NAMES = ["", "X Trace", "X\r\nEvil", "X-\u017f", 1, b"X"]
INVALID_VALUES = [
    "secret\r\nX: 1",
    "secret\0",
    " secret",
    "secret\t",
    " ",
    "secretü",
    None,
    1,
]
RESERVED = """
    Authorization authorization Accept-Encoding Connection Content-Length Expect Host TE
    Trailer Transfer-Encoding Upgrade
""".split()  # noqa: SIM905 - easier to read.


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        *((name, "secret", "invalid header name") for name in INVALID_NAMES),
        *(
            ("X-Trace", value, "invalid value of header 'X-Trace'")
            for value in INVALID_VALUES
        ),
        *(
            (name, "secret", f"the header '{name}' is set by the session")
            for name in RESERVED
        ),
    ],
)
def test_an_invalid_header_is_rejected_and_not_shown(
    name: str, value: str, problem: str
) -> None:
    with pytest.raises(BctrlConfigError, match=f"^{problem}") as caught:
        checked_headers({"X-Fine": "1", name: value})

    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
