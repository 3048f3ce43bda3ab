"""Answers of gateways, which are no fact about a runtime: only the API's own error body is."""

from __future__ import annotations

import pytest
from helpers import Connect

from bctrl_async import BctrlServerError, BctrlSession, RetryPolicy, StopResult
from bctrl_async.emulator import Emulator, Reply

ENVOY = "upstream connect error or disconnect/reset before headers. reset reason: connection reset"
VARNISH = "<!DOCTYPE html><html><body><h1>Error 503 Backend fetch failed</h1></body></html>"
INGRESS = "<html>\r\n<head><title>503 Service Temporarily Unavailable</title></head></html>"
NESTED = {"error": {"code": "ServiceUnavailable", "message": "The backend is down."}}
ONCE = RetryPolicy(attempts=1, patience=0)

gateways = pytest.mark.parametrize("body", [ENVOY, VARNISH, INGRESS, NESTED, {}, ""])


def gateway(body: object, status: int = 503) -> Reply:
    """Return the answer to a stop that took effect before the connection to the API broke."""
    return Reply(status, body=body, takes_effect=True)


@gateways
async def test_a_503_of_a_gateway_after_the_effect_is_in_doubt(
    emulator: Emulator, session: BctrlSession, body: object
) -> None:
    """Fault: a stop that took effect was reported as rejected, may_have_stopped False."""
    emulator.poison("ws-1", "crm", gateway(body))

    with pytest.raises(BctrlServerError) as caught:
        await session.stop_runtime("ws-1", "crm", retry=ONCE)

    assert caught.value.may_have_stopped


@gateways
async def test_a_bulk_stop_that_ends_at_a_503_of_a_gateway_is_unknown(
    emulator: Emulator, session: BctrlSession, body: object
) -> None:
    """Fault: a stop that took effect was not_sent after a deadline."""
    emulator.poison("ws-1", "crm", gateway(body))

    report = await session.stop_runtimes([("ws-1", "crm")], deadline=0.2, verify=False)

    assert report.counts == {StopResult.UNKNOWN: 1}
    assert emulator.status("ws-1", "crm") == "stopped"


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (400, StopResult.REJECTED),
        (404, StopResult.REJECTED),
        (413, StopResult.REJECTED),
        (429, StopResult.REJECTED),
        (408, StopResult.UNKNOWN),
        (409, StopResult.UNKNOWN),
        (499, StopResult.UNKNOWN),
        (503, StopResult.UNKNOWN),
        (520, StopResult.UNKNOWN),
    ],
)
async def test_a_gateway_rejects_only_what_it_has_not_forwarded(
    emulator: Emulator, connect: Connect, status: int, result: StopResult
) -> None:
    emulator.poison("ws-1", "crm", Reply(status, body="No."))

    async with connect(retry=ONCE) as session:
        report = await session.stop_runtimes([("ws-1", "crm")], verify=False)

    assert report.counts == {result: 1}


async def test_the_503_of_the_api_says_that_nothing_was_done(
    emulator: Emulator, connect: Connect
) -> None:
    emulator.poison("ws-1", "crm", Reply(503))

    async with connect(retry=ONCE) as session:
        report = await session.stop_runtimes([("ws-1", "crm")], verify=False)

    assert report.counts == {StopResult.REJECTED: 1}
