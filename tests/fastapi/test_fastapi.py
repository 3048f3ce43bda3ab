"""The FastAPI extra; the example app has tests of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, Request, Response, WebSocket
from fastapi.testclient import TestClient
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect
from support.helpers import Connect
from support.servers import emulator_in_a_thread

from bctrl_async import BctrlConfigError, BctrlError, BctrlSession, RetryPolicy, errors
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.fastapi import (
    BctrlDep,
    Runtime,
    add_exception_handlers,
    get_session,
    lifespan,
    problem,
)
from bctrl_async.pace import FilePace

STOP = "/workspaces/ws-1/runtimes/r0/stop"
SECRET = "text of the api"
PROBLEM = "application/problem+json"

Log = pytest.LogCaptureFixture

once = RetryPolicy(attempts=1, patience=0)


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """An emulator with the runtimes r0 to r9, which runs beside the loop of the app."""
    with emulator_in_a_thread() as running:
        yield running


def app_for(make_session: Callable[[], BctrlSession], **options: Any) -> FastAPI:  # noqa: ANN401
    """Return an app with a route that stops one runtime."""
    app = FastAPI(lifespan=lifespan(make_session, **options))
    add_exception_handlers(app)

    @app.post("/workspaces/{workspace_id}/runtimes/{alias}/stop")
    async def stop(workspace_id: str, alias: str, session: BctrlDep) -> Runtime:
        return await session.stop_runtime(workspace_id, alias)

    return app


def answer_with(error: Exception) -> httpx2.Response:
    """Return the response of an app whose route raises an error."""
    app = FastAPI()
    add_exception_handlers(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    return TestClient(app).get("/")


class TestLifespan:
    @pytest.mark.parametrize(
        "state", [None, {"bctrl_session": "not one", "greeting": "hello"}]
    )
    def test_the_session_is_open_around_the_inner_lifespan_whose_state_is_kept(
        self, state: dict[str, str] | None, connect: Connect
    ) -> None:
        seen: list[BctrlSession] = []

        @asynccontextmanager
        async def inner(app: FastAPI) -> AsyncIterator[Any]:
            seen.append(app.state.bctrl_session)
            yield state
            assert not seen[-1].closed

        app = app_for(connect, inner=inner)

        @app.get("/greeting")
        async def greeting(request: Request, session: BctrlDep) -> str | None:
            assert session is seen[-1]
            return getattr(request.state, "greeting", None)

        for _ in range(2):  # An app can start again, with a new session.
            with TestClient(app) as client:
                assert client.get("/greeting").json() == (state or {}).get("greeting")
            assert seen[-1].closed
        assert seen[0] is not seen[1]

    @pytest.mark.usefixtures("patient")
    def test_by_default_the_environment_configures_the_session_and_pace_paces_it(
        self, monkeypatch: pytest.MonkeyPatch, emulator: Emulator, tmp_path: Path
    ) -> None:
        app = app_for(BctrlSession, rate=FilePace(tmp_path / "pace", rate=100))
        with pytest.raises(BctrlConfigError, match="BCTRL_API_KEY"), TestClient(app):
            pass
        monkeypatch.setenv("BCTRL_API_KEY", "emulator-key")
        monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
        with TestClient(app) as client:
            assert client.post(STOP).json()["status"] == "stopped"
        assert (tmp_path / "pace").exists()

    def test_a_pace_is_not_lost_beside_make_session(
        self, connect: Connect, tmp_path: Path
    ) -> None:
        with pytest.raises(
            BctrlConfigError, match="Pass it to the BctrlSession"
        ) as error:
            lifespan(connect, rate=FilePace(tmp_path / "pace", rate=100))
        assert error.value.argument == "rate"

    async def test_the_session_is_found_without_the_lifespan_state(
        self, connect: Connect
    ) -> None:
        app = app_for(connect)
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://app") as client,
        ):
            assert (await client.post(STOP)).status_code == 200

    def test_an_inner_lifespan_that_fails_closes_the_session(
        self, connect: Connect
    ) -> None:
        def inner(_: FastAPI) -> AbstractAsyncContextManager[None]:
            raise OSError("no database")

        app = app_for(connect, inner=inner)
        with pytest.raises(OSError, match="no database"), TestClient(app):
            pass
        assert app.state.bctrl_session.closed

    def test_without_the_lifespan_the_log_has_advice(self, caplog: Log) -> None:
        app = app_for(BctrlSession)
        answer = TestClient(app).post(STOP)
        assert answer.status_code == 500
        assert answer.json()["detail"] == "This service cannot call the bctrl API."
        assert "FastAPI(lifespan=lifespan())" in caplog.text


def test_an_override_serves_one_loop(connect: Connect, caplog: Log) -> None:
    """Fault: the second request found a closed loop, and had no advice."""
    app = app_for(connect)
    session = connect()
    app.dependency_overrides[get_session] = lambda: session
    # A client that is not entered has a loop for each request.
    client = TestClient(app)
    assert [client.post(STOP).status_code for _ in range(2)] == [200, 500]
    assert (
        "one in each asyncio.run; in a test, use `with TestClient(app)`" in caplog.text
    )


class TestDependency:
    def test_it_works_in_background_tasks(
        self, connect: Connect, emulator: Emulator
    ) -> None:
        router = APIRouter(prefix="/later")

        @router.post("/{alias}", status_code=202)
        async def later(alias: str, session: BctrlDep, tasks: BackgroundTasks) -> None:
            tasks.add_task(session.stop_runtime, "ws-1", alias)

        app = app_for(connect)
        app.include_router(router)
        with TestClient(app) as client:
            assert client.post("/later/r0").status_code == 202
        assert emulator.status("ws-1", "r0") == "stopped"

    def test_it_works_in_a_mounted_app(self, connect: Connect) -> None:
        app = FastAPI(lifespan=lifespan(connect))
        app.mount("/sub", app_for(connect))
        with TestClient(app) as client:
            assert client.post(f"/sub{STOP}").json()["alias"] == "r0"
            again = client.post(f"/sub{STOP}")
        assert (again.status_code, again.headers["Content-Type"]) == (409, PROBLEM)
        assert again.json()["code"] == "runtime.not_active"
        assert again.json()["requestId"].startswith("req")

    def test_it_works_in_a_websocket_that_an_error_closes_with_its_detail(
        self, connect: Connect, emulator: Emulator
    ) -> None:
        app = app_for(partial(connect, retry=once))

        @app.websocket("/ws")
        async def stop(socket: WebSocket, session: BctrlDep) -> None:
            await socket.accept()
            while True:
                await socket.send_text(
                    (await session.stop_runtime("ws-1", "r0")).status
                )

        with TestClient(app) as client:
            for fault, code, reason in [
                (None, 1011, "Nothing is running under this alias."),
                (
                    Fault.RATE_LIMITED,
                    1013,
                    "The rate limit of the bctrl API is exceeded.",
                ),
            ]:
                emulator.add_runtime("ws-1", "r0")
                emulator.inject(None, fault)
                with client.websocket_connect("/ws") as socket:
                    assert socket.receive_text() == "stopped"
                    with pytest.raises(WebSocketDisconnect) as closed:
                        socket.receive_text()
                assert (closed.value.code, closed.value.reason) == (code, reason)

    @pytest.mark.parametrize(
        "left", [WebSocketDisconnect(1006), RuntimeError("closed already")]
    )
    async def test_a_websocket_that_has_gone_is_no_other_error(
        self, left: Exception
    ) -> None:
        app = FastAPI()
        add_exception_handlers(app)

        @app.websocket("/ws")
        async def fail(_: WebSocket) -> None:
            raise group_of(errors.BctrlNetworkError("no answer"))

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(_: Message) -> None:
            raise left

        scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b""}
        await app(scope, receive, send)


def with_secrets(error: BctrlError) -> BctrlError:
    """Return an error with a secret in every field that a response could disclose."""
    error.message = error.hint = error.body = error.request_id = SECRET
    error.summary = SECRET
    error.workspace_id, error.alias, error.attempts = "ws-1", "crm", 3
    return error


ROWS = [
    (errors.BctrlRateLimitError("", status=429), 429, "rate-limited"),
    (errors.BctrlRateLimitError(""), 429, "rate-limited"),
    (
        errors.BctrlConflictError("", status=409, code="runtime.not_active"),
        409,
        "not-running",
    ),
    (errors.BctrlConflictError("", status=409), 409, "not-stoppable"),
    (
        errors.BctrlNotFoundError("", status=404, code="runtime.not_found"),
        404,
        "not-found",
    ),
    # From a proxy, or for a wrong base_url.
    (
        errors.BctrlNotFoundError("", status=404, code="route.not_found"),
        502,
        "rejected",
    ),
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


def group_of(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("not all stops succeeded", errors)


class TestGroups:
    """Fault: a failed `TaskGroup` was a bare 500, though its errors have problems."""

    @pytest.mark.parametrize("error", [ROWS[2][0], ROWS[8][0]])
    def test_it_is_the_problem_of_its_first_error_and_all_are_logged(
        self, error: BctrlError, caplog: Log
    ) -> None:
        first, second = (with_secrets(copy(each)) for each in (error, ROWS[0][0]))
        answer = answer_with(group_of(group_of(first), second))

        alone = answer_with(first)
        assert (answer.status_code, answer.headers) == (
            alone.status_code,
            alone.headers,
        )
        assert (
            answer.json()
            == alone.json()
            == problem(first).model_dump(exclude_none=True)
        )
        logged = [
            record for record in caplog.records if record.name == "bctrl_async.fastapi"
        ]
        assert "BctrlRateLimitError" in logging.Formatter().format(logged[0])

    def test_it_is_the_problem_of_a_stop_that_may_have_worked(self) -> None:
        doubt = errors.BctrlTimeoutError("", may_have_stopped=True)
        answer = answer_with(group_of(ROWS[0][0], group_of(ROWS[2][0], doubt)))

        assert answer.json() == answer_with(doubt).json()
        assert answer.json()["mayHaveStopped"]

    async def test_a_task_group_and_a_report_raise_such_groups(
        self, connect: Connect, emulator: Emulator
    ) -> None:
        app = app_for(connect)

        @app.post("/tasks")
        async def tasks(session: BctrlDep) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(session.stop_runtime("ws-1", "gone"))

        @app.post("/report")
        async def report(session: BctrlDep) -> None:
            targets = [("ws-1", alias) for alias in ("r0", "gone", "none")]
            (await session.stop_runtimes(targets)).raise_for_failures()

        with TestClient(app) as client:
            answers = [client.post(path) for path in ("/tasks", "/report")]
        assert [answer.status_code for answer in answers] == [404, 404]
        assert [answer.json()["alias"] for answer in answers] == ["gone", "gone"]
        assert emulator.status("ws-1", "r0") == "stopped"

    def test_a_group_with_another_error_is_raised_as_it_is(self) -> None:
        group = group_of(BctrlError(""), group_of(LookupError("the app's own")))
        with pytest.raises(ExceptionGroup) as raised:
            answer_with(group)
        assert raised.value is group

    def test_the_apps_own_handler_of_groups_stays(self) -> None:
        app = FastAPI()
        app.exception_handler(ExceptionGroup)(lambda _, __: Response("own"))
        add_exception_handlers(app)

        @app.get("/")
        async def fail() -> None:
            raise group_of(BctrlError(""))

        assert TestClient(app).get("/").text == "own"

    def test_it_closes_a_websocket_with_the_detail(self) -> None:
        app = FastAPI()
        add_exception_handlers(app)

        @app.websocket("/ws")
        async def fail(socket: WebSocket) -> None:
            await socket.accept()
            raise group_of(BctrlConfigError(""), errors.BctrlRateLimitError(""))

        with (
            TestClient(app).websocket_connect("/ws") as socket,
            pytest.raises(WebSocketDisconnect) as closed,
        ):
            socket.receive_text()
        detail = "This service cannot call the bctrl API."
        assert (closed.value.code, closed.value.reason) == (1011, detail)


class TestProblems:
    @pytest.mark.parametrize(("error", "status", "slug"), ROWS)
    def test_every_error_has_a_type_and_a_status_and_none_of_the_apis_text(
        self, error: BctrlError, status: int, slug: str, caplog: Log
    ) -> None:
        answer = answer_with(with_secrets(error))

        assert answer.status_code == status
        assert answer.headers["Content-Type"] == PROBLEM
        body = answer.json()
        assert body == problem(error).model_dump(exclude_none=True)
        assert body["status"] == status
        assert body["type"] == f"urn:bctrl-async:problem:{slug}"
        assert (body["workspaceId"], body["alias"], body["attempts"]) == (
            "ws-1",
            "crm",
            3,
        )
        assert body["mayHaveStopped"] is False
        # Of invalid input the text is our own, and says what rule is broken.
        is_ours = isinstance(error, BctrlConfigError) and slug == "invalid-target"
        assert answer.text.lower().count(SECRET) == is_ours
        assert SECRET not in str(answer.headers)
        # Operators find in the log what clients must not see.
        logged = [
            record for record in caplog.records if record.name == "bctrl_async.fastapi"
        ]
        assert [SECRET in record.getMessage() for record in logged] == [True] * (
            status >= 500
        )

    def test_every_class_of_error_has_a_row(self) -> None:
        public = {cls for cls in vars(errors).values() if isinstance(cls, type)}
        assert {type(error) for error, _, _ in ROWS} == {
            cls for cls in public if issubclass(cls, BctrlError)
        }

    @pytest.mark.parametrize(
        ("text", "is_passed_on"),
        [
            ("runtime.not_found", True),
            ("req_1/2+3=:", True),
            ("not an id", False),
            ("<b>", False),
            ("x" * 101, False),
            ("\u0661", False),
            ("", False),
        ],
    )
    def test_only_identifiers_are_passed_on(
        self, text: str, *, is_passed_on: bool
    ) -> None:
        body = problem(errors.BctrlNotFoundError("", code=text, request_id=text))
        assert (body.code, body.request_id) == (
            (text, text) if is_passed_on else (None, None)
        )

    @pytest.mark.parametrize(
        ("may_have_stopped", "detail"),
        [
            (False, "The run was ended before all its stops were settled."),
            (True, "The bctrl API did not confirm that the runtime stopped."),
        ],
    )
    def test_a_sent_stop_is_not_left_over(
        self, detail: str, *, may_have_stopped: bool
    ) -> None:
        assert (
            problem(BctrlError("", may_have_stopped=may_have_stopped)).detail == detail
        )

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (errors.BctrlRateLimitError("", retry_after=0.2), "1"),
            (errors.BctrlRateLimitError("", retry_after=0.0), "0"),
            (errors.BctrlServerError("", status=503, retry_after=30), "30"),
            (errors.BctrlRateLimitError("", retry_after=3600.0), "60"),
            (errors.BctrlRateLimitError(""), None),
            (errors.BctrlServerError("", status=500, retry_after=30), None),
        ],
    )
    def test_only_429_and_503_carry_a_retry_after_of_a_minute_at_most(
        self, error: BctrlError, expected: str | None
    ) -> None:
        assert answer_with(error).headers.get("Retry-After") == expected

    def test_what_the_client_asked_for_is_named(self, connect: Connect) -> None:
        app = app_for(connect)

        @app.get("/{workspace_id}")
        async def count(workspace_id: str, session: BctrlDep) -> int:
            return len(await session.list_runtimes(workspace_id))

        with TestClient(app) as client:
            answers = [
                client.post(STOP.replace("r0", "%2e%2e")),
                client.get("/nowhere"),
            ]
        # UTF-8 cannot encode a lone surrogate.
        answers.append(
            answer_with(BctrlConfigError("", workspace_id="ws-1", alias="\ud800"))
        )
        names = [
            (answer.json()["workspaceId"], answer.json().get("alias"))
            for answer in answers
        ]
        assert names == [("ws-1", ".."), ("nowhere", None), ("ws-1", "?")]
        assert [answer.status_code for answer in answers] == [422, 404, 500]
        rule = "Alias '..' could be taken for a path. Remove its '.' or '..' segments."
        assert answers[0].json()["detail"] == rule
