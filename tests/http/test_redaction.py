"""The API key in text of the server: echoed whole, in part, or in another encoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from servers import closing, http_answer, served

from bctrl_async import BctrlApiError
from bctrl_async._http.redaction import bearer_key, excerpt_of, sanitize

KEY = "sk-live/Ab+cd=<0123>&\"'x\\y%2F9"
# Without the characters with which escapes begin: the two could not be told apart.
keys = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="\\%&"),
    min_size=8,
    max_size=60,
)


FORMS: dict[str, Callable[[str], str]] = {
    "as it is": lambda key: key,
    "bearer": lambda key: f"Bearer {key}",
    "JSON": json.dumps,
    "JSON of PHP": lambda key: json.dumps(key).replace("/", "\\/"),
    "JSON of .NET": lambda key: "".join(
        character if character.isalnum() else f"\\u{ord(character):04X}" for character in key
    ),
    "JSON, escaped": lambda key: "".join(f"\\u{ord(character):04x}" for character in key),
    "URL": lambda key: quote(key, safe=""),
    "URL, lower case": lambda key: "".join(
        character if character.isalnum() else f"%{ord(character):02x}" for character in key
    ),
    "URL, all": lambda key: "".join(f"%{ord(character):02X}" for character in key),
    "path": lambda key: quote(key, safe="/+=&<>"),
}


ENCODINGS = ["utf-16", "utf-16-be", "utf-32-le"]


def leaked(form: str, text: str) -> int:
    """Return how much of the beginning of a form is in a text."""
    return next(length for length in range(len(form), -1, -1) if form[:length] in text)


class TestForms:
    @pytest.mark.parametrize("name", FORMS)
    @given(key=keys)
    @example(key=KEY)
    @example(key="\\\\\\\\////%%%%")
    @example(key="aaaaaaab")
    def test_an_echoed_key_is_redacted_in_any_form(self, name: str, key: str) -> None:
        r"""Fault: a key with `/` was shown as `\/`."""
        form = FORMS[name](key)
        # A key that begins like an ordinary word is redacted from that as well.
        assume(key[:4] not in '{"error": "bad key [] given"}')
        text = f'{{"error": "bad key [{form}] given"}}'

        for shown in (excerpt_of(text.encode(), key), sanitize(text, key)):
            assert shown is not None
            assert form not in shown
            assert "***" in shown
            assert shown.startswith('{"error": "bad key [')
            assert shown.endswith('] given"}')

    @pytest.mark.parametrize("name", FORMS)
    def test_a_form_that_is_cut_leaves_a_few_characters_at_most(self, name: str) -> None:
        """Fault: a body that was cut within an echoed key left the first half of it."""
        key = "sk-live/" + "".join(map(chr, range(0x30, 0x60)))
        form = FORMS[name](key)
        for length in range(len(form)):
            text = f"bad key {form[:length]}"
            for shown in (excerpt_of(text.encode(), key), sanitize(text, key)):
                assert shown is not None
                assert leaked(form, shown) <= len(FORMS[name](key[:8]))
                assert leaked(key, shown) < 8

    @pytest.mark.parametrize("name", FORMS)
    def test_a_form_at_the_end_of_an_excerpt_leaves_no_part(self, name: str) -> None:
        form = FORMS[name](KEY)
        for length in (500, 2048):
            for before in range(length - len(form), length):
                text = "." * before + form + "." * 200
                shown = sanitize(text, KEY) if length == 500 else excerpt_of(text.encode(), KEY)
                assert leaked(form, shown or "") <= 10
                assert len(shown or "") <= length

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_a_key_in_utf_16_or_utf_32_is_redacted(self, encoding: str) -> None:
        """Fault: of a page in UTF-16, an error showed the key with a NUL after each character."""
        for name, encode in FORMS.items():
            form = encode(KEY)
            body = f"<p>ä€😀 bad key {form}</p>".encode(encoding)
            for shown in (excerpt_of(body, KEY), sanitize(body.decode(errors="replace"), KEY)):
                assert shown is not None, name
                assert leaked(form, shown.replace("\0", "").replace(" ", "")) <= 10, name
                assert "***" in shown, name
                assert "\0" not in shown, name

    @given(st.text(st.characters(exclude_characters="\0")), st.text("\\%&#;u0aA25/", max_size=30))
    def test_other_text_is_unchanged(self, text: str, escapes: str) -> None:
        text = text.encode(errors="replace").decode() + escapes

        assert excerpt_of(text.encode(), "sk-live-0123456789") == text

    def test_text_around_the_key_is_unchanged(self) -> None:
        text = 'a\\u002fb\\" %41 &amp; é 😀 {} \\/ %2f &lt; z'

        assert excerpt_of(text.format(KEY).encode(), KEY) == text.format("***")
        assert excerpt_of(text.format(KEY + KEY).encode(), KEY) == text.format("******")

    @pytest.mark.parametrize("key", ["", "k", "key"])
    def test_a_key_too_short_to_be_secret_is_not_redacted(self, key: str) -> None:
        assert excerpt_of(b"a key of any kind %6b%65%79", key) == "a key of any kind %6b%65%79"

    def test_a_key_of_four_characters_is_redacted(self) -> None:
        assert excerpt_of(b"bad key ab/9, ab\\/9", "ab/9") == "bad key ***, ***"

    def test_a_long_body_is_redacted_no_further_than_it_is_shown(self) -> None:
        body = b"\\" * 10_000_000

        assert excerpt_of(body, KEY) == "\\" * 2048

    def test_the_key_of_a_header_is_hidden(self) -> None:
        assert bearer_key(f"Bearer {KEY}") == KEY
        assert repr(bearer_key(f"Bearer {KEY}")) == "'***'"


@pytest.mark.parametrize("cut", [1, 20])
async def test_a_body_that_is_cut_within_the_key_does_not_show_its_beginning(cut: int) -> None:
    key = "sk-live-0123456789-do-not-print"
    body = f'{{"error": "bad key {key}'.encode()[:-cut]
    async with served(closing(http_answer("401 No", body + b"." * 99)[:-99]), key) as session:
        with pytest.raises(BctrlApiError) as caught:
            await session.stop_runtime("ws-1", "crm")

    assert key[:8] not in f"{caught.value} {vars(caught.value)}"
    assert "bad key ***" in str(caught.value)
