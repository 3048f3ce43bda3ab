"""Answers of gateways, which are no fact about a runtime: only the API's own error body is."""

from __future__ import annotations

import pytest
from helpers import Connect, pass_time, started

from bctrl_async import BctrlNotFoundError, RetryPolicy, StopOutcome, StopResult
from bctrl_async.emulator import Emulator, Reply

ONCE = RetryPolicy(attempts=1, patience=0, base=0.001, cap=0.001)
CRM = ("ws-1", "crm")
ENVOY = "upstream connect error or disconnect/reset before headers. reset reason: connection reset"


async def stop_one(connect: Connect, *, verify: bool = False) -> StopOutcome:
    """Stop one runtime in bulk and return its outcome."""
    outcomes: list[StopOutcome] = []
    async with connect(retry=ONCE) as session:
        await session.stop_runtimes([CRM], verify=verify, on_outcome=outcomes.append)
    [outcome] = outcomes
    return outcome


@pytest.mark.parametrize(
    "body",
    [ENVOY, {"error": {"code": "ServiceUnavailable", "message": "The backend is down."}}, ""],
)
async def test_a_bulk_stop_that_ends_at_a_503_of_a_gateway_is_unknown(
    emulator: Emulator, connect: Connect, body: object
) -> None:
    """Fault: a stop that took effect was `rejected`, or `not_sent` after a deadline."""
    emulator.poison(*CRM, Reply(503, body=body, takes_effect=True))

    async with connect() as session:
        batch = session.stop_runtimes([CRM], deadline=30, verify=False)
        # The second request follows the first answer.
        running = await started(batch, emulator, 2)
        pass_time(30)
        await running

    assert batch.report.counts == {StopResult.UNKNOWN: 1}
    assert emulator.status(*CRM) == "stopped"


@pytest.mark.parametrize(
    ("reply", "result"),
    [
        (Reply(400, body="No."), StopResult.REJECTED),
        (Reply(413, body="No."), StopResult.REJECTED),
        (Reply(429, body="No."), StopResult.REJECTED),
        (Reply(408, body="No."), StopResult.UNKNOWN),
        (Reply(409, body="No."), StopResult.UNKNOWN),
        (Reply(503, body="No."), StopResult.UNKNOWN),
        (Reply(520, body="No."), StopResult.UNKNOWN),
        (Reply(503), StopResult.REJECTED),
    ],
    ids=lambda value: (
        f"{value.status} {value.body or 'API'}" if isinstance(value, Reply) else value
    ),
)
async def test_a_gateway_rejects_only_what_it_has_not_forwarded(
    emulator: Emulator, connect: Connect, reply: Reply, result: StopResult
) -> None:
    emulator.poison(*CRM, reply)

    assert (await stop_one(connect)).result is result


FOREIGN_404: dict[str, object] = {
    "Kong": {"message": "no Route matched with those values"},
    "AWS S3": {"Code": "NoSuchKey", "code": "NoSuchKey", "Key": "crm"},
    "Kubernetes": {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404},
    "a problem whose detail names a runtime": {"detail": "runtime.not_found", "code": "not_found"},
    "a gateway that nests its errors": {"error": {"code": "runtime.not_found"}},
    "another path of the API": {"code": "route.not_found"},
    "another code of the API": {"code": "workspace.suspended"},
    "an empty list": [],
    "Envoy": "no healthy upstream",
    "a page": "<html><h1>404 Not Found</h1></html>",
    "nothing": "",
}


@pytest.mark.parametrize("body", FOREIGN_404.values(), ids=FOREIGN_404)
async def test_a_404_without_a_code_of_the_api_is_rejected(
    emulator: Emulator, connect: Connect, body: object
) -> None:
    """Fault: any JSON object in a 404 settles a stop, also of a gateway without a route."""
    emulator.poison(*CRM, Reply(404, body=body))

    outcome = await stop_one(connect)

    assert outcome.result is StopResult.REJECTED
    assert isinstance(outcome.error, BctrlNotFoundError)
    assert not outcome.error.names_runtime


async def test_a_poll_learns_nothing_from_a_404_without_a_code_of_the_api(
    emulator: Emulator, connect: Connect
) -> None:
    """Fault: verified against a 404 of another service, an active runtime becomes `not_found`."""
    emulator.inject(Reply(200, body=dict(emulator.runtimes[CRM]), takes_effect=False))
    emulator.inject(*[Reply(404, body=FOREIGN_404["Kong"])] * 9, method="GET")

    outcome = await stop_one(connect, verify=True)

    assert outcome.result is StopResult.ACCEPTED
    assert outcome.runtime is not None
    assert outcome.runtime.status == "active"


@pytest.mark.parametrize("code", ["runtime.not_found", "workspace.not_found"])
async def test_a_404_with_a_code_of_the_api_is_not_found(
    emulator: Emulator, connect: Connect, code: str
) -> None:
    emulator.poison(*CRM, Reply(404, code=code))

    assert (await stop_one(connect)).result is StopResult.NOT_FOUND
