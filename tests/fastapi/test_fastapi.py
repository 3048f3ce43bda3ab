"""The FastAPI extra; the example app has tests of its own."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, Request, WebSocket
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.testclient import TestClient
from helpers import BOUND, Connect
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from servers import emulator_in_a_thread
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

import bctrl_async
from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RetryPolicy,
    RuntimeRef,
    RuntimeState,
    StopResult,
    errors,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.fastapi import (
    BctrlDep,
    Runtime,
    StopOutcome,
    StopReport,
    add_exception_handlers,
    get_session,
    lifespan,
    problem,
)
from bctrl_async.pace import FilePace

KEY = "emulator-key"
STOP = "/workspaces/ws-1/runtimes/crm/stop"
SECRET = "text of the api"
PROBLEM = "application/problem+json"

once = RetryPolicy(attempts=1, patience=0)


def app_for(make_session: Callable[[], BctrlSession], **options: Any) -> FastAPI:  # noqa: ANN401
    """Return an app with a route that stops one runtime."""
    app = FastAPI(lifespan=lifespan(make_session, **options))
    add_exception_handlers(app)

    @app.post("/workspaces/{workspace_id}/runtimes/{alias}/stop")
    async def stop(workspace_id: str, alias: str, session: BctrlDep) -> Runtime:
        return await session.stop_runtime(workspace_id, alias)

    return app


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client of an app that runs in this event loop, with its lifespan."""
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "state": dict(state or {})}, receive, send)

        transport = httpx2.ASGITransport(with_state)
        async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
            yield client


def answer_with(error: BctrlError) -> httpx2.Response:
    """Return the response of an app whose route raises an error."""
    app = FastAPI()
    add_exception_handlers(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    return TestClient(app).get("/")


class TestLifespan:
    async def test_the_session_is_open_while_the_app_runs_and_closed_after_it(
        self, connect: Connect
    ) -> None:
        app = app_for(connect)
        seen = []
        for _ in range(2):  # An app can start again, with a new session.
            async with client_of(app):
                seen.append(app.state.bctrl_session)
                assert not seen[-1].closed
            assert seen[-1].closed
        assert seen[0] is not seen[1]

    @pytest.mark.usefixtures("patient")
    async def test_by_default_the_environment_configures_the_session_and_pace_paces_it(
        self, monkeypatch: pytest.MonkeyPatch, emulator: Emulator, tmp_path: Path
    ) -> None:
        app = FastAPI(lifespan=lifespan(pace=FilePace(tmp_path / "pace", rate=100)))
        with pytest.raises(BctrlConfigError, match="BCTRL_API_KEY"):
            async with client_of(app):
                pass
        monkeypatch.setenv("BCTRL_API_KEY", KEY)
        monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
        async with client_of(app):
            await app.state.bctrl_session.stop_runtime("ws-1", "crm")
        assert (tmp_path / "pace").exists()
        assert emulator.status("ws-1", "crm") == "stopped"

    def test_a_pace_is_not_silently_lost_beside_make_session(
        self, connect: Connect, tmp_path: Path
    ) -> None:
        with pytest.raises(BctrlConfigError, match="Pass it to the BctrlSession") as error:
            lifespan(connect, pace=FilePace(tmp_path / "pace", rate=100))
        assert error.value.argument == "pace"

    @pytest.mark.parametrize("state", [None, {}, {"bctrl_session": "not one", "greeting": "hello"}])
    async def test_the_inner_lifespan_runs_inside_and_its_state_is_kept(
        self, state: dict[str, str] | None, connect: Connect
    ) -> None:
        closed: list[bool] = []

        @asynccontextmanager
        async def inner(app: FastAPI) -> AsyncIterator[Any]:
            closed.append(app.state.bctrl_session.closed)
            yield state
            closed.append(app.state.bctrl_session.closed)

        app = app_for(connect, inner=inner)

        @app.get("/greeting")
        async def greeting(request: Request) -> str | None:
            return getattr(request.state, "greeting", None)

        async with client_of(app) as client:
            assert (await client.post(STOP)).status_code == 200
            assert (await client.get("/greeting")).json() == (state or {}).get("greeting")
        assert closed == [False, False]

    async def test_the_session_is_found_without_the_lifespan_state(self, connect: Connect) -> None:
        app = app_for(connect)
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://app") as client,
        ):
            assert (await client.post(STOP)).status_code == 200

    async def test_an_inner_lifespan_that_fails_closes_the_session(self, connect: Connect) -> None:
        def inner(_: FastAPI) -> AbstractAsyncContextManager[None]:
            raise OSError("no database")

        app = app_for(connect, inner=inner)
        with pytest.raises(OSError, match="no database"):
            async with client_of(app):
                pass
        assert app.state.bctrl_session.closed

    def test_without_the_lifespan_the_error_gives_advice(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        app = FastAPI()
        add_exception_handlers(app)

        @app.get("/")
        async def use(session: BctrlDep) -> bool:
            return session.closed

        answer = TestClient(app).get("/")
        assert answer.status_code == 500
        assert answer.json()["detail"] == "This service cannot call the bctrl API."
        assert "FastAPI(lifespan=lifespan())" in caplog.text


class TestDependency:
    async def test_it_works_in_routers_and_in_background_tasks(
        self, connect: Connect, emulator: Emulator
    ) -> None:
        router = APIRouter(prefix="/later")

        @router.post("/{alias}", status_code=202)
        async def later(alias: str, session: BctrlDep, tasks: BackgroundTasks) -> None:
            tasks.add_task(session.stop_runtime, "ws-1", alias)

        app = app_for(connect)
        app.include_router(router)
        async with client_of(app) as client:
            assert (await client.post("/later/crm")).status_code == 202
            async with asyncio.timeout(BOUND):
                while emulator.status("ws-1", "crm") != "stopped":
                    await asyncio.sleep(0)

    async def test_it_works_in_a_mounted_app(self, connect: Connect) -> None:
        app = FastAPI(lifespan=lifespan(connect))
        app.mount("/sub", app_for(connect))
        async with client_of(app) as client:
            assert (await client.post(f"/sub{STOP}")).json()["alias"] == "crm"
            again = await client.post(f"/sub{STOP}")
        assert (again.status_code, again.headers["Content-Type"]) == (409, PROBLEM)
        assert again.json()["code"] == "runtime.not_active"
        assert again.json()["requestId"].startswith("req")

    def test_it_works_in_a_websocket_that_an_error_closes_with_its_detail(self) -> None:
        with emulator_in_a_thread() as emulator:
            app = app_for(lambda: BctrlSession(KEY, base_url=emulator.url, retry=once))

            @app.websocket("/ws")
            async def stop(socket: WebSocket, session: BctrlDep) -> None:
                await socket.accept()
                while True:
                    runtime = await session.stop_runtime("ws-1", await socket.receive_text())
                    await socket.send_text(runtime.status)

            def close_of(client: TestClient, *aliases: str) -> WebSocketDisconnect:
                with client.websocket_connect("/ws") as socket:
                    for alias in aliases[:-1]:
                        socket.send_text(alias)
                        assert socket.receive_text() == "stopped"
                    socket.send_text(aliases[-1])
                    with pytest.raises(WebSocketDisconnect) as closed:
                        socket.receive_text()
                return closed.value

            with TestClient(app) as client:
                conflict = close_of(client, "r1", "r1")
                assert (conflict.code, conflict.reason) == (
                    1011,
                    "Nothing is running under this alias.",
                )
                emulator.inject(Fault.RATE_LIMITED)
                assert close_of(client, "r2").code == 1013

    @pytest.mark.parametrize("left", [WebSocketDisconnect(1006), RuntimeError("closed already")])
    async def test_a_websocket_whose_client_has_disconnected_is_not_another_error(
        self, left: Exception
    ) -> None:
        app = FastAPI()
        add_exception_handlers(app)

        @app.websocket("/ws")
        async def fail(socket: WebSocket) -> None:
            await socket.accept()
            raise errors.BctrlNetworkError("no answer")

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            if message["type"] == "websocket.close":
                raise left

        scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b""}
        await app(scope, receive, send)

    async def test_the_session_can_be_overridden_in_tests(
        self, connect: Connect, emulator: Emulator
    ) -> None:
        app = app_for(lambda: BctrlSession("another-key", base_url="http://127.0.0.1:9"))
        async with connect() as session, client_of(app) as client:
            app.dependency_overrides[get_session] = lambda: session
            assert (await client.post(STOP)).status_code == 200
        assert emulator.received["ws-1", "crm"] == 1


def with_secrets(error: BctrlError) -> BctrlError:
    """Return an error with a secret in every field that a response could disclose."""
    error.message = error.hint = error.body = error.request_id = SECRET
    error.summary = SECRET
    error.workspace_id, error.alias, error.attempts = "ws-1", "crm", 3
    return error


ROWS = [
    (errors.BctrlRateLimitError("", status=429), 429, "rate-limited"),
    (errors.BctrlRateLimitError(""), 429, "rate-limited"),
    (errors.BctrlConflictError("", status=409, code="runtime.not_active"), 409, "not-running"),
    (errors.BctrlConflictError("", status=409), 409, "not-stoppable"),
    (errors.BctrlNotFoundError("", status=404, code="runtime.not_found"), 404, "not-found"),
    # From a proxy, or for a wrong base_url.
    (errors.BctrlNotFoundError("", status=404, code="route.not_found"), 502, "rejected"),
    (errors.BctrlValidationError("", status=422), 422, "invalid-target"),
    (BctrlConfigError("", reason_class="invalid_input"), 422, "invalid-target"),
    (errors.BctrlServerError("", status=503), 503, "unavailable"),
    (errors.BctrlServerError("", status=504), 504, "timeout"),
    (errors.BctrlTimeoutError(""), 504, "timeout"),
    (errors.BctrlServerError("", status=500), 502, "no-usable-response"),
    (errors.BctrlNetworkError(""), 502, "no-usable-response"),
    (errors.BctrlResponseError("", status=200), 502, "no-usable-response"),
    (errors.BctrlAuthenticationError("", status=401), 502, "rejected"),
    (errors.BctrlPermissionError("", status=403), 502, "rejected"),
    (errors.BctrlApiError("", status=418), 502, "rejected"),
    (errors.BctrlApiError("", status=408), 504, "timeout"),
    (BctrlConfigError(""), 500, "misconfigured"),
    (BctrlError(""), 503, "not-settled"),
]


class TestProblems:
    @pytest.mark.parametrize(("error", "status", "slug"), ROWS)
    def test_every_error_has_a_type_and_a_status_and_none_of_the_apis_text(
        self, error: BctrlError, status: int, slug: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        answer = answer_with(with_secrets(error))

        assert answer.status_code == status
        assert answer.headers["Content-Type"] == PROBLEM
        body = answer.json()
        assert body == problem(error).model_dump(exclude_none=True)
        assert body["status"] == status
        assert body["type"] == f"urn:bctrl-async:problem:{slug}"
        assert (body["workspaceId"], body["alias"], body["attempts"]) == ("ws-1", "crm", 3)
        assert body["mayHaveStopped"] is False
        # Of invalid input the text is our own, and says what rule is broken.
        is_ours = isinstance(error, BctrlConfigError) and slug == "invalid-target"
        assert answer.text.lower().count(SECRET) == is_ours
        assert SECRET not in str(answer.headers)
        # Operators find in the log what clients must not see.
        logged = [record for record in caplog.records if record.name == "bctrl_async.fastapi"]
        assert [SECRET in record.getMessage() for record in logged] == [True] * (status >= 500)

    def test_the_apis_identifiers_are_passed_on_but_no_text_in_their_place(self) -> None:
        error = errors.BctrlNotFoundError("", code="runtime.not_found", request_id="req_1/2+3=:")
        body = problem(error)
        assert (body.code, body.request_id) == ("runtime.not_found", "req_1/2+3=:")
        for text in ("not an id", "<b>", "x" * 101, "\u0661", ""):
            error.code = error.request_id = text
            assert (problem(error).code, problem(error).request_id) == (None, None)

    def test_a_stop_that_was_sent_is_not_called_left_over(self) -> None:
        assert problem(BctrlError("")).detail == "The run ended before this stop was settled."
        error = BctrlError("", may_have_stopped=True)
        assert problem(error).detail == "The bctrl API did not confirm that the runtime stopped."

    async def test_a_problem_of_a_whole_workspace_names_the_workspace(
        self, connect: Connect
    ) -> None:
        app = app_for(connect)

        @app.get("/{workspace_id}")
        async def count(workspace_id: str, session: BctrlDep) -> int:
            return len(await session.list_runtimes(workspace_id))

        async with client_of(app) as client:
            answer = await client.get("/nowhere")

        assert (answer.status_code, answer.json()["workspaceId"]) == (404, "nowhere")
        assert "alias" not in answer.json()

    def test_every_class_of_error_has_a_row(self) -> None:
        public = {cls for cls in vars(errors).values() if isinstance(cls, type)}
        assert {type(error) for error, _, _ in ROWS} == {
            cls for cls in public if issubclass(cls, BctrlError)
        }

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (errors.BctrlRateLimitError("", retry_after=0.2), "1"),
            (errors.BctrlRateLimitError("", retry_after=0.0), "0"),
            (errors.BctrlServerError("", status=503, retry_after=30), "30"),
            (errors.BctrlRateLimitError("", retry_after=365 * 86400.0), "60"),
            (errors.BctrlRateLimitError(""), None),
            (errors.BctrlServerError("", status=500, retry_after=30), None),
            (errors.BctrlPermissionError("", status=403, retry_after=30), None),
        ],
    )
    def test_only_429_and_503_carry_a_retry_after_of_a_minute_at_most(
        self, error: BctrlError, expected: str | None
    ) -> None:
        assert answer_with(error).headers.get("Retry-After") == expected

    async def test_an_alias_that_cannot_be_sent_or_encoded_is_the_clients_fault(
        self, connect: Connect
    ) -> None:
        async with client_of(app_for(connect)) as client:
            answer = await client.post("/workspaces/ws-1/runtimes/%2e%2e/stop")
        assert (answer.status_code, answer.json()["alias"]) == (422, "..")
        # UTF-8 cannot encode a lone surrogate.
        error = BctrlConfigError("", workspace_id="ws-1", alias="\ud800")
        assert answer_with(error).json()["alias"] == "?"

    @pytest.mark.parametrize("status", [401, 422, 503])
    async def test_a_key_echoed_by_the_api_is_not_sent_to_the_client(
        self, emulator: Emulator, connect: Connect, status: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        words = {"code": KEY, "error": f"{SECRET} {KEY}", "requestId": KEY, "hint": KEY}
        emulator.inject(Reply(status, body=words, headers={"x-request-id": KEY}))
        async with client_of(app_for(partial(connect, retry=once))) as client:
            answer = await client.post(STOP)
        assert answer.status_code >= 400
        assert KEY not in answer.text + str(answer.headers) + caplog.text
        assert SECRET not in answer.text + str(answer.headers)


UPSTREAM = errors.BctrlServerError(
    SECRET, status=500, code="server.error", request_id="req_1", may_have_stopped=True
)
OUTCOMES = [
    bctrl_async.StopOutcome(
        index=0,
        target=RuntimeRef("ws-1", "crm"),
        result=StopResult.STOPPED,
        state=RuntimeState.NOT_RUNNING,
    ),
    bctrl_async.StopOutcome(
        index=1,
        target=RuntimeRef("ws-\ud800", "\ud800"),
        result=StopResult.UNKNOWN,
        state=RuntimeState.UNCONFIRMED,
        error=UPSTREAM,
        request_id=SECRET,
        attempts=4,
        elapsed=1.5,
    ),
]
REPORT = bctrl_async.StopReport(
    total=2,
    counts=Counter({StopResult.STOPPED: 1, StopResult.UNKNOWN: 1}),
    failures=tuple(OUTCOMES[1:]),
    states=Counter({RuntimeState.NOT_RUNNING: 1, RuntimeState.UNCONFIRMED: 1}),
    elapsed=2.5,
    retries=3,
    throttled=1,
    resumed=7,
    ended_early=UPSTREAM,
)
ERROR = {
    "type": "BctrlServerError",
    "message": "The bctrl API sent no usable response.",
    "status": 500,
    "code": "server.error",
    "request_id": "req_1",
    "may_have_stopped": True,
}


class Answer(BaseModel):
    """A model of the app, which has bodies of the extra as fields."""

    report: StopReport
    outcomes: list[StopOutcome]


async def valid_answer(client: httpx2.AsyncClient, method: str, path: str, route: str) -> Any:  # noqa: ANN401
    """Return a response body after validating it against the app's OpenAPI."""
    openapi = (await client.get("/openapi.json")).json()
    said = openapi["paths"][route][method]["responses"]["200"]["content"]["application/json"]
    schema = {**said["schema"], "components": openapi["components"]}
    Draft202012Validator.check_schema(schema)
    answer = await client.request(method, path)
    assert answer.status_code == 200
    checker = Draft202012Validator.FORMAT_CHECKER
    Draft202012Validator(schema, format_checker=checker).validate(answer.json())
    assert list(Draft202012Validator(schema).iter_errors({})), "the schema allows anything"
    return answer.json()


class TestBodies:
    route = "/workspaces/{workspace_id}/runtimes/{alias}/stop"

    @pytest.mark.parametrize("fault", [None, Fault.UNKNOWN_VALUES, Fault.ACCEPTED])
    async def test_a_runtime_is_the_apis_own_json_and_matches_the_schema(
        self, fault: Fault | None, connect: Connect, emulator: Emulator
    ) -> None:
        emulator.inject(fault)
        async with client_of(app_for(connect)) as client:
            answer = await valid_answer(client, "post", STOP, self.route)
            assert (await client.get("/docs")).status_code == 200
        runtime = emulator.runtimes["ws-1", "crm"]
        assert answer["workspaceId"] == runtime["workspaceId"]
        assert answer["summary"]["launchMode"] == (
            "teleport" if fault is Fault.UNKNOWN_VALUES else "ephemeral"
        )

    async def test_lone_surrogates_of_the_api_are_replaced(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        runtime = {**emulator.runtimes["ws-1", "crm"], "driver": "a\ud800", "createdAt": "b\udfff"}
        emulator.inject(Reply(200, body=json.dumps(runtime)))
        async with client_of(app_for(connect)) as client:
            answer = await client.post(STOP)
        assert answer.status_code == 200
        assert (answer.json()["driver"], answer.json()["createdAt"]) == ("a?", "b?")

    async def test_outcomes_and_reports_match_the_schema_without_the_apis_text(
        self, connect: Connect
    ) -> None:
        app = app_for(connect)

        @app.get("/answer")
        async def answer() -> Answer:
            return Answer(report=REPORT, outcomes=OUTCOMES)

        async with client_of(app) as client:
            body = await valid_answer(client, "get", "/answer", "/answer")

        stopped, unknown = body["outcomes"]
        assert stopped == OUTCOMES[0].to_dict()
        assert unknown == OUTCOMES[1].to_dict() | {
            "workspace_id": "ws-?",
            "alias": "?",
            "error": ERROR,
            "request_id": None,
        }
        assert body["report"] == REPORT.to_dict() | {
            "counts": {"stopped": 1, "unknown": 1},
            "failures": [unknown],
            "ended_early": ERROR,
        }
        assert SECRET not in json.dumps(body)

    async def test_they_are_the_data_of_server_sent_events(self, connect: Connect) -> None:
        app = app_for(connect)

        @app.get("/events", response_class=EventSourceResponse)
        async def events(session: BctrlDep) -> AsyncIterator[object]:
            yield ServerSentEvent(data=OUTCOMES[1])
            yield ServerSentEvent(data=REPORT)
            yield ServerSentEvent(data=await session.get_runtime("ws-1", "crm"))

        @app.get("/bare", response_class=EventSourceResponse)
        async def bare(session: BctrlDep) -> AsyncIterator[StopOutcome | StopReport | Runtime]:
            yield OUTCOMES[1]
            yield REPORT
            yield await session.get_runtime("ws-1", "crm")

        async with client_of(app) as client:
            texts = [(await client.get(path)).text for path in ("/events", "/bare")]
        data, same = [
            [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
            for text in texts
        ]
        outcome, report, runtime = data
        assert data == same
        assert (outcome["error"], report["failures"]) == (ERROR, [outcome])
        assert runtime["status"] == "active"
        assert SECRET not in texts[0]

    async def test_outcomes_and_report_of_a_real_run_match_the_schema(
        self, connect: Connect
    ) -> None:
        app = app_for(connect)
        targets = [("ws-1", "crm"), ("ws-1", ".."), ("ws-1", "gone"), ("no target",)]

        @app.post("/answer")
        async def answer(session: BctrlDep) -> Answer:
            async with session.stop_runtimes(targets) as batch:  # type: ignore[arg-type]  # On purpose.
                outcomes = [outcome async for outcome in batch]
            return Answer(report=batch.report, outcomes=outcomes)

        async with client_of(app) as client:
            body = await valid_answer(client, "post", "/answer", "/answer")
        assert body["report"]["counts"] == {"stopped": 1, "rejected": 2, "not_found": 1}
        runtimes = [outcome["runtime"] for outcome in body["outcomes"] if outcome["ok"]]
        assert [runtime["status"] for runtime in runtimes] == ["stopped"]
        failures = body["report"]["failures"]
        assert sorted(failure["error"]["message"] for failure in failures) == [
            "Alias '..' could be taken for a path. Remove its '.' or '..' segments.",
            "Invalid target ('no target',): expected (workspace id, alias).",
            "The workspace or the alias does not exist.",
        ]
