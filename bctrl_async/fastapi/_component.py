"""TypedDicts as components of the app's OpenAPI."""

from typing import Any, TypeVar

from pydantic import ConfigDict, with_config

_T = TypeVar("_T")


def component(schema: type[_T]) -> type[_T]:
    """Prepare a TypedDict for the app's OpenAPI, where its name is that of a component.

    Args:
        schema: The TypedDict; its docstring is the description.
    """
    # If the app has a model of the same name, pydantic puts the module before both.
    schema.__module__ = "bctrl_async.fastapi"
    return with_config(ConfigDict(json_schema_extra=_remove_titles))(schema)


def _remove_titles(schema: dict[str, Any]) -> None:
    """Remove the titles of the fields: pydantic makes `Workspaceid` of `workspaceId`."""
    for field in schema["properties"].values():
        field.pop("title", None)
