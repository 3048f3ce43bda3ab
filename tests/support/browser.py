"""Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from support.helpers import BOUND

CHROMIUM = shutil.which("chromium")
_KEYS = {
    "Tab": 9,
    "Enter": 13,
    "Escape": 27,
    " ": 32,
    "ArrowDown": 40,
    "k": 75,
    "/": 191,
}


class Tab:
    """A page in Chromium.

    Attributes:
        errors: What the page logged: exceptions, and violations of its
            Content-Security-Policy.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.errors: list[str] = []
        self._socket = socket
        self._last = 0
        self._answers: defaultdict[int, asyncio.Future[dict[str, Any]]] = defaultdict(
            asyncio.get_running_loop().create_future
        )

    async def read(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                self._answers[data["id"]].set_result(data)
            elif data["method"] == "Runtime.exceptionThrown":
                details = data["params"]["exceptionDetails"]
                self.errors.append(
                    details.get("exception", {}).get("description", details["text"])
                )
            elif data["method"] == "Log.entryAdded":
                entry = data["params"]["entry"]
                if entry["level"] == "error" and entry["source"] != "network":
                    self.errors.append(entry["text"])

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        self._last += 1
        number = self._last
        await self._socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(self._answers[number], BOUND)
        del self._answers[number]
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def run(self, script: str) -> Any:  # noqa: ANN401 - JSON.
        """Return the value of an expression, or what its promise resolves to."""
        answer = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    async def wait_for(self, condition: str) -> None:
        """Wait until an expression is true; a page that is being loaded is not."""
        try:
            async with asyncio.timeout(BOUND):
                while True:
                    with suppress(RuntimeError):
                        if await self.run(f"Boolean({condition})"):
                            return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            shown = await self.run("document.body.innerText")
            raise AssertionError(
                f"{condition} did not become true; errors: {self.errors}\n{shown}"
            ) from None

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.wait_for(
            "document.readyState === 'complete' && location.href !== 'about:blank'"
        )

    async def reload(self) -> None:
        await self.run("window.isOld = true")
        await self.call("Page.reload")
        await self.wait_for("document.readyState === 'complete' && !window.isOld")

    async def press(self, key: str, *, control: bool = False) -> None:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=_KEYS[key],
                modifiers=2 if control else 0,
                **({"text": text} if text and kind == "keyDown" else {}),
            )

    async def write(self, text: str) -> None:
        """Write into the element that has the focus."""
        await self.call("Input.insertText", text=text)

    async def show_as(self, *, width: int, scheme: str = "light") -> None:
        """Set the width in CSS pixels, and the colour scheme that the user prefers."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self) -> bytes:
        """Return a picture of the whole page, as PNG."""
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])


@contextmanager
def chromium() -> Iterator[str]:
    """Run Chromium, and yield the address of its DevTools."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
                *(
                    "--remote-debugging-port=0",
                    f"--user-data-dir={profile}",
                    "--no-first-run",
                ),
                # With it each memory of WebAssembly takes gigabytes of the address
                # space, which may be limited (`ulimit -v`).
                "--disable-features=WebAssemblyTrapHandler",
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            ready = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + BOUND
            while not (ready.exists() and ready.read_text().count("\n")):
                assert time.monotonic() < deadline, "Chromium did not start"
                time.sleep(0.02)
            yield f"127.0.0.1:{ready.read_text().splitlines()[0]}"
        finally:
            process.kill()
            process.wait()


@asynccontextmanager
async def new_tab(browser: str) -> AsyncIterator[Tab]:
    """Open a tab that shares nothing with others, such as cookies.

    Args:
        browser: The address of the DevTools of Chromium.
    """
    async with aiohttp.ClientSession(f"http://{browser}") as http:
        async with http.get("/json/version") as answer:
            url = (await answer.json())["webSocketDebuggerUrl"]
        async with _connected(http, url) as window:
            context = await window.call("Target.createBrowserContext")
            page = await window.call(
                "Target.createTarget", url="about:blank", **context
            )
            async with _connected(http, f"/devtools/page/{page['targetId']}") as tab:
                for domain in ("Page", "Runtime", "Log"):
                    await tab.call(f"{domain}.enable")
                yield tab
            await window.call("Target.disposeBrowserContext", **context)


@asynccontextmanager
async def _connected(http: aiohttp.ClientSession, url: str) -> AsyncIterator[Tab]:
    async with http.ws_connect(url, max_msg_size=0) as socket:
        tab = Tab(socket)
        reading = asyncio.create_task(tab.read())
        yield tab
        reading.cancel()
