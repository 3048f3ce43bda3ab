"""FastAPI: a session per app, a dependency for it, and errors as problems.

A complete app:

    app = FastAPI(lifespan=lifespan())
    add_exception_handlers(app)

    @app.post(
        "/workspaces/{workspace_id}/runtimes/{alias}/stop",
        responses=PROBLEM_RESPONSES,
    )
    async def stop(workspace_id: str, alias: str, session: BctrlDep) -> Runtime:
        return await session.stop_runtime(workspace_id, alias, stopped_ok=True)

`Runtime`, `StopOutcome` and `StopReport` are the classes that a session returns,
annotated with pydantic models.
"""

from bctrl_async.fastapi._app import (
    BctrlDep,
    add_exception_handlers,
    get_session,
    lifespan,
)
from bctrl_async.fastapi._problems import PROBLEM_RESPONSES, Problem, problem
from bctrl_async.fastapi._types import Runtime, StopOutcome, StopReport

__all__ = [
    "PROBLEM_RESPONSES",
    "BctrlDep",
    "Problem",
    "Runtime",
    "StopOutcome",
    "StopReport",
    "add_exception_handlers",
    "get_session",
    "lifespan",
    "problem",
]
