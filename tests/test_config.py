"""Checks of a session's configuration: the key, the URL and the numbers."""

import traceback
from typing import Any, cast

import pytest
from test_secrets import everything_of
from yarl import URL

from bctrl_async import BctrlConfigError, BctrlSession, _config

KEY = "sk-live-0123456789"


class TestKey:
    def test_a_key_of_any_visible_ascii_becomes_a_bearer_header_whose_repr_hides_it(
        self,
    ) -> None:
        key = "".join(map(chr, range(0x21, 0x7F)))
        header = _config.authorization(f"{key}\r\n")

        assert header == f"Bearer {key}"
        assert repr(header) == "'***'"

    @pytest.mark.parametrize(
        "key",
        [
            *(
                "",
                f" {KEY}",
                f"\n{KEY}",
                f"{KEY} \n",
                f"{KEY}\r\nX-Evil: 1",
                f"Bearer {KEY}",
            ),
            *(f"{KEY}\x7f", f"{KEY}\u2028", f"{KEY}\ud800", KEY.encode(), {"key": KEY}),
        ],
    )
    def test_any_other_key_is_rejected_and_not_shown(self, key: Any) -> None:  # noqa: ANN401 - bytes.
        """Fault: a key given as bytes stood in a frame of the session's constructor."""
        with pytest.raises(BctrlConfigError, match=r"^invalid API key: ") as caught:
            BctrlSession(key)

        problem = f"expected a str, not {type(key).__name__}"
        if isinstance(key, str):
            problem = "Strip it, and leave out 'Bearer '"
        assert problem in str(caught.value)
        assert caught.value.argument == "api_key"
        assert KEY not in everything_of(caught.value)
        assert "self = <BctrlSession with invalid arguments>" in everything_of(
            caught.value
        )

    @pytest.mark.parametrize("value", [None, ""])
    def test_without_one_the_error_says_where_to_put_it(
        self, monkeypatch: pytest.MonkeyPatch, value: str | None
    ) -> None:
        if value is not None:
            monkeypatch.setenv("BCTRL_API_KEY", value)
        with pytest.raises(BctrlConfigError) as caught:
            BctrlSession()
        assert str(caught.value) == "no API key. Pass api_key= or set BCTRL_API_KEY"
        assert caught.value.argument == "api_key"


URLS = {
    "https://api.example.com": "https://api.example.com/v1",
    "https://api.example.com/v1/": "https://api.example.com/v1",
    "https://api.example.com//": "https://api.example.com/v1",
    "https://api.example.com:8443/v1": "https://api.example.com:8443/v1",
    "https://api.example.com/gateway/v1/": "https://api.example.com/gateway/v1",
    "https://api.example.com/a%2Fb": "https://api.example.com/a%2Fb/v1",
    "https://api.example.com/apiv1": "https://api.example.com/apiv1/v1",
    "HTTPS://API.example.com#": "https://api.example.com/v1",
    URL("https://api.example.com/v1"): "https://api.example.com/v1",
    "http://LOCALHOST:8787/": "http://localhost:8787/v1",
    "http://127.9.9.9": "http://127.9.9.9/v1",
    "http://[0:0:0:0:0:0:0:1]": "http://[::1]/v1",
}
"""URLs that are given, and those to which paths are appended."""

REJECTED: dict[str, list[Any]] = {
    "expected scheme and host, no spaces. Pass such as https://api.bctrl.ai": [
        *(
            "",
            "api.example.com",
            "https:///v1",
            "https://[::1",
            5,
            b"https://api.example.com",
        ),
        f"ftp://user:{KEY}@api.example.com",
        f"https://user:{KEY}@api.example.com:99999",
        "https://api\t.example.com",
        "https://api.example.com/a b",
    ],
    "it contains credentials. Pass the key as api_key=": [
        f"https://{KEY}@api.example.com",
        f"https://user:{KEY}@api.example.com?x=1",
        f"http://user:{KEY}@api.example.com",
    ],
    "it has a query or a fragment": [
        "https://api.example.com/v1?x=1",
        "https://api.example.com#top",
    ],
    "would send the API key unencrypted": [
        "http://127.0.0.1.evil.com",
        "http://localhost.evil.com",
        "http://evil.com/localhost",
        *("http://10.0.0.1", "http://0.0.0.0", "http://[::2]", "http://2130706433"),
    ],
}
"""URLs by what is wrong with them."""


class TestBaseUrl:
    @pytest.mark.parametrize("given", URLS)
    def test_v1_is_appended_once(self, given: str) -> None:
        found = _config.base_url(given, allow_plaintext=False)

        assert str(found) == URLS[given]
        assert found == URL(URLS[given], encoded=True)

    @pytest.mark.parametrize(
        ("problem", "given"),
        [(problem, given) for problem, urls in REJECTED.items() for given in urls],
    )
    def test_any_other_url_is_rejected_and_credentials_are_not_shown(
        self, problem: str, given: str
    ) -> None:
        r"""Fault: tabs were left out, so `api\t.example.com` was another host."""
        with pytest.raises(BctrlConfigError, match=r"^invalid base_url: ") as caught:
            _config.base_url(given, allow_plaintext=False)

        error = caught.value
        assert problem in str(error)
        assert error.argument == "base_url"
        assert KEY not in f"{error!r} {vars(error)} {traceback.format_exception(error)}"

    def test_plain_http_to_another_machine_can_be_allowed(self) -> None:
        url = _config.base_url("http://10.0.0.1:8787", allow_plaintext=True)
        assert str(url) == "http://10.0.0.1:8787/v1"

    def test_without_an_argument_the_variable_is_used(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert BctrlSession(KEY).base_url == "https://api.bctrl.ai/v1"
        monkeypatch.setenv("BCTRL_BASE_URL", "https://env.example.com")
        assert BctrlSession(KEY).base_url == "https://env.example.com/v1"
        url = "https://arg.example.com"
        assert BctrlSession(KEY, base_url=url).base_url == "https://arg.example.com/v1"

    @pytest.mark.parametrize(
        "value", ["", "nonsense", "https://u:p@h", "http://10.0.0.1"]
    )
    def test_the_error_names_the_variable(
        self, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        monkeypatch.setenv("BCTRL_BASE_URL", value)
        with pytest.raises(
            BctrlConfigError, match=r"^invalid BCTRL_BASE_URL: "
        ) as caught:
            BctrlSession(KEY)
        assert caught.value.argument == "base_url"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("timeout", value) for value in (0, -0.5, True, float("inf"), 10**400)),
        *(("max_connections", value) for value in (0, 1.5, True)),
        ("rate", 0),
    ],
)
def test_a_number_that_is_out_of_range_is_rejected_by_name(
    name: str, value: object
) -> None:
    """`test_wrong_arguments.py` has values of other types."""
    with pytest.raises(
        BctrlConfigError, match=rf"^invalid {name} .*: expected a "
    ) as caught:
        BctrlSession(KEY, **cast("Any", {name: value}))
    assert caught.value.argument == name
