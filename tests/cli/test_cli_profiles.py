"""The config file of the command: profiles, checks, and which URL gets a key."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
from conftest import KEY
from support.commands import Command, save
from support.tls import forward_proxy, over_tls

from bctrl_async.emulator import Emulator, Fault

SECRET = "sk_secret_0123456789"
GIVE_KEY = "api_key_env = 'KEY_OF_PROFILE'"

Run = Callable[..., Coroutine[object, object, tuple[int, str, str]]]
ErrorOf = Callable[..., Coroutine[object, object, str]]


@pytest.fixture(autouse=True)
def _environment(command: Command) -> None:
    for name in ("BCTRL_API_KEY", "BCTRL_BASE_URL"):
        command.patch.delenv(name)
    home = str(command.folder / "home")
    command.setenv(BCTRL_CONFIG="config.toml", KEY_OF_PROFILE=KEY, HOME=home)


@pytest.fixture
def run(command: Command) -> Run:
    """Return a function that runs the command with a config file and variables."""

    async def run(
        config: str, args: str = "list ws", variables: str = ""
    ) -> tuple[int, str, str]:
        save("config.toml", config, "latin-1")
        command.setenv(**dict(variable.split("=") for variable in variables.split()))
        return await command(*args.split())

    return run


@pytest.fixture
def error_of(run: Run) -> ErrorOf:
    """Return a function that returns the one line of an error, whose exit code is 2."""

    async def error_of(*args: str) -> str:
        code, _, err = await run(*args)
        assert err.startswith("bctrl-async: error: ")
        assert (code, err.count("\n"), SECRET in err) == (2, 1, False)
        return err.removeprefix("bctrl-async: error: ").rstrip("\n")

    return error_of


def full(text: str, name: str = "x") -> str:
    """Return a text with the config file's path, and a profile's titles."""
    folder = Path.cwd()
    file = f"{folder}/config.toml"
    return text.format(file=file, folder=folder, profile=f"profile {name!r} of {file}")


def profile_of(emulator: Emulator, more: str = "", name: str = "x") -> str:
    return f"[profiles.{name}]\nbase_url = '{emulator.url}'\n{GIVE_KEY}\n{more}"


# The file


async def test_its_place_is_that_of_the_platform(command: Command) -> None:
    command.setenv(BCTRL_CONFIG="")
    command.setenv(XDG_CONFIG_HOME=str(command.folder))
    file = command.folder / "bctrl-async" / "config.toml"
    _, _, err = await command("list", "--profile", "x", "ws")
    assert err == f"bctrl-async: error: cannot read {file}: No such file or directory\n"
    file.parent.mkdir()
    save(file, profile_of(command.api))
    assert (await command("list", "--profile", "x", "ws"))[0] == 0


@pytest.mark.parametrize("variables", ["", "BCTRL_PROFILE="])
async def test_without_the_name_of_a_profile_it_is_not_read(
    run: Run, variables: str
) -> None:
    """Fault: a profile `default` counted unnamed, or conflicted with a variable."""
    config = "[profiles.default]\nbase_url = 'https://default.test'\ntimeot = 1\n"
    code, out, _ = await run(config, "doctor", f"BCTRL_API_KEY=k {variables}")
    assert (code, "\nconfig    no profile is in use\n" in out) == (0, True)


X = f"[profiles.x]\n{GIVE_KEY}\n"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            "[profiles.x",
            "invalid {file}: Expected ']' at the end of a table declaration",
        ),
        ("[profile.x]", "invalid {file}: Object contains unknown field `profile`"),
        (
            "[profiles.x]\nrate = true",
            "invalid {file}: Expected `int | float | str`, got `bool`",
        ),
        ("[profiles.b]", "unknown profile 'x'. {file} has b"),
        ("", "unknown profile 'x'. {file} has none"),
        ("\xff", "invalid {file}: 'utf-8' codec can't decode "),
        ("[profiles.b]\n[profiles.a]", "unknown profile 'x'. {file} has a, b"),
        (
            f"{X}timeot = '3s'",
            "{profile}: unknown key timeot: expected one of api_key_env, ",
        ),
        (
            f"{X}api_key = '{SECRET}'",
            "{profile}: unknown key api_key: expected one of api_key_",
        ),
        (
            X.replace("KEY_OF_PROFILE", SECRET),
            "{profile}: api_key_env must name a variable in ",
        ),
        (
            "[profiles.x]",
            "{profile}: api_key_env must name a variable in capitals, such as STAG",
        ),
        (
            f"{X}timeout = 30",
            "invalid value for timeout in {profile}: '30' is not a duration ",
        ),
        (f"{X}rate = 0", 'invalid value "0" for rate in {profile}. Must be > 0'),
        (
            f"{X}base_url = ''",
            "invalid value for base_url in {profile}: must not be empty",
        ),
        (
            f"{X}base_url = 'http://h.test'",
            "invalid base_url in {profile}: 'http://h.test' would ",
        ),
        (
            f"{X}proxy = 'socks5://u:pw@h'",
            "invalid proxy in {profile}: expected an http or ",
        ),
        (
            f"{X}ca_file = 'nosuch.pem'",
            "cannot read the CA file {folder}/nosuch.pem: No such ",
        ),
        (
            f"{X}ca_file = '~/no.pem'",
            "cannot read the CA file {folder}/home/no.pem: No such ",
        ),
        (
            f"{X}pace = 'pace'",
            "pace in {profile} needs --rate, the rate of all processes together",
        ),
        (
            f"{X}pace = 'ftp://h'\nrate = 5",
            "invalid pace in {profile}: expected the URL ",
        ),
    ],
)
async def test_an_error_names_its_place(
    error_of: ErrorOf, config: str, said: str
) -> None:
    """Fault: the error of a pace without a rate named an option that was not given."""
    assert (await error_of(config, "stop --profile x ws a")).startswith(full(said))


# The values of a profile


async def test_its_values_are_those_of_options(command: Command, run: Run) -> None:
    command.api.inject(*[Fault.SERVER_ERROR] * 4)
    config = profile_of(command.api, "attempts = 3\nrate = 100\npace = 'pace'\n")
    args = "stop --profile x --no-verify ws a"
    await run(config, args)
    assert len(command.api.requests) == 3
    await run(config, f"{args} --attempts 1")
    assert len(command.api.requests) == 4


async def test_its_proxy_and_its_file_of_cas_are_used(
    command: Command, run: Run
) -> None:
    async with over_tls(command.api, "bctrl.test") as server, forward_proxy() as proxy:
        server.write_ca(command.folder)
        config = f"[profiles.x]\nbase_url = '{server.url}'\n{GIVE_KEY}\n"
        config += f"proxy = '{proxy.url}'\nca_file = 'ca.pem'\n"
        code, _, err = await run(config, "list --profile x ws")
    assert (code, err, len(proxy.heads)) == (0, "3 runtimes\n", 1)


@pytest.mark.parametrize(
    ("config", "names"),
    [("[profiles.prod]\n[profiles.staging]", ["prod", "staging"]), ("=", [])],
)
async def test_a_shell_completes_its_name(
    command: Command, run: Run, config: str, names: list[str]
) -> None:
    await run(config)
    code, out, _ = await command("__complete", "list", "--profile", "")
    assert (code, out.splitlines()[2:]) == (0, names)


# A profile is used whole: the key of one account must not go to the URL of another

BOTH = "BCTRL_API_KEY=k BCTRL_BASE_URL=https://env.test"
TYPED = "--base-url https://typed.test"


@pytest.mark.parametrize(
    ("variables", "args", "used"),
    [
        ("BCTRL_API_KEY=k", "", "api.bctrl.ai BCTRL_API_KEY"),
        ("", "--profile x", "x.test X_KEY"),
        (BOTH, "", "env.test BCTRL_API_KEY"),
        (f"{BOTH} BCTRL_PROFILE=", "", "env.test BCTRL_API_KEY"),
        (BOTH, TYPED, "typed.test BCTRL_API_KEY"),
        ("BCTRL_API_KEY=k", TYPED, "typed.test BCTRL_API_KEY"),
        (BOTH, "--profile x", "x.test X_KEY"),
        (f"{BOTH} BCTRL_PROFILE=x", "", "x.test X_KEY"),
        (f"{BOTH} BCTRL_PROFILE=x", "--profile y", "api.bctrl.ai Y_KEY"),
        (f"{BOTH} BCTRL_PROFILE=x", f"--profile y {TYPED}", "typed.test Y_KEY"),
        (BOTH, "--profile y", "api.bctrl.ai Y_KEY"),
        ("BCTRL_BASE_URL=", "--profile y", "api.bctrl.ai Y_KEY"),
    ],
)
async def test_a_profile_is_used_whole(
    run: Run, variables: str, args: str, used: str
) -> None:
    config = (
        "[profiles.x]\nbase_url = 'https://x.test'\napi_key_env = 'X_KEY'\n"
        "[profiles.y]\napi_key_env = 'Y_KEY'\n"
    )
    variables = f"X_KEY=k Y_KEY=k {variables}"
    code, out, err = await run(config, f"doctor {args}", variables)
    assert (code, err) == (0, "")
    url, key = used.split()
    assert f"\nURL       https://{url} (" in out
    assert f"\nkey       {key}" in out


@pytest.mark.parametrize(
    ("variables", "args", "said"),
    [
        (
            "KEY_OF_PROFILE=",
            "doctor --profile x",
            "no API key: set KEY_OF_PROFILE (api_key_env of",
        ),
        ("BCTRL_BASE_URL=https://env.test", "doctor", "no API key: set BCTRL_API_KEY"),
        # Fault: it was taken for unset, and the requests went to the public API.
        (
            "BCTRL_API_KEY=k BCTRL_BASE_URL=",
            "doctor",
            "invalid value for BCTRL_BASE_URL: must not",
        ),
        (
            f"KEY_OF_PROFILE={SECRET}\u00e9",
            "doctor --profile x",
            "invalid API key from KEY_OF_PRO",
        ),
        (
            "BCTRL_WORKSPACE=ws",
            "stop --profile x --all --yes",
            "give WORKSPACE, or add workspace to {profile}",
        ),
    ],
)
async def test_what_is_missing_is_an_error(
    error_of: ErrorOf, variables: str, args: str, said: str
) -> None:
    assert (await error_of(X, args, variables)).startswith(full(said))


@pytest.mark.parametrize(
    ("table", "made"), [("pace = 'of-profile'\n", True), ("", False)]
)
async def test_with_a_profile_no_workspace_and_pace_of_variables_is_used(
    command: Command, run: Run, table: str, *, made: bool
) -> None:
    config = profile_of(command.api, f"workspace = 'ws'\n{table}")
    given = "BCTRL_PROFILE=x BCTRL_WORKSPACE=nosuch BCTRL_PACE=of-variable"
    code, _, _ = await run(config, "stop --all --yes --rate 100", given)
    files = [(command.folder / name).exists() for name in ("of-profile", "of-variable")]
    assert (code, files) == (0, [made, False])


@pytest.mark.parametrize(
    "args",
    ["list ws", "get ws a", "stop ws a", "stop -o json ws a", "stop ws --all --yes"],
)
async def test_a_rejected_key_is_named(command: Command, run: Run, args: str) -> None:
    """Fault: the advice was to check BCTRL_API_KEY, which was not used."""
    code, out, err = await run(
        profile_of(command.api), f"{args} --profile x", "KEY_OF_PROFILE=wrong"
    )
    place = full("KEY_OF_PROFILE (api_key_env of {profile})")
    assert f"Check the API key from {place}" in out + err
    assert (code, "BCTRL_API_KEY" in out + err) == (2, False)
