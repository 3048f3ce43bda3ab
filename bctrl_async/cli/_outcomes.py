"""Outcomes as lines or records: each reason is explained once, and then counted."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.text import Text

from bctrl_async import BctrlError, RuntimeRef, StopOutcome, StopResult
from bctrl_async.cli import _output as out

_MAX_NAME = 100
_MAX_NAMED = 3
_RESULT_WIDTH = max(len(result) for result in StopResult)
_RUNNING = {True: "still running", False: "not running", None: "unconfirmed"}
_without_numbers = re.compile(r"\d+").sub


class _Group(NamedTuple):
    """Targets with the same result and reason; numbers in the reason may differ."""

    result: StopResult
    reason: str
    targets: list[RuntimeRef]


class OutcomePrinter:
    """A printer of outcomes, as lines or records.

    Each of `aliases` gets a line. Without them, only attempted targets that may run are shown: the
    first for each reason gets a line, and the others are counted.
    """

    def __init__(
        self,
        output: out.Output,
        aliases: Sequence[str] | None,
        *,
        prints_json: bool = False,
    ) -> None:
        self.output: out.Output = output
        self.prints_json: bool = prints_json
        self._prints_all = aliases is not None
        self._groups: dict[tuple[StopResult, str], _Group] = {}
        widest = max((cell_len(out.escape(each)) for each in aliases or ()), default=out.MAX_WIDTH)
        self._width = min(widest, out.MAX_WIDTH)

    def print(self, outcome: StopOutcome) -> None:
        """Print an outcome."""
        is_unsent = outcome.result is StopResult.NOT_SENT and not outcome.attempts
        if self.prints_json:
            self.output.print_object(outcome.to_dict())
        elif not (outcome.ok or is_unsent):
            self._print_failure(outcome)
        elif self._prints_all and not out.is_quiet.get():
            self._print_line(outcome, _describe(outcome))

    def _print_failure(self, outcome: StopOutcome) -> None:
        """Print a target that may run; only the first of a group gets advice."""
        is_invalid = outcome.result is StopResult.INVALID
        reason = "" if is_invalid else _reason(outcome)
        key = outcome.result, _without_numbers("0", reason)
        targets = self._groups.setdefault(key, _Group(outcome.result, reason, [])).targets
        targets.append(outcome.target)
        is_first = len(targets) <= (out.MAX_SHOWN if is_invalid else 1)
        if is_first or self._prints_all:
            self._print_line(outcome, _describe(outcome, advises=is_first))

    def describe(self, error: BctrlError) -> str:
        """Return the text of an error, without advice that a target's line has given."""
        is_explained = any(group.reason == _summary(error) for group in self._groups.values())
        return f"{out.name_call(error)}{error.summary if is_explained else out.describe(error)}"

    def finish(self) -> None:
        """Print how many targets had no line of their own, by reason, and name some of them."""
        if self._prints_all:
            return
        groups = sorted(self._groups.values(), key=lambda group: -len(group.targets))
        for result, reason, targets in groups:
            if not reason and len(targets) > out.MAX_SHOWN:
                more = len(targets) - out.MAX_SHOWN
                out.print_info(f"{more:,} more invalid targets are not shown")
            elif reason and (others := targets[1:]):
                listed = ", ".join(map(self._name, others[:_MAX_NAMED]))
                if len(others) > _MAX_NAMED:
                    listed += f" and {len(others) - _MAX_NAMED:,} more"
                line = f"{len(others):,} more {result} ({out.one_line(reason)}): {listed}"
                self.output.print_result(line)

    def _print_line(self, outcome: StopOutcome, detail: str) -> None:
        is_stopped = outcome.ok and not outcome.result.is_taken
        name = self._name(outcome.target)
        name += " " * (self._width - cell_len(name))
        result = (f"{outcome.result:<{_RESULT_WIDTH}}", "green" if is_stopped else "yellow")
        self.output.print_result(Text.assemble(name, "  ", result, "  ", out.one_line(detail)))

    def _name(self, target: RuntimeRef) -> str:
        alias = out.escape(target.alias)
        if len(alias) > _MAX_NAME:
            alias = f"{alias[:_MAX_NAME]}..."
        if self._prints_all or not target.workspace_id:
            return alias
        return f"{out.escape(target.workspace_id)} {alias}"


def _summary(error: BctrlError) -> str:
    """Return an error in a few words, without its target and its advice."""
    if error.status is not None and error.code is not None:
        return f"{error.status} {error.code}"
    return error.summary.partition(": ")[0]


def _reported_error(outcome: StopOutcome) -> BctrlError | None:
    """Return the error of an outcome, unless the status of its runtime says as much."""
    is_described = outcome.result.is_taken and outcome.runtime is not None
    return None if is_described else outcome.error


def _reason(outcome: StopOutcome) -> str:
    error, runtime = _reported_error(outcome), outcome.runtime
    if error is not None:
        return _summary(error)
    return f"status {out.escape(runtime.status)}" if runtime else "not confirmed"


def _describe(outcome: StopOutcome, *, advises: bool = True) -> str:
    if outcome.resumed:
        return "from the journal of an earlier run, not sent again"
    facts = []
    error = _reported_error(outcome)
    if error is None:
        facts.append(f"{outcome.elapsed:.2f} s")
        if outcome.attempts > 1:
            facts.append(f"{outcome.attempts} attempts")
    if outcome.result is not StopResult.STOPPED and outcome.runtime is not None:
        facts.append(f"status {out.escape(outcome.runtime.status)} ({_RUNNING[outcome.running]})")
    if error is not None:
        # The default advice of an error's class assumes a failed stop; show it only then.
        advises = advises and (
            not outcome.result.is_processed or error.advice != type(error).advice
        )
        text = out.describe(error) if advises else error.summary
        # The name of an invalid target is shown already.
        facts.append(text.removeprefix(f"invalid target {outcome.target.alias}: "))
    return ", ".join(facts)
