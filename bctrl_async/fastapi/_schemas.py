"""The JSON of runtimes, outcomes and reports, as the app's OpenAPI describes it.

The names of these classes are those of the components.
"""

from datetime import datetime
from typing import Annotated, NotRequired
from uuid import UUID

from pydantic import Field

# pydantic takes that of `typing` only from Python 3.12 on.
from typing_extensions import TypedDict

from bctrl_async import LaunchMode, RuntimeKind, RuntimeState, RuntimeStatus, StopResult
from bctrl_async.fastapi._component import component
from bctrl_async.fastapi._problems import (
    Alias,
    Attempts,
    Code,
    Detail,
    MayHaveStopped,
    RequestId,
    Type,
    WorkspaceId,
)

_ID = "0f2c1f7e-6f0b-4d0e-9c55-0d4f8f1d6a01"
_OPEN = "The API may add values."


@component
class RuntimeSummary(TypedDict):
    """Details of a runtime. A field that the API omitted is null."""

    browserRunning: bool | None
    currentDriver: str | None
    defaultContextId: str | None
    defaultPageId: str | None
    launchMode: Annotated[str, Field(description=_OPEN, examples=list(LaunchMode))] | None
    profileId: UUID | None
    storageWorkspace: str | None


@component
class Runtime(TypedDict):
    """A runtime as described by the API."""

    id: Annotated[UUID, Field(examples=[_ID])]
    alias: Annotated[str, Field(examples=["crm"])]
    workspaceId: Annotated[UUID, Field(examples=["7a9e2b34-51c8-4f3d-8a67-2f1f0c9b7e02"])]
    kind: Annotated[str, Field(description=_OPEN, examples=list(RuntimeKind))]
    status: Annotated[
        str,
        Field(
            description=_OPEN,
            # That of the runtimes an app has stopped comes first: tools show it.
            examples=sorted(RuntimeStatus, key=lambda status: status is not RuntimeStatus.STOPPED),
        ),
    ]
    driver: Annotated[str, Field(examples=["playwright"])]
    createdAt: Annotated[
        str,
        Field(description="Usually ISO 8601; not validated.", examples=["2026-01-31T09:00:00Z"]),
    ]
    updatedAt: Annotated[
        str,
        Field(description="Usually ISO 8601; not validated.", examples=["2026-01-31T10:30:00Z"]),
    ]
    summary: RuntimeSummary | None


@component
class StopError(TypedDict):
    """The reason of a failed or unsettled stop, or of a run that ended early."""

    type: Type
    detail: Detail
    mayHaveStopped: MayHaveStopped
    code: NotRequired[Code]
    requestId: NotRequired[RequestId]


@component
class StopOutcome(TypedDict):
    """The outcome of stopping one target of a bulk stop."""

    index: Annotated[int, Field(description="The position in the input, from 0.", ge=0)]
    workspaceId: WorkspaceId
    alias: Alias
    result: StopResult
    runtime: Runtime | None
    error: StopError | None
    attempts: Attempts
    elapsed: Annotated[
        float, Field(description="Seconds from reading the target.", ge=0, examples=[0.21])
    ]
    at: datetime
    resumed: Annotated[bool, Field(description="True if it comes from an earlier run's journal.")]


@component
class StopReport(TypedDict):
    """The report of a bulk stop."""

    total: Annotated[int, Field(description="The number of targets read.", ge=0, examples=[3000])]
    ok: Annotated[
        bool,
        Field(
            description="True if the whole input was read and there are no failures. The runtime "
            "of an accepted stop may still run."
        ),
    ]
    allStopped: Annotated[
        bool,
        Field(
            description="True if the report is ok and no runtime runs any longer, by what the "
            "server said."
        ),
    ]
    counts: Annotated[
        dict[StopResult, Annotated[int, Field(ge=0)]],
        Field(
            description="The number of outcomes for each result that occurred.",
            examples=[{StopResult.STOPPED: 2998, StopResult.UNKNOWN: 2}],
        ),
    ]
    states: Annotated[
        dict[RuntimeState, Annotated[int, Field(ge=0)]],
        Field(
            description="The number of runtimes by state; the numbers add up to `total`.",
            examples=[{RuntimeState.NOT_RUNNING: 2998, RuntimeState.UNCONFIRMED: 2}],
        ),
    ]
    failures: Annotated[
        list[StopOutcome],
        Field(description="The outcomes that are failures, in order of completion."),
    ]
    elapsed: Annotated[float, Field(description="Seconds.", ge=0, examples=[31.5])]
    retries: Annotated[int, Field(description="Requests beyond the first for each target.", ge=0)]
    throttled: Annotated[int, Field(description="The number of 429 and 503 answers.", ge=0)]
    resumed: Annotated[int, Field(description="Outcomes from an earlier run's journal.", ge=0)]
    endedEarly: Annotated[
        StopError | None,
        Field(description="The reason why the run ended before its input did, or null."),
    ]
