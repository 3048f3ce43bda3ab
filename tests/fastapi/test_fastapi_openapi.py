"""The OpenAPI of an app that uses the FastAPI extra, and the problems that it describes."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator, ValidationError
from openapi_spec_validator import validate as validate_openapi
from pydantic import BaseModel
from test_fastapi import ROWS

from bctrl_async import BctrlConfigError
from bctrl_async.fastapi import (
    PROBLEM_RESPONSES,
    Problem,
    Runtime,
    StopOutcome,
    StopReport,
    add_exception_handlers,
)
from bctrl_async.fastapi._problems import ProblemType

DOCS = Path(__file__).parents[2] / "docs"
PROBLEM = "application/problem+json"
REF = "#/components/schemas/"


def app_with_routes(**options: Any) -> FastAPI:  # noqa: ANN401 - those of FastAPI.
    """Return an app that returns each body and declares the problems."""
    app = FastAPI(**options)
    add_exception_handlers(app)

    @app.get("/runtime", responses=PROBLEM_RESPONSES)
    async def runtime() -> Runtime:
        raise NotImplementedError

    @app.get("/outcomes", responses=PROBLEM_RESPONSES)
    async def outcomes() -> list[StopOutcome]:
        raise NotImplementedError

    @app.get("/report", responses=PROBLEM_RESPONSES)
    async def report() -> StopReport:
        raise NotImplementedError

    return app


def valid_openapi(app: FastAPI) -> dict[str, Any]:
    """Return an app's OpenAPI after validating it, with its examples."""
    document: dict[str, Any] = TestClient(app).get("/openapi.json").json()
    validate_openapi(document)
    for schema in parts_of(document):
        for example in as_list(schema.get("examples", [])):
            validate(example, schema, document)
    for part in parts_of(document):
        if "schema" in part and "examples" in part:
            for example in part["examples"].values():
                validate(example["value"], part["schema"], document)
    return document


def parts_of(document: object) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        yield document
        for key, value in document.items():
            if key != "value":  # An example.
                yield from parts_of(value)
    elif isinstance(document, list):
        for value in document:
            yield from parts_of(value)


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def validate(value: object, schema: dict[str, Any], document: dict[str, Any]) -> None:
    whole = {**schema, "components": document["components"]}
    checker = Draft202012Validator.FORMAT_CHECKER
    Draft202012Validator(whole, format_checker=checker).validate(value)


def response_of(
    document: dict[str, Any], path: str, status: int = 200, method: str = "get"
) -> dict[str, Any]:
    found: dict[str, Any] = document["paths"][path][method]["responses"][str(status)]
    return found


class TestComponents:
    def test_each_body_is_a_component_under_its_public_name(self) -> None:
        document = valid_openapi(app_with_routes())
        assert document["openapi"].startswith("3.1")
        assert "bctrl_async" not in json.dumps(document)
        components = document["components"]["schemas"]
        assert {name: schema["title"] for name, schema in components.items()} == {
            name: name
            for name in (
                *("Problem", "Runtime", "RuntimeState", "RuntimeSummary"),
                *("StopError", "StopOutcome", "StopReport", "StopResult"),
            )
        }
        for schema in components.values():
            # pydantic would give `workspaceId` the title `Workspaceid`.
            assert not [part for part in schema.get("properties", {}).values() if "title" in part]

    def test_bodies_are_components_within_the_apps_own_models(self) -> None:
        class Answer(BaseModel):
            report: StopReport
            runtimes: list[Runtime]
            last: StopOutcome | None = None

        app = FastAPI()

        @app.get("/")
        async def answer() -> Answer:
            raise NotImplementedError

        fields = valid_openapi(app)["components"]["schemas"]["Answer"]["properties"]
        assert fields["report"]["$ref"] == REF + "StopReport"
        assert fields["runtimes"]["items"] == {"$ref": REF + "Runtime"}
        assert {"$ref": REF + "StopOutcome"} in fields["last"]["anyOf"]

    def test_the_apps_own_models_of_the_same_names_are_kept_apart(self) -> None:
        class Runtime(BaseModel):
            language: str

        class Problem(BaseModel):
            reason: str

        app = app_with_routes()

        @app.get("/own", responses={404: {"model": Problem}})
        async def own() -> Runtime:
            raise NotImplementedError

        document = valid_openapi(app)
        schemas = document["components"]["schemas"]
        names = [
            content["schema"]["$ref"].removeprefix(REF)
            for path in ("/own", "/runtime")
            for status in (200, 404)
            for content in response_of(document, path, status)["content"].values()
        ]
        assert names[2:] == ["bctrl_async__fastapi__Runtime", "bctrl_async__fastapi__Problem"]
        fields = [set(schemas[name]["properties"]) for name in names]
        assert fields[:2] == [{"language"}, {"reason"}]
        assert "mayHaveStopped" in fields[3]

    def test_the_example_is_valid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(DOCS / "examples" / "fastapi")
        monkeypatch.delitem(sys.modules, "app", raising=False)
        document = valid_openapi(importlib.import_module("app").app)
        assert {"Progress", "StopReport"} < document["components"]["schemas"].keys()

    def test_the_app_of_the_guide_describes_its_events(self) -> None:
        guide = (DOCS / "how-to" / "fastapi.md").read_text("utf-8")
        [code] = re.findall(
            r"^<!-- file: app.py -->\n\n```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL
        )
        names: dict[str, Any] = {}
        exec(code, names)  # noqa: S102 - our docs.
        names["app"].openapi_version = "3.2.0"
        document = valid_openapi(names["app"])
        path = document["paths"]["/workspaces/{workspace_id}/stop"]["post"]
        events = path["responses"]["200"]["content"]["text/event-stream"]
        data = events["itemSchema"]["properties"]["data"]["contentSchema"]
        assert data["anyOf"] == [{"$ref": REF + "StopOutcome"}, {"$ref": REF + "StopReport"}]


class TestProblems:
    def test_each_matches_its_schema_in_the_apps_openapi(self) -> None:
        app = FastAPI()
        add_exception_handlers(app)

        @app.get("/{number}", responses=PROBLEM_RESPONSES)
        async def fail(number: int) -> None:
            error, *_ = ROWS[number]
            error.retry_after = 1.5
            error.workspace_id, error.alias, error.request_id = "ws-1", "crm", "req_1"
            raise error

        document, client = valid_openapi(app), TestClient(app)
        fields = document["components"]["schemas"]["Problem"]["properties"].keys()
        for number, (_, status, slug) in enumerate(ROWS):
            answer = client.get(f"/{number}")
            said = response_of(document, "/{number}", status)
            own = {"application/json"} if status == 422 else set()
            assert said["content"].keys() == {answer.headers["Content-Type"]} | own
            problem = said["content"][PROBLEM]
            validate(answer.json(), problem["schema"], document)
            assert answer.json().keys() <= fields
            assert problem["examples"][slug]["value"]["type"] == answer.json()["type"]
            assert ("Retry-After" in said.get("headers", {})) is ("Retry-After" in answer.headers)

    def test_each_type_has_an_example_under_its_status(self) -> None:
        examples = {
            (status, name)
            for status, response in PROBLEM_RESPONSES.items()
            for name in response["content"][PROBLEM]["examples"]
        }
        assert examples == {(kind.status, kind.slug) for kind in ProblemType}

    def test_the_reference_explains_each_type(self) -> None:
        page = (DOCS / "reference" / "problems.md").read_text("utf-8")
        sections = re.findall(r"^### ([a-z-]+)\n\nStatus (\d{3}): ", page, re.MULTILINE)
        assert sections == [(kind.slug, str(kind.status)) for kind in ProblemType]
        members = re.findall(r'^  "(\w+)":', page.partition("## Types")[0], re.MULTILINE)
        assert members == [field.serialization_alias for field in Problem.model_fields.values()]

    def test_a_problem_is_documented_under_its_media_type_whatever_the_route_returns(self) -> None:
        app = FastAPI()
        add_exception_handlers(app)

        @app.get("/", response_class=PlainTextResponse, responses=PROBLEM_RESPONSES)
        async def text() -> str:
            raise NotImplementedError

        document = valid_openapi(app)
        assert response_of(document, "/")["content"].keys() == {"text/plain"}
        [(media_type, content)] = response_of(document, "/", 404)["content"].items()
        assert (media_type, content["schema"]) == (PROBLEM, {"$ref": REF + "Problem"})


class TestTheAppsOwnErrors:
    def test_its_answers_and_its_openapi_stay_as_they_are(self) -> None:
        class Item(BaseModel):
            size: int

        def make() -> FastAPI:
            app = FastAPI()

            @app.post("/items/{number}")
            async def create(number: int, items: list[Item]) -> int:
                raise HTTPException(418, f"{number} {items}")

            return app

        plain, app = make(), make()
        add_exception_handlers(app)
        answers = [
            [(answer.status_code, answer.headers, answer.content) for answer in answers_of(each)]
            for each in (plain, app)
        ]
        assert [status for status, _, _ in answers[0]] == [422, 422, 418, 404]
        assert answers[0] == answers[1]
        assert app.openapi() == plain.openapi()

    def test_both_kinds_of_422_are_documented_where_the_problems_are(self) -> None:
        app = FastAPI()
        add_exception_handlers(app)

        @app.get("/{number}", responses=PROBLEM_RESPONSES)
        async def read(number: int) -> None:
            raise BctrlConfigError(f"bad {number}", reason_class="invalid_input")

        document = valid_openapi(app)
        client = TestClient(app)
        content = response_of(document, "/{number}", 422)["content"]
        for path, media_type in (("/one", "application/json"), ("/1", PROBLEM)):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["Content-Type"]) == (422, media_type)
            validate(answer.json(), content[media_type]["schema"], document)
        with pytest.raises(ValidationError):
            validate({"detail": [{"loc": 1}]}, content["application/json"]["schema"], document)


def answers_of(app: FastAPI) -> list[httpx2.Response]:
    client = TestClient(app)
    return [
        client.post("/items/one", json=[{"size": "x"}]),
        client.post("/items/1", content=b"{", headers={"Content-Type": "application/json"}),
        client.post("/items/1", json=[{"size": 1}]),
        client.post("/nowhere"),
    ]
