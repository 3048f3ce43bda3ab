"""Outcomes as lines or records: each reason is explained once, and then counted."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

from bctrl_async import (
    BctrlError,
    RuntimeRef,
    RuntimeStatus,
    StopOutcome,
    StopResult,
)
from bctrl_async.cli import _output as out

_MAX_ALIAS = 100
"""The most characters of an alias that are shown."""
_MAX_EXAMPLES = 3
"""The most targets that are named for a reason, after the first."""
_RESULT_WIDTH = max(len(result) for result in StopResult)
_RUNNING = {True: "still running", False: "not running", None: "unconfirmed"}
_replace_numbers = re.compile(r"\d+").sub


class _Group(NamedTuple):
    """Targets with the same result and reason; numbers in the reason may differ."""

    result: StopResult
    reason: str
    targets: list[RuntimeRef]


class OutcomePrinter:
    """A printer of outcomes, as lines or records.

    Each of `aliases` gets a line. Without them, only attempted targets that may run are
    shown: the first for each reason gets a line, and the others are counted.
    """

    def __init__(self, output: out.Output, aliases: Sequence[str] = ()) -> None:
        self._output = output
        self._prints_all = bool(aliases)
        self._groups: dict[tuple[StopResult, str], _Group] = {}
        self._width = out.width_of(out.escape(alias) for alias in aliases)

    def print(self, outcome: StopOutcome) -> None:
        """Print an outcome."""
        # A stop that could not connect is `not_sent`, too, but it was attempted.
        is_unattempted = outcome.result is StopResult.NOT_SENT and not outcome.attempts
        if self._output.prints_json:
            self._output.print_object(outcome.to_dict())
        elif not (outcome.ok or is_unattempted):
            self._print_failure(outcome)
        elif self._prints_all and not out.is_quiet.get():
            self._print_line(outcome, _describe(outcome))

    def _print_failure(self, outcome: StopOutcome) -> None:
        """Print a target that may run; only the first of a group get advice."""
        reason = _reason(outcome)
        # Each invalid target, which has no reason here, has advice of its own.
        max_advised = 1 if reason else out.MAX_SHOWN
        key = outcome.result, _replace_numbers("0", reason)
        group = self._groups.setdefault(key, _Group(outcome.result, reason, []))
        group.targets.append(outcome.target)
        is_among_first = len(group.targets) <= max_advised
        if is_among_first or self._prints_all:
            self._print_line(outcome, _describe(outcome, with_advice=is_among_first))

    def describe(self, error: BctrlError) -> str:
        """Return an error's text, without advice that a target's line has given."""
        call = out.name_call(error)
        if any(group.reason == _summary(error) for group in self._groups.values()):
            return f"{call}{error.summary}"
        return f"{call}{out.describe(error)}"

    def finish(self) -> None:
        """Print how many targets had no line, by reason, and name some of them."""
        if self._prints_all:
            return
        groups = sorted(self._groups.values(), key=lambda group: -len(group.targets))
        for group in groups:
            more = len(group.targets) - out.MAX_SHOWN
            if group.reason:
                self._print_rest(group)
            elif more > 0:
                out.print_info(f"{more:,} more invalid targets are not shown")

    def _print_rest(self, group: _Group) -> None:
        """Print how many targets of a group follow the first, and name some of them."""
        targets = group.targets[1:]
        if not targets:
            return
        names = ", ".join(self._name(target) for target in targets[:_MAX_EXAMPLES])
        if len(targets) > _MAX_EXAMPLES:
            names += f" and {len(targets) - _MAX_EXAMPLES:,} more"
        reason = out.one_line(group.reason)
        line = f"{len(targets):,} more {group.result} ({reason}): {names}"
        self._output.print_result(line)

    def _print_line(self, outcome: StopOutcome, detail: str) -> None:
        is_stopped = outcome.ok and not outcome.result.is_accepted
        style = "green" if is_stopped else "yellow"
        name = out.pad(self._name(outcome.target), self._width)
        result = (f"{outcome.result:<{_RESULT_WIDTH}}", style)
        line = Text.assemble(name, "  ", result, "  ", out.one_line(detail))
        self._output.print_result(line)

    def _name(self, target: RuntimeRef) -> str:
        alias = out.escape(target.alias)
        if len(alias) > _MAX_ALIAS:
            alias = f"{alias[:_MAX_ALIAS]}..."
        if self._prints_all or not target.workspace_id:
            return alias
        return f"{out.escape(target.workspace_id)} {alias}"


def _summary(error: BctrlError) -> str:
    """Return an error in a few words, without its target and its advice."""
    if error.status is not None and error.code is not None:
        return f"{error.status} {error.code}"
    return error.summary.partition(": ")[0]


def _reported_error(outcome: StopOutcome) -> BctrlError | None:
    """Return the error of an outcome, unless its runtime's status says as much."""
    if not outcome.result.is_accepted or outcome.runtime is None:
        return outcome.error
    if outcome.runtime.status == RuntimeStatus.ACTIVE and outcome.running is None:
        # No poll was answered, and the error has the reason.
        return outcome.error
    return None


def _reason(outcome: StopOutcome) -> str:
    """Return why a target may run; an empty text if it is invalid."""
    if outcome.result is StopResult.INVALID:
        return ""
    error = _reported_error(outcome)
    if error is not None:
        return _summary(error)
    if outcome.runtime is not None:
        return f"status {out.escape(outcome.runtime.status)}"
    return "not confirmed"


def _describe(outcome: StopOutcome, *, with_advice: bool = True) -> str:
    if outcome.resumed:
        return "from the journal of an earlier run, not sent again"
    facts = []
    error = _reported_error(outcome)
    if error is None:
        facts.append(f"{outcome.elapsed:.2f} s")
        if outcome.attempts > 1:
            facts.append(f"{outcome.attempts} attempts")
    if outcome.result is not StopResult.STOPPED and outcome.runtime is not None:
        status = out.escape(outcome.runtime.status)
        facts.append(f"status {status} ({_RUNNING[outcome.running]})")
    if error is not None:
        text = error.summary
        if with_advice and _advice_applies(outcome, error):
            text = out.describe(error)
        # The name of an invalid target is shown already.
        facts.append(text.removeprefix(f"invalid target {outcome.target.alias}: "))
    return ", ".join(facts)


def _advice_applies(outcome: StopOutcome, error: BctrlError) -> bool:
    """Return True unless the advice is about a failure, and the stop did not fail."""
    # The advice of a class is for a failed call.
    is_default = error.advice == type(error).advice
    return not (outcome.result.is_processed and is_default)
