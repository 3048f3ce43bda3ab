"""Merge journals: one outcome for each target of several files, such as those of shards."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import msgspec
from msgspec.structs import replace

from bctrl_async import _config
from bctrl_async.errors import BctrlConfigError, BctrlError, quote
from bctrl_async.journal._content import (
    OLD,
    checked_path,
    format_duration,
    read_content,
    read_error,
)
from bctrl_async.journal._format import error_of, may_run
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import (
    OutcomeRecord,
    RuntimeState,
    StopOutcome,
    StopReport,
    StopResult,
)

_log = logging.getLogger("bctrl_async.journal")
_T = TypeVar("_T")

_RANKS = {
    StopResult.STOPPED: 4,
    StopResult.ALREADY_STOPPED: 4,
    StopResult.ACCEPTED: 2,
    StopResult.NOT_FOUND: 1,
}
"""The result with the highest rank says most about a runtime; that of any other is 0."""
_ACCEPTED_AND_ENDED = 3
"""The rank of `accepted` if the runtime has failed or is gone since."""
_SENT_AGAIN = 2
"""The highest rank of an outcome whose target is sent again by a resumed run."""
_MAX_NAMED = 3


class JournalOutcome(StopOutcome, frozen=True, kw_only=True):
    """The outcome of a target in one or more journals.

    Args:
        journals: The journals that have one of the target, in the order in which they were given.
    """

    journals: tuple[Path, ...]


class MergedJournals(msgspec.Struct, frozen=True, kw_only=True):
    """The content of several journals of one server.

    Args:
        paths: The files.
        base_url: The server of their runs; None if all files are empty.
        started: The time at which the first of them was begun; None if all are empty.
        updated: The time of the last entry; None if there is none.
        outcomes: One outcome for each target. `index` is its position in the input of its own run.
        repeated: The targets that are in more than one journal.
        running_again: The targets that ran, or may have run, after the time at which another
            journal has them as not running.
        incomplete: The files whose last run is not complete: it goes on, ended early, or had
            failures.
        shards: The shards that complete runs have stopped, each with the number of shards.
    """

    paths: Sequence[Path]
    base_url: str | None
    started: datetime | None
    updated: datetime | None
    outcomes: Mapping[RuntimeRef, JournalOutcome]
    repeated: Sequence[RuntimeRef]
    running_again: AbstractSet[RuntimeRef]
    incomplete: Sequence[Path]
    shards: AbstractSet[tuple[int, int]]

    def report(self, *, missing_ok: bool = False) -> StopReport:
        """Return a report as if one run had written all journals.

        Targets that are `running_again` are failures.

        Args:
            missing_ok: Do not count `not_found` as a failure. A run without it that had such
                targets is not complete.
        """
        outcomes = [
            replace(outcome, state=RuntimeState.NOT_RUNNING, error=None)
            if missing_ok and outcome.result is StopResult.NOT_FOUND
            else outcome
            for outcome in self.outcomes.values()
        ]
        outcomes.sort(key=lambda outcome: outcome.at)
        elapsed = 0.0
        if self.started is not None and self.updated is not None:
            # Negative if the clocks of two machines differ.
            elapsed = max((self.updated - self.started).total_seconds(), 0.0)
        return StopReport.from_outcomes(outcomes, elapsed=elapsed, ended_early=self._ended_early())

    def _ended_early(self) -> BctrlError | None:
        if self.incomplete:
            names = _listed(self.incomplete, len(self.incomplete), lambda path: quote(str(path)))
            return BctrlError(
                f"{len(self.incomplete)} of {len(self.paths)} journals are not complete: {names}",
                advice="Their runs go on, ended early or had failures; repeat each with its whole "
                "input",
            )
        counts = sorted({count for _, count in self.shards if count > 0})
        present = {shard for shard in self.shards if 1 <= shard[0] <= shard[1]}
        if missing := sum(counts) - len(present):
            # There may be millions.
            shards = ((number, count) for count in counts for number in range(1, count + 1))
            left = (shard for shard in shards if shard not in present)
            names = _listed(left, missing, lambda shard: f"{shard[0]}/{shard[1]}")
            return BctrlError(
                f"no journal is of shard {names}",
                advice="Add the missing journals, or stop these shards",
            )
        return None


def merge_journals(
    paths: Iterable[str | os.PathLike[str]], *, max_age: float | None = None
) -> MergedJournals:
    """Read journals of one server, also while runs write them, and keep one outcome per target.

    Of several outcomes, the one that says most about the runtime is kept: `stopped` or
    `already_stopped`, else `accepted` of a runtime that has failed or is gone since, else any
    `accepted`, else `not_found`, else any other. Of several of these the first by time is kept, but
    the last if the target is to be sent again. But what is older than the last one that says that
    the runtime runs or may run does not count: it may have been started again. The evidence is a
    status that is not final, in an answer, a poll or a list, or an accepted stop. Any other failure
    says nothing of the runtime.

    An outcome whose runtime is not stopped has an `error`, as far as the journal has it, and a
    `runtime`, if the server described it.

    A warning is logged if the journals were begun more than a day apart.

    Args:
        paths: The files. One that is given twice is read once.
        max_age: Seconds since a journal was begun, above 0, beyond which it is rejected; None
            rejects none.

    Raises:
        BctrlConfigError: A file cannot be read, is not an intact journal of this version, is of
            another server than the first, or is older than `max_age`; or there is no file.
    """
    if max_age is not None:
        max_age = _config.seconds(max_age, "max_age")
    expected = "an iterable of paths"
    if isinstance(paths, str | bytes | os.PathLike):
        raise _config.invalid_type("paths", paths, expected)
    _config.check_type(paths, Iterable, "paths", expected)
    # A target would seem to be in two journals.
    checked = (checked_path(path, "paths") for path in paths)
    files = list({_resolved(path): path for path in checked}.values())
    if not files:
        raise BctrlConfigError("there are no journals", argument="paths")
    merging = _Merging(max_age)
    for path in files:
        merging.add(path)
    merging.check_ages()
    merging.choose()
    return MergedJournals(
        paths=files,
        base_url=merging.base_url,
        started=merging.started,
        updated=merging.updated,
        outcomes=merging.outcomes,
        # An item without names is not a target; a line that ends the input is in every shard.
        repeated=[target for target in merging.several if target.workspace_id],
        running_again=merging.running_again,
        incomplete=merging.incomplete,
        shards=merging.shards,
    )


def read_journals(
    paths: Iterable[str | os.PathLike[str]],
    *,
    missing_ok: bool = False,
    max_age: float | None = None,
) -> StopReport:
    """Return one report on several journals, such as those of shards, also while runs write them.

    `total` is the number of targets that have an outcome, each of which counts once, as
    `merge_journals` says. `elapsed` is the time from the begin of the first journal to the last
    entry. `retries` counts those of the outcomes that are kept. `throttled` and
    `resumed` are 0. `ended_early` is set if the last run of a journal is not complete, or no
    journal is of one of the shards.

    Args:
        paths: The files. One that is given twice is read once.
        missing_ok: Do not count `not_found` as a failure, as in the runs.
        max_age: Seconds since a journal was begun, above 0, beyond which it is rejected, such as
            one of an earlier night; None rejects none.

    Raises:
        BctrlConfigError: A file cannot be read, is not an intact journal of this version, is of
            another server than the first, or is older than `max_age`; or there is no file.
    """
    return merge_journals(paths, max_age=max_age).report(missing_ok=missing_ok)


class _Merging:
    """The journals merged so far.

    Args:
        max_age: The age in seconds beyond which a journal is rejected, or None.
    """

    def __init__(self, max_age: float | None) -> None:
        self._max_age = max_age
        self.base_url: str | None = None
        self.updated: datetime | None = None
        self.outcomes: dict[RuntimeRef, JournalOutcome] = {}
        self.several: dict[RuntimeRef, list[JournalOutcome]] = {}
        self.running_again: set[RuntimeRef] = set()
        self.incomplete: list[Path] = []
        self.shards: set[tuple[int, int]] = set()
        self._begun: list[tuple[datetime, Path]] = []

    @property
    def started(self) -> datetime | None:
        """The time at which the first journal was begun, None if all are empty."""
        return min(self._begun)[0] if self._begun else None

    def check_ages(self) -> None:
        """Log a warning if the journals may be of several nights."""
        if not self._begun:
            return
        first, last = min(self._begun), max(self._begun)
        if last[0] - first[0] > OLD:
            _log.warning(
                "the journal %r was begun %s before %r: if it is of an earlier night, what it has "
                "as stopped may run again",
                str(first[1]),
                format_duration(last[0] - first[0]),
                str(last[1]),
                extra={
                    "bctrl.event": "old_journal",
                    "bctrl.journal": str(first[1]),
                    "bctrl.age": (last[0] - first[0]).total_seconds(),
                },
            )

    def add(self, path: Path) -> None:
        """Read a journal and merge it."""
        journals = (path,)

        def outcome_in(record: OutcomeRecord, target: RuntimeRef) -> JournalOutcome:
            return _outcome_in(journals, record, target)

        content = read_content(path, outcome_in)
        if content is None or not content.is_complete:
            self.incomplete.append(path)
        if content is None:
            return
        self._check_server(path, content.base_url)
        if self._max_age is not None and (reason := content.excess_age(self._max_age)) is not None:
            raise read_error(path, reason)
        self._begun.append((content.started, path))
        self.shards |= content.shards
        if content.updated is not None:
            self.updated = max(self.updated or content.updated, content.updated)
        outcomes = cast("dict[RuntimeRef, JournalOutcome]", content.outcomes)
        if not self.outcomes:
            self.outcomes = outcomes
            return
        for target, outcome in outcomes.items():
            known = self.outcomes.setdefault(target, outcome)
            if known is not outcome:
                self.several.setdefault(target, [known]).append(outcome)

    def choose(self) -> None:
        """Keep one outcome of each target that is in several journals."""
        for target, outcomes in self.several.items():
            runs_at = max((each.at for each in outcomes if may_run(each)), default=None)
            current = [each for each in outcomes if runs_at is None or each.at >= runs_at]
            kept = reduce(_better, current)
            if may_run(kept) and any(_rank(each) >= _ACCEPTED_AND_ENDED for each in outcomes):
                self.running_again.add(target)
                kept = _with_running_error(kept)
            journals = tuple(path for each in outcomes for path in each.journals)
            self.outcomes[target] = msgspec.structs.replace(kept, journals=journals)

    def _check_server(self, path: Path, base_url: str) -> None:
        if self.base_url is None:
            self.base_url = base_url
        elif base_url != self.base_url:
            raise BctrlConfigError(
                f"the journals are of two servers: {str(self._begun[0][1])!r} of {self.base_url}, "
                f"{str(path)!r} of {base_url}",
                advice="Read those of each server on their own",
            )


def _listed(items: Iterable[_T], count: int, name: Callable[[_T], str]) -> str:
    names = ", ".join(map(name, islice(items, _MAX_NAMED)))
    return names + (f" and {count - _MAX_NAMED:,} more" if count > _MAX_NAMED else "")


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    # Before Python 3.13, a loop of links is a RuntimeError.
    except (OSError, RuntimeError, ValueError) as error:
        raise read_error(path, str(error)) from error


def _rank(outcome: StopOutcome) -> int:
    if outcome.result is StopResult.ACCEPTED and outcome.ok:
        return _ACCEPTED_AND_ENDED
    return _RANKS.get(outcome.result, 0)


def _still_runs(outcome: StopOutcome) -> bool:
    return outcome.state is RuntimeState.STILL_RUNNING


def _with_running_error(outcome: JournalOutcome) -> JournalOutcome:
    if outcome.result is StopResult.REJECTED:
        # Its own error says why it was not stopped.
        return outcome
    error = BctrlError(
        f"it {'still ran' if _still_runs(outcome) else 'may have run'} after another journal has "
        "it as no longer running",
        advice="Stop it again, with a new journal",
        workspace_id=outcome.target.workspace_id,
        alias=outcome.target.alias,
    )
    return msgspec.structs.replace(outcome, error=error)


def _better(known: JournalOutcome, outcome: JournalOutcome) -> JournalOutcome:
    rank, known_rank = _rank(outcome), _rank(known)
    if rank != known_rank:
        return outcome if rank > known_rank else known
    is_better = outcome.at > known.at if rank <= _SENT_AGAIN else outcome.at < known.at
    return outcome if is_better else known


def _outcome_in(
    journals: tuple[Path, ...], record: OutcomeRecord, target: RuntimeRef
) -> JournalOutcome:
    return JournalOutcome(
        index=record.index,
        target=target,
        result=record.result,
        state=record.state,
        request_id=record.request_id,
        runtime=record.runtime,
        error=error_of(record),
        attempts=record.attempts,
        elapsed=record.elapsed,
        at=record.at,
        journals=journals,
    )
