"""The rules of single calls: a return means stopped, and an error tells the truth."""

from __future__ import annotations

from bctrl_async import (
    BctrlConflictError,
    BctrlError,
    BctrlNotFoundError,
    Runtime,
)
from sim.check_throttling import check_service
from sim.exchange import Exchange
from sim.records import SingleCall
from sim.rules import (
    NOT_RUNNING,
    PATIENCE,
    Problem,
    Problems,
    may_have_stopped,
    name,
)
from sim.world import World


def check_call(world: World, call: SingleCall) -> Problems:
    """Yield what is wrong with a call of `stop_runtime`."""
    took = call.ended - call.began
    if took > PATIENCE + world.plan.longest(
        len(world.calls), world.plan.max_connections
    ):
        yield Problem("slow", f"the call of {name(call.target)} took {took:.0f} s")
    yield from check_service(world, call)
    ended, now = call.result, world.statuses()[call.target]
    claim = f"the call of {name(call.target)}"
    if ended is None:
        if call.cancel_after is None:
            yield Problem("no result", f"{claim} has no result")
    elif isinstance(ended, Runtime):
        if ended.alias != call.target[1]:
            yield Problem("another's", f"{claim} returned {ended.alias!r}")
        if now not in NOT_RUNNING and not call.reads:
            yield Problem("runs on", f"{claim} returned, but its status is {now}")
    elif isinstance(ended, BctrlError):
        exchanges = [
            exchange
            for exchange in world.network.exchanges
            if exchange.target == call.target
        ]
        found = [
            *_check_error(call, ended, exchanges, now),
            *_check_conflict(call, ended, exchanges, now),
        ]
        if not world.plan.climate.hazards - {"cut"} and call.before == "active":
            found.append(Problem("calm", "although nothing failed"))
        for rule, text in found:
            yield Problem(rule, f"{claim} raised {ended!r}, {text}")
    else:
        yield Problem("raised", f"{claim} raised {ended!r}")


def _check_error(
    call: SingleCall, error: BctrlError, exchanges: list[Exchange], now: str | None
) -> Problems:
    sent = [exchange for exchange in exchanges if exchange.stops]
    if call.reads and (sent or error.may_have_stopped or now != call.before):
        yield Problem("read", "but it stopped something, or says that it may have")
    if not error.may_have_stopped and now != call.before:
        yield Problem("had an effect", f"but its status changed to {now}")
    if not (call.reads or error.may_have_stopped) and any(map(may_have_stopped, sent)):
        yield Problem("may have stopped", "but an attempt may have stopped it")
    if (
        isinstance(error, BctrlNotFoundError)
        and error.names_runtime
        and now is not None
    ):
        yield Problem("is there", f"but its status is {now}")
    if error.attempts < len(sent):
        yield Problem(
            "attempts", f"after {error.attempts} attempts, but {len(sent)} were sent"
        )


def _check_conflict(
    call: SingleCall, error: BctrlError, exchanges: list[Exchange], now: str | None
) -> Problems:
    if not (isinstance(error, BctrlConflictError) and error.already_stopped):
        return
    if now not in NOT_RUNNING:
        yield Problem("runs on", f"but its status is {now}")
    was_read = any(
        exchange.status == 200 and exchange.answered is not None and not exchange.page
        for exchange in exchanges
        if not exchange.stops
    )
    if isinstance(error.__cause__, BctrlError) and not was_read:
        # It has looked, but the runtime cannot be had.
        return
    if call.before == "active":
        yield Problem("own work", "although it had stopped the runtime itself")
    if call.stopped_ok:
        yield Problem("stopped_ok", "in spite of stopped_ok")
