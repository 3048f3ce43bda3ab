"""The HTTP protocol, sans-IO: building requests and parsing responses."""

import gzip
import json
import math
import pickle
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from enum import Enum
from urllib.parse import quote, unquote
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict
from yarl import URL

from bctrl_async._http import response
from bctrl_async._http.request import (
    _MAX_DECODINGS,
    _has_dot_segment,
    checked_headers,
    path_segment,
)
from bctrl_async.errors import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlValidationError,
)
from bctrl_async.models import Runtime

KEY = "sk-live-0123456789"
BEARER = f"Bearer {KEY}"
NOW = datetime(2026, 11, 25, 9, 30, tzinfo=UTC)

WIRE: dict[str, object] = {
    "id": "0b7c7a0e-54a1-4c7a-9f6e-7d9f0a3c1f01",
    "alias": "crm",
    "workspaceId": "0b7c7a0e-54a1-4c7a-9f6e-7d9f0a3c1f02",
    "kind": "browser",
    "status": "stopped",
    "driver": "playwright",
    "createdAt": "2026-11-25T08:00:00Z",
    "updatedAt": "2026-11-25T09:00:00Z",
}

# C0, C1, zero-width, bidi, line separators, a lone surrogate, a tag, private use.
UNPRINTABLE = [
    *"\x07\x1b\x7f\x85\x9b\u00ad\u200b\u200e\u202e\u2066\u2028\ufeff",
    "\ud800",
    "\U000e0041",
    "\ue000",
]

# Text with dots, separators and their percent-encodings, nested to any depth.
tricky_text = st.lists(
    st.sampled_from(
        [".", "..", "/", "\\", "%", "%2e", "%2E", "%2f", "%5c", "%25", "25", ";", "?", "#", "a"]
    )
    | st.characters(codec=None),
    max_size=12,
).map("".join)


def parse(body: bytes) -> Runtime:
    return response.decode_runtime(body)


def parse_invalid(
    body: bytes, status: int = 200, authorization: str = BEARER
) -> BctrlResponseError:
    with pytest.raises(response.DECODE_ERRORS) as caught:
        response.decode_runtime(body)
    assert isinstance(caught.value, Exception)
    error = response.unreadable(status, "the body", "Runtime", caught.value)
    response.unusable(error, "", body, authorization)
    return error


def parse_error(
    status: int = 400,
    body: object = b"",
    headers: Mapping[str, str] | None = None,
    authorization: str = BEARER,
) -> BctrlError:
    """Parse an error response; a body that is not bytes is encoded as JSON."""
    return response.parse_error(
        status,
        CIMultiDict(headers or {}).get,
        body if isinstance(body, bytes) else json.dumps(body).encode(),
        authorization,
        now=NOW,
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    return response.parse_retry_after(CIMultiDict(headers).get, NOW)


def decodings(text: str) -> list[str]:
    """Return `text` percent-decoded zero, one, two, … times, until it no longer changes."""
    decoded = [text]
    while (further := unquote(decoded[-1])) != decoded[-1]:
        decoded.append(further)
    return decoded


def has_dot_segment_in_rounds(text: str) -> bool:
    """Return True if a percent-decoding of `text` has a dot segment."""
    return any(
        segment.partition(";")[0] in {".", ".."}
        for decoded in decodings(text)
        for segment in re.split(r"[/\\]", decoded)
    )


class TestPathSegment:
    def test_an_enum_member_is_sent_as_its_value(self) -> None:
        class Alias(str, Enum):  # noqa: UP042 - a StrEnum formats as its value, this does not.
            CRM = "crm"
            MAIL = "the mail"

        assert f"{path_segment(Alias.CRM, 'alias')}" == "crm"
        assert f"{path_segment(Alias.MAIL, 'alias')}" == "the%20mail"

    @given(tricky_text | st.text())
    @example("%25" * 40 + "2e")
    @example("a%2f%2e%2e%5cb")
    @example("crm;v=1")
    @example("日本語 / alias")
    def test_any_text_arrives_unchanged_or_is_rejected(self, text: str) -> None:
        """Fault: `stop("..")` leaves the resource, and `%2e%2e` too (vendor's SDK, aiodocker)."""
        try:
            segment = path_segment(text, "alias")
        except BctrlConfigError:
            return

        path = f"/v1/workspaces/ws/runtimes/{segment}/stop"
        assert unquote(segment, errors="strict") == text
        assert re.fullmatch(r"[A-Za-z0-9._~%-]+", segment)
        assert URL("https://api.bctrl.ai").with_path(path, encoded=True).raw_path == path
        for decoded in decodings(segment):
            assert not {".", ".."} & set(re.split(r"[/\\]", decoded))

    @given(st.from_regex(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]*", fullmatch=True))
    def test_a_plain_name_is_sent_unchanged(self, text: str) -> None:
        assert path_segment(text, "alias") == text

    @pytest.mark.parametrize(
        ("text", "segment"),
        [
            ("crm/eu", "crm%2Feu"),
            ("a b", "a%20b"),
            ("a+b", "a%2Bb"),
            ("crm?x=1#y", "crm%3Fx%3D1%23y"),
            ("100%", "100%25"),
            ("ä", "%C3%A4"),
            ("...", "..."),
            (".hidden", ".hidden"),
            ("a..b", "a..b"),
            ("..a/b", "..a%2Fb"),
            ("crm;v=1", "crm%3Bv%3D1"),
            (" ", "%20"),
            ("http://x", "http%3A%2F%2Fx"),
        ],
    )
    def test_special_characters_are_encoded(self, text: str, segment: str) -> None:
        assert path_segment(text, "alias") == segment

    def test_a_uuid_is_sent_in_its_canonical_form(self) -> None:
        uuid = UUID("0B7C7A0E54A14C7A9F6E7D9F0A3C1F01")

        segment = path_segment(uuid, "workspace id")

        assert segment == "0b7c7a0e-54a1-4c7a-9f6e-7d9f0a3c1f01"

    @pytest.mark.parametrize(
        "text",
        [
            ".",
            "..",
            "%2e",
            "%2e%2e",
            "%2E.",
            "%252e",
            "%25252e%25252E",
            "..;x",
            ".;",
            "..%3Bx",
            "../b",
            "a/..",
            "a/../b",
            "a/./b",
            "a%2f..%2fb",
            "..\\x",
            "a\\..",
            "a%5c%2e%2e",
            "%252e%252e%255c",
        ],
    )
    def test_a_dot_segment_is_rejected_in_any_encoding(self, text: str) -> None:
        """Fault: `stop("..")` leaves the resource, and `%2e%2e` too (vendor's SDK, aiodocker)."""
        with pytest.raises(BctrlConfigError, match=r"^alias '.*' could be taken for a path"):
            path_segment(text, "alias")

    @given(tricky_text | st.text("%2eE5cCfF.;/\\a3B", max_size=40))
    @example("%" * 30 + "2e" * 30)
    @example("%%32%65")
    @example("%2%35%25%32%65")
    @example("%c3%2e%e9%2f")
    @example("%c0%ae%c0%ae")
    def test_dot_segments_of_every_decoding_are_found_in_the_last(self, text: str) -> None:
        is_found, is_deep = _has_dot_segment(text), text.count("%") > _MAX_DECODINGS
        assert is_found is has_dot_segment_in_rounds(text) or (is_found and is_deep)

    def test_a_name_that_is_encoded_many_times_over_is_rejected(self) -> None:
        """Fault: decoding until nothing changed took 14 ms of the event loop for each name."""
        with pytest.raises(BctrlConfigError, match=r"^alias '.*' could be taken for a path"):
            path_segment("%" * 334 + "25" * 333, "alias")

    @pytest.mark.parametrize("character", ["a", "%", "é", "\n", ".", "\ud800", "\U000e0001"])
    def test_a_name_over_the_limit_is_rejected_and_not_repeated(self, character: str) -> None:
        """Fault: an alias of 64 KB was sent, or was repeated as a whole in its error."""
        with pytest.raises(BctrlConfigError) as caught:
            path_segment(character * 1_001, "alias")

        assert str(caught.value) == (
            "alias has 1,001 characters, more than 1,000. Pass the alias of the runtime"
        )
        assert caught.value.reason_class == "invalid_input"

    @pytest.mark.parametrize("name", ["a" * 1_000, "é" * 1_000])
    def test_a_name_of_the_longest_length_is_sent(self, name: str) -> None:
        assert unquote(path_segment(name, "alias")) == name

    @pytest.mark.parametrize("bad", ["\n", "/..", "\ud800"])
    def test_the_error_of_a_long_name_shows_a_part_of_it(self, bad: str) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            path_segment("\U000e0001" * 900 + bad, "alias")

        assert len(str(caught.value)) < 300

    def test_an_alias_of_64_kb_that_is_encoded_again_and_again_is_rejected_unread(self) -> None:
        """Fault: each round decoded the whole name once more, which stalled the loop for 1.8 s."""
        with pytest.raises(BctrlConfigError, match=r"^alias has 64,003 characters"):
            path_segment("%" + "25" * 32_000 + "2e", "alias")

    def test_a_control_character_is_rejected_and_shown_escaped(self) -> None:
        for character in map(chr, (*range(0x20), *range(0x7F, 0xA0))):
            with pytest.raises(BctrlConfigError, match="contains a control character") as caught:
                path_segment(f"crm{character}", "alias")

            assert str(caught.value).isprintable(), repr(character)

    @pytest.mark.parametrize("text", [chr(0xD800), f"crm{chr(0xDFFF)}", chr(0xDC80)])
    def test_a_lone_surrogate_is_rejected(self, text: str) -> None:
        with pytest.raises(BctrlConfigError, match="contains a lone surrogate") as caught:
            path_segment(text, "alias")

        assert str(caught.value).isascii()
        assert caught.value.__cause__ is None

    @pytest.mark.parametrize("value", [None, "", "crm\n", "..", chr(0xD800)])
    def test_the_error_of_an_invalid_name_has_a_reason_class(self, value: str) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            path_segment(value, "alias")

        assert caught.value.reason_class == "invalid_input"

    def test_an_empty_name_is_rejected(self) -> None:
        with pytest.raises(BctrlConfigError, match=r"^workspace id is empty\. Pass the workspace"):
            path_segment("", "workspace id")

    @pytest.mark.parametrize("value", [None, b"crm", bytearray(b"crm"), 1, True, ("a",), object()])
    def test_a_value_that_is_not_text_is_rejected_by_its_type(self, value: str) -> None:
        message = f"^alias must be a str, not {type(value).__name__}"

        with pytest.raises(BctrlConfigError, match=message):
            path_segment(value, "alias")


class TestExtraHeaders:
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"X-Trace": "abc"},
            {"X-Empty": ""},
            {"x!#$%&'*+.^_`|~-9": "every character of a token"},
            {"X-Words": "two words\tand a tab"},
            {"Idempotency-Key": "0b7c7a0e"},
        ],
    )
    def test_valid_headers_are_accepted(self, headers: dict[str, str]) -> None:
        checked_headers(headers)

    @pytest.mark.parametrize(
        "name",
        ["", " ", "X Trace", "X-Trace:", "X\r\nEvil", "X\x00", "Ü", "X-\u017f", 1, None, b"X"],
    )
    def test_an_invalid_header_name_is_rejected(self, name: str) -> None:
        with pytest.raises(BctrlConfigError, match=r"^invalid header name") as caught:
            checked_headers({name: "value"})

        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize(
        "value",
        ["a\r\nX-Evil: 1", "a\n", "a\x00", "a\x7f", " a", "a ", "\ta", "a\t", " ", "aü", "a\ud800"],
    )
    def test_an_invalid_value_is_rejected_and_not_shown(self, value: str) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            checked_headers({"X-Trace": value.replace("a", "secret")})

        assert "invalid value of header 'X-Trace': expected printable ASCII" in str(caught.value)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("value", [None, 1, True, b"x", ["x"]])
    def test_a_value_that_is_not_text_is_rejected(self, value: str) -> None:
        with pytest.raises(BctrlConfigError, match=r"^invalid value of header 'X-Trace'"):
            checked_headers({"X-Trace": value})

    @pytest.mark.parametrize(
        "name",
        [
            "Authorization",
            "authorization",
            "AUTHORIZATION",
            "Connection",
            "Content-Length",
            "Expect",
            "Host",
            "TE",
            "Trailer",
            "Transfer-Encoding",
            "Upgrade",
        ],
    )
    def test_the_key_and_framing_headers_cannot_be_replaced(self, name: str) -> None:
        with pytest.raises(BctrlConfigError, match=f"the header '{name}' is set by the session"):
            checked_headers({"X-Trace": "fine", name: "x"})


class TestParseRuntime:
    def test_a_runtime_is_parsed(self) -> None:
        runtime = parse(json.dumps(WIRE).encode())

        assert runtime.alias == "crm"
        assert runtime.status == "stopped"

    def test_unknown_fields_are_ignored(self) -> None:
        wire = WIRE | {"region": [{"name": "eu"}], "Alias": 1, "": None}

        runtime = parse(json.dumps(wire).encode())

        assert runtime == parse(json.dumps(WIRE).encode())

    @pytest.mark.parametrize("cut", ["\\ud83d", "\\udc00", "\\ud83d\\ud83d", "a\\ud83db"])
    def test_a_lone_surrogate_in_text_is_replaced(self, cut: str) -> None:
        body = json.dumps(WIRE | {"driver": "CUT"}).replace("CUT", cut).encode()

        runtime = parse(body)

        assert runtime.driver == json.loads(f'"{cut}"').encode(errors="replace").decode()
        assert runtime.status == "stopped"

    def test_an_invalid_field_is_named_despite_a_lone_surrogate(self) -> None:
        body = json.dumps(WIRE | {"driver": "CUT", "alias": 5}).replace("CUT", "\\ud83d").encode()

        error = parse_invalid(body)

        assert "`$.alias`" in error.summary
        assert isinstance(error.__cause__, msgspec.ValidationError)

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    def test_a_byte_order_mark_is_accepted(self, encoding: str) -> None:
        body = json.dumps(WIRE).encode(encoding)

        assert parse(body).alias == "crm"

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b" ",
            b"OK",
            b"<html><body>Welcome</body></html>",
            json.dumps(WIRE).encode()[:-1],
            json.dumps(WIRE).encode() + b"}",
            gzip.compress(json.dumps(WIRE).encode()),
            json.dumps(WIRE).replace("crm", "ü").encode("latin-1"),
            b"\xff\xfe\x00",
            b"\xef\xbb\xbf",
            b'{"alias": NaNa}',
        ],
    )
    def test_a_body_that_is_not_json_is_an_error_with_its_cause(self, body: bytes) -> None:
        error = parse_invalid(body, status=202)

        assert error.summary == "the server answered 202, but the body is not JSON"
        assert isinstance(error.__cause__, (ValueError, msgspec.DecodeError))

    @pytest.mark.parametrize(
        "body",
        [
            b'{"a":' * 200_000,
            b'{"summary":{"x":' + b"[" * 500_000,
            b'{"summary":{"x":' + b"[" * 500_000 + b"]" * 500_000 + b"}}",
        ],
        ids=["objects", "arrays", "complete"],
    )
    def test_excessive_nesting_is_an_error(self, body: bytes) -> None:
        error = parse_invalid(body)

        assert error.summary == "the server answered 200, but the body is not JSON"
        assert isinstance(error.__cause__, RecursionError)

    @pytest.mark.parametrize("body", [b"null", b"[]", b"1", b'"stopped"', b"true", b"{}"])
    def test_json_that_is_not_a_runtime_is_an_error(self, body: bytes) -> None:
        error = parse_invalid(body)

        assert error.summary.startswith(
            "the server answered 200, but the body is not a valid Runtime: "
        )
        assert isinstance(error.__cause__, msgspec.ValidationError)

    @pytest.mark.parametrize("field", list(WIRE))
    def test_a_field_of_the_wrong_type_is_named(self, field: str) -> None:
        assert f"`$.{field}`" in parse_invalid(json.dumps(WIRE | {field: 5}).encode()).summary

    @pytest.mark.parametrize("field", list(WIRE))
    def test_a_required_field_that_is_null_is_named(self, field: str) -> None:
        assert f"`$.{field}`" in parse_invalid(json.dumps(WIRE | {field: None}).encode()).summary

    @pytest.mark.parametrize("field", list(WIRE))
    def test_a_required_field_that_is_missing_is_named(self, field: str) -> None:
        wire = {name: value for name, value in WIRE.items() if name != field}

        assert (
            f"missing required field `{field}`" in parse_invalid(json.dumps(wire).encode()).summary
        )

    @pytest.mark.parametrize("field", ["id", "workspaceId"])
    def test_an_id_that_is_not_a_uuid_is_named(self, field: str) -> None:
        error = parse_invalid(json.dumps(WIRE | {field: "ws-1"}).encode())

        assert error.summary == (
            "the server answered 200, but the body is not a valid Runtime: "
            f"Invalid UUID - at `$.{field}`"
        )

    def test_after_an_invalid_body_the_runtime_may_have_stopped(self) -> None:
        error = parse_invalid(b"OK")

        assert error.may_have_stopped
        assert error.status == 200
        assert error.body == "OK"

    def test_an_echoed_key_is_redacted(self) -> None:
        error = parse_invalid(json.dumps({"you sent": BEARER}).encode())

        assert error.body == '{"you sent": "Bearer ***"}'
        assert KEY not in f"{error} {vars(error)}"

    @pytest.mark.parametrize("before", range(2048 - len(KEY) - 1, 2050))
    def test_a_key_at_the_end_of_the_excerpt_is_redacted(self, before: int) -> None:
        error = parse_invalid(b"." * before + KEY.encode() + b"." * 100)

        assert error.body is not None
        assert len(error.body) == 2048
        assert set(error.body) <= {".", "*"}

    def test_the_error_can_be_pickled(self) -> None:
        error = parse_invalid(b"\xff")

        assert vars(pickle.loads(pickle.dumps(error))) == vars(error)  # noqa: S301

    @given(st.binary())
    def test_any_bytes_are_an_error_of_ours(self, body: bytes) -> None:
        assert parse_invalid(body).status == 200


class TestErrorClass:
    @pytest.mark.parametrize(
        ("status", "error_class", "may_have_stopped", "foreign_may_have_stopped"),
        [
            (400, BctrlValidationError, False, False),
            (401, BctrlAuthenticationError, False, False),
            (402, BctrlApiError, False, True),
            (403, BctrlPermissionError, False, False),
            (404, BctrlNotFoundError, False, False),
            (405, BctrlApiError, False, False),
            (408, BctrlApiError, False, True),
            (409, BctrlConflictError, False, True),
            (413, BctrlApiError, False, False),
            (418, BctrlApiError, False, True),
            (422, BctrlValidationError, False, True),
            (429, BctrlRateLimitError, False, False),
            (451, BctrlApiError, False, False),
            (499, BctrlApiError, False, True),
            (500, BctrlServerError, True, True),
            (501, BctrlServerError, True, True),
            (502, BctrlServerError, True, True),
            (503, BctrlServerError, False, True),
            (504, BctrlServerError, True, True),
            (520, BctrlServerError, True, True),
            (599, BctrlServerError, True, True),
            (999, BctrlServerError, True, True),
        ],
    )
    def test_the_status_and_a_code_decide_the_class_and_may_have_stopped(
        self,
        status: int,
        error_class: type[BctrlError],
        *,
        may_have_stopped: bool,
        foreign_may_have_stopped: bool,
    ) -> None:
        """Fault: a gateway's 503 for a stop that took effect was proof that nothing was done."""
        error = parse_error(status, {"code": "some.code", "error": "No."})
        assert type(error) is error_class
        assert error.status == status
        assert error.may_have_stopped is may_have_stopped

        for body in (
            b"",
            b"upstream connect error",
            {"code": 5},
            {"error": {"code": "x.y"}},
            {"code": "101503"},
        ):
            foreign = parse_error(status, body)
            assert type(foreign) is error_class
            assert foreign.may_have_stopped is foreign_may_have_stopped

    @given(st.integers(300, 999), st.binary(), st.text(), st.text())
    def test_any_response_gives_a_one_line_error_that_can_be_pickled(
        self, status: int, body: bytes, header: str, key: str
    ) -> None:
        error = parse_error(
            status,
            body,
            {"x-request-id": header, "Location": header, "Retry-After": header},
            f"Bearer {key}",
        )

        assert vars(pickle.loads(pickle.dumps(error))) == vars(error)  # noqa: S301
        assert len(str(error).splitlines()) == 1


class TestErrorFields:
    FULL: Mapping[str, object] = {
        "code": "request.invalid",
        "error": "alias is wrong",
        "reasonClass": "invalid_input",
        "requestId": "req-1",
        "hint": "Look at the list",
        "details": {"alias": "?"},
    }

    def test_every_field_of_the_contract_is_parsed(self) -> None:
        error = parse_error(400, self.FULL)

        assert error.code == "request.invalid"
        assert error.message == "alias is wrong"
        assert error.reason_class == "invalid_input"
        assert error.request_id == "req-1"
        assert error.hint == "Look at the list"
        assert error.body == json.dumps(self.FULL)
        assert str(error) == (
            "the server answered 400 request.invalid: alias is wrong (request id req-1). "
            "Look at the list. Correct the request; retrying will not help"
        )

    @pytest.mark.parametrize(
        ("body", "code", "message"),
        [
            ({"code": "c", "error": "words"}, "c", "words"),
            ({"error": "words"}, None, "words"),
            ({"message": "words"}, None, "words"),
            ({"error": {"code": "c", "message": "words"}}, None, "words"),
            ({"code": "c", "error": {"message": "words"}}, "c", "words"),
            ({"error": {}}, None, None),
            ({"error": {"error": {"message": "too deep"}}}, None, None),
            ({"title": "Title", "detail": "detail", "status": 400}, None, "detail"),
            ({"title": "Title", "type": "about:blank"}, None, "Title"),
            ({"error": "error", "message": "message", "detail": "d"}, None, "error"),
            ({"error": "", "message": "message"}, None, "message"),
            ({"error": None, "message": "message"}, None, "message"),
            ({"error": ["x"], "message": "message"}, None, "message"),
            ({"code": 17, "error": 5, "message": True}, None, None),
            ({}, None, None),
            ([{"error": "x"}], None, None),
            (None, None, None),
            (5, None, None),
            ("words", None, "words"),
            ("", None, None),
            (b"words", None, "words"),
            (b"upstream connect error\n", None, "upstream connect error"),
            (b"", None, None),
            (b" \n ", None, None),
            (b"<html><title>502</title></html>", None, None),
            (b"\n  <!DOCTYPE html>", None, None),
            (b'{"code": "c", "error": "wo', None, '{"code": "c", "error": "wo'),
            (b"\xef\xbb\xbf" + b'{"error": "words"}', None, "words"),
            (b"caf\xe9", None, "caf\ufffd"),
        ],
    )
    def test_code_and_message_are_found_in_a_body_of_any_shape(
        self, body: object, code: str | None, message: str | None
    ) -> None:
        error = parse_error(400, body)

        assert (error.code, error.message) == (code, message)

    def test_all_fields_but_a_code_are_found_in_a_nested_object(self) -> None:
        """A gateway nests its errors, and its code is none of the API's."""
        error = parse_error(400, {"error": self.FULL})

        assert error.code is None
        assert error.message == "alias is wrong"
        assert error.reason_class == "invalid_input"
        assert error.request_id == "req-1"
        assert error.hint == "Look at the list"

    @pytest.mark.parametrize(
        ("status", "words"),
        [(502, "Bad Gateway"), (404, "Not Found"), (599, "(no reason given)")],
    )
    def test_without_a_message_the_reason_phrase_is_used(self, status: int, words: str) -> None:
        assert parse_error(status).summary == f"the server answered {status} {words}"

    def test_a_compressed_body_is_accepted(self) -> None:
        error = parse_error(500, gzip.compress(json.dumps(self.FULL).encode(), mtime=0))

        assert isinstance(error, BctrlServerError)
        assert error.code is None
        assert error.body is not None
        assert error.body.startswith("\x1f\ufffd")

    @pytest.mark.parametrize("body", [b"[" * 900_000, b'{"error":' * 100_000])
    def test_excessive_nesting_is_accepted(self, body: bytes) -> None:
        error = parse_error(500, body)

        assert error.message == body[:500].decode()

    def test_a_number_too_long_for_python_is_accepted(self) -> None:
        assert parse_error(500, b'{"code": ' + b"9" * 5000 + b"}").code is None

    def test_long_fields_are_truncated(self) -> None:
        huge = "x" * 100_000
        fields = ("code", "error", "reasonClass", "requestId", "hint")

        error = parse_error(400, dict.fromkeys(fields, huge), {"x-request-id": huge})

        assert len(error.body or "") == 2048
        for value in (error.code, error.message, error.reason_class, error.request_id, error.hint):
            assert value == "x" * 500
        assert len(str(error)) < 2500

    def test_a_field_is_one_line_without_control_characters(self) -> None:
        words = " a\nb\r\n\x1b[31mc\x00\x7f\x85d\u2028e\u2029f\tg "

        error = parse_error(400, dict.fromkeys(("code", "error", "requestId", "hint"), words))

        assert error.code == error.message == error.request_id == error.hint == "a b [31mc d e f g"
        assert str(error).isprintable()

    @pytest.mark.parametrize("character", UNPRINTABLE)
    def test_no_character_that_reorders_or_hides_text_is_in_an_error(self, character: str) -> None:
        """Fault: bidi controls and zero-width characters of the server passed in error texts."""
        words = f"not{character}ok"
        names = ("code", "error", "reasonClass", "requestId", "hint")

        for error in (
            parse_error(400, dict.fromkeys(names, words)),
            parse_error(400, words.encode(errors="surrogatepass"), {"X-Request-Id": words}),
            parse_error(302, b"", {"Location": words}),
        ):
            shown = [str(error), error.code, error.reason_class, error.request_id, error.hint]
            assert "".join(filter(None, shown)).isprintable()
            assert "not" in str(error)

    def test_a_plain_text_body_is_one_line_without_control_characters(self) -> None:
        assert parse_error(500, b"a\n\x1b[2Jb\r\n").message == "a [2Jb"

    def test_the_error_of_a_stopped_runtime_is_recognized(self) -> None:
        error = parse_error(409, {"code": "runtime.not_active", "error": "not active"})

        assert isinstance(error, BctrlConflictError)
        assert error.already_stopped

    @pytest.mark.parametrize(
        ("body", "headers", "request_id"),
        [
            ({"requestId": "b"}, {"X-Request-Id": "x", "X-Bctrl-Request-Id": "y"}, "b"),
            ({}, {"X-Request-Id": "x", "X-Bctrl-Request-Id": "y"}, "x"),
            ({}, {"X-Bctrl-Request-Id": "y"}, "y"),
            ({"requestId": ""}, {"X-Request-Id": " ", "X-Bctrl-Request-Id": "y"}, "y"),
            ({"requestId": 5}, {"x-request-id": "x"}, "x"),
            ({}, {"X-Request-Id": "a\tb"}, "a b"),
            ({}, {}, None),
        ],
    )
    def test_a_request_id_in_the_body_takes_precedence(
        self, body: object, headers: Mapping[str, str], request_id: str | None
    ) -> None:
        assert parse_error(500, body, headers).request_id == request_id

    @pytest.mark.parametrize("status", [400, 429, 503])
    def test_a_retry_after_is_kept(self, status: int) -> None:
        assert parse_error(status, b"", {"Retry-After": "7"}).retry_after == 7.0
        assert parse_error(status).retry_after is None


class TestEchoedKey:
    """Fault: the key in debug logs (openai-python#1082)."""

    @pytest.mark.parametrize(
        "body",
        [
            {"code": KEY, "error": BEARER, "reasonClass": KEY, "requestId": KEY, "hint": KEY},
            {"error": {"code": f"x{KEY}x", "message": f"{KEY}{KEY}"}},
            {"details": {"headers": {"Authorization": BEARER}}},
            {KEY: KEY},
            BEARER,
            [KEY],
            f"no such key: {KEY}".encode(),
            f"<html>{KEY}</html>".encode(),
            f'{{"error": "{KEY}'.encode(),
            b"\xff" + KEY.encode(),
        ],
    )
    def test_it_is_in_no_attribute_and_in_no_text(self, body: object) -> None:
        headers = {"X-Request-Id": KEY, "X-Bctrl-Request-Id": KEY, "Location": f"/?key={KEY}"}
        for status in (307, 401, 409, 500):
            error = parse_error(status, body, headers)

            assert KEY not in f"{error} {error!r} {vars(error)}"

    def test_it_is_redacted_where_the_body_is_truncated(self) -> None:
        for before in range(2048 - len(KEY) - 1, 2050):
            error = parse_error(400, b"." * before + KEY.encode() + b"." * 100)

            assert error.body is not None, before
            assert len(error.body) == 2048, before
            assert set(error.body) <= {".", "*"}, before

    def test_it_is_redacted_where_a_message_is_truncated(self) -> None:
        for before in range(500 - len(KEY) - 1, 502):
            error = parse_error(400, {"error": "." * before + KEY + "." * 100})

            assert error.message is not None, before
            assert set(error.message) <= {".", "*"}, before

    def test_a_key_too_short_to_be_secret_is_not_redacted(self) -> None:
        error = parse_error(400, {"error": "a kettle of fish"}, authorization="Bearer k")

        assert error.message == "a kettle of fish"


class TestRedirects:
    @pytest.mark.parametrize(
        ("status", "may_have_stopped"),
        [
            (301, True),
            (302, True),
            (303, True),
            (307, False),
            (308, False),
        ],
    )
    def test_a_redirect_is_an_error_with_its_location(
        self, status: int, *, may_have_stopped: bool
    ) -> None:
        """Fault: redirects followed with the key attached (browserbase, steel)."""
        error = parse_error(status, b"moved", {"Location": "https://elsewhere.example.com/v1"})

        assert type(error) is BctrlResponseError
        assert error.status == status
        assert error.may_have_stopped is may_have_stopped
        assert error.summary == (
            f"the server answered {status}, a redirect to https://elsewhere.example.com/v1: not "
            "followed, to protect the API key"
        )
        assert str(error).endswith("Set the base URL to that of the API itself")

    @pytest.mark.parametrize("status", [99, 101, 300, 304])
    def test_after_any_other_status_the_runtime_may_have_stopped(self, status: int) -> None:
        error = parse_error(status, b"", {})

        assert type(error) is BctrlResponseError
        assert error.may_have_stopped
        assert error.summary.startswith(f"the server answered {status} ")
        assert error.summary.endswith(", an unexpected status")

    @pytest.mark.parametrize("headers", [{}, {"Location": ""}, {"Location": " \t "}])
    def test_a_redirect_without_a_location_is_an_error(self, headers: Mapping[str, str]) -> None:
        assert parse_error(302, b"", headers).summary.endswith("302 Found, an unexpected status")

    def test_its_location_is_truncated_to_one_line(self) -> None:
        error = parse_error(302, b"", {"Location": "/a\x1b\u2028b" + "x" * 9000})

        assert "a redirect to /a bxx" in error.summary
        assert str(error).isprintable()
        assert len(str(error)) < 1000


class TestRetryAfter:
    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            ("0", 0.0),
            ("1", 1.0),
            (" 30 ", 30.0),
            ("007", 7.0),
            ("1.5", 1.5),
            ("86400", 86400.0),
            ("31536000", 31536000.0),
            ("31536001", 31536000.0),
            ("9" * 30, 31536000.0),
        ],
    )
    def test_seconds_are_parsed_and_capped_at_a_year(self, value: str, seconds: float) -> None:
        """Fault: `Retry-After` over a limit is ignored or shortened, or waited out (openai)."""
        assert retry_after({"Retry-After": value}) == seconds

    @pytest.mark.parametrize(
        "value",
        [
            "",
            " ",
            "-1",
            "-0",
            "+5",
            "1.",
            ".5",
            "1e9",
            "0x10",
            "1_000",
            "inf",
            "Infinity",
            "nan",
            "\uff11\uff12",  # Unicode digits, which `float` accepts.
            "\u0661",
            "12\u00b2",
            "soon",
            "30s",
            "5 minutes",
            "1, 2",
            "9" * 5000,
            "2026-11-25T09:31:00Z",
            "Wed, 32 Nov 2026 09:31:00 GMT",
            "Wed, 25 Nov 2026 25:61:00 GMT",
            "Wed, 25 Nov 99999 09:31:00 GMT",
            "Wed, 25 Nov 2026 09:31:00 +9999999",
        ],
    )
    def test_a_negative_or_invalid_value_is_ignored(self, value: str) -> None:
        assert retry_after({"Retry-After": value}) is None
        assert retry_after({"retry-after-ms": value}) is None

    @pytest.mark.parametrize(
        ("value", "seconds"), [("0", 0.0), ("1", 0.001), ("1500", 1.5), ("250.5", 0.2505)]
    )
    def test_milliseconds_are_parsed(self, value: str, seconds: float) -> None:
        """Fault: Retry-After-ms is compared as str to int and ignored (vendor's SDK 0.3.0)."""
        assert retry_after({"Retry-After-Ms": value}) == seconds

    def test_milliseconds_are_capped_at_a_year(self) -> None:
        assert retry_after({"retry-after-ms": "9" * 30}) == 31536000.0

    def test_milliseconds_take_precedence(self) -> None:
        assert retry_after({"retry-after-ms": "1500", "Retry-After": "2"}) == 1.5

    @pytest.mark.parametrize("value", ["", "-1", "soon", "nan"])
    def test_invalid_milliseconds_fall_back_to_seconds(self, value: str) -> None:
        assert retry_after({"retry-after-ms": value, "Retry-After": "2"}) == 2.0

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            ("Wed, 25 Nov 2026 09:31:00 GMT", 60.0),
            ("Wednesday, 25-Nov-26 09:31:00 GMT", 60.0),
            ("Wed Nov 25 09:31:00 2026", 60.0),
            ("Wed, 25 Nov 2026 09:31:00", 60.0),
            ("Wed, 25 Nov 2026 09:31:00 -0000", 60.0),
            ("Wed, 25 Nov 2026 10:31:00 +0100", 60.0),
            ("Wed, 25 Nov 2026 09:29:00 GMT", 0.0),
            ("Mon, 01 Jan 0001 00:00:00 GMT", 0.0),
            ("Sun, 29 Nov 2026 09:30:00 GMT", 4 * 86400.0),
            ("Fri, 31 Dec 9999 23:59:59 GMT", 31536000.0),
        ],
    )
    def test_a_date_is_compared_with_now_and_the_past_is_zero(
        self, value: str, seconds: float
    ) -> None:
        assert retry_after({"Retry-After": value}) == seconds

    @pytest.mark.parametrize("skew", [timedelta(hours=-3), timedelta(), timedelta(days=2)])
    def test_a_date_is_compared_with_the_date_header(self, skew: timedelta) -> None:
        server_now = NOW + skew
        headers = {
            "Date": format_datetime(server_now, usegmt=True),
            "Retry-After": format_datetime(server_now + timedelta(seconds=45), usegmt=True),
        }

        assert retry_after(headers) == 45.0

    @pytest.mark.parametrize("date", ["", " ", "now", "9" * 5000, "Wed, 32 Nov 2026 09:31:00 GMT"])
    def test_without_a_valid_date_header_our_clock_is_used(self, date: str) -> None:
        headers = {"Date": date, "Retry-After": "Wed, 25 Nov 2026 09:31:00 GMT"}

        assert retry_after(headers) == 60.0

    def test_our_clock_may_be_in_any_time_zone(self) -> None:
        now = NOW.astimezone(timezone(timedelta(hours=-7)))

        header = {"Retry-After": "Wed, 25 Nov 2026 09:31:00 GMT"}.get
        assert response.parse_retry_after(header, now) == 60.0

    def test_absent_is_none(self) -> None:
        assert retry_after({}) is None

    # Parts of dates and numbers get further into the parser than arbitrary text.
    header = st.text() | st.lists(
        st.sampled_from(
            [
                "Wed,",
                "25",
                "Nov",
                "2026",
                "09:31:00",
                "GMT",
                "+0100",
                "-0000",
                "-",
                "+",
                ":",
                ".",
                ",",
            ]
        )
        | st.sampled_from(
            [" ", "99999999999", "0", "-5", "T", "Z", "e9", "inf", "+99999", "\uff11"]
        ),
        max_size=9,
    ).map(" ".join)

    @given(
        st.fixed_dictionaries(
            {}, optional={"Retry-After": header, "retry-after-ms": header, "Date": header}
        )
    )
    @example({"Retry-After": "Fri, 31 Dec 9999 23:59:59 -2359", "Date": "1 Jan 1 00:00:00 +2359"})
    def test_any_header_gives_none_or_a_finite_wait(self, headers: dict[str, str]) -> None:
        wait = retry_after(headers)

        assert wait is None or (math.isfinite(wait) and wait >= 0)


def test_quoting_agrees_with_the_standard_library() -> None:
    printable = "".join(map(chr, range(0x20, 0x7F)))

    assert path_segment(printable, "alias") == quote(printable, safe="")
