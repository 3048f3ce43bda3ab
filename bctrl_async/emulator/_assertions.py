"""The requests that an emulator received, and how a test's assertion fails."""

import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from bctrl_async.emulator._contract import WireRuntime
from bctrl_async.emulator._faults import Fault
from bctrl_async.emulator._replies import Reply

Target = tuple[str, str]

_MAX_LINES = 20


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A request as received, and the emulator's reaction to it.

    Attributes:
        workspace_id: The workspace by the name given to `add_runtime`, else as in the
            path; None if the path is unknown.
        alias: The decoded alias, None for the path of a list and an unknown path.
        method: The HTTP method.
        raw_path: The request target exactly as on the wire, with its query.
        headers: The headers, with case-insensitive names.
        body: The body as on the wire, not decompressed.
        fault: The fault or reply that was applied, None for normal behaviour.
        status: The HTTP status of the response, None if there was no response.
        operation: Its name, such as `stop`; None if the path is unknown, or its
            operation has another method.
        received_at: Seconds from the emulator's start until the request had arrived, on
            a clock that never goes back.
    """

    workspace_id: str | None
    alias: str | None
    method: str
    raw_path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes
    fault: Fault | Reply | None
    status: int | None
    operation: str | None
    received_at: float

    @property
    def target(self) -> Target:
        """The workspace and the alias, each empty if there is none."""
        return self.workspace_id or "", self.alias or ""


def explain(
    marked: Mapping[str, Sequence[Target]],
    runtimes: Mapping[Target, WireRuntime],
    ending: Container[Target],
    stops: Sequence[ReceivedRequest],
) -> str:
    """Return a line for each marked target: its status, and what its stops got."""
    lines = ["the stops are not as expected:"]
    for mark, targets in marked.items():
        for target in targets[:_MAX_LINES]:
            workspace_id, alias = target
            status = runtimes[target]["status"] if target in runtimes else "never added"
            if target in ending:
                status += ", ending"
            answers = _join([_answer(stop) for stop in stops if stop.target == target])
            lines.append(f"  {mark} {alias!r} in {workspace_id!r}: {status}; {answers}")
        if len(targets) > _MAX_LINES:
            lines.append(f"  {mark} and {len(targets) - _MAX_LINES} more")
    return "\n".join(lines)


def _join(answers: list[str]) -> str:
    """Join the answers to the stops of a target, and count repetitions."""
    if not answers:
        return "no stop received"
    texts = []
    for answer, group in itertools.groupby(answers):
        count = len(list(group))
        texts.append(answer if count == 1 else f"{answer} {count} times")
    return f"answered {', '.join(texts)}"


def _answer(stop: ReceivedRequest) -> str:
    status = "not at all" if stop.status is None else str(stop.status)
    if stop.fault is None:
        return status
    if isinstance(stop.fault, Reply):
        return f"{status} (a Reply)"
    return f"{status} ({stop.fault})"
