"""The config file of the command: its profiles, its checks, and which key goes to which URL."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import save
from conftest import KEY
from helpers import Command
from tls import forward_proxy, over_tls

from bctrl_async import cli
from bctrl_async.emulator import Emulator, Fault

SECRET = "sk-secret-0123456789"
GIVE_KEY = "api_key_env = 'KEY_OF_PROFILE'"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the config file."""
    monkeypatch.setenv("BCTRL_CONFIG", str(tmp_path / "config.toml"))
    return tmp_path / "config.toml"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    emulator.add_runtime("ws", "a")
    monkeypatch.setenv("KEY_OF_PROFILE", KEY)


async def error_of(command: Command, *args: str) -> str:
    """Return the one line of an error, whose exit code is 2."""
    code, _, err = await command(*args)
    assert err.startswith("bctrl-async: error: ")
    assert (code, err.count("\n")) == (2, 1)
    return err.removeprefix("bctrl-async: error: ").rstrip("\n")


class TestFile:
    async def test_its_place_is_that_of_the_platform(
        self,
        command: Command,
        monkeypatch: pytest.MonkeyPatch,
        emulator: Emulator,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        file = tmp_path / "bctrl-async" / "config.toml"
        known = f"unknown profile 'x'. {file} has none"
        assert await error_of(command, "list", "--profile", "x", "ws") == known
        file.parent.mkdir()
        file.write_text(f"[profiles.default]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n")
        assert (await command("list", "ws"))[0] == 0

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "cannot read {file}: No such file or directory"),
            ("[profiles.x\n", "invalid {file}: Expected ']' at the end of a table declaration"),
            ("[profile.x]\n", "invalid {file}: Object contains unknown field `profile`"),
            ("profiles = 3\n", "invalid {file}: Expected `object`, got `int` - at `$.profiles`"),
            (
                "[profiles.x]\nrate = true\n",
                "invalid {file}: Expected `int | float | str`, got `b",
            ),
            ("\xff", "invalid {file}: 'utf-8' codec can't decode "),
        ],
    )
    async def test_an_unreadable_one_is_an_error_with_its_path(
        self, command: Command, config: Path, content: str | None, said: str
    ) -> None:
        if content is not None:
            save(config, content, "latin-1")
        assert (await error_of(command, "list", "ws")).startswith(said.format(file=config))


class TestProfile:
    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("timeot = '3s'", "{profile}: unknown key timeot: expected one of api_key_env, "),
            (f"api_key = '{SECRET}'", "{profile}: unknown key api_key: expected one of api_key_"),
            ("timeout = 30", "invalid value for timeout in {profile}: '30' is not a duration "),
            ("attempts = 0", 'invalid value "0" for attempts in {profile}. Must be >= 1'),
            ("rate = 0", 'invalid value "0.0" for rate in {profile}. Must be > 0'),
            ("rate = inf", "invalid rate in {profile}: expected a positive number per second"),
            ("base_url = ''", "invalid value for base_url in {profile}: must not be empty"),
            (f"api_key_env = '{SECRET}'", "{profile}: invalid api_key_env: expected a variable in"),
            ("base_url = 'http://bctrl.test'", "invalid base_url in {profile}: 'http://bctrl.te"),
            ("proxy = 'socks5://u:pw@h'", "invalid proxy in {profile}: expected an http or https "),
            ("ca_file = 'nosuch.pem'", "cannot read the CA file {folder}/nosuch.pem: No such file"),
            ("ca_file = '~/nosuch.pem'", "cannot read the CA file {folder}/home/nosuch.pem: No "),
            ("pace = 'pace'", "pace in {profile} needs --rate, the rate of all processes together"),
            ("pace = 'ftp://h'\nrate = 5", "invalid pace in {profile}: expected the URL "),
        ],
    )
    async def test_an_error_names_the_file_the_profile_and_the_key(
        self,
        command: Command,
        config: Path,
        monkeypatch: pytest.MonkeyPatch,
        line: str,
        said: str,
    ) -> None:
        """Fault: the error of a pace without a rate named an option that was not given."""
        monkeypatch.setenv("HOME", str(config.parent / "home"))
        given = "" if "api_key_env" in line else GIVE_KEY
        save(config, f"[profiles.staging]\n{given}\n{line}\n")
        error = await error_of(command, "stop", "--profile", "staging", "ws", "a")
        profile = f"profile 'staging' of {config}"
        assert error.startswith(said.format(profile=profile, folder=config.parent))
        assert SECRET not in error

    @pytest.mark.parametrize("name", ["nosuch", ""])
    async def test_an_unknown_one_is_an_error_that_names_the_others(
        self, command: Command, config: Path, name: str
    ) -> None:
        save(config, "[profiles.b]\n[profiles.a]\n")
        error = await error_of(command, "list", "ws", f"--profile={name}")
        assert error == f"unknown profile {name!r}. {config} has a, b"

    async def test_its_values_are_those_of_options(
        self, command: Command, config: Path, emulator: Emulator
    ) -> None:
        emulator.inject(*[Fault.SERVER_ERROR] * 4)
        save(
            config,
            f"[profiles.x]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n"
            "attempts = 3\nrate = 100\npace = 'pace'\n",
        )
        await command("stop", "--profile", "x", "--no-verify", "ws", "a")
        assert len(emulator.requests) == 3
        assert (config.parent / "pace").exists()
        await command("stop", "--profile", "x", "--no-verify", "--attempts", "1", "ws", "a")
        assert len(emulator.requests) == 4

    async def test_its_proxy_and_its_file_of_cas_are_used(
        self, command: Command, config: Path, emulator: Emulator
    ) -> None:
        async with over_tls(emulator, "bctrl.test") as server, forward_proxy() as proxy:
            server.write_ca(config.parent)
            save(
                config,
                f"[profiles.x]\nbase_url = '{server.url}'\n{GIVE_KEY}\n"
                f"proxy = '{proxy.url}'\nca_file = 'ca.pem'\n",
            )
            code, _, err = await command("list", "--profile", "x", "ws")
        assert (code, err) == (0, "1 runtime\n")
        assert len(proxy.heads) == 1

    @pytest.mark.parametrize(
        ("text", "names"), [("[profiles.prod]\n[profiles.staging]", ["prod", "staging"]), ("=", [])]
    )
    def test_a_shell_completes_its_name(
        self, config: Path, capsys: pytest.CaptureFixture[str], text: str, names: list[str]
    ) -> None:
        save(config, text)
        assert cli.main(["__complete", "list", "--profile", ""]) == 0
        assert capsys.readouterr().out.splitlines()[2:] == names


BOTH = "BCTRL_API_KEY=k BCTRL_BASE_URL=https://env.test"
TYPED = "--base-url https://typed.test"


class TestPrecedence:
    """A profile is used whole: the key of one account must not go to the URL of another."""

    @pytest.mark.parametrize(
        ("variables", "args", "url", "key"),
        [
            ("", "", "default.test", "DEFAULT_KEY"),
            ("BCTRL_API_KEY= BCTRL_PROFILE=", "", "default.test", "DEFAULT_KEY"),
            ("", TYPED, "typed.test", "DEFAULT_KEY"),
            ("", "--profile x", "x.test", "X_KEY"),
            (BOTH, "", "env.test", "BCTRL_API_KEY"),
            (f"{BOTH} BCTRL_PROFILE=", "", "env.test", "BCTRL_API_KEY"),
            (BOTH, TYPED, "typed.test", "BCTRL_API_KEY"),
            ("BCTRL_API_KEY=k", TYPED, "typed.test", "BCTRL_API_KEY"),
            (BOTH, "--profile x", "x.test", "X_KEY"),
            (BOTH, "--profile default", "default.test", "DEFAULT_KEY"),
            (f"{BOTH} BCTRL_PROFILE=x", "", "x.test", "X_KEY"),
            (f"{BOTH} BCTRL_PROFILE=x", f"--profile y {TYPED}", "typed.test", "Y_KEY"),
            (BOTH, "--profile y", "api.bctrl.ai", "Y_KEY"),
            ("BCTRL_BASE_URL=", "--profile y", "api.bctrl.ai", "Y_KEY"),
        ],
    )
    async def test_a_profile_and_variables_are_not_mixed(
        self,
        command: Command,
        config: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        variables: str,
        args: str,
        url: str,
        key: str,
    ) -> None:
        for name in ("DEFAULT", "X", "Y"):
            monkeypatch.setenv(f"{name}_KEY", "k")
        save(
            config,
            "[profiles.default]\nbase_url = 'https://default.test'\napi_key_env = 'DEFAULT_KEY'\n"
            "[profiles.x]\nbase_url = 'https://x.test'\napi_key_env = 'X_KEY'\n"
            "[profiles.y]\napi_key_env = 'Y_KEY'\n",
        )
        for variable in variables.split():
            monkeypatch.setenv(*variable.split("="))
        code, out, err = await command("doctor", *args.split())
        assert (code, err) == (0, "")
        assert f"\nURL       https://{url} (" in out
        assert f"\nkey       {key}" in out

    @pytest.mark.parametrize(
        ("variables", "args", "table", "said"),
        [
            ("", "", "", "no API key in profile 'default' of {file}. Add api_key_env"),
            (BOTH, "--profile default", "", "no API key in profile 'default' of {file}. Add "),
            ("BCTRL_BASE_URL=https://env.test", "", GIVE_KEY, "no API key: set BCTRL_API_KEY"),
            # Which URL is the key for? It could be that of the profile.
            ("BCTRL_API_KEY=k", "", "base_url = 'https://a.test'", "BCTRL_API_KEY is set, and pro"),
            ("BCTRL_API_KEY=k BCTRL_BASE_URL=", "", "base_url = 'b'", "BCTRL_API_KEY is set, and "),
            # Fault: it was taken for unset, and the requests went to the public API.
            ("BCTRL_API_KEY=k BCTRL_BASE_URL=", "", "", "invalid value for BCTRL_BASE_URL: must "),
            (
                "",
                "",
                "api_key_env = 'A'",
                "no API key: set A (api_key_env of profile 'default' of ",
            ),
        ],
    )
    async def test_a_key_without_its_url_or_a_url_without_its_key_is_an_error(
        self,
        command: Command,
        config: Path,
        monkeypatch: pytest.MonkeyPatch,
        emulator: Emulator,
        *,
        variables: str,
        args: str,
        table: str,
        said: str,
    ) -> None:
        save(config, f"[profiles.default]\n{table}\n")
        for variable in variables.split():
            monkeypatch.setenv(*variable.split("="))
        error = await error_of(command, "list", *args.split(), "ws")
        assert error.startswith(said.format(file=config))
        assert not emulator.requests

    async def test_the_variables_of_workspace_and_pace_are_behind_the_profile_in_use(
        self, command: Command, config: Path, monkeypatch: pytest.MonkeyPatch, emulator: Emulator
    ) -> None:
        start = f"[profiles.default]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n"
        monkeypatch.setenv("BCTRL_WORKSPACE", "nosuch")
        monkeypatch.setenv("BCTRL_PACE", str(config.parent / "of-variable"))
        args = ("stop", "--all", "--yes", "--rate", "100")
        save(config, start)
        for name in ("list", "doctor"):
            assert "could not list workspace 'nosuch'" in (await command(name))[2]
        save(config, f"{start}workspace = 'ws'\npace = 'of-profile'\n")
        assert (await command(*args))[0] == 0
        assert (config.parent / "of-profile").exists()
        assert not (config.parent / "of-variable").exists()
        monkeypatch.setenv("BCTRL_PACE", "")
        save(config, f"{start}workspace = 'ws'\n")
        assert (await command(*args))[0] == 0


class TestKey:
    @pytest.mark.parametrize(
        "args", ["list ws", "get ws a", "stop ws a", "stop -o json ws a", "stop ws --all --yes"]
    )
    async def test_a_rejected_one_is_named_with_its_place(
        self,
        command: Command,
        config: Path,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        args: str,
    ) -> None:
        """Fault: the advice was to check BCTRL_API_KEY, which was not used."""
        save(config, f"[profiles.x]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n")
        monkeypatch.setenv("KEY_OF_PROFILE", "wrong")
        code, out, err = await command(*args.split(), "--profile", "x")
        place = f"KEY_OF_PROFILE (api_key_env of profile 'x' of {config})"
        assert code == 2
        assert f"Check the API key from {place}" in out + err
        assert "BCTRL_API_KEY" not in out + err

    async def test_an_invalid_one_is_not_shown(
        self, command: Command, config: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KEY_OF_PROFILE", f"{SECRET} {SECRET}")
        save(config, f"[profiles.x]\n{GIVE_KEY}\n")
        error = await error_of(command, "list", "--profile", "x", "ws")
        assert error.startswith("invalid API key from KEY_OF_PROFILE (api_key_env of profile 'x' ")
        assert SECRET not in error
