"""A raw connection to an emulator, on which a test sees every byte."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import NamedTuple, Self, cast

from jsonschema import Draft202012Validator
from yarl import URL

from bctrl_async.emulator import Emulator
from support.contract import response_schema
from support.helpers import BOUND

KEY = "Bearer emulator-key"
LIST = "/v1/workspaces/ws-1/runtimes"
GET = f"{LIST}/crm"
STOP = f"{GET}/stop"


def path_of(workspace_id: str, alias: str) -> str:
    return f"/v1/workspaces/{workspace_id}/runtimes/{alias}/stop"


def errors_against_contract(value: object) -> list[str]:
    """Return what is wrong with the Runtime of an answer."""
    checker = Draft202012Validator.FORMAT_CHECKER
    validator = Draft202012Validator(response_schema(), format_checker=checker)
    return [error.message for error in validator.iter_errors(value)]


class Answer(NamedTuple):
    """An answer; the names of its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        return cast("dict[str, object]", json.loads(self.body))


class Wire:
    """A raw connection: the test writes and reads every byte."""

    def __init__(self, emulator: Emulator) -> None:
        self._url = URL(emulator.url)

    async def __aenter__(self) -> Self:
        self.reader, self._writer = await asyncio.open_connection(
            self._url.host, self._url.port
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    async def send(
        self,
        path: str = STOP,
        method: str = "POST",
        key: str = KEY,
        packed: bytes = b"",
    ) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: {key}"]
        lines += [f"Content-Encoding: {'gzip' if packed else 'identity'}"]
        lines += [f"Content-Length: {len(packed)}", "", ""]
        self._writer.write("\r\n".join(lines).encode() + packed)
        await self._writer.drain()

    async def answer(self) -> Answer:
        async with asyncio.timeout(BOUND):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            pairs = [line.split(": ", 1) for line in lines[1:-1]]
            headers = {name.lower(): value for name, value in pairs}
            assert len(headers) == len(pairs), "a header was sent twice"
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(lines[0].split()[1]), headers, body)

    @property
    def unread(self) -> bytes:
        """The bytes that have arrived and were not read."""
        return bytes(self.reader._buffer)  # type: ignore[attr-defined]  # no API has it.

    async def rest(self) -> bytes:
        async with asyncio.timeout(BOUND):
            return await self.reader.read()


async def ask(
    emulator: Emulator, path: str = STOP, method: str = "POST", key: str = KEY
) -> Answer:
    """Return the answer to a request, by default a stop of `crm` in `ws-1`."""
    async with Wire(emulator) as wire:
        await wire.send(path, method, key)
        return await wire.answer()
