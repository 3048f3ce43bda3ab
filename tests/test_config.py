"""Checks of a session's configuration."""

import traceback
from collections.abc import Callable
from typing import Any, cast

import pytest
from multidict import CIMultiDict
from test_secrets import everything_of
from yarl import URL

from bctrl_async import BctrlSession, _config
from bctrl_async.errors import BctrlConfigError

KEY = "sk-live-0123456789"


class TestKey:
    def test_a_key_of_any_visible_ascii_becomes_a_bearer_header(self) -> None:
        key = "".join(map(chr, range(0x21, 0x7F)))

        assert _config.authorization(f"{key}\r\n") == f"Bearer {key}"

    @pytest.mark.parametrize(
        "key",
        [
            "",
            f" {KEY}",
            f"\n{KEY}",
            f"{KEY} \n",
            f"{KEY}\r\nX-Evil: 1",
            f"{KEY}\x7f",
            f"Bearer {KEY}",
            f"{KEY}\u2028",
            f"{KEY}\ud800",
        ],
    )
    def test_a_key_that_does_not_fit_into_a_header_is_rejected_and_not_shown(
        self, key: str
    ) -> None:
        with pytest.raises(BctrlConfigError, match=r"^invalid API key: empty, or with") as caught:
            BctrlSession(key)

        assert KEY not in everything_of(caught.value)
        assert "Strip it, and leave out 'Bearer '" in str(caught.value)
        assert caught.value.argument == "api_key"

    @pytest.mark.parametrize("key", [KEY.encode(), {"key": KEY}])
    def test_a_key_that_is_not_a_str_is_rejected_and_not_shown(self, key: str) -> None:
        """Fault: a key given as bytes stood in a frame of the session's constructor."""
        with pytest.raises(BctrlConfigError) as caught:
            BctrlSession(key)

        assert str(caught.value) == f"invalid API key: expected a str, not {type(key).__name__}"
        assert caught.value.argument == "api_key"
        assert KEY not in everything_of(caught.value)
        assert "self = <BctrlSession with invalid arguments>" in everything_of(caught.value)

    def test_the_key_is_read_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BCTRL_API_KEY", KEY)

        assert _config.api_key_from_environment() == KEY
        assert KEY not in repr(_config.api_key_from_environment())

    @pytest.mark.parametrize("value", [None, ""])
    def test_a_missing_or_empty_variable_is_an_error_with_advice(
        self, monkeypatch: pytest.MonkeyPatch, value: str | None
    ) -> None:
        if value is not None:
            monkeypatch.setenv("BCTRL_API_KEY", value)

        with pytest.raises(BctrlConfigError) as caught:
            _config.api_key_from_environment()

        assert str(caught.value) == "no API key. Pass api_key= or set BCTRL_API_KEY"
        assert caught.value.argument == "api_key"


def test_the_repr_of_a_secret_and_of_a_header_made_of_it_hides_them() -> None:
    secret = _config.Secret(KEY)
    headers = CIMultiDict({"Authorization": _config.authorization(secret)})

    assert repr(secret) == f"{secret!r}" == "'***'"
    assert KEY not in f"{headers} {headers!r} {dict(headers)}"
    assert (f"{secret}", headers["authorization"]) == (KEY, f"Bearer {KEY}")


REJECTED: dict[str, list[Any]] = {
    "expected scheme and host, no spaces. Pass such as https://api.bctrl.ai": [
        "",
        "api.example.com",
        "//api.example.com",
        "https:///v1",
        f"ftp://user:{KEY}@api.example.com",
        f"https://user:{KEY}@api.example.com:99999",
        "https://[::1",
        "https://\ud800.example.com",
        "https://api\t.example.com",
        "http\ts://api.example.com",
        "https://api.example.com/a b",
        5,
        b"https://api.example.com",
    ],
    "it contains credentials. Pass the key as api_key=": [
        f"https://{KEY}@api.example.com",
        f"https://user:{KEY}@api.example.com?x=1",
        f"http://user:{KEY}@api.example.com",
    ],
    "it has a query or a fragment": [
        "https://api.example.com?x=1",
        "https://api.example.com/v1?x",
        "https://api.example.com#top",
    ],
    "would send the API key unencrypted": [
        "http://127.0.0.1.evil.com",
        "http://localhost.evil.com",
        "http://evil.com/localhost",
        "http://10.0.0.1",
        "http://0.0.0.0",
        "http://[::2]",
        "http://2130706433",
        "http://127.1",
    ],
}
"""URLs by what is wrong with them."""


class TestBaseUrl:
    @pytest.mark.parametrize(
        ("given", "url"),
        [
            ("https://api.example.com", "https://api.example.com/v1"),
            ("https://api.example.com/v1/", "https://api.example.com/v1"),
            ("https://api.example.com//", "https://api.example.com/v1"),
            ("https://api.example.com:8443/v1", "https://api.example.com:8443/v1"),
            ("https://api.example.com/gateway/v1/", "https://api.example.com/gateway/v1"),
            ("https://api.example.com/a%2Fb", "https://api.example.com/a%2Fb/v1"),
            ("https://api.example.com/apiv1", "https://api.example.com/apiv1/v1"),
            ("HTTPS://API.example.com#", "https://api.example.com/v1"),
            (cast("str", URL("https://api.example.com/v1")), "https://api.example.com/v1"),
            ("http://LOCALHOST:8787/", "http://localhost:8787/v1"),
            ("http://127.9.9.9", "http://127.9.9.9/v1"),
            ("http://[0:0:0:0:0:0:0:1]", "http://[::1]/v1"),
        ],
    )
    def test_v1_is_appended_once(self, given: str, url: str) -> None:
        found = _config.base_url(given, allow_plaintext=False)

        assert str(found) == url
        assert found == URL(url, encoded=True)

    @pytest.mark.parametrize(
        ("problem", "given"),
        [(problem, given) for problem, urls in REJECTED.items() for given in urls],
    )
    def test_any_other_url_is_rejected_and_credentials_are_not_shown(
        self, problem: str, given: str
    ) -> None:
        r"""Fault: tabs and line ends were left out, so `api\t.example.com` was another host."""
        with pytest.raises(BctrlConfigError) as caught:
            _config.base_url(given, allow_plaintext=False)

        error = caught.value
        assert str(error).startswith("invalid base_url: ")
        assert problem in str(error)
        assert error.argument == "base_url"
        assert KEY not in f"{error!r} {vars(error)} {traceback.format_exception(error)}"

    def test_plain_http_to_another_machine_can_be_allowed(self) -> None:
        url = _config.base_url("http://10.0.0.1:8787", allow_plaintext=True)

        assert str(url) == "http://10.0.0.1:8787/v1"


class TestBaseUrlOfTheEnvironment:
    def test_it_is_used_without_an_argument(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def url(given: str | None) -> str:
            return str(_config.base_url(given, allow_plaintext=False))

        assert url(None) == "https://api.bctrl.ai/v1"
        monkeypatch.setenv("BCTRL_BASE_URL", "https://env.example.com")
        assert url(None) == "https://env.example.com/v1"
        assert url("https://arg.example.com") == "https://arg.example.com/v1"

        with pytest.raises(BctrlConfigError, match=r"^invalid base_url: expected scheme and host"):
            url("")

    @pytest.mark.parametrize(
        "value", ["", "nonsense", "https://u:p@h", "https://h?x=1", "http://10.0.0.1"]
    )
    def test_the_error_names_the_variable(
        self, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        monkeypatch.setenv("BCTRL_BASE_URL", value)

        with pytest.raises(BctrlConfigError, match=r"^invalid BCTRL_BASE_URL: ") as caught:
            _config.base_url(None, allow_plaintext=False)

        assert caught.value.argument == "base_url"


@pytest.mark.parametrize("value", [1, 1e-300, 1e300])
def test_a_positive_number_of_seconds_is_accepted(value: float) -> None:
    seconds = _config.seconds(value, "timeout")

    assert seconds == value
    assert type(seconds) is float


@pytest.mark.parametrize("check", [_config.seconds, _config.count])
@pytest.mark.parametrize(
    "value", [0, -0.5, True, float("nan"), float("inf"), 10**400 * -1, "1", None, 1j]
)
def test_any_other_number_is_rejected_with_its_name(
    check: Callable[[object, str], float], value: object
) -> None:
    with pytest.raises(BctrlConfigError, match=r"^invalid the_option .*: expected a ") as caught:
        check(value, "the_option")

    assert caught.value.argument == "the_option"


def test_a_fraction_is_not_a_count() -> None:
    assert _config.count(10**30, "attempts") == 10**30
    with pytest.raises(BctrlConfigError, match=r"^invalid attempts 1\.5: expected a whole number"):
        _config.count(1.5, "attempts")
