"""The server of a chaos run, which remembers what its answers say of each runtime."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from aiohttp import web
from support.wire_faults import OVERSIZED, WireEmulator

from bctrl_async.emulator import Fault, Reply
from bctrl_async.emulator._contract import Route

Target = tuple[str, str]

_NOT_WHOLE = frozenset(
    {Fault.DROP_BEFORE, Fault.DROP_AFTER, Fault.HANG, Fault.TRUNCATED_JSON}
)
"""The faults that cut an answer off, whatever it would have said."""


class ChaosServer(WireEmulator):
    """An emulator that remembers what its answers say of each runtime."""

    @cached_property
    def words(self) -> defaultdict[Target, dict[tuple[str, str], int]]:
        """The ids and statuses of each target that a client could read.

        They are of an answer about the runtime or of a list. Each has the number of the
        last request that was answered so: its index in `requests`.
        """
        return defaultdict(dict)

    def _decide(
        self, request: web.BaseRequest, route: Route
    ) -> tuple[Fault | Reply | None, Reply]:
        fault, reply = super()._decide(request, route)
        if reply.status == 200 and fault not in _NOT_WHOLE:
            for runtime in _runtimes_in(reply.body):
                words = self.words[route.workspace_id, runtime["alias"]]
                words[runtime["id"], runtime["status"]] = len(self.requests)
        return fault, reply


def _runtimes_in(body: object) -> Iterator[Mapping[str, Any]]:
    """Yield each runtime that a client can read in the body of a 200."""
    if not isinstance(body, Mapping) or _is_oversized(body):
        return
    for item in body.get("runtimes", [body]):
        if "id" in item:
            yield item


def _is_oversized(body: Mapping[str, Any]) -> bool:
    assert isinstance(OVERSIZED.body, Mapping)
    return OVERSIZED.body.keys() <= body.keys()
