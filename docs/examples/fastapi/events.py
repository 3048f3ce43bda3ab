"""The events of a bulk stop: its progress, then its report."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

from fastapi.sse import ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from runs import Run

from bctrl_async import StopResult
from bctrl_async.fastapi import StopReport

PROGRESS_EVERY = 0.25
"""Seconds between two progress events."""
REPORT = "report"
"""The name and the id of the last event. The others need no id: each has everything so far."""


class Progress(BaseModel):
    """The progress of a bulk stop, which is the data of an event."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, serialize_by_alias=True
    )

    total: Annotated[int, Field(description="The number of targets.", ge=0)]
    in_flight: Annotated[int, Field(description="The number of stops in flight.", ge=0)]
    is_throttled: Annotated[bool, Field(description="True while the API slows the run down.")]
    is_unanswered: Annotated[bool, Field(description="True while the API does not respond.")]
    counts: Annotated[
        dict[StopResult, int], Field(description="The number of outcomes so far for each result.")
    ]


if TYPE_CHECKING:
    Event = ServerSentEvent
else:
    # FastAPI documents the type of what is yielded: of an event, that should be its data.
    Event = Progress | StopReport


async def events(run: Run) -> AsyncIterator[ServerSentEvent]:
    while run.report is None:
        yield ServerSentEvent(
            event="progress",
            data=Progress(
                total=run.batch.total or 0,
                in_flight=run.batch.in_flight,
                is_throttled=run.batch.is_throttled,
                is_unanswered=run.batch.is_unanswered,
                counts=run.batch.counts,
            ),
        )
        await asyncio.wait([run.task], timeout=PROGRESS_EVERY)
    yield ServerSentEvent(event=REPORT, id=REPORT, raw_data=run.report)
