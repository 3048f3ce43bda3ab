"""The OpenAPI of an app that uses the FastAPI extra, and its bodies."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.encoders import jsonable_encoder
from fastapi.responses import PlainTextResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator, ValidationError
from openapi_spec_validator import validate as validate_openapi
from pydantic import BaseModel, RootModel, TypeAdapter
from support.helpers import Connect
from support.servers import emulator_in_a_thread
from test_fastapi import PROBLEM, ROWS, SECRET, STOP, app_for, once

import bctrl_async
from bctrl_async import BctrlError
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.fastapi import (
    PROBLEM_RESPONSES,
    BctrlDep,
    Problem,
    Runtime,
    StopOutcome,
    StopReport,
    add_exception_handlers,
)
from bctrl_async.fastapi._problems import ProblemType

DOCS = Path(__file__).parents[2] / "docs"
REF = "#/components/schemas/"


Document = dict[str, Any]


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """An emulator with the runtimes r0 to r9, which runs beside the loop of the app."""
    with emulator_in_a_thread() as running:
        yield running


def app_with_routes() -> FastAPI:
    """Return an app that returns each body and declares the problems."""
    app = FastAPI()
    add_exception_handlers(app)
    bodies = {
        "/runtime": Runtime,
        "/outcomes": list[StopOutcome],
        "/report": StopReport,
    }
    for path, body in bodies.items():
        app.get(path, response_model=body, responses=PROBLEM_RESPONSES)(nothing)
    return app


async def nothing() -> None:
    """Stand for a route that no test calls: its schema is read."""
    raise NotImplementedError


def valid_openapi(app: FastAPI) -> Document:
    """Return an app's OpenAPI after validating it, with its examples."""
    document: Document = TestClient(app).get("/openapi.json").json()
    validate_openapi(document)
    for part in parts_of(document):
        if "schema" in part and "examples" in part:
            for example in part["examples"].values():
                validate(example["value"], part["schema"], document)
    return document


def parts_of(document: object) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        yield document
        document = list(document.values())
    if isinstance(document, list):
        for value in document:
            yield from parts_of(value)


def validate(value: object, schema: dict[str, Any], document: Document) -> None:
    whole = {**schema, "components": document["components"]}
    checker = Draft202012Validator.FORMAT_CHECKER
    Draft202012Validator(whole, format_checker=checker).validate(value)


def response_of(
    document: Document, path: str, status: int = 200, method: str = "get"
) -> dict[str, Any]:
    found: dict[str, Any] = document["paths"][path][method]["responses"][str(status)]
    return found


def valid_answer(client: TestClient, path: str, route: str) -> Any:  # noqa: ANN401 - JSON.
    """Return the answer to a POST after validating it against the app's OpenAPI."""
    document = client.get("/openapi.json").json()
    schema = response_of(document, route, method="post")["content"]["application/json"][
        "schema"
    ]
    answer = client.post(path).json()
    validate(answer, schema, document)
    with pytest.raises(ValidationError):
        validate({}, schema, document)
    return answer


class TestComponents:
    def test_each_body_is_a_component_under_its_public_name(self) -> None:
        document = valid_openapi(app_with_routes())
        assert document["openapi"].startswith("3.1")
        assert "bctrl_async" not in json.dumps(document)
        components = document["components"]["schemas"]
        names = [
            *("Problem", "Runtime", "RuntimeSummary"),
            *("StopError", "StopOutcome", "StopReport", "StopResult"),
        ]
        assert {name: component["title"] for name, component in components.items()} == {
            name: name for name in names
        }
        for component in components.values():
            # pydantic would give `workspaceId` the title `Workspaceid`.
            fields = component.get("properties", {}).values()
            assert not [field for field in fields if "title" in field]

    def test_the_apps_own_models_of_the_same_names_are_kept_apart(self) -> None:
        class Runtime(BaseModel):
            language: str

        class Problem(BaseModel):
            reason: str

        app = app_with_routes()
        app.get("/own", response_model=Runtime, responses={404: {"model": Problem}})(
            nothing
        )
        document = valid_openapi(app)
        names = [
            content["schema"]["$ref"].removeprefix(REF)
            for path in ("/own", "/runtime")
            for status in (200, 404)
            for content in response_of(document, path, status)["content"].values()
        ]
        assert names[2:] == [
            "bctrl_async__fastapi__Runtime",
            "bctrl_async__fastapi__Problem",
        ]
        fields = [
            set(document["components"]["schemas"][name]["properties"]) for name in names
        ]
        assert fields[:2] == [{"language"}, {"reason"}]
        assert "mayHaveStopped" in fields[3]

    def test_a_problem_is_documented_under_its_media_type_whatever_the_route_returns(
        self,
    ) -> None:
        app = app_with_routes()
        app.get("/", response_class=PlainTextResponse, responses=PROBLEM_RESPONSES)(
            nothing
        )
        document = valid_openapi(app)
        assert response_of(document, "/")["content"].keys() == {"text/plain"}
        [(media_type, content)] = response_of(document, "/", 404)["content"].items()
        assert (media_type, content["schema"]) == (PROBLEM, {"$ref": REF + "Problem"})


class Answer(BaseModel):
    """A model of the app, which has bodies of the extra as fields."""

    report: StopReport
    outcomes: list[StopOutcome]
    last: Runtime | None = None


class TestBodies:
    @pytest.mark.parametrize("fault", [None, Fault.UNKNOWN_VALUES, Fault.ACCEPTED])
    def test_a_runtime_is_the_apis_own_json_and_matches_the_schema(
        self, fault: Fault | None, connect: Connect, emulator: Emulator
    ) -> None:
        emulator.inject(fault)
        with TestClient(app_for(connect)) as client:
            answer = valid_answer(
                client, STOP, "/workspaces/{workspace_id}/runtimes/{alias}/stop"
            )
        assert answer["workspaceId"] == emulator.runtimes["ws-1", "r0"]["workspaceId"]
        mode = "teleport" if fault is Fault.UNKNOWN_VALUES else "ephemeral"
        assert answer["summary"]["launchMode"] == mode

    def test_lone_surrogates_are_replaced(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        runtime = {
            **emulator.runtimes["ws-1", "r0"],
            "driver": "a\ud800",
            "createdAt": "b\udfff",
        }
        emulator.inject(Reply(200, body=json.dumps(runtime)))
        with TestClient(app_for(connect)) as client:
            answer = client.post(STOP).json()
        assert (answer["driver"], answer["createdAt"]) == ("a?", "b?")

    def test_outcomes_and_reports_match_the_schema_without_the_apis_text(
        self, connect: Connect, emulator: Emulator
    ) -> None:
        app = app_for(partial(connect, retry=once))
        emulator.poison(
            "ws-1", "r1", Reply(500, code="server.error", message=SECRET, hint=SECRET)
        )
        aliases = ["r0", "r1", "gone", "..", "\ud800"]
        targets: list[Any] = [*(("ws-1", alias) for alias in aliases), ("no target",)]
        outcomes: list[bctrl_async.StopOutcome] = []
        sent: list[Any] = []

        @app.post("/answer")
        async def answer(session: BctrlDep) -> Answer:
            report = await session.stop_runtimes(
                targets, verify=False, on_outcome=outcomes.append
            )
            outcomes.sort(key=lambda outcome: outcome.index)
            ended_early = msgspec.structs.replace(report, ended_early=outcomes[1].error)
            foreign_id = msgspec.structs.replace(outcomes[1], request_id=SECRET)
            runtime = await session.get_runtime("ws-1", "r0")
            sent.extend([*outcomes, report, ended_early, foreign_id, runtime])
            body = Answer(report=report, outcomes=outcomes)
            assert body.report is report
            return body

        @app.get("/events", response_class=EventSourceResponse)
        async def events() -> AsyncIterator[ServerSentEvent]:
            for item in sent:
                yield ServerSentEvent(
                    data=RootModel[StopOutcome | StopReport | Runtime](item)
                )

        @app.get("/typed", response_class=EventSourceResponse)
        async def typed() -> AsyncIterator[StopOutcome | StopReport | Runtime]:
            for item in sent:
                yield item

        # Before 3.2, OpenAPI cannot describe events.
        app.openapi_version = "3.2.0"
        document = valid_openapi(app)
        fields = document["components"]["schemas"]["Answer"]["properties"]
        refs = [
            {"$ref": REF + name} for name in ("StopOutcome", "StopReport", "Runtime")
        ]
        assert [fields["outcomes"]["items"], fields["report"]] == refs[:2]
        assert refs[2] in fields["last"]["anyOf"]
        events_of = response_of(document, "/typed")["content"]["text/event-stream"]
        assert (
            events_of["itemSchema"]["properties"]["data"]["contentSchema"]["anyOf"]
            == refs
        )
        with TestClient(app) as client:
            body = valid_answer(client, "/answer", "/answer")
            streams = [client.get(path).text for path in ("/events", "/typed")]

        stopped, unknown, *others = body["outcomes"]
        error = {
            "type": "BctrlServerError",
            "message": "The bctrl API sent no usable response.",
            "status": 500,
            "code": "server.error",
            "request_id": outcomes[1].request_id,
            "may_have_stopped": True,
        }
        assert stopped == outcomes[0].to_dict()
        assert unknown == outcomes[1].to_dict() | {"error": error}
        assert [
            (each["alias"], each["error"]["message"].partition(".")[0])
            for each in others
        ] == [
            ("gone", "The workspace or the alias does not exist"),
            ("..", "Alias '"),
            (
                "?",
                "Alias '\\ud800' contains a lone surrogate, which UTF-8 cannot encode",
            ),
            (
                "('no target',)",
                "Invalid target ('no target',): expected (workspace id, alias)",
            ),
        ]
        report = body["report"]
        assert sorted(report["failures"], key=lambda each: each["index"]) == [
            unknown,
            *others,
        ]
        assert report["counts"] == {
            "stopped": 1,
            "unknown": 1,
            "not_found": 1,
            "invalid": 3,
        }
        assert (report["running"], report["not_running"]) == (0, 1)
        for text in streams:
            lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
            *data, runtime = map(json.loads, lines)
            late = [report | {"ended_early": error}, unknown | {"request_id": None}]
            assert data == [*body["outcomes"], report, *late]
            assert runtime["status"] == "stopped"
        assert SECRET not in json.dumps(body) + "".join(streams)

    def test_nothing_but_the_session_s_own_classes_is_shown(self) -> None:
        """Faults: `to_dict` had the API's text; FastAPI's encoders were edited."""
        outcome = bctrl_async.StopOutcome(
            index=0,
            target=bctrl_async.RuntimeRef("ws-1", "crm"),
            result=bctrl_async.StopResult.UNKNOWN,
            error=BctrlError(SECRET),
        )
        with pytest.raises(ValueError, match="an instance of StopOutcome"):
            TypeAdapter(StopOutcome).validate_python(outcome.to_dict())
        with pytest.raises(ValueError, match="not iterable"):
            jsonable_encoder(outcome)

    def test_a_cancelled_run_and_its_stops_have_the_same_reason(
        self, connect: Connect
    ) -> None:
        """Fault: the reason was "the run ended before this stop was settled"."""
        app = app_for(connect)

        @app.post("/cancelled")
        async def cancelled(session: BctrlDep) -> StopReport:
            batch = session.stop_runtimes([("ws-1", "r0")] * 500)
            batch.stop_reading()
            return await batch

        with TestClient(app) as client:
            report = client.post("/cancelled").json()
        reasons = [
            report["ended_early"],
            *(failure["error"] for failure in report["failures"]),
        ]
        message = "The run was ended before all its stops were settled."
        assert {reason["message"] for reason in reasons} == {message}


@pytest.fixture(scope="module")
def problems() -> tuple[TestClient, Document]:
    """A client of an app that answers with each problem, and the app's OpenAPI."""
    app = FastAPI()
    add_exception_handlers(app)

    @app.get("/{number}", responses=PROBLEM_RESPONSES)
    async def fail(number: int) -> None:
        error = copy(ROWS[number][0])
        error.retry_after = 1.5
        error.workspace_id, error.alias, error.request_id = "ws-1", "crm", "req_1"
        raise error

    return TestClient(app), valid_openapi(app)


class TestProblems:
    @pytest.mark.parametrize("number", range(len(ROWS)))
    def test_each_matches_its_schema(
        self, problems: tuple[TestClient, Document], number: int
    ) -> None:
        (client, document), (_, status, slug) = problems, ROWS[number]
        answer = client.get(f"/{number}")
        said = response_of(document, "/{number}", status)
        own = {"application/json"} if status == 422 else set()
        assert said["content"].keys() == {answer.headers["Content-Type"]} | own
        problem = said["content"][PROBLEM]
        validate(answer.json(), problem["schema"], document)
        fields = document["components"]["schemas"]["Problem"]["properties"]
        assert answer.json().keys() <= fields.keys()
        assert problem["examples"][slug]["value"]["type"] == answer.json()["type"]
        assert ("Retry-After" in said.get("headers", {})) is (
            "Retry-After" in answer.headers
        )

    def test_an_invalid_request_is_documented_beside_them(
        self, problems: tuple[TestClient, Document]
    ) -> None:
        client, document = problems
        answer = client.get("/one")
        media_type = answer.headers["Content-Type"]
        assert (answer.status_code, media_type) == (422, "application/json")
        schema = response_of(document, "/{number}", 422)["content"][media_type][
            "schema"
        ]
        validate(answer.json(), schema, document)
        with pytest.raises(ValidationError):
            validate({"detail": [{"loc": 1}]}, schema, document)

    def test_the_apps_own_errors_and_their_openapi_stay_as_they_are(self) -> None:
        class Item(BaseModel):
            size: int

        async def create(number: int, items: list[Item]) -> int:
            raise HTTPException(418, f"{number} {items}")

        plain, app = FastAPI(), FastAPI()
        add_exception_handlers(app)
        answers = []
        for each in (plain, app):
            each.post("/items/{number}")(create)
            client = TestClient(each)
            answers.append(
                [
                    client.post("/items/one", json=[{"size": "x"}]),
                    client.post("/items/1", json="not a list"),
                    client.post("/items/1", json=[{"size": 1}]),
                    client.post("/nowhere"),
                ]
            )
        said = [
            [(one.status_code, one.headers, one.content) for one in each]
            for each in answers
        ]
        assert [status for status, _, _ in said[0]] == [422, 422, 418, 404]
        assert said[0] == said[1]
        assert app.openapi() == plain.openapi()

    def test_the_reference_explains_each_type(self) -> None:
        page = (DOCS / "reference" / "problems.md").read_text("utf-8")
        sections = re.findall(r"^### ([a-z-]+)\n\nStatus (\d{3}): ", page, re.MULTILINE)
        assert sections == [(kind.slug, str(kind.status)) for kind in ProblemType]
        members = re.findall(
            r'^  "(\w+)":', page.partition("## Types")[0], re.MULTILINE
        )
        assert members == [
            field.serialization_alias for field in Problem.model_fields.values()
        ]
