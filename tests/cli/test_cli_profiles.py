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


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator, tmp_path: Path) -> None:
    emulator.add_runtime("ws", "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BCTRL_CONFIG", "config.toml")
    monkeypatch.setenv("KEY_OF_PROFILE", KEY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def configure(text: str) -> None:
    save("config.toml", text)


def full(text: str, name: str = "x") -> str:
    """Return a text with the path of the config file and the folder and title of a profile."""
    folder = Path.cwd()
    file = f"{folder}/config.toml"
    return text.format(file=file, folder=folder, profile=f"profile {name!r} of {file}")


async def error_of(command: Command, args: str) -> str:
    """Return the one line of an error, whose exit code is 2."""
    code, _, err = await command(*args.split())
    assert err.startswith("bctrl-async: error: ")
    assert (code, err.count("\n")) == (2, 1)
    return err.removeprefix("bctrl-async: error: ").rstrip("\n")


class TestFile:
    async def test_its_place_is_that_of_the_platform(
        self, command: Command, monkeypatch: pytest.MonkeyPatch, emulator: Emulator, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("BCTRL_CONFIG", "")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        file = tmp_path / "bctrl-async" / "config.toml"
        known = f"unknown profile 'x'. {file} has none"
        assert await error_of(command, "list --profile x ws") == known
        file.parent.mkdir()
        save(file, f"[profiles.default]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n")
        assert (await command("list", "ws"))[0] == 0

    async def test_a_named_one_must_exist(self, command: Command) -> None:
        problem = full("cannot read {file}: No such file or directory")
        assert await error_of(command, "list ws") == problem

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("[profiles.x", "Expected ']' at the end of a table declaration"),
            ("[profile.x]", "Object contains unknown field `profile`"),
            ("profiles = 3", "Expected `object`, got `int` - at `$.profiles`"),
            ("[profiles.x]\nrate = true", "Expected `int | float | str`, got `bool`"),
            ("\xff", "'utf-8' codec can't decode "),
        ],
    )
    async def test_an_unreadable_one_is_an_error_with_its_path(
        self, command: Command, content: str, said: str
    ) -> None:
        save("config.toml", content, "latin-1")
        assert (await error_of(command, "list ws")).startswith(full(f"invalid {{file}}: {said}"))


class TestProfile:
    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("timeot = '3s'", "{profile}: unknown key timeot: expected one of api_key_env, "),
            (f"api_key = '{SECRET}'", "{profile}: unknown key api_key: expected one of api_key_"),
            (f"api_key_env = '{SECRET}'", "{profile}: invalid api_key_env: expected a variable in"),
            ("timeout = 30", "invalid value for timeout in {profile}: '30' is not a duration "),
            ("rate = 0", 'invalid value "0" for rate in {profile}. Must be > 0'),
            ("base_url = ''", "invalid value for base_url in {profile}: must not be empty"),
            ("base_url = 'http://bctrl.test'", "invalid base_url in {profile}: 'http://bctrl.te"),
            ("proxy = 'socks5://u:pw@h'", "invalid proxy in {profile}: expected an http or https "),
            ("ca_file = 'nosuch.pem'", "cannot read the CA file {folder}/nosuch.pem: No such file"),
            ("ca_file = '~/nosuch.pem'", "cannot read the CA file {folder}/home/nosuch.pem: No "),
            ("pace = 'pace'", "pace in {profile} needs --rate, the rate of all processes together"),
            ("pace = 'ftp://h'\nrate = 5", "invalid pace in {profile}: expected the URL "),
        ],
    )
    async def test_an_error_names_the_file_the_profile_and_the_key(
        self, command: Command, line: str, said: str
    ) -> None:
        """Fault: the error of a pace without a rate named an option that was not given."""
        configure(f"[profiles.x]\n{GIVE_KEY * ('api_key_env' not in line)}\n{line}\n")
        error = await error_of(command, "stop --profile x ws a")
        assert error.startswith(full(said))
        assert SECRET not in error

    @pytest.mark.parametrize("name", ["nosuch", ""])
    async def test_an_unknown_one_is_an_error_that_names_the_others(
        self, command: Command, name: str
    ) -> None:
        configure("[profiles.b]\n[profiles.a]\n")
        error = await error_of(command, f"list ws --profile={name}")
        assert error == full(f"unknown profile {name!r}. {{file}} has a, b")

    async def test_its_values_are_those_of_options(
        self, command: Command, emulator: Emulator, tmp_path: Path
    ) -> None:
        emulator.inject(*[Fault.SERVER_ERROR] * 4)
        start = f"[profiles.x]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n"
        configure(f"{start}attempts = 3\nrate = 100\npace = 'pace'\n")
        args = ("stop", "--profile", "x", "--no-verify", "ws", "a")
        await command(*args)
        assert len(emulator.requests) == 3
        assert (tmp_path / "pace").exists()
        await command(*args, "--attempts", "1")
        assert len(emulator.requests) == 4

    async def test_its_proxy_and_its_file_of_cas_are_used(
        self, command: Command, emulator: Emulator, tmp_path: Path
    ) -> None:
        async with over_tls(emulator, "bctrl.test") as server, forward_proxy() as proxy:
            server.write_ca(tmp_path)
            start = f"[profiles.x]\nbase_url = '{server.url}'\n{GIVE_KEY}\n"
            configure(f"{start}proxy = '{proxy.url}'\nca_file = 'ca.pem'\n")
            code, _, err = await command("list", "--profile", "x", "ws")
        assert (code, err, len(proxy.heads)) == (0, "1 runtime\n", 1)

    @pytest.mark.parametrize(
        ("text", "names"), [("[profiles.prod]\n[profiles.staging]", ["prod", "staging"]), ("=", [])]
    )
    def test_a_shell_completes_its_name(
        self, capsys: pytest.CaptureFixture[str], text: str, names: list[str]
    ) -> None:
        configure(text)
        assert cli.main(["__complete", "list", "--profile", ""]) == 0
        assert capsys.readouterr().out.splitlines()[2:] == names


BOTH = "BCTRL_API_KEY=k BCTRL_BASE_URL=https://env.test"
TYPED = "--base-url https://typed.test"


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: str) -> None:
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))


class TestPrecedence:
    """A profile is used whole: the key of one account must not go to the URL of another."""

    @pytest.mark.parametrize(
        ("variables", "args", "used"),
        [
            ("", "", "default.test DEFAULT_KEY"),
            ("BCTRL_API_KEY= BCTRL_BASE_URL= BCTRL_PROFILE=", "", "default.test DEFAULT_KEY"),
            ("", TYPED, "typed.test DEFAULT_KEY"),
            ("", "--profile x", "x.test X_KEY"),
            (BOTH, "", "env.test BCTRL_API_KEY"),
            (f"{BOTH} BCTRL_PROFILE=", "", "env.test BCTRL_API_KEY"),
            (BOTH, TYPED, "typed.test BCTRL_API_KEY"),
            ("BCTRL_API_KEY=k", TYPED, "typed.test BCTRL_API_KEY"),
            (BOTH, "--profile x", "x.test X_KEY"),
            (BOTH, "--profile default", "default.test DEFAULT_KEY"),
            ("BCTRL_API_KEY=k BCTRL_PROFILE=x", "", "x.test X_KEY"),
            (f"{BOTH} BCTRL_PROFILE=x", "--profile y", "api.bctrl.ai Y_KEY"),
            (f"{BOTH} BCTRL_PROFILE=x", f"--profile y {TYPED}", "typed.test Y_KEY"),
            (BOTH, "--profile y", "api.bctrl.ai Y_KEY"),
            ("BCTRL_BASE_URL=", "--profile y", "api.bctrl.ai Y_KEY"),
        ],
    )
    async def test_a_profile_and_variables_are_not_mixed(
        self,
        command: Command,
        monkeypatch: pytest.MonkeyPatch,
        variables: str,
        args: str,
        used: str,
    ) -> None:
        set_variables(monkeypatch, f"DEFAULT_KEY=k X_KEY=k Y_KEY=k {variables}")
        configure(
            "[profiles.default]\nbase_url = 'https://default.test'\napi_key_env = 'DEFAULT_KEY'\n"
            "[profiles.x]\nbase_url = 'https://x.test'\napi_key_env = 'X_KEY'\n"
            "[profiles.y]\napi_key_env = 'Y_KEY'\n"
        )
        code, out, err = await command("doctor", *args.split())
        assert (code, err) == (0, "")
        url, key = used.split()
        assert f"\nURL       https://{url} (" in out
        assert f"\nkey       {key}" in out

    @pytest.mark.parametrize(
        ("variables", "table", "said"),
        [
            ("", "", "no API key in {profile}. Add api_key_env"),
            ("BCTRL_PROFILE=default", "", "no API key in {profile}. Add api_key_env"),
            (
                f"{BOTH} BCTRL_PROFILE=default",
                GIVE_KEY,
                "BCTRL_PROFILE and BCTRL_BASE_URL are both set. Unset one",
            ),
            ("", "api_key_env = 'A'", "no API key: set A (api_key_env of {profile})"),
            ("BCTRL_BASE_URL=https://env.test", GIVE_KEY, "no API key: set BCTRL_API_KEY"),
            # Which URL is the key for? It could be that of the profile.
            ("BCTRL_API_KEY=k", "base_url = 'a'", "BCTRL_API_KEY is set, and {profile} has a base"),
            # Fault: it was taken for unset, and the requests went to the public API.
            ("BCTRL_API_KEY=k BCTRL_BASE_URL=", "", "invalid value for BCTRL_BASE_URL: must not "),
        ],
    )
    async def test_a_key_without_its_url_or_a_url_without_its_key_is_an_error(
        self,
        command: Command,
        monkeypatch: pytest.MonkeyPatch,
        *,
        variables: str,
        table: str,
        said: str,
    ) -> None:
        configure(f"[profiles.default]\n{table}\n")
        set_variables(monkeypatch, variables)
        assert (await error_of(command, "list ws")).startswith(full(said, "default"))

    async def test_the_pace_of_a_profile_precedes_a_variable_and_two_workspaces_are_an_error(
        self, command: Command, monkeypatch: pytest.MonkeyPatch, emulator: Emulator, tmp_path: Path
    ) -> None:
        start = f"[profiles.default]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n"
        set_variables(monkeypatch, "BCTRL_WORKSPACE=nosuch BCTRL_PACE=of-variable")
        args = ("stop", "--all", "--yes", "--rate", "100")
        configure(start)
        for name in ("list", "doctor"):
            assert "could not list workspace 'nosuch'" in (await command(name))[2]
        configure(f"{start}workspace = 'ws'\npace = 'of-profile'\n")
        title = full("{profile}", "default")
        problem = f"BCTRL_WORKSPACE is 'nosuch', and {title} has 'ws'. Unset one"
        assert await error_of(command, " ".join(args)) == problem
        monkeypatch.setenv("BCTRL_WORKSPACE", "")
        assert (await command(*args))[0] == 0
        assert (tmp_path / "of-profile").exists()
        assert not (tmp_path / "of-variable").exists()
        monkeypatch.setenv("BCTRL_PACE", "")
        configure(f"{start}workspace = 'ws'\n")
        assert (await command(*args))[0] == 0


class TestKey:
    @pytest.mark.parametrize(
        "args", ["list ws", "get ws a", "stop ws a", "stop -o json ws a", "stop ws --all --yes"]
    )
    async def test_a_rejected_one_is_named_with_its_place(
        self, command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, args: str
    ) -> None:
        """Fault: the advice was to check BCTRL_API_KEY, which was not used."""
        configure(f"[profiles.x]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n")
        monkeypatch.setenv("KEY_OF_PROFILE", "wrong")
        code, out, err = await command(*args.split(), "--profile", "x")
        assert code == 2
        place = full("KEY_OF_PROFILE (api_key_env of {profile})")
        assert f"Check the API key from {place}" in out + err
        assert "BCTRL_API_KEY" not in out + err

    async def test_an_invalid_one_is_not_shown(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KEY_OF_PROFILE", f"{SECRET} {SECRET}")
        configure(f"[profiles.x]\n{GIVE_KEY}\n")
        error = await error_of(command, "list --profile x ws")
        place = full("KEY_OF_PROFILE (api_key_env of {profile})")
        assert error.startswith(f"invalid API key from {place}: empty, or with a space")
        assert SECRET not in error
