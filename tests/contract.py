"""The contract as tests use it: `docs/contract/openapi.yaml`, read and never restated."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import yaml

Schema = dict[str, Any]

DOCUMENT = Path(__file__).parent.parent / "docs" / "contract" / "openapi.yaml"

# What RFC 3986 section 3.3 lets stand in one segment of a path, and no less than one of it: an
# empty segment would be another resource.
_SEGMENT = r"((?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+)"


def _load() -> Schema:
    return cast("Schema", yaml.safe_load(DOCUMENT.read_text(encoding="utf-8")))


CONTRACT = _load()


def resolved(schema: object) -> Any:  # noqa: ANN401 - as deep and as varied as YAML.
    """Return the schema with what its `$ref`s point at in their place."""
    if isinstance(schema, list):
        return [resolved(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" not in schema:
        return {name: resolved(value) for name, value in schema.items()}
    target: Any = CONTRACT
    for step in schema["$ref"].removeprefix("#/").split("/"):
        target = target[step]
    return resolved(target)


def operation(operation_id: str = "runtimes-stop") -> tuple[str, str, Schema]:
    """Return method, path template and description of an operation."""
    for path, methods in CONTRACT["paths"].items():
        for method, described in methods.items():
            if described["operationId"] == operation_id:
                return method.upper(), path, described
    raise LookupError(operation_id)


def answer_schema() -> Schema:
    """Return the schema of the 200 answer, without references."""
    _, _, described = operation()
    content = described["responses"]["200"]["content"]
    return cast("Schema", resolved(content["application/json"]["schema"]))


def assert_request_fits_contract(
    method: str, raw_path: str, headers: Mapping[str, str], body: bytes
) -> dict[str, str]:
    """Compare a request with the contract as it was sent.

    Args:
        method: The HTTP method.
        raw_path: The request's target as it stood on the wire, from `/v1` on.
        headers: All headers.
        body: The whole body.

    Returns:
        The path's parameters, decoded.

    Raises:
        AssertionError: The contract does not allow this request; the text says why.
    """
    expected_method, template, described = operation()
    assert method == expected_method, f"{method} is not {expected_method}"
    found = {name.lower(): value for name, value in headers.items()}
    assert len(found) == len(headers), f"a header is given twice: {sorted(headers)}"
    _assert_headers_fit(found, described)
    if "requestBody" not in described:
        assert not body, f"the contract has no request body, but there is {body!r}"
        assert "content-type" not in found, f"a Content-Type without a body: {found}"
        assert "transfer-encoding" not in found, f"a Transfer-Encoding without a body: {found}"
        assert found.get("content-length", "0") == "0", f"a length without a body: {found}"
    return _path_parameters(raw_path, template, described)


def _assert_headers_fit(found: Mapping[str, str], described: Schema) -> None:
    for parameter in described["parameters"]:
        if parameter["in"] == "header" and parameter["required"]:
            assert parameter["name"].lower() in found, f"{parameter['name']} is missing"
    for requirement in described["security"]:
        for name in requirement:
            scheme = CONTRACT["components"]["securitySchemes"][name]
            assert scheme["type"] == "http", f"unheard of: {scheme}"
            # RFC 6750 section 2.1; the value stays out of the message.
            credentials = re.compile(rf"{scheme['scheme']} [!-~]+", re.IGNORECASE)
            fits = credentials.fullmatch(found["authorization"])
            assert fits, f"Authorization is not of the scheme {scheme['scheme']}"
    media_types = {
        media_type
        for response in described["responses"].values()
        for media_type in response["content"]
    }
    accepted = {part.partition(";")[0].strip() for part in found.get("accept", "*/*").split(",")}
    assert accepted & {"*/*", *media_types}, f"Accept leaves out {sorted(media_types)}"


def _path_parameters(raw_path: str, template: str, described: Schema) -> dict[str, str]:
    names = [
        parameter["name"]
        for parameter in described["parameters"]
        if parameter["in"] == "path" and parameter["required"]
    ]
    assert names == re.findall(r"{(\w+)}", template), f"{names} are not those of {template}"
    literals = map(re.escape, re.split(r"{\w+}", template))
    match = re.fullmatch(_SEGMENT.join(literals), raw_path)
    assert match, f"{raw_path} does not fit {template}"
    values = [unquote(segment, errors="strict") for segment in match.groups()]
    # RFC 3986 section 6.2.2.2: encoded or not, these are steps, and whoever stands between may
    # take them.
    assert not {".", ".."} & set(values), f"{raw_path} has a step in it"
    return dict(zip(names, values, strict=True))
