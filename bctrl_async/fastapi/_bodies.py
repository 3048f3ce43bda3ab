"""Pydantic models of runtimes, outcomes and reports, made of their Structs."""

from datetime import datetime
from uuid import UUID

from pydantic import Field, model_validator

import bctrl_async
from bctrl_async import BctrlError, StopResult
from bctrl_async.fastapi._problems import (
    Body,
    CamelBody,
    Text,
    classify,
    explain,
    identifier,
)

_OR_ADDED = "or a value that the API has added."


class RuntimeSummary(CamelBody):
    """Details of a runtime. A field that the API omitted is null."""

    browser_running: bool | None
    current_driver: Text | None
    default_context_id: Text | None
    default_page_id: Text | None
    launch_mode: Text | None = Field(description=f"`profile`, `ephemeral`, {_OR_ADDED}")
    profile_id: UUID | None
    storage_workspace: Text | None


class Runtime(CamelBody):
    """A runtime as described by the API."""

    id: UUID
    alias: Text
    workspace_id: UUID
    kind: Text = Field(description=f"`browser`, `desktop`, `spreadsheet`, {_OR_ADDED}")
    status: Text = Field(description=f"`active`, `stopped`, `failed`, {_OR_ADDED}")
    driver: Text
    created_at: Text = Field(description="Usually ISO 8601; not validated.")
    updated_at: Text = Field(description="Usually ISO 8601; not validated.")
    summary: RuntimeSummary | None


class StopError(Body):
    """The reason of a stop that is not ok, or of a run that ended early."""

    type: str = Field(
        description="The name of the class of the error, such as `BctrlTimeoutError`."
    )
    message: Text = Field(
        description="An explanation for people, without the API's own text."
    )
    status: int | None = Field(description="The status of the API's answer, or null.")
    code: str | None = Field(description="The API's error code, if any.")
    request_id: str | None = Field(
        description="The API's id of the request, for its support team, if any."
    )
    may_have_stopped: bool = Field(
        description="True if a request may have stopped the runtime."
    )

    @model_validator(mode="before")
    @classmethod
    def _of(cls, error: BctrlError) -> dict[str, object]:
        return {
            "type": type(error).__name__,
            "message": explain(error, classify(error)),
            "status": error.status,
            "code": identifier(error.code),
            "request_id": identifier(error.request_id),
            "may_have_stopped": error.may_have_stopped,
        }


class StopOutcome(Body):
    """The outcome of stopping one target of a bulk stop."""

    index: int = Field(description="The position in the input, from 0.")
    workspace_id: Text = Field(description="The workspace as requested.")
    alias: Text = Field(description="The alias of the runtime as requested.")
    result: StopResult
    ok: bool = Field(
        description="True if the runtime no longer runs, by the API's own word."
    )
    running: bool | None = Field(
        description="Whether the runtime runs, by the API's own word; null if unknown."
    )
    at: datetime = Field(description="The time at which the outcome became known.")
    sent_at: datetime | None = Field(
        description="The time at which the last request started, or null."
    )
    attempts: int = Field(
        description="The number of requests started; some may not have arrived."
    )
    elapsed: float = Field(description="Seconds from reading the target.")
    request_id: str | None = Field(
        description="The API's id of the last request that it answered, or null."
    )
    resumed: bool = Field(description="True if it comes from an earlier run's journal.")
    runtime: Runtime | None = Field(
        description="The runtime as last described by the API."
    )
    error: StopError | None

    @model_validator(mode="before")
    @classmethod
    def _of(cls, outcome: bctrl_async.StopOutcome) -> dict[str, object]:
        # StopError takes the error itself: its JSON has the API's own text.
        return outcome.to_dict() | {
            "error": outcome.error,
            "request_id": identifier(outcome.request_id),
        }


class StopReport(Body):
    """The report of a bulk stop."""

    total: int = Field(description="The number of targets read.")
    ok: bool = Field(
        description="True if all targets were read, and every outcome is ok."
    )
    counts: dict[StopResult, int] = Field(
        description="The number of outcomes for each result."
    )
    running: int = Field(
        description="The number of runtimes that run, by the API's own word."
    )
    not_running: int = Field(description="The number of runtimes that no longer run.")
    failures: list[StopOutcome] = Field(
        description="The outcomes that are not ok, in order of completion."
    )
    elapsed: float = Field(description="Seconds.")
    retries: int = Field(description="Requests beyond the first for each target.")
    throttled: int = Field(description="The number of 429 and 503 answers.")
    resumed: int = Field(description="Outcomes from an earlier run's journal.")
    ended_early: StopError | None = Field(
        description="Why the run ended early, if it did."
    )
    started_since: list[Runtime] | None = Field(
        description="What runs and was no target, by a last list of the workspace; "
        "null if nobody looked."
    )
    look_error: StopError | None = Field(
        description="Why this last look failed, if it did."
    )
