"""The OpenAPI of an app that uses the FastAPI extra, and the problems that it describes."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from fastapi import FastAPI, Query, Request
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate as validate_openapi
from pydantic import BaseModel
from pydantic.alias_generators import to_camel
from test_fastapi import ROWS

import bctrl_async
from bctrl_async import BctrlError
from bctrl_async.fastapi import (
    PROBLEM_RESPONSES,
    Problem,
    RuntimeBody,
    StopOutcomeBody,
    StopReportBody,
    _schemas,
    add_exception_handlers,
)
from bctrl_async.fastapi._problems import ProblemType
from bctrl_async.outcomes import OutcomeRecord

DOCS = Path(__file__).parent.parent / "docs"
PROBLEM = "application/problem+json"
REF = "#/components/schemas/"


def app_with_routes(**options: Any) -> FastAPI:  # noqa: ANN401 - those of FastAPI.
    """Return an app that returns each body and declares the problems."""
    app = FastAPI(**options)
    add_exception_handlers(app)

    @app.get("/runtime", responses=PROBLEM_RESPONSES)
    async def runtime() -> RuntimeBody:
        raise NotImplementedError

    @app.get("/outcomes", responses=PROBLEM_RESPONSES)
    async def outcomes() -> list[StopOutcomeBody]:
        raise NotImplementedError

    @app.get("/report", responses=PROBLEM_RESPONSES)
    async def report() -> StopReportBody:
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
    def test_each_body_is_a_component(self) -> None:
        document = valid_openapi(app_with_routes())
        assert document["openapi"].startswith("3.1")
        assert document["components"]["schemas"].keys() == {
            "Problem",
            "Runtime",
            "RuntimeState",
            "RuntimeSummary",
            "StopError",
            "StopOutcome",
            "StopReport",
            "StopResult",
            "ValidationProblem",
        }
        schemas = {
            path: response_of(document, path)["content"]["application/json"]["schema"]
            for path in document["paths"]
        }
        assert schemas["/runtime"] == {"$ref": REF + "Runtime"}
        assert schemas["/report"] == {"$ref": REF + "StopReport"}
        assert schemas["/outcomes"]["items"] == {"$ref": REF + "StopOutcome"}

    def test_no_private_or_mangled_name_is_in_it(self) -> None:
        """Fault: titles were `_Outcome`, `_Error` and `Workspaceid`."""
        document = valid_openapi(app_with_routes())
        assert "bctrl_async" not in json.dumps(document)
        schemas = document["components"]["schemas"]
        assert {name: schema["title"] for name, schema in schemas.items()} == {
            name: name for name in schemas
        }
        for schema in schemas.values():
            assert not [part for part in schema.get("properties", {}).values() if "title" in part]

    @pytest.mark.parametrize("separate", [True, False])
    def test_bodies_are_components_within_the_apps_own_models(self, *, separate: bool) -> None:
        class Answer(BaseModel):
            report: StopReportBody
            runtimes: list[RuntimeBody]
            last: StopOutcomeBody | None = None

        app = FastAPI(separate_input_output_schemas=separate)

        @app.get("/")
        async def answer() -> Answer:
            raise NotImplementedError

        fields = valid_openapi(app)["components"]["schemas"]["Answer"]["properties"]
        assert fields["report"]["$ref"] == REF + "StopReport"
        assert fields["runtimes"]["items"] == {"$ref": REF + "Runtime"}
        assert {"$ref": REF + "StopOutcome"} in fields["last"]["anyOf"]

    def test_the_apps_own_models_of_the_same_names_are_kept_apart(self) -> None:
        """Fault: one of two models with the same name described the answers of both."""

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
        contents = [
            response_of(document, path, status)["content"]
            for path in ("/own", "/runtime")
            for status in (200, 404)
        ]
        names = [
            content[media_type]["schema"]["$ref"].removeprefix(REF)
            for content in contents
            for media_type in content
        ]
        assert names[2:] == ["bctrl_async__fastapi__Runtime", "bctrl_async__fastapi__Problem"]
        assert [set(schemas[name]["properties"]) for name in names[:2]] == [
            {"language"},
            {"reason"},
        ]
        assert "mayHaveStopped" in schemas[names[3]]["properties"]

    @pytest.mark.parametrize("struct", ["Runtime", "RuntimeSummary"])
    def test_the_components_of_the_apis_objects_have_all_their_fields(self, struct: str) -> None:
        fields = msgspec.inspect.type_info(getattr(bctrl_async, struct))
        assert isinstance(fields, msgspec.inspect.StructType)
        component = getattr(_schemas, struct)
        assert component.__required_keys__ == {field.encode_name for field in fields.fields}

    def test_the_components_of_outcomes_and_reports_have_all_their_fields(self) -> None:
        outcome = set(map(to_camel, OutcomeRecord.__struct_fields__))
        assert _schemas.StopOutcome.__required_keys__ == outcome
        report = set(map(to_camel, bctrl_async.StopReport.__struct_fields__))
        assert _schemas.StopReport.__required_keys__ == report | {"ok", "allStopped"}

    def test_the_example_is_valid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(DOCS / "examples" / "fastapi")
        monkeypatch.delitem(sys.modules, "app", raising=False)
        document = valid_openapi(importlib.import_module("app").app)
        # The data of both events, and the app's own errors.
        types = {"Progress", "StopReport", "Problem", "PlainProblem", "Runtime"}
        assert types < document["components"]["schemas"].keys()
        operations = {
            operation["operationId"]: operation
            for path in document["paths"].values()
            for operation in path.values()
        }
        assert operations.keys() == {"health", "stop_one", "stop_many", "follow", "cancel"}
        assert all(operation["tags"] for operation in operations.values())
        for name in ("stop_one", "follow", "cancel"):
            assert all("description" in each for each in operations[name]["parameters"])
        for name in ("stop_many", "follow"):
            events = operations[name]["responses"]["200"]["content"]["text/event-stream"]
            data = {
                event["properties"]["event"]["const"]: event["properties"]["data"]["contentSchema"]
                for event in events["itemSchema"]["oneOf"]
            }
            expected = {
                "progress": {"$ref": REF + "Progress"},
                "report": {"$ref": REF + "StopReport"},
            }
            assert data == expected
            example = events["examples"]["progress"]["value"].partition("data: ")[2]
            validate(json.loads(example), {"$ref": REF + "Progress"}, document)


class TestProblems:
    @pytest.mark.parametrize(("error", "status", "slug"), ROWS)
    def test_each_matches_its_schema_in_the_apps_openapi(
        self, error: BctrlError, status: int, slug: str
    ) -> None:
        app = FastAPI()
        add_exception_handlers(app)

        @app.get("/", responses=PROBLEM_RESPONSES)
        async def fail() -> None:
            error.retry_after = 1.5
            error.workspace_id, error.alias, error.request_id = "ws-1", "crm", "req_1"
            raise error

        document = valid_openapi(app)
        answer = TestClient(app).get("/")

        said = response_of(document, "/", status)
        assert said["content"].keys() == {answer.headers["Content-Type"]}
        validate(answer.json(), said["content"][PROBLEM]["schema"], document)
        assert (
            answer.json().keys()
            <= document["components"]["schemas"]["Problem"]["properties"].keys()
        )
        assert said["content"][PROBLEM]["examples"][slug]["value"]["type"] == answer.json()["type"]
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
        assert sections == [(kind.slug, str(kind.status.value)) for kind in ProblemType]
        members = re.findall(r'^  "(\w+)":', page.partition("## Types")[0], re.MULTILINE)
        assert members == list(Problem.__annotations__)

    def test_the_guide_names_the_type_of_each_error(self) -> None:
        guide = (DOCS / "how-to" / "fastapi.md").read_text("utf-8")
        rows = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", guide, re.MULTILINE)
        assert rows == [(kind.slug, str(kind.status.value)) for kind in ProblemType]

    def test_a_problem_is_documented_under_its_media_type_whatever_the_route_returns(self) -> None:
        app = FastAPI()
        add_exception_handlers(app)

        @app.get("/", response_class=PlainTextResponse, responses=PROBLEM_RESPONSES)
        async def text() -> str:
            raise NotImplementedError

        document = valid_openapi(app)
        assert response_of(document, "/", 404)["content"][PROBLEM]["schema"] == {
            "$ref": REF + "Problem"
        }
        assert response_of(document, "/", 404)["content"].keys() == {PROBLEM}
        assert response_of(document, "/")["content"].keys() == {"text/plain"}

    @pytest.mark.parametrize("first", [True, False])
    def test_an_openapi_of_the_apps_own_is_valid_before_and_after(self, *, first: bool) -> None:
        app = app_with_routes()

        def custom() -> dict[str, Any]:
            document = get_openapi(title="Own", version="1", routes=app.routes)
            document["paths"]["/runtime"]["parameters"] = []
            document["paths"]["/health"] = {
                "get": {"responses": {"200": {"$ref": "#/components/responses/Health"}}}
            }
            document["components"]["responses"] = {"Health": {"description": "Healthy"}}
            return document

        app.openapi = custom  # type: ignore[method-assign]
        if first:
            add_exception_handlers(app)
        document = valid_openapi(app)
        assert document["info"]["title"] == "Own"
        content = response_of(document, "/runtime", 404)["content"]
        assert content.keys() == ({PROBLEM} if first else {PROBLEM, "application/json"})

    def test_an_app_without_routes_is_left_alone(self) -> None:
        app = FastAPI()
        expected = dict(app.openapi())
        add_exception_handlers(app)
        assert app.openapi() == expected


class Item(BaseModel):
    name: str
    size: Annotated[int, Query(gt=0)]


def app_with_arguments() -> FastAPI:
    app = FastAPI()

    @app.post("/items/{number}")
    async def create(number: int, items: list[Item], kind: str) -> int:
        return number + len(items) + len(kind)

    return app


class TestInvalidRequests:
    def test_the_answer_is_a_problem_as_documented(self) -> None:
        app = app_with_arguments()
        add_exception_handlers(app)
        document = valid_openapi(app)

        answer = TestClient(app).post("/items/one", json=[{"name": "n", "size": -1}])

        assert answer.status_code == 422
        assert answer.headers["Content-Type"] == PROBLEM
        body = answer.json()
        errors = body.pop("errors")
        assert body == {
            "type": "urn:bctrl-async:problem:invalid-request",
            "title": "Invalid request",
            "status": 422,
            "detail": "3 missing or invalid values in the request.",
        }
        assert [error["loc"] for error in errors] == [
            ["path", "number"],
            ["query", "kind"],
            ["body", 0, "size"],
        ]
        assert errors[1] == {"loc": ["query", "kind"], "msg": "Field required", "type": "missing"}
        said = response_of(document, "/items/{number}", 422, "post")["content"]
        assert said.keys() == {PROBLEM}
        assert said[PROBLEM]["schema"] == {"$ref": REF + "ValidationProblem"}
        validate(answer.json(), said[PROBLEM]["schema"], document)

    def test_with_the_other_problems_either_is_documented(self) -> None:
        app = app_with_arguments()
        add_exception_handlers(app)

        @app.get("/{number}", responses=PROBLEM_RESPONSES)
        async def read(number: int) -> None:
            del number

        document = valid_openapi(app)
        answer = TestClient(app).get("/one")

        schema = response_of(document, "/{number}", 422)["content"][PROBLEM]["schema"]
        assert schema["anyOf"] == [{"$ref": REF + "Problem"}, {"$ref": REF + "ValidationProblem"}]
        validate(answer.json(), schema, document)
        schema = response_of(document, "/items/{number}", 422, "post")["content"][PROBLEM]["schema"]
        assert schema == {"$ref": REF + "ValidationProblem"}
        assert document["components"]["schemas"].keys() == {"Item", "Problem", "ValidationProblem"}

    def test_the_input_is_not_echoed(self) -> None:
        """Fault: a client's log had what it sent, and a large request got a larger answer."""
        app = app_with_arguments()
        add_exception_handlers(app)
        secret = "s3cret" * 10
        sent = [{"name": [secret], secret: secret, "size": secret}] * 10_000
        answer = TestClient(app).post("/items/1", params={"kind": "k"}, json=sent)
        assert answer.status_code == 422
        assert "s3cret" not in answer.text
        assert answer.json()["detail"].startswith("20000 missing")
        assert len(answer.json()["errors"]) == 20

    def test_a_long_place_and_a_long_message_are_cut(self) -> None:
        app = FastAPI()
        add_exception_handlers(app)

        class Strict(BaseModel, extra="forbid"):
            pass

        @app.post("/")
        async def create(item: Strict) -> None:
            del item

        @app.get("/")
        async def fail() -> None:
            raise RequestValidationError([{"loc": (0,) * 999, "msg": "m" * 9999, "type": "own"}])

        client = TestClient(app)
        [error] = client.post("/", json={"k" * 9999: 1}).json()["errors"]
        assert error["loc"] == ["body", "k" * 200 + "…"]
        assert len(client.get("/").content) < 1000

    def test_an_error_that_the_app_raises_may_lack_members(self) -> None:
        """Fault: the answer was a 500."""
        app = FastAPI()
        add_exception_handlers(app)

        @app.get("/")
        async def fail() -> None:
            raise RequestValidationError(
                [
                    {"msg": "No.", "loc": ("body", None, 1.5)},
                    {},
                    {"loc": None},
                    {"loc": "body"},
                    "No.",
                ]
            )

        assert TestClient(app).get("/").json()["errors"] == [
            {"loc": ["body", "None", "1.5"], "msg": "No.", "type": ""},
            {"loc": [], "msg": "", "type": ""},
            {"loc": [], "msg": "", "type": ""},
            {"loc": ["body"], "msg": "", "type": ""},
            {"loc": [], "msg": "No.", "type": ""},
        ]

    def test_another_media_type_of_a_problem_stays_documented(self) -> None:
        app = FastAPI()
        add_exception_handlers(app)
        page = {"content": {"text/html": {}, PROBLEM: {"example": {}}}, "model": Problem}

        @app.get("/", responses={404: page})
        async def page_or_problem() -> None: ...

        responses = app.openapi()["paths"]["/"]["get"]["responses"]
        assert responses["404"]["content"].keys() == {"text/html", PROBLEM}
        assert "schema" in responses["404"]["content"][PROBLEM]

    def test_text_that_is_not_json_is_a_problem_too(self) -> None:
        app = app_with_arguments()
        add_exception_handlers(app)
        answer = TestClient(app).post(
            "/items/1?kind=k", content=b"{", headers={"Content-Type": "application/json"}
        )
        assert (answer.status_code, answer.headers["Content-Type"]) == (422, PROBLEM)
        assert answer.json()["detail"] == "1 missing or invalid value in the request."
        [error] = answer.json()["errors"]
        assert (error["loc"], error["msg"]) == (["body"], "JSON decode error at character 1")

    @pytest.mark.parametrize("first", [True, False])
    def test_a_handler_of_the_apps_own_is_kept_and_the_openapi_says_so(
        self, *, first: bool
    ) -> None:
        app = app_with_arguments()

        async def own(_: Request, __: Exception) -> JSONResponse:
            return JSONResponse({"own": True}, HTTPStatus.BAD_REQUEST)

        if first:
            app.add_exception_handler(RequestValidationError, own)
        add_exception_handlers(app)
        if not first:
            app.add_exception_handler(RequestValidationError, own)

        assert TestClient(app).post("/items/one").json() == {"own": True}
        assert "HTTPValidationError" in valid_openapi(app)["components"]["schemas"]

    def test_fastapis_own_answer_can_be_kept(self) -> None:
        app = app_with_arguments()
        add_exception_handlers(app)
        app.exception_handler(RequestValidationError)(request_validation_exception_handler)
        assert "detail" in TestClient(app).post("/items/one").json()
        document = valid_openapi(app)
        said = response_of(document, "/items/{number}", 422, "post")["content"]
        assert said.keys() == {"application/json"}

    def test_models_of_the_same_names_are_kept(self) -> None:
        app = app_with_arguments()
        add_exception_handlers(app)
        own = type("ValidationProblem", (BaseModel,), {"__annotations__": {"own": int}})

        @app.get("/own", response_model=own)
        async def read() -> None:
            raise NotImplementedError

        @app.get("/fastapi", responses={200: {"content": {"x/y": {"schema": HTTP_VALIDATION}}}})
        async def custom() -> None:
            raise NotImplementedError

        document = valid_openapi(app)
        said = response_of(document, "/items/{number}", 422, "post")["content"][PROBLEM]
        assert said["schema"] == {"$ref": REF + "bctrl_async__fastapi__ValidationProblem"}
        schemas = document["components"]["schemas"]
        assert set(schemas["ValidationProblem"]["properties"]) == {"own"}
        assert {"HTTPValidationError", "ValidationError"} < schemas.keys()


HTTP_VALIDATION = {"$ref": REF + "HTTPValidationError"}
