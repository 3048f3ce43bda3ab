"""The classes that a session returns, as types of routes and of pydantic fields."""

from typing import Annotated

import msgspec
from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

import bctrl_async
from bctrl_async.fastapi import _bodies


class _ShownAs:
    """An annotation of a Struct: pydantic keeps it, and shows it as a model."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._model = model

    def __get_pydantic_core_schema__(
        self, struct: type[msgspec.Struct], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def check(value: object, _: object) -> object:
            # The JSON of `to_dict` is refused: it may have the API's own text.
            if not isinstance(value, struct):
                raise PydanticKnownError("is_instance_of", {"class": struct.__name__})
            return value

        model_schema = handler.generate_schema(self._model)
        # `check` never calls the model's own validator, its second argument: the schema
        # of the model is for the app's OpenAPI alone.
        return core_schema.no_info_wrap_validator_function(
            check,
            model_schema,
            serialization=core_schema.plain_serializer_function_ser_schema(
                self._model.model_validate, return_schema=model_schema
            ),
        )


Runtime = Annotated[bctrl_async.Runtime, _ShownAs(_bodies.Runtime)]
StopOutcome = Annotated[bctrl_async.StopOutcome, _ShownAs(_bodies.StopOutcome)]
StopReport = Annotated[bctrl_async.StopReport, _ShownAs(_bodies.StopReport)]
