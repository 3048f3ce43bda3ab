"""The contract is the judge: what it allows is read, and what is sent is what it asks for."""

import json
import types
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import msgspec
import pytest
from contract import (
    CONTRACT,
    Schema,
    answer_schema,
    assert_request_fits_contract,
    operation,
    resolved,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from bctrl_async import _config
from bctrl_async._http.response import read_runtime
from bctrl_async.models import LaunchMode, Runtime, RuntimeKind, RuntimeStatus, RuntimeSummary

SCHEMAS: Schema = CONTRACT["components"]["schemas"]
MODELS: dict[str, type] = {
    "Runtime": Runtime,
    "RuntimeSummary": RuntimeSummary,
    "RuntimeKind": RuntimeKind,
    "RuntimeStatus": RuntimeStatus,
    "LaunchMode": LaunchMode,
}
STRUCTS: dict[str, type[msgspec.Struct]] = {"Runtime": Runtime, "RuntimeSummary": RuntimeSummary}
ENUMS: dict[str, type[StrEnum]] = {
    "RuntimeKind": RuntimeKind,
    "RuntimeStatus": RuntimeStatus,
    "LaunchMode": LaunchMode,
}

# Surrogates too: JSON can carry half of a pair.
_text = st.text(st.characters(codec=None), max_size=8)
_scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _text
_json = _scalars | st.lists(_scalars, max_size=2) | st.dictionaries(_text, _scalars, max_size=2)


def instances(schema: Schema) -> st.SearchStrategy[Any]:
    """Return all that a schema allows, unknown properties included.

    hypothesis-jsonschema 0.23.1 cannot make objects under hypothesis 6.170 (it uses what is
    private there), so this reads the few keywords that the contract has, and refuses others.
    """
    unheard_of = set(schema) - {"type", "enum", "format", "properties", "required"}
    assert not unheard_of, unheard_of
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of([_instances_of(kind, schema) for kind in kinds])


def _instances_of(kind: str, schema: Schema) -> st.SearchStrategy[Any]:
    match kind, schema.get("format"):
        case "null", _:
            return st.none()
        case "boolean", None:
            return st.booleans()
        case "string", None:
            return _text
        case "string", "uuid":
            return st.uuids().map(str) | st.uuids().map(lambda uuid: str(uuid).upper())
        case "object", None:
            return _objects(schema)
    raise NotImplementedError(kind, schema)


def _objects(schema: Schema) -> st.SearchStrategy[Schema]:
    properties = {name: instances(value) for name, value in schema["properties"].items()}
    required = {name: properties.pop(name) for name in schema.get("required", [])}
    names = st.text(max_size=8).filter(lambda name: name not in schema["properties"])
    known = st.fixed_dictionaries(required, optional=properties)
    return st.builds(dict[str, Any].__or__, st.dictionaries(names, _json, max_size=3), known)


def without_enums(schema: Any) -> Any:  # noqa: ANN401 - as deep and as varied as YAML.
    if isinstance(schema, dict):
        return {k: without_enums(v) for k, v in schema.items() if k != "enum"}
    return schema


def assert_read_as(read: object, written: object, schema: Schema) -> None:
    """Compare what the client made of a value with the value."""
    if isinstance(read, msgspec.Struct):
        assert isinstance(written, Mapping)
        fields = msgspec.structs.fields(type(read))
        names = {field.encode_name: field.name for field in fields}
        for name, described in schema["properties"].items():
            assert_read_as(getattr(read, names[name]), written.get(name), described)
    elif isinstance(read, UUID):
        assert isinstance(written, str)
        assert str(read) == written.lower()
    else:
        assert read == written


def read(body: bytes) -> Runtime:
    runtime = read_runtime(200, body, "Bearer k")
    assert isinstance(runtime, Runtime), runtime
    return runtime


class TestAnswers:
    SCHEMA = answer_schema()
    VALIDATOR = Draft202012Validator(SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER)

    @settings(max_examples=200, deadline=None)
    @given(instances(SCHEMA))
    def test_what_is_generated_here_is_what_the_schema_allows(self, answer: Schema) -> None:
        self.VALIDATOR.validate(answer)

    @settings(
        max_examples=10_000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(instances(SCHEMA))
    def test_every_answer_that_the_contract_allows_is_read_value_for_value(
        self, answer: Schema
    ) -> None:
        body = json.dumps(answer).encode()

        runtime = read(body)

        assert_read_as(runtime, json.loads(body), self.SCHEMA)

    @settings(deadline=None)
    @given(instances(without_enums(SCHEMA)))
    def test_enum_values_of_a_later_server_are_read_as_well(self, answer: Schema) -> None:
        """Fault: a new enum value breaks every call (apify-client-python#931)."""
        body = json.dumps(answer).encode()

        runtime = read(body)

        assert_read_as(runtime, json.loads(body), self.SCHEMA)
        assert isinstance(runtime.kind, RuntimeKind)
        assert isinstance(runtime.status, RuntimeStatus)

    @pytest.mark.parametrize("summary", [None, {}, {"launchMode": "\ud800"}, {"launchMode": None}])
    @pytest.mark.parametrize("kind", ["browser", "\udfff"])
    def test_half_a_surrogate_pair_in_an_enum_is_read_as_it_came(
        self, kind: str, summary: dict[str, str | None] | None
    ) -> None:
        answer = {
            "alias": "crm",
            "createdAt": "",
            "driver": "",
            "id": "e3e70682-c209-4cac-629f-6fbed82c07cd",
            "kind": kind,
            "status": "\ud800",
            "updatedAt": "",
            "workspaceId": "f728b4fa-4248-5e3a-0a5d-2f346baa9455",
            **({} if summary is None else {"summary": summary}),
        }
        runtime = read(json.dumps(answer).encode())
        assert (runtime.kind, runtime.status) == (kind, "\ud800")
        assert_read_as(runtime, answer, self.SCHEMA)

    @settings(deadline=None)
    @given(instances(SCHEMA), st.sampled_from([None, "utf-8", "utf-8-sig", "utf-16"]))
    def test_unescaped_text_is_read_as_well(self, answer: Schema, encoding: str | None) -> None:
        body = json.dumps(answer, ensure_ascii=False).encode(encoding or "utf-8", "surrogatepass")

        assert_read_as(read(body), json.loads(body), self.SCHEMA)


class TestModels:
    def test_every_schema_has_its_model_and_every_model_its_schema(self) -> None:
        assert set(MODELS) == set(SCHEMAS)

    @pytest.mark.parametrize("name", STRUCTS)
    def test_a_structs_wire_names_are_the_schemas_properties(self, name: str) -> None:
        fields = msgspec.structs.fields(STRUCTS[name])

        assert {field.encode_name for field in fields} == set(SCHEMAS[name]["properties"])

    @pytest.mark.parametrize("name", STRUCTS)
    def test_a_struct_requires_what_the_schema_requires(self, name: str) -> None:
        fields = msgspec.structs.fields(STRUCTS[name])

        required = {field.encode_name for field in fields if field.required}

        assert required == set(SCHEMAS[name].get("required", []))

    @pytest.mark.parametrize("name", STRUCTS)
    def test_what_is_not_required_is_none_where_it_is_missing(self, name: str) -> None:
        fields = msgspec.structs.fields(STRUCTS[name])

        assert {field.default for field in fields if not field.required} == {None}

    @pytest.mark.parametrize(
        ("name", "property_name"),
        [(name, prop) for name in STRUCTS for prop in SCHEMAS[name]["properties"]],
    )
    def test_a_fields_type_is_the_propertys(self, name: str, property_name: str) -> None:
        described = SCHEMAS[name]["properties"][property_name]
        by_wire_name = {
            field.encode_name: field.name for field in msgspec.structs.fields(STRUCTS[name])
        }
        hint = get_type_hints(STRUCTS[name])[by_wire_name[property_name]]
        types_read = set(get_args(hint)) if get_origin(hint) in {Union, types.UnionType} else {hint}

        if property_name not in SCHEMAS[name].get("required", []):
            assert types.NoneType in types_read
            types_read.discard(types.NoneType)
        assert types_read == {self.type_of(described)}

    @staticmethod
    def type_of(described: Schema) -> type:
        if "$ref" in described:
            return MODELS[described["$ref"].rpartition("/")[2]]
        kinds = described["type"] if isinstance(described["type"], list) else [described["type"]]
        (kind,) = set(kinds) - {"null"}
        by_kind = {
            ("string", None): str,
            ("string", "uuid"): UUID,
            ("boolean", None): bool,
        }
        return by_kind[kind, described.get("format")]

    @pytest.mark.parametrize("name", ENUMS)
    def test_an_enums_members_are_the_schemas_values(self, name: str) -> None:
        assert [member.value for member in ENUMS[name]] == SCHEMAS[name]["enum"]
        assert [member.name for member in ENUMS[name]] == [
            value.upper() for value in SCHEMAS[name]["enum"]
        ]


class TestDocument:
    def test_the_answer_is_a_runtime(self) -> None:
        assert answer_schema() == resolved(SCHEMAS["Runtime"])
        assert "$ref" not in json.dumps(answer_schema())

    def test_the_default_base_url_is_the_contracts_first_server(self) -> None:
        assert CONTRACT["servers"][0]["url"] == _config.DEFAULT_BASE_URL

    def test_an_operation_that_is_not_there_is_an_error(self) -> None:
        with pytest.raises(LookupError, match="runtimes-start"):
            operation("runtimes-start")


GOOD_PATH = "/v1/workspaces/ws-1/runtimes/crm/stop"
GOOD_HEADERS = {"Host": "api.bctrl.ai", "Authorization": "Bearer k", "Content-Length": "0"}


class TestRequests:
    """The judge of requests, which other tests rely upon, refuses what is wrong."""

    def test_it_takes_a_right_request_and_gives_its_parameters(self) -> None:
        parameters = assert_request_fits_contract("POST", GOOD_PATH, GOOD_HEADERS, b"")

        assert parameters == {"id": "ws-1", "alias": "crm"}

    @pytest.mark.parametrize(
        ("segment", "alias"),
        [
            ("a%2Fb", "a/b"),
            ("a%20b", "a b"),
            ("%C3%A4", "ä"),
            ("...", "..."),
            ("a:b@c;v=1,2!", "a:b@c;v=1,2!"),
            ("stop", "stop"),
        ],
    )
    def test_a_parameter_is_one_decoded_segment(self, segment: str, alias: str) -> None:
        path = f"/v1/workspaces/ws-1/runtimes/{segment}/stop"

        parameters = assert_request_fits_contract("POST", path, GOOD_HEADERS, b"")

        assert parameters == {"id": "ws-1", "alias": alias}

    @pytest.mark.parametrize("accept", ["application/json", "*/*", "text/html, */*;q=0.1"])
    def test_headers_beyond_the_contract_are_the_callers_own(self, accept: str) -> None:
        headers = {"authorization": "bearer k", "X-Trace": "1", "Accept": accept}

        assert assert_request_fits_contract("POST", GOOD_PATH, headers, b"")

    @pytest.mark.parametrize("method", ["GET", "post", "PUT", ""])
    def test_it_refuses_another_method(self, method: str) -> None:
        with pytest.raises(AssertionError, match="is not POST"):
            assert_request_fits_contract(method, GOOD_PATH, GOOD_HEADERS, b"")

    @pytest.mark.parametrize(
        "path",
        [
            "",
            "/",
            "/v1/stop",
            "/workspaces/ws-1/runtimes/crm/stop",
            "/v1/v1/workspaces/ws-1/runtimes/crm/stop",
            "/v2/workspaces/ws-1/runtimes/crm/stop",
            "/v1/workspaces/ws-1/runtimes/crm",
            "/v1/workspaces/ws-1/runtimes/crm/stop/",
            "/v1/workspaces/ws-1/runtimes/crm/stop?x=1",
            "/v1/workspaces/ws-1/runtimes/crm/stop?",
            "/v1/workspaces/ws-1/runtimes/crm/stop#x",
            "/v1/workspaces/ws-1/runtimes/crm/stop\n",
            "/v1/workspaces//runtimes/crm/stop",
            "/v1/workspaces/ws-1/runtimes//stop",
            "/v1/workspaces/ws-1/runtimes/a/b/stop",
            "/v1/workspaces/ws-1/runtimes/a?b/stop",
            "/v1/workspaces/ws-1/runtimes/a b/stop",
            "/v1/workspaces/ws-1/runtimes/ä/stop",
            "/v1/workspaces/ws-1/runtimes/100%/stop",
            "/v1/workspaces/ws-1/runtimes/%zz/stop",
            "https://api.bctrl.ai/v1/workspaces/ws-1/runtimes/crm/stop",
        ],
    )
    def test_it_refuses_another_path(self, path: str) -> None:
        with pytest.raises(AssertionError, match="does not fit /v1/workspaces/"):
            assert_request_fits_contract("POST", path, GOOD_HEADERS, b"")

    @pytest.mark.parametrize("step", [".", "..", "%2e", "%2E%2e", ".%2e"])
    def test_it_refuses_a_step_in_the_path(self, step: str) -> None:
        path = f"/v1/workspaces/ws-1/runtimes/{step}/stop"

        with pytest.raises(AssertionError, match="has a step in it"):
            assert_request_fits_contract("POST", path, GOOD_HEADERS, b"")

    def test_it_refuses_a_request_without_a_key(self) -> None:
        with pytest.raises(AssertionError, match="Authorization is missing"):
            assert_request_fits_contract("POST", GOOD_PATH, {"Host": "api.bctrl.ai"}, b"")

    @pytest.mark.parametrize("value", ["", "k", "Bearer", "Bearer ", "Bearer a b", "Basic a"])
    def test_it_refuses_a_key_of_another_scheme_and_does_not_show_it(self, value: str) -> None:
        with pytest.raises(AssertionError) as caught:
            assert_request_fits_contract("POST", GOOD_PATH, {"Authorization": value}, b"")

        assert str(caught.value).startswith("Authorization is not of the scheme bearer")

    @pytest.mark.parametrize(
        ("headers", "body", "problem"),
        [
            ({}, b"{}", "has no request body"),
            ({"Content-Type": "application/json"}, b"", "a Content-Type without a body"),
            ({"Content-Type": "application/octet-stream"}, b"", "a Content-Type without a body"),
            ({"content-length": "2"}, b"", "a length without a body"),
            ({"Transfer-Encoding": "chunked"}, b"", "a Transfer-Encoding without a body"),
            ({"Accept": "text/html"}, b"", "Accept leaves out"),
            ({"AUTHORIZATION": "Bearer k"}, b"", "a header is given twice"),
        ],
    )
    def test_it_refuses_a_body_and_all_that_announces_one(
        self, headers: dict[str, str], body: bytes, problem: str
    ) -> None:
        headers = {"Authorization": "Bearer k"} | headers

        with pytest.raises(AssertionError, match=problem):
            assert_request_fits_contract("POST", GOOD_PATH, headers, body)
