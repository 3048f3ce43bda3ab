"""The config file of the command: its profiles, its checks, and where the API key comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import KEY
from helpers import Command
from tls import forward_proxy, over_tls

from bctrl_async import cli
from bctrl_async.emulator import Emulator, Fault

SECRET = "sk-secret-0123456789"
GIVE_KEY = "api_key_env = 'KEY_OF_PROFILE'"

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has access lists")


class Config(NamedTuple):
    """A config file.

    Attributes:
        path: Its path, which is BCTRL_CONFIG.
    """

    path: Path

    def write(self, text: str) -> None:
        self.path.write_text(text, "utf-8")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    config = Config(tmp_path / "config.toml")
    monkeypatch.setenv("BCTRL_CONFIG", str(config.path))
    return config


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    emulator.add_runtime("ws", "a")
    monkeypatch.setenv("KEY_OF_PROFILE", KEY)


def one_error(err: str) -> str:
    """Return the only line on stderr, without what all begin with."""
    assert err.startswith("bctrl-async: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("bctrl-async: error: ").rstrip("\n")


class TestFile:
    async def test_it_is_optional(
        self, command: Command, monkeypatch: pytest.MonkeyPatch, emulator: Emulator
    ) -> None:
        monkeypatch.setenv("BCTRL_API_KEY", KEY)
        assert (await command("list", "--base-url", emulator.url, "ws"))[0] == 0

    async def test_its_place_is_that_of_the_platform(
        self,
        command: Command,
        monkeypatch: pytest.MonkeyPatch,
        emulator: Emulator,
        tmp_path: Path,
    ) -> None:
        file = tmp_path / "bctrl-async" / "config.toml"
        file.parent.mkdir()
        file.write_text(f"[profiles.default]\nbase_url = '{emulator.url}'\napi_key_env = 'MINE'\n")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("MINE", KEY)
        assert (await command("list", "ws"))[0] == 0

    async def test_a_named_one_must_exist(self, command: Command, config: Config) -> None:
        code, _, err = await command("list", "ws")
        assert code == 2
        assert one_error(err) == f"there is no {config.path}. Check BCTRL_CONFIG"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("[profiles.x\n", "invalid {file}: Expected ']' at the end of a table declaration"),
            ("[profiles.x]\nrate = 1\nrate = \n", "(at line 3, column 8)"),
            ("[profile.x]\n", "invalid {file}: write the keys below [profiles.NAME]"),
            ("profiles = 3\n", "invalid {file}: write the keys below [profiles.NAME]"),
            ("[profiles]\nrate = 3\n", "invalid {file}: write the keys below [profiles.NAME]"),
        ],
    )
    async def test_bad_toml_is_one_line_with_the_file(
        self, command: Command, config: Config, text: str, said: str
    ) -> None:
        config.write(text)
        code, _, err = await command("list", "ws")
        assert code == 2
        assert said.format(file=config.path) in one_error(err)

    async def test_text_that_is_not_utf_8_is_an_error(
        self, command: Command, config: Config
    ) -> None:
        config.path.write_bytes(b"\xff")
        code, _, err = await command("list", "ws")
        assert code == 2
        assert one_error(err).startswith(f"invalid {config.path}: 'utf-8' codec can't decode ")

    async def test_a_folder_is_an_error(self, command: Command, config: Config) -> None:
        config.path.mkdir()
        code, _, err = await command("list", "ws")
        assert code == 2
        assert one_error(err) == f"cannot read {config.path}: Is a directory"

    @posix
    async def test_a_device_can_stand_for_no_file(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BCTRL_CONFIG", os.devnull)
        assert one_error((await command("list", "ws"))[2]) == "no API key: set BCTRL_API_KEY"


class TestProfile:
    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("timeot = '3s'", "{profile}: unknown key timeot: expected one of api_key_env, "),
            (f"api_key = '{SECRET}'", "{profile}: the API key must not be in it: use api_key_env"),
            ("timeout = 30", "invalid value for timeout in {profile}: '30' has no unit: write 30s"),
            ("timeout = '0s'", "invalid value for timeout in {profile}: '0s' is not above 0"),
            ("attempts = 0", "invalid value for attempts in {profile}: '0' is not a whole number"),
            ("attempts = true", "{profile}: invalid attempts: expected a text or a number"),
            ("patience = 'long'", "invalid value for patience in {profile}: 'long' is not a durat"),
            ("rate = 0", "invalid value for rate in {profile}: '0' is not a positive number"),
            ("rate = inf", "invalid value for rate in {profile}: 'inf' is not a positive number"),
            ("base_url = ''", "invalid value for base_url in {profile}: must not be empty"),
            (f"api_key_env = '{SECRET}'", "{profile}: invalid api_key_env: expected a variable in"),
            ("ca_file = '~nosuchuser/ca.pem'", "cannot read the CA file "),
            ('ca_file = "a\\u0000b"', "invalid value for ca_file in {profile}: must not contain "),
            (
                "base_url = 'http://bctrl.test'",
                "invalid base_url in {profile}: 'http://bctrl.test'",
            ),
            ("proxy = 'socks5://u:pw@h'", "invalid proxy in {profile}. Give a URL such as http://"),
            ("ca_file = 'nosuch.pem'", "cannot read the CA file {folder}/nosuch.pem: No such file"),
        ],
    )
    async def test_an_error_names_the_file_the_profile_and_the_key(
        self, command: Command, config: Config, line: str, said: str
    ) -> None:
        given = "" if "api_key_env" in line else GIVE_KEY
        config.write(f"[profiles.staging]\n{given}\n{line}\n")
        code, _, err = await command("stop", "--profile", "staging", "ws", "a")
        assert code == 2
        profile = f"profile 'staging' of {config.path}"
        assert one_error(err).startswith(said.format(profile=profile, folder=config.path.parent))
        assert SECRET not in err

    @pytest.mark.parametrize("how", ["option", "variable"])
    async def test_an_unknown_one_is_an_error_that_names_the_others(
        self, command: Command, config: Config, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        config.write("[profiles.b]\n[profiles.a]\n")
        if how == "variable":
            monkeypatch.setenv("BCTRL_PROFILE", "nosuch")
        code, _, err = await command("list", "ws", *["--profile", "nosuch"] * (how == "option"))
        assert code == 2
        assert one_error(err) == f"unknown profile 'nosuch'. {config.path} has a, b"
        assert (await command("list", "ws", "--profile="))[0] == 2
        config.write("")
        _, _, err = await command("list", "--profile", "nosuch", "ws")
        assert one_error(err) == f"unknown profile 'nosuch'. {config.path} has none"

    async def test_without_a_file_any_is_unknown(
        self, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        code, _, err = await command("list", "--profile", "nosuch", "ws")
        assert code == 2
        assert (
            one_error(err)
            == f"unknown profile 'nosuch'. There is no {tmp_path / 'bctrl-async' / 'config.toml'}"
        )

    async def test_its_values_are_those_of_options(
        self, command: Command, config: Config, emulator: Emulator
    ) -> None:
        emulator.inject(*[Fault.SERVER_ERROR] * 4)
        config.write(f"[profiles.x]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\nattempts = 3\n")
        await command("stop", "--profile", "x", "--no-verify", "ws", "a")
        assert len(emulator.requests) == 3
        await command("stop", "--profile", "x", "--no-verify", "--attempts", "1", "ws", "a")
        assert len(emulator.requests) == 4

    async def test_a_shared_pace_is_beside_the_config_file_and_has_its_rate(
        self, command: Command, config: Config, emulator: Emulator
    ) -> None:
        config.write(
            f"[profiles.default]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n"
            "rate = 100\npace = 'pace'\n"
        )
        assert (await command("stop", "ws", "a"))[0] == 0
        assert (config.path.parent / "pace").exists()

    async def test_a_path_may_begin_at_the_home_folder(
        self, command: Command, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("HOME", "USERPROFILE"):
            monkeypatch.setenv(name, str(tmp_path / "home"))
        config.write(f"[profiles.x]\n{GIVE_KEY}\nca_file = '~/nosuch.pem'\n")
        _, _, err = await command("list", "--profile", "x", "ws")
        assert one_error(err).startswith(
            f"cannot read the CA file {tmp_path / 'home' / 'nosuch.pem'}: "
        )

    async def test_a_shared_pace_without_a_rate_is_named_with_its_place(
        self, command: Command, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the error named --pace, which was not given."""
        config.write("[profiles.x]\napi_key_env = 'KEY'\npace = 'pace'\n")
        monkeypatch.setenv("KEY", KEY)
        args = ("stop", "--profile", "x", "--dry-run", "ws", "a")
        code, _, err = await command(*args)
        assert code == 2
        assert one_error(err).startswith(
            f"pace in profile 'x' of {config.path} needs --rate, the rate of all processes together"
        )
        assert (await command(*args, "--rate", "5"))[0] == 0
        config.write("[profiles.x]\napi_key_env = 'KEY'\npace = 'ftp://h'\nrate = 5\n")
        code, _, err = await command(*args)
        assert code == 2
        assert one_error(err).startswith(
            f"invalid pace in profile 'x' of {config.path}: expected the URL "
        )

    async def test_its_proxy_and_its_file_of_cas_are_used(
        self, command: Command, config: Config, emulator: Emulator
    ) -> None:
        async with over_tls(emulator, "bctrl.test") as server, forward_proxy() as proxy:
            server.write_ca(config.path.parent)
            config.write(
                f"[profiles.x]\nbase_url = '{server.url}'\n{GIVE_KEY}\n"
                f"proxy = '{proxy.url}'\nca_file = 'ca.pem'\n"
            )
            code, _, err = await command("list", "--profile", "x", "ws")
        assert (code, err) == (0, "1 runtime\n")
        assert len(proxy.heads) == 1

    def test_a_shell_completes_its_name(
        self, config: Config, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for text, names in (
            ("[profiles.prod]\n[profiles.staging]", ["prod", "staging"]),
            ("=", []),
        ):
            config.write(text)
            assert cli.main(["__complete", "list", "--profile", ""]) == 0
            assert capsys.readouterr().out.splitlines()[2:] == names


class TestUnusableValues:
    """Fault: each left the command as a traceback in a box."""

    @pytest.mark.parametrize("name", ["list", "doctor"])
    async def test_a_malformed_url_is_an_error_with_a_proxy_as_well(
        self, command: Command, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("BCTRL_API_KEY", KEY)
        code, _, err = await command(name, "--base-url", "https://[::1", "ws")
        assert code == 2
        assert one_error(err).startswith("invalid --base-url: expected scheme and host")


class TestPrecedence:
    """Which URL and which key are used together."""

    async def test_a_variable_precedes_the_default_profile_and_an_option_both(
        self, command: Command, config: Config, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config.write("[profiles.default]\nbase_url = 'http://127.0.0.1:9'\n")
        monkeypatch.setenv("BCTRL_API_KEY", KEY)
        once = ("--attempts", "1")
        assert (await command("list", *once, "ws"))[0] == 1
        monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
        assert (await command("list", *once, "ws"))[0] == 0
        unused = "http://127.0.0.1:9"
        assert (await command("list", *once, "--base-url", unused, "ws"))[0] == 1

    @pytest.mark.parametrize("how", ["option", "variable"])
    async def test_a_named_profile_precedes_the_variables(
        self,
        command: Command,
        config: Config,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        how: str,
    ) -> None:
        """Otherwise the key of production would be sent to the URL of staging."""
        config.write(f"[profiles.staging]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n")
        monkeypatch.setenv("BCTRL_API_KEY", "the-key-of-production")
        monkeypatch.setenv("BCTRL_BASE_URL", "http://127.0.0.1:9")
        if how == "variable":
            monkeypatch.setenv("BCTRL_PROFILE", "staging")
        code, _, err = await command("list", *["--profile", "staging"] * (how == "option"), "ws")
        assert (code, err) == (0, "1 runtime\n")

    async def test_a_named_profile_without_a_url_has_that_of_the_public_api(
        self, command: Command, config: Config, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config.write(f"[profiles.x]\n{GIVE_KEY}\nproxy = 'http://127.0.0.1:9'\n")
        monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
        code, _, err = await command("list", "--profile", "x", "--attempts", "1", "ws")
        assert code == 1
        assert "no connection: " in err
        assert not emulator.requests

    @pytest.mark.parametrize("named", [True, False])
    async def test_an_empty_variable_is_an_error_unless_a_url_precedes_it(
        self,
        command: Command,
        config: Config,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        *,
        named: bool,
    ) -> None:
        """Fault: beside a named profile without a URL, it stood for the public API."""
        key = f"{GIVE_KEY}\n"
        monkeypatch.setenv("BCTRL_BASE_URL", "")
        monkeypatch.setenv("BCTRL_API_KEY", KEY)
        profile = ("--profile", "x") if named else ()
        config.write(f"[profiles.x]\nproxy = 'http://127.0.0.1:9'\n{key}")
        code, _, err = await command("list", *profile, "--attempts", "1", "ws")
        assert "invalid value for BCTRL_BASE_URL: must not be empty" in one_error(err)
        assert code == 2

        config.write(f"[profiles.x]\n{key}")
        assert (await command("list", *profile, "--base-url", emulator.url, "ws"))[0] == 0
        if named:
            config.write(f"[profiles.x]\nbase_url = '{emulator.url}'\n{key}")
            assert (await command("list", *profile, "ws"))[0] == 0

    async def test_a_named_profile_without_a_key_does_not_get_that_of_the_environment(
        self, command: Command, config: Config, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config.write(f"[profiles.staging]\nbase_url = '{emulator.url}'\n")
        monkeypatch.setenv("BCTRL_API_KEY", KEY)
        code, _, err = await command("list", "--profile", "staging", "ws")
        assert code == 2
        assert one_error(err) == (
            f"no API key in profile 'staging' of {config.path}. Add api_key_env"
        )
        assert not emulator.requests

    async def test_the_key_of_the_default_profile_is_not_sent_to_the_url_of_the_environment(
        self, command: Command, config: Config, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config.write(f"[profiles.default]\n{GIVE_KEY}\n")
        monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
        code, _, err = await command("list", "ws")
        assert code == 2
        assert one_error(err).startswith(
            "no API key: set BCTRL_API_KEY as well as BCTRL_BASE_URL. The key of profile 'default' "
        )
        # A URL on the command line was given with this profile in mind.
        assert (await command("list", "--base-url", emulator.url, "ws"))[0] == 0
        assert len(emulator.requests) == 1

    async def test_the_url_of_the_default_profile_gets_the_key_of_that_profile(
        self, command: Command, config: Config, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: it got that of BCTRL_API_KEY, which may be of another account."""
        config.write(f"[profiles.default]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n")
        monkeypatch.setenv("BCTRL_API_KEY", "the-key-of-production")
        code, _, err = await command("list", "ws")
        assert (code, err) == (0, "1 runtime\n")
        # Neither URL is of the profile.
        for url in ("option", "variable"):
            if url == "variable":
                monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
            args = ["--base-url", emulator.url] * (url == "option")
            _, _, err = await command("list", *args, "ws")
            assert "the server answered 401" in one_error(err)

    async def test_the_url_of_the_default_profile_gets_the_key_of_the_environment_if_it_has_none(
        self, command: Command, config: Config, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config.write(f"[profiles.default]\nbase_url = '{emulator.url}'\n")
        monkeypatch.setenv("BCTRL_API_KEY", KEY)
        assert (await command("list", "ws"))[0] == 0

    async def test_a_default_profile_without_a_url_leaves_the_key_to_the_environment(
        self, command: Command, config: Config, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config.write("[profiles.default]\napi_key_env = 'UNSET'\nproxy = 'http://127.0.0.1:9'\n")
        monkeypatch.setenv("BCTRL_API_KEY", KEY)
        code, _, err = await command("list", "--attempts", "1", "ws")
        assert code == 1
        assert "no connection: " in one_error(err)
        assert not emulator.requests


class TestKey:
    @pytest.mark.parametrize(
        "args", ["list ws", "get ws a", "stop ws a", "stop -o json ws a", "stop ws --all --yes"]
    )
    async def test_a_rejected_one_is_named_with_its_place(
        self,
        command: Command,
        config: Config,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        args: str,
    ) -> None:
        """Fault: the advice was to check BCTRL_API_KEY, which was not used."""
        config.write(f"[profiles.x]\nbase_url = '{emulator.url}'\napi_key_env = 'STAGING_KEY'\n")
        monkeypatch.setenv("STAGING_KEY", "wrong")
        code, out, err = await command(*args.split(), "--profile", "x")
        place = f"STAGING_KEY (api_key_env of profile 'x' of {config.path})"
        assert code == 2
        assert f"Check the API key from {place}" in out + err
        assert "BCTRL_API_KEY" not in out + err

    async def test_it_comes_from_the_variable_that_the_profile_names(
        self, command: Command, config: Config, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config.write(f"[profiles.x]\nbase_url = '{emulator.url}'\napi_key_env = 'STAGING_KEY'\n")
        code, _, err = await command("list", "--profile", "x", "ws")
        assert code == 2
        assert one_error(err) == (
            f"no API key from STAGING_KEY (api_key_env of profile 'x' of {config.path}): "
            "it is not set"
        )
        monkeypatch.setenv("STAGING_KEY", KEY)
        assert (await command("list", "--profile", "x", "ws"))[0] == 0

    async def test_an_invalid_one_is_not_shown(
        self, command: Command, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MINE", f"{SECRET} {SECRET}")
        config.write("[profiles.x]\napi_key_env = 'MINE'\n")
        code, _, err = await command("list", "--profile", "x", "ws")
        assert code == 2
        assert one_error(err).startswith("invalid API key from MINE (")
        assert SECRET not in err
