"""The API key in text of the server: echoed whole, in part, or in another encoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given, strategies as st

from bctrl_async._http.redaction import _pattern, excerpt_of, sanitize

KEY = "sk-live/Ab+cd=<0123>&\"'x\\y%2F9"
# Keys lack the characters with which escapes start: the two could not be told apart.
keys = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="\\%&"),
    min_size=8,
    max_size=60,
)

Encode = Callable[[str], str]
FORMS: dict[str, Encode] = {
    "as it is": lambda key: key,
    "JSON of PHP": lambda key: json.dumps(key).replace("/", "\\/"),
    "JSON of .NET": lambda key: "".join(
        character if character.isalnum() else f"\\u{ord(character):04X}"
        for character in key
    ),
    "JSON, escaped": lambda key: "".join(
        f"\\u{ord(character):04x}" for character in key
    ),
    "URL": lambda key: quote(key, safe=""),
    "URL, lower case": lambda key: quote(key, safe="").replace("%2F", "%2f"),
    "URL, all": lambda key: "".join(f"%{ord(character):02X}" for character in key),
}
every_form = pytest.mark.parametrize("encode", FORMS.values(), ids=FORMS)


def shown_of(text: str, key: str) -> list[str]:
    """Return what an error shows of a text: in a body, and in a line of its own."""
    return [excerpt_of(text.encode(), key), sanitize(text, key)]


def leaked(form: str, text: str) -> int:
    """Return how much of the start of a form is in a text."""
    return next(length for length in range(len(form), -1, -1) if form[:length] in text)


@every_form
@given(key=keys)
@example(key=KEY)
@example(key="\\\\\\\\////%%%%")
@example(key="aaaaaaab")
def test_an_echoed_key_is_redacted_in_any_form(encode: Encode, key: str) -> None:
    r"""Fault: a key with `/` was shown as `\/`."""
    # A key that starts like an ordinary word is redacted from that as well.
    assume(key[:4] not in '{"error": "bad key [] given"}')

    for shown in shown_of(f'{{"error": "bad key [{encode(key)}] given"}}', key):
        assert encode(key) not in shown
        assert "***" in shown
        assert shown.startswith('{"error": "bad key [')
        assert shown.endswith('] given"}')


@every_form
def test_a_form_that_the_server_cuts_leaves_a_few_characters_at_most(
    encode: Encode,
) -> None:
    """Fault: a body that was cut within an echoed key left the first half of it."""
    key = "sk-live/" + "".join(map(chr, range(0x30, 0x60)))
    for length in range(len(encode(key))):
        for shown in shown_of(f"bad key {encode(key)[:length]}", key):
            assert leaked(encode(key), shown) <= len(encode(key[:8]))
            assert leaked(key, shown) < 8


@every_form
def test_a_form_at_the_end_of_an_excerpt_leaves_no_part(encode: Encode) -> None:
    for before in range(2048 - len(encode(KEY)), 2048):
        shown = excerpt_of(b"." * before + encode(KEY).encode() + b"." * 200, KEY)
        assert leaked(encode(KEY), shown) <= 10
        assert len(shown) <= 2048


@every_form
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32-le"])
def test_a_key_in_utf_16_or_utf_32_is_redacted(encode: Encode, encoding: str) -> None:
    """Fault: of a page in UTF-16, an error showed the key with NULs in it."""
    body = f"<p>ä€😀 bad key {encode(KEY)}</p>".encode(encoding)
    for shown in (excerpt_of(body, KEY), sanitize(body.decode(errors="replace"), KEY)):
        assert leaked(encode(KEY), shown.replace(" ", "")) <= 10
        assert "***" in shown
        assert "\0" not in shown


@given(
    st.text(st.characters(exclude_characters="\0")),
    st.text("\\%&#;u0aA25/", max_size=30),
)
def test_other_text_is_unchanged(text: str, escapes: str) -> None:
    text = text.encode(errors="replace").decode() + escapes

    assert excerpt_of(text.encode(), "sk-live-0123456789") == text


@pytest.mark.parametrize(
    ("key", "text", "shown"),
    [
        (
            KEY,
            f'a\\u002fb\\" %41 &amp; {KEY}{KEY} \\/ z',
            'a\\u002fb\\" %41 &amp; ****** \\/ z',
        ),
        ("ab/9", "bad key ab/9, ab\\/9", "bad key ***, ***"),
        # A shorter key is a placeholder, and would match ordinary words.
        ("key", "a key of any kind %6b%65%79", "a key of any kind %6b%65%79"),
        ("", "a key of any kind", "a key of any kind"),
        # No more is redacted than is shown.
        (KEY, "\\" * 10_000_000, "\\" * 2048),
    ],
    ids=["long", "short", "too short", "none", "long text"],
)
def test_only_the_key_is_redacted(key: str, text: str, shown: str) -> None:
    assert excerpt_of(text.encode(), key) == shown


@pytest.mark.parametrize("cut", [30, 63, 64, 65, 4_000])
def test_a_long_token_is_redacted_without_a_long_pattern(cut: int) -> None:
    """Fault: a token of 4,000 characters took half a second as a pattern."""
    key = "eyJhbGciOiJSUzI1NiIs" + "aB3-" * 995
    assert excerpt_of(f"bad key {key[:cut]}... given".encode(), key) in {
        "bad key *** given",
        "bad key ***... given",
    }
    assert len(_pattern(key).pattern) < 5_000
