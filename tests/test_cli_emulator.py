"""The lines that `bctrl-async emulator -v` prints."""

from __future__ import annotations

import aiohttp
import pytest
from yarl import URL

from bctrl_async.cli._emulator import _print_request, emulator
from bctrl_async.emulator import Emulator, Fault, ReceivedRequest

RUNTIMES = "/v1/workspaces/demo/runtimes"


async def printed(
    capsys: pytest.CaptureFixture[str],
    method: str,
    path: str,
    *faults: Fault,
    key: str = "emulator-key",
) -> str:
    """Send one request, and return what is printed of it."""
    async with (
        Emulator(port=0, on_request=_print_request) as emulator,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client,
    ):
        emulator.add_runtime("demo", "runtime-0001")
        emulator.inject(*faults)
        try:
            async with client.request(method, URL(emulator.url + path, encoded=True)):
                pass
        except aiohttp.ServerDisconnectedError:
            assert faults == (Fault.DROP_BEFORE,)
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_the_help_names_every_fault() -> None:
    _, _, names = (emulator.__doc__ or "").partition("Faults:\n")
    assert names.replace(",", "").split() == list(Fault)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/runtime-0001", f"200 GET  {RUNTIMES}/runtime-0001\n"),
        ("/runtime-0002", f"404 GET  {RUNTIMES}/runtime-0002\n"),
        ("?api_key=secret", f"200 GET  {RUNTIMES}?...\n"),
        ("/a%2Fb%20c", f"404 GET  {RUNTIMES}/a%2Fb%20c (demo, a/b c)\n"),
        ("/%1B%5B2J", f"404 GET  {RUNTIMES}/%1B%5B2J (demo, '\\x1b[2J')\n"),
        ("/%FF", f"404 GET  {RUNTIMES}/%FF\n"),
    ],
)
async def test_a_request_is_a_line_with_its_status_and_path(
    capsys: pytest.CaptureFixture[str], path: str, expected: str
) -> None:
    assert await printed(capsys, "GET", RUNTIMES + path) == expected


@pytest.mark.parametrize("fault", Fault)
def test_a_stop_of_the_demo_fits_into_80_columns_with_any_fault(
    capsys: pytest.CaptureFixture[str], fault: Fault
) -> None:
    path = f"{RUNTIMES}/runtime-0001/stop"
    _print_request(
        ReceivedRequest("demo", "runtime-0001", "POST", path, {}, b"", fault, 200, "stop", 0.0)
    )
    line = capsys.readouterr().err
    assert line == f"200 POST {path} {fault}\n"
    assert len(line.rstrip("\n")) <= 80


async def test_a_request_without_an_answer_has_no_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = await printed(capsys, "POST", f"{RUNTIMES}/runtime-0001/stop", Fault.DROP_BEFORE)
    assert line.startswith("--- POST /v1/")


async def test_the_key_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    line = await printed(capsys, "GET", RUNTIMES, key="sk-live-1")
    assert line == f"401 GET  {RUNTIMES}\n"
