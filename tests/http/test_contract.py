"""Conformance to the contract: of the models and the response parser."""

import json
import random
import types
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jsonschema import Draft202012Validator
from support.contract import (
    CONTRACT,
    Schema,
    resolved,
    response_schema,
)

from bctrl_async import _config
from bctrl_async._http.response import decode_runtime
from bctrl_async.models import (
    LaunchMode,
    Runtime,
    RuntimeKind,
    RuntimeStatus,
    RuntimeSummary,
)

SCHEMAS: Schema = CONTRACT["components"]["schemas"]
MODELS: dict[str, type] = {
    "Runtime": Runtime,
    "RuntimeSummary": RuntimeSummary,
    "RuntimeKind": RuntimeKind,
    "RuntimeStatus": RuntimeStatus,
    "LaunchMode": LaunchMode,
}
STRUCTS: dict[str, type[msgspec.Struct]] = {
    "Runtime": Runtime,
    "RuntimeSummary": RuntimeSummary,
}
ENUMS: dict[str, type[StrEnum]] = {
    "RuntimeKind": RuntimeKind,
    "RuntimeStatus": RuntimeStatus,
    "LaunchMode": LaunchMode,
}

# It has surrogates, too: JSON can contain a lone surrogate.
# It evaluates annotations, each time.
fields_of = cache(msgspec.structs.fields)

_text = st.text(st.characters(codec=None), max_size=8)
_numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
_scalars = st.none() | st.booleans() | _numbers | _text
_json = (
    _scalars
    | st.lists(_scalars, max_size=2)
    | st.dictionaries(_text, _scalars, max_size=2)
)


def instances(schema: Schema) -> st.SearchStrategy[Any]:
    """Return a strategy for all instances of a schema, including unknown properties.

    hypothesis-jsonschema 0.23.1 cannot generate objects with hypothesis 6.170, whose
    private API it uses. So this implements the few keywords of the contract, and
    rejects others.
    """
    unknown = set(schema) - {"type", "enum", "format", "properties", "required"}
    assert not unknown, unknown
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
    properties = {
        name: instances(value) for name, value in schema["properties"].items()
    }
    required = {name: properties.pop(name) for name in schema.get("required", [])}
    names = st.text(max_size=8).filter(lambda name: name not in schema["properties"])
    known = st.fixed_dictionaries(required, optional=properties)
    return st.builds(
        dict[str, Any].__or__, st.dictionaries(names, _json, max_size=3), known
    )


def variation(wire: Schema, schema: Schema, rng: random.Random) -> Schema:
    """Return another instance: other order and choices, fewer properties."""
    required = schema.get("required", [])
    names = [name for name in wire if name in required or rng.random() < 0.8]
    rng.shuffle(names)
    varied = {}
    for name in names:
        value, described = wire[name], schema["properties"].get(name, {})
        if "enum" in described:
            value = rng.choice(described["enum"])
        elif "properties" in described:
            value = variation(value, described, rng)
        varied[name] = value
    return varied


def without_enums(schema: Any) -> Any:  # noqa: ANN401 - any YAML.
    if isinstance(schema, dict):
        return {k: without_enums(v) for k, v in schema.items() if k != "enum"}
    return schema


def assert_parsed(parsed: object, wire: object, schema: Schema) -> None:
    """Compare a parsed value with its JSON."""
    if isinstance(parsed, msgspec.Struct):
        assert isinstance(wire, Mapping)
        fields = fields_of(type(parsed))
        names = {field.encode_name: field.name for field in fields}
        for name, described in schema["properties"].items():
            assert_parsed(getattr(parsed, names[name]), wire.get(name), described)
    elif isinstance(parsed, UUID):
        assert isinstance(wire, str)
        assert str(parsed) == wire.lower()
    else:
        assert parsed == wire


def parse(body: bytes) -> Runtime:
    return decode_runtime(body)


def readable(body: bytes) -> Any:  # noqa: ANN401 - any JSON.
    """Decode JSON, with `?` in place of lone surrogates."""
    text = json.dumps(json.loads(body), ensure_ascii=False)
    return json.loads(text.encode(errors="replace"))


def assert_read(body: bytes, schema: Schema) -> None:
    """Parse a body without loss, unless its alias has half of a character."""
    try:
        json.loads(body)["alias"].encode()
    except UnicodeEncodeError:
        with pytest.raises(
            msgspec.ValidationError, match="its alias has half of a character"
        ):
            parse(body)
    else:
        assert_parsed(parse(body), readable(body), schema)


class TestResponses:
    SCHEMA = response_schema()
    VALIDATOR = Draft202012Validator(
        SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER
    )

    @settings(max_examples=200, deadline=None)
    @given(instances(SCHEMA))
    def test_generated_instances_are_valid(self, wire: Schema) -> None:
        self.VALIDATOR.validate(wire)
        self.VALIDATOR.validate(variation(wire, self.SCHEMA, random.Random(0)))

    # Ten responses each; Hypothesis needs far longer than the parser.
    @settings(
        max_examples=1_000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(instances(SCHEMA))
    def test_every_valid_response_is_parsed_without_loss(self, wire: Schema) -> None:
        rng = random.Random(0)
        for response in [wire, *(variation(wire, self.SCHEMA, rng) for _ in range(9))]:
            assert_read(json.dumps(response).encode(), self.SCHEMA)

    @settings(deadline=None)
    @given(instances(without_enums(SCHEMA)))
    def test_unknown_enum_values_are_kept(self, wire: Schema) -> None:
        """Fault: a new enum value breaks every call (apify-client-python#931)."""
        body = json.dumps(wire | {"alias": "crm"}).encode()

        runtime = parse(body)

        assert_parsed(runtime, readable(body), self.SCHEMA)
        assert isinstance(runtime.kind, RuntimeKind)
        assert isinstance(runtime.status, RuntimeStatus)

    @settings(deadline=None)
    @given(instances(SCHEMA), st.sampled_from([None, "utf-8", "utf-8-sig", "utf-16"]))
    def test_unescaped_text_is_parsed(self, wire: Schema, encoding: str | None) -> None:
        body = json.dumps(wire, ensure_ascii=False).encode(
            encoding or "utf-8", "surrogatepass"
        )

        assert_read(body, self.SCHEMA)


class TestModels:
    def test_there_is_a_model_for_every_schema(self) -> None:
        assert set(MODELS) == set(SCHEMAS)

    @pytest.mark.parametrize("name", STRUCTS)
    def test_the_fields_of_a_struct_are_those_of_its_schema(self, name: str) -> None:
        fields, schema = fields_of(STRUCTS[name]), SCHEMAS[name]

        assert {field.encode_name for field in fields} == set(schema["properties"])
        required = {field.encode_name for field in fields if field.required}
        assert required == set(schema.get("required", []))
        assert {field.default for field in fields if not field.required} == {None}

    @pytest.mark.parametrize(
        ("name", "property_name"),
        [(name, prop) for name in STRUCTS for prop in SCHEMAS[name]["properties"]],
    )
    def test_the_type_of_a_field_is_that_of_its_property(
        self, name: str, property_name: str
    ) -> None:
        described = SCHEMAS[name]["properties"][property_name]
        by_wire_name = {
            field.encode_name: field.name for field in fields_of(STRUCTS[name])
        }
        hint = get_type_hints(STRUCTS[name])[by_wire_name[property_name]]
        field_types = (
            set(get_args(hint))
            if get_origin(hint) in {Union, types.UnionType}
            else {hint}
        )

        if property_name not in SCHEMAS[name].get("required", []):
            assert types.NoneType in field_types
            field_types.discard(types.NoneType)
        assert field_types == {self.type_of(described)}

    @staticmethod
    def type_of(described: Schema) -> type:
        if "$ref" in described:
            return MODELS[described["$ref"].rpartition("/")[2]]
        kinds = (
            described["type"]
            if isinstance(described["type"], list)
            else [described["type"]]
        )
        (kind,) = set(kinds) - {"null"}
        by_kind = {
            ("string", None): str,
            ("string", "uuid"): UUID,
            ("boolean", None): bool,
        }
        return by_kind[kind, described.get("format")]

    @pytest.mark.parametrize("name", ENUMS)
    def test_the_members_of_an_enum_are_the_values_of_its_schema(
        self, name: str
    ) -> None:
        assert [member.value for member in ENUMS[name]] == SCHEMAS[name]["enum"]
        assert [member.name for member in ENUMS[name]] == [
            value.upper() for value in SCHEMAS[name]["enum"]
        ]


class TestDocument:
    def test_the_response_is_a_runtime(self) -> None:
        assert response_schema() == resolved(SCHEMAS["Runtime"])
        assert "$ref" not in json.dumps(response_schema())

    def test_the_default_base_url_is_the_contracts_first_server(self) -> None:
        assert CONTRACT["servers"][0]["url"] == _config.DEFAULT_BASE_URL
