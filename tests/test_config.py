"""Checks of a session's configuration."""

import traceback
from collections.abc import Callable
from typing import cast

import pytest
from multidict import CIMultiDict
from yarl import URL

from bctrl_async import _config
from bctrl_async.errors import BctrlConfigError

KEY = "sk-live-0123456789"


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BCTRL_API_KEY", raising=False)
    monkeypatch.delenv("BCTRL_BASE_URL", raising=False)


def shown(error: BaseException) -> str:
    """Return everything that a log could show of an error."""
    return "\n".join([repr(error), repr(vars(error)), *traceback.format_exception(error)])


class TestKey:
    def test_a_key_becomes_a_bearer_header(self) -> None:
        assert _config.authorization(KEY) == f"Bearer {KEY}"

    def test_a_key_may_contain_any_visible_ascii_character(self) -> None:
        key = "".join(map(chr, range(0x21, 0x7F)))

        assert _config.authorization(key) == f"Bearer {key}"

    @pytest.mark.parametrize(
        "key",
        [
            "",
            " ",
            f" {KEY}",
            f"{KEY} ",
            "\n",
            f"\n{KEY}",
            f"{KEY} \n",
            f"{KEY}\r\nX-Evil: 1",
            f"{KEY}\x00",
            f"{KEY}\x7f",
            f"Bearer {KEY}",
            f"{KEY}ü",
            f"{KEY}\u2028",
            f"{KEY}\ud800",
        ],
    )
    def test_a_key_that_does_not_fit_into_a_header_is_rejected_and_not_shown(
        self, key: str
    ) -> None:
        with pytest.raises(BctrlConfigError, match=r"^invalid API key: empty, or with") as caught:
            _config.authorization(key)

        assert KEY not in shown(caught.value)
        assert "Strip it, and leave out 'Bearer '" in str(caught.value)
        assert caught.value.argument == "api_key"

    @pytest.mark.parametrize("key", [KEY.encode(), 1, None, [KEY], object()])
    def test_a_key_that_is_not_a_str_is_rejected_and_not_shown(self, key: object) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            _config.authorization(key)

        assert str(caught.value) == f"invalid API key: expected a str, not {type(key).__name__}"
        assert caught.value.argument == "api_key"
        assert KEY not in shown(caught.value)

    def test_the_key_is_read_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BCTRL_API_KEY", KEY)

        assert _config.api_key_from_environment() == KEY

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


class TestSecret:
    def test_its_repr_hides_it(self) -> None:
        secret = _config.Secret(KEY)

        assert repr(secret) == f"{secret!r}" == "%r" % (secret,) == "'***'"  # noqa: UP031

    def test_its_text_is_unchanged(self) -> None:
        secret = _config.Secret(KEY)

        assert secret == KEY
        assert f"{secret}" == str(secret) == KEY
        assert secret.encode() == KEY.encode()

    def test_a_header_made_of_a_key_hides_it(self) -> None:
        """Fault: the key in debug logs (openai-python#1082)."""
        headers = CIMultiDict({"Authorization": _config.authorization(KEY)})

        assert KEY not in f"{headers} {headers!r} {dict(headers)}"
        assert headers["authorization"] == f"Bearer {KEY}"

    def test_the_key_of_the_environment_is_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BCTRL_API_KEY", KEY)

        assert KEY not in repr(_config.api_key_from_environment())


class TestBaseUrl:
    @pytest.mark.parametrize(
        ("given", "url"),
        [
            ("https://api.example.com", "https://api.example.com/v1"),
            ("https://api.example.com/", "https://api.example.com/v1"),
            ("https://api.example.com/v1", "https://api.example.com/v1"),
            ("https://api.example.com/v1/", "https://api.example.com/v1"),
            ("https://api.example.com//", "https://api.example.com/v1"),
            ("https://api.example.com:8443/v1", "https://api.example.com:8443/v1"),
            ("https://api.example.com/gateway", "https://api.example.com/gateway/v1"),
            ("https://api.example.com/gateway/v1/", "https://api.example.com/gateway/v1"),
            ("https://api.example.com/a%2Fb", "https://api.example.com/a%2Fb/v1"),
            ("https://api.example.com/apiv1", "https://api.example.com/apiv1/v1"),
            ("https://api.example.com/v10", "https://api.example.com/v10/v1"),
            ("HTTPS://API.example.com", "https://api.example.com/v1"),
            ("https://api.example.com?", "https://api.example.com/v1"),
            ("https://api.example.com#", "https://api.example.com/v1"),
        ],
    )
    def test_v1_is_appended_once(self, given: str, url: str) -> None:
        found = _config.base_url(given, allow_plaintext=False)

        assert str(found) == url
        assert found == URL(url, encoded=True)

    @pytest.mark.parametrize(
        "given",
        [
            "",
            "api.example.com",
            "//api.example.com",
            "/v1",
            "https://",
            "https:///v1",
            "ftp://api.example.com",
            "ws://api.example.com",
            "file:///etc/passwd",
            "https://api.example.com:99999",
            "https://api.example.com:port",
            "https://[::1",
            "https://\ud800.example.com",
            "https://api.example.com\n",
            "https://api\t.example.com",
            "https://api.example.com/gate\r\nway",
            "http\ts://api.example.com",
            "http://127.0.0.1\t.evil.com",
            " https://api.example.com",
            "https://api.example.com/a b",
            "https://api.example.com\x00",
            5,
            b"https://api.example.com",
        ],
    )
    def test_an_invalid_url_is_rejected(self, given: str) -> None:
        r"""Fault: tabs and line ends were left out, so `api\t.example.com` was another host."""
        with pytest.raises(BctrlConfigError) as caught:
            _config.base_url(given, allow_plaintext=True)

        assert str(caught.value) == (
            "invalid base_url: expected scheme and host, no spaces. "
            "Pass such as https://api.bctrl.ai"
        )
        assert caught.value.argument == "base_url"

    @pytest.mark.parametrize(
        "given",
        [
            f"https://{KEY}@api.example.com",
            f"https://user:{KEY}@api.example.com",
            f"https://:{KEY}@api.example.com",
            f"https://{KEY}:@api.example.com/v1",
            f"https://user:{KEY}@api.example.com?x=1",
            f"http://user:{KEY}@api.example.com",
            f"https://user:{KEY}@api.example.com:99999",
            f"ftp://user:{KEY}@api.example.com",
        ],
    )
    def test_credentials_are_rejected_and_not_shown(self, given: str) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            _config.base_url(given, allow_plaintext=False)

        assert KEY not in shown(caught.value)

    def test_the_error_about_credentials_gives_advice(self) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            _config.base_url(f"https://{KEY}@api.example.com", allow_plaintext=False)

        assert str(caught.value) == (
            "invalid base_url: it contains credentials. Pass the key as api_key="
        )

    @pytest.mark.parametrize(
        "given",
        [
            "https://api.example.com?x=1",
            "https://api.example.com/v1?x",
            "https://api.example.com#top",
            "https://api.example.com/v1?x=1#top",
        ],
    )
    def test_a_query_or_a_fragment_is_rejected(self, given: str) -> None:
        with pytest.raises(BctrlConfigError, match="has a query or a fragment"):
            _config.base_url(given, allow_plaintext=False)

    @pytest.mark.parametrize(
        ("given", "url"),
        [
            ("http://localhost", "http://localhost/v1"),
            ("http://LOCALHOST:8787/", "http://localhost:8787/v1"),
            ("http://127.0.0.1:8787", "http://127.0.0.1:8787/v1"),
            ("http://127.9.9.9", "http://127.9.9.9/v1"),
            ("http://[::1]:8787", "http://[::1]:8787/v1"),
            ("http://[0:0:0:0:0:0:0:1]", "http://[::1]/v1"),
        ],
    )
    def test_plain_http_to_this_machine_is_accepted(self, given: str, url: str) -> None:
        assert str(_config.base_url(given, allow_plaintext=False)) == url

    @pytest.mark.parametrize(
        "given",
        [
            "http://api.bctrl.ai",
            "http://127.0.0.1.evil.com",
            "http://localhost.evil.com",
            "http://localhost.",
            "http://evil-localhost",
            "http://evil.com/localhost",
            "http://10.0.0.1",
            "http://128.0.0.1",
            "http://0.0.0.0",
            "http://[::2]",
            "http://2130706433",
            "http://0x7f.1",
            "http://127.1",
        ],
    )
    def test_plain_http_to_another_machine_is_rejected(self, given: str) -> None:
        with pytest.raises(BctrlConfigError, match="would send the API key unencrypted"):
            _config.base_url(given, allow_plaintext=False)

    def test_plain_http_to_another_machine_can_be_allowed(self) -> None:
        url = _config.base_url("http://10.0.0.1:8787", allow_plaintext=True)

        assert str(url) == "http://10.0.0.1:8787/v1"


class TestBaseUrlOfTheEnvironment:
    def test_a_missing_variable_means_the_public_api(self) -> None:
        assert str(_config.base_url(None, allow_plaintext=False)) == "https://api.bctrl.ai/v1"

    def test_the_variable_replaces_a_missing_argument(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BCTRL_BASE_URL", "https://env.example.com")

        assert str(_config.base_url(None, allow_plaintext=False)) == "https://env.example.com/v1"

    def test_the_argument_overrides_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BCTRL_BASE_URL", "https://env.example.com")

        url = _config.base_url("https://arg.example.com", allow_plaintext=False)

        assert str(url) == "https://arg.example.com/v1"

    def test_a_url_of_yarl_is_taken_as_its_text(self) -> None:
        """Fault: it raised AttributeError."""
        given = cast("str", URL("https://api.example.com/v1"))
        assert str(_config.base_url(given, allow_plaintext=False)) == "https://api.example.com/v1"

    def test_an_empty_argument_is_not_a_missing_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BCTRL_BASE_URL", "https://env.example.com")

        with pytest.raises(BctrlConfigError, match=r"^invalid base_url: expected scheme and host"):
            _config.base_url("", allow_plaintext=False)

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


class TestNumbers:
    @pytest.mark.parametrize("value", [1, 0.001, 1e-300, 60.0, 1e300])
    def test_a_positive_number_of_seconds_is_accepted(self, value: float) -> None:
        seconds = _config.seconds(value, "timeout")

        assert seconds == value
        assert type(seconds) is float

    @pytest.mark.parametrize("value", [1, 100, 10**30])
    def test_a_positive_whole_number_is_a_count(self, value: int) -> None:
        assert _config.count(value, "attempts") == value

    @pytest.mark.parametrize("check", [_config.seconds, _config.count])
    @pytest.mark.parametrize(
        "value",
        [0, 0.0, -1, -0.5, True, False, float("nan"), float("inf"), float("-inf"), "1", None, 1j],
    )
    def test_any_other_value_is_rejected_with_its_name(
        self, check: Callable[[object, str], float], value: object
    ) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            check(value, "the_option")

        assert str(caught.value).startswith(f"invalid the_option {value!r}: expected a ")
        assert caught.value.argument == "the_option"

    def test_a_fraction_is_not_a_count(self) -> None:
        with pytest.raises(
            BctrlConfigError, match=r"^invalid attempts 1\.5: expected a whole number"
        ):
            _config.count(1.5, "attempts")
