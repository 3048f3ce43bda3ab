"""404 answers of other services, which say nothing about a runtime."""

from __future__ import annotations

import asyncio
import json

import pytest
from servers import answering, http_answer, raw_server

from bctrl_async import BctrlNotFoundError, BctrlSession, RetryPolicy, StopOutcome, StopResult

# Each with the Content-Type that its service sends.
FOREIGN_BODIES: dict[str, tuple[str, str]] = {
    "Kong": ("application/json", '{"message":"no Route matched with those values"}'),
    "AWS API Gateway": ("application/json", '{"message":"Not Found"}'),
    "AWS JSON protocol": (
        "application/x-amz-json-1.1",
        '{"__type":"ResourceNotFoundException","message":"not found"}',
    ),
    "AWS S3": ("application/json", '{"Code":"NoSuchKey","code":"NoSuchKey","Key":"crm"}'),
    "Spring": (
        "application/json",
        '{"timestamp":"2026-11-25T08:00:00Z","status":404,"error":"Not Found","path":"/v1"}',
    ),
    "FastAPI": ("application/json", '{"detail":"Not Found"}'),
    "Kubernetes": (
        "application/json",
        '{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}',
    ),
    "nginx": ("application/json", '{"status":404,"message":"Not Found"}'),
    "Traefik": ("text/plain", "404 page not found"),
    "Envoy": ("text/plain", "no healthy upstream"),
    "Express": ("application/json", '{"error":"Cannot POST /v1"}'),
    "Rails": ("application/json", '{"status":404,"error":"Not Found"}'),
    "Django REST framework": ("application/json", '{"detail":"No Runtime matches the query."}'),
    "ASP.NET": (
        "application/problem+json",
        '{"type":"https://tools.ietf.org/html/rfc9110","title":"Not Found","status":404}',
    ),
    "a problem whose detail names a runtime": (
        "application/problem+json",
        '{"title":"Not Found","detail":"runtime.not_found","code":"not_found"}',
    ),
    "Google": (
        "application/json",
        '{"error":{"code":404,"message":"Method not found.","status":"NOT_FOUND"}}',
    ),
    "a gateway that nests its errors": (
        "application/json",
        '{"error":{"code":"runtime.not_found","message":"gone"}}',
    ),
    "GraphQL": ("application/json", '{"errors":[{"message":"not found"}]}'),
    "Docker registry": ("application/json", '{"errors":[{"code":"NAME_UNKNOWN"}]}'),
    "another path of the API": ("application/json", '{"code":"route.not_found"}'),
    "an empty object": ("application/json", "{}"),
    "an empty list": ("application/json", "[]"),
    "nothing": ("application/json", ""),
    "a page": ("text/html", "<html><h1>404 Not Found</h1></html>"),
    "another code of the API": ("application/json", '{"code":"workspace.suspended"}'),
    "a code that only contains the prefix": ("application/json", '{"code":"no.runtime."}'),
}
every_foreign_body = pytest.mark.parametrize(
    ("content_type", "body"), FOREIGN_BODIES.values(), ids=FOREIGN_BODIES.keys()
)


def not_found(body: str, content_type: str = "application/json") -> bytes:
    return http_answer("404 Not Found", body.encode(), f"Content-Type: {content_type}")


async def stop_one(url: str, *, verify: bool = False) -> StopOutcome:
    """Stop one runtime in bulk and return its outcome."""
    outcomes: list[StopOutcome] = []
    once = RetryPolicy(attempts=1, patience=0, base=0.001, cap=0.001)
    async with BctrlSession("k", base_url=url, retry=once) as session:
        await session.stop_runtimes([("ws-1", "crm")], verify=verify, on_outcome=outcomes.append)
    (outcome,) = outcomes
    return outcome


@every_foreign_body
async def test_a_404_without_a_code_of_the_api_is_rejected(content_type: str, body: str) -> None:
    """Fault: any JSON object in a 404 settles a stop, also one of a gateway without a route."""
    async with raw_server(answering(not_found(body, content_type))) as url:
        outcome = await stop_one(url)

    assert outcome.result is StopResult.REJECTED
    assert isinstance(outcome.error, BctrlNotFoundError)
    assert not outcome.error.names_runtime


@every_foreign_body
async def test_a_poll_learns_nothing_from_a_404_without_a_code_of_the_api(
    content_type: str, body: str
) -> None:
    """Fault: verified against a 404 of another service, an active runtime becomes `not_found`."""
    active = {
        "id": "7b1f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f",
        "workspaceId": "0b2f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f",
        "alias": "crm",
        "kind": "browser",
        "status": "active",
        "driver": "d",
        "createdAt": "",
        "updatedAt": "",
    }
    accepted = http_answer("200 OK", json.dumps(active).encode())

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        is_stop = head.startswith(b"POST ")
        writer.write(accepted if is_stop else not_found(body, content_type))

    async with raw_server(handle) as url:
        outcome = await stop_one(url, verify=True)

    assert outcome.result is StopResult.ACCEPTED
    assert outcome.runtime is not None
    assert outcome.runtime.status == "active"


@pytest.mark.parametrize("code", ["runtime.not_found", "workspace.not_found"])
async def test_a_404_with_a_code_of_the_api_is_not_found(code: str) -> None:
    async with raw_server(answering(not_found(f'{{"code":"{code}"}}'))) as url:
        outcome = await stop_one(url)

    assert outcome.result is StopResult.NOT_FOUND
