"""Checks of requests and responses against `docs/contract/openapi.yaml`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import yaml

Schema = dict[str, Any]

DOCUMENT = Path(__file__).parents[2] / "docs" / "contract" / "openapi.yaml"

# One non-empty path segment (RFC 3986 section 3.3); an empty one would be another
# resource.
_SEGMENT = r"((?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+)"


def _load() -> Schema:
    return cast("Schema", yaml.safe_load(DOCUMENT.read_text(encoding="utf-8")))


CONTRACT = _load()


def resolved(schema: object) -> Any:  # noqa: ANN401 - any YAML.
    """Return the schema with its `$ref`s resolved."""
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
    """Return the method, the path template and the description of an operation."""
    for path, methods in CONTRACT["paths"].items():
        for method, described in methods.items():
            if described["operationId"] == operation_id:
                return method.upper(), path, described
    raise LookupError(operation_id)


def response_schema() -> Schema:
    """Return the schema of the 200 response, with its `$ref`s resolved."""
    _, _, described = operation()
    content = described["responses"]["200"]["content"]
    return cast("Schema", resolved(content["application/json"]["schema"]))


def assert_request_fits_contract(
    method: str, raw_path: str, headers: Mapping[str, str], body: bytes
) -> dict[str, str]:
    """Check a request, as it was sent, against the contract.

    Args:
        method: The HTTP method.
        raw_path: The request target on the wire, from `/v1` on.
        headers: All headers.
        body: The whole body.

    Returns:
        The path parameters, decoded.

    Raises:
        AssertionError: The request violates the contract; the text says how.
    """
    expected_method, template, described = operation()
    assert method == expected_method, f"{method} is not {expected_method}"
    lower = {name.lower(): value for name, value in headers.items()}
    assert len(lower) == len(headers), f"duplicate header: {sorted(headers)}"
    _assert_headers_fit(lower, described)
    if "requestBody" not in described:
        assert not body, f"the contract has no request body, but got {body!r}"
        assert "content-type" not in lower, f"Content-Type without a body: {lower}"
        assert "transfer-encoding" not in lower, (
            f"Transfer-Encoding without a body: {lower}"
        )
        assert lower.get("content-length", "0") == "0", (
            f"Content-Length without a body: {lower}"
        )
    return _path_parameters(raw_path, template, described)


def _assert_headers_fit(headers: Mapping[str, str], described: Schema) -> None:
    for parameter in described["parameters"]:
        if parameter["in"] == "header" and parameter["required"]:
            assert parameter["name"].lower() in headers, (
                f"{parameter['name']} is missing"
            )
    for requirement in described["security"]:
        for name in requirement:
            scheme = CONTRACT["components"]["securitySchemes"][name]
            assert scheme["type"] == "http", f"unexpected scheme: {scheme}"
            # RFC 6750 section 2.1; the message does not show the value.
            credentials = re.compile(rf"{scheme['scheme']} [!-~]+", re.IGNORECASE)
            fits = credentials.fullmatch(headers["authorization"])
            assert fits, f"Authorization is not of the scheme {scheme['scheme']}"
    media_types = {
        media_type
        for response in described["responses"].values()
        for media_type in response["content"]
    }
    accepted = {
        part.partition(";")[0].strip()
        for part in headers.get("accept", "*/*").split(",")
    }
    assert accepted & {"*/*", *media_types}, f"Accept excludes {sorted(media_types)}"


def _path_parameters(raw_path: str, template: str, described: Schema) -> dict[str, str]:
    names = [
        parameter["name"]
        for parameter in described["parameters"]
        if parameter["in"] == "path" and parameter["required"]
    ]
    assert names == re.findall(r"{(\w+)}", template), f"{names} do not match {template}"
    literals = map(re.escape, re.split(r"{\w+}", template))
    match = re.fullmatch(_SEGMENT.join(literals), raw_path)
    assert match, f"{raw_path} does not match {template}"
    values = [unquote(segment, errors="strict") for segment in match.groups()]
    # Intermediaries may resolve dot segments even if encoded (RFC 3986 section
    # 6.2.2.2).
    assert not {".", ".."} & set(values), f"{raw_path} contains a dot segment"
    return dict(zip(names, values, strict=True))
