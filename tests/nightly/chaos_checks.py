"""The checks after a chaos run: each line of the journal, report and emulator."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set as AbstractSet
from dataclasses import replace

from chaos_server import ChaosServer
from support.journal_lines import JournalLines, Record

from bctrl_async import RuntimeRef, StopReport, StopResult
from bctrl_async.emulator import ReceivedRequest, Reply

_CLAIMS_STOPPED = frozenset(
    {StopResult.STOPPED, StopResult.ACCEPTED, StopResult.ALREADY_STOPPED}
)
_CLAIMS_NO_EFFECT = frozenset({StopResult.REJECTED, StopResult.NOT_SENT})
_ANSWERED = _CLAIMS_STOPPED | {StopResult.NOT_FOUND}
_CONFIRMED = frozenset({StopResult.STOPPED, StopResult.ALREADY_STOPPED})
"""The results that a poll alone can confirm."""
_THROTTLED = frozenset({429, 503})
_FINAL_NO = frozenset({307, 401, 404, *_THROTTLED})

LOGIN_PAGE = Reply(
    200,
    body="<title>Sign in</title>",
    headers={"Content-Type": "text/html"},
    takes_effect=False,
)
FOREIGN_NOT_FOUND = Reply(404, body={"message": "no Route matched with those values"})
_GATEWAYS = (
    Reply(503, body="upstream connect error or disconnect/reset before headers"),
    Reply(
        503, body="<html><body><h1>Error 503 Backend fetch failed</h1></body></html>"
    ),
    Reply(503, body="<html><head><title>503 Service Unavailable</title></head></html>"),
    Reply(408, body="<html><body><h1>408 Request Time-out</h1></body></html>"),
    Reply(409, body="Conflict"),
    Reply(
        499, body="<html><head><title>499 Client Closed Request</title></head></html>"
    ),
)
GATEWAYS = (*_GATEWAYS, *(replace(reply, takes_effect=True) for reply in _GATEWAYS))
"""Answers of a proxy and of another service, before the effect and after it."""
_PROVE_NOTHING = (LOGIN_PAGE, *GATEWAYS)

Status = str | None


def check_journal(journal: JournalLines, base_url: str) -> Iterator[str]:
    """Check the journal of a single run."""
    if journal.is_torn:
        yield "the last line of the journal is cut short"
    if journal.header["base_url"] != f"{base_url}/v1":
        yield f"the header of the journal is {journal.header}"


def done_targets(entries: Iterable[Record]) -> set[tuple[str, str]]:
    """Return the targets that are done."""
    # Over a stream a target may be there several times, each of which is a stop of its
    # own.
    last = {(entry["workspace_id"], entry["alias"]): entry for entry in entries}
    return {target for target, entry in last.items() if entry.get("ok")}


def check_account(
    entries: Sequence[Record], report: StopReport, delivered: Counter[int]
) -> Iterator[str]:
    """Compare the entries of the journal with the report and the delivered outcomes."""
    indices = Counter(entry["index"] for entry in entries)
    results = Counter(StopResult(entry["result"]) for entry in entries)
    failed = {entry["index"] for entry in entries if not entry.get("ok")}
    rules = {
        "a target has two outcomes": max(indices.values(), default=1) == 1,
        "a target has no outcome": sorted(indices) == list(range(report.total)),
        "the counts differ from the journal": results == report.counts,
        "the counts do not add up": report.counts.total() == report.total,
        "the failures differ from the journal": failed
        == {outcome.index for outcome in report.failures},
        "an outcome was delivered twice": max(delivered.values(), default=1) == 1,
        "a delivered outcome is not in the journal": delivered.keys() <= indices.keys(),
    }
    yield from (problem for problem, holds in rules.items() if not holds)


def check_targets(
    entries: Iterable[Record],
    targets: Sequence[object],
    emulator: ChaosServer,
    before: Mapping[RuntimeRef, Status],
    poisoned: frozenset[RuntimeRef],
) -> Iterator[str]:
    """Compare each entry of the journal with the emulator.

    Args:
        entries: The entries of the journal.
        targets: The input; an item that is not a RuntimeRef is invalid.
        emulator: The server of the run.
        before: The status of each target before the run.
        poisoned: The targets of which every request met a fault.
    """
    requests: defaultdict[tuple[object, object], list[ReceivedRequest]] = defaultdict(
        list
    )
    first_stops: dict[tuple[object, object], int] = {}
    for number, request in enumerate(emulator.requests):
        requests[request.target].append(request)
        if request.method == "POST":
            first_stops.setdefault(request.target, number)
    by_target: defaultdict[RuntimeRef, list[Record]] = defaultdict(list)
    for entry in entries:
        target = targets[entry["index"]]
        if isinstance(target, RuntimeRef):
            by_target[target].append(entry)
            if (entry["workspace_id"], entry["alias"]) != target:
                yield f"target {entry['index']} has other names in the journal"
        elif entry["result"] != StopResult.INVALID:
            yield f"target {entry['index']} is {entry['result']}, but it is invalid"
    for target, group in by_target.items():
        words = {
            word
            for word, number in emulator.words[target].items()
            if number >= first_stops.get(target, 0)
        }
        rules = _contradictions(
            group, requests[target], words, before[target], emulator.status(*target)
        )
        results = [entry["result"] for entry in group]
        claim = f"target {group[0]['index']} is {results}"
        # Nothing but a list can have said more.
        unsaid = _ANSWERED - (_CONFIRMED if words else set())
        if target in poisoned and not unsaid.isdisjoint(results):
            yield f"{claim}, but every answer to it was a fault"
        for problem in rules:
            yield f"{claim}, but {problem}"


def _contradictions(
    group: Sequence[Record],
    requests: Sequence[ReceivedRequest],
    words: AbstractSet[tuple[str, str]],
    before: Status,
    now: Status,
) -> Iterator[str]:
    """Yield what contradicts the outcomes of a target, which may be repeated.

    `words` are the ids and statuses that the server has said of its runtime since the
    first stop arrived, in an answer about it or in a list.
    """
    results = {StopResult(entry["result"]) for entry in group}
    stops = [request for request in requests if request.method == "POST"]
    # What the API itself answered, and not something in front of it.
    statuses = {r.status for r in requests if r.fault not in _PROVE_NOTHING}
    own_404 = any(r.status == 404 and r.fault is None for r in requests)
    answers = [request.status for request in stops]
    said = {status for _, status in words}
    unsaid = {
        (entry["runtime"]["id"], entry["runtime"]["status"])
        for entry in group
        if entry.get("runtime")
    } - words
    rules = {
        f"its status is {now}": (
            not results & _CLAIMS_STOPPED or now in {"stopped", "failed"}
        )
        and (StopResult.NOT_FOUND not in results or now is None),
        f"its status was {before} and is {now}": not results <= _CLAIMS_NO_EFFECT
        or now == before,
        f"the server received it {len(stops)} times": len(stops)
        <= sum(entry.get("attempts", 0) for entry in group),
        f"the server has never said {unsaid} of it since": not unsaid,
        f"the server answered {answers}, and said {said}": (
            results != {StopResult.NOT_SENT}
            or all(request.status in _THROTTLED for request in stops)
        )
        and (StopResult.STOPPED not in results or "stopped" in said)
        and (StopResult.ACCEPTED not in results or 200 in statuses)
        and (
            StopResult.ALREADY_STOPPED not in results
            or 409 in statuses
            or "failed" in said
        )
        and (StopResult.NOT_FOUND not in results or own_404)
        and (StopResult.REJECTED not in results or bool(_FINAL_NO & statuses)),
    }
    yield from (problem for problem, holds in rules.items() if not holds)
