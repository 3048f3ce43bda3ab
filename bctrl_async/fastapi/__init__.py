"""FastAPI: a session per app, a dependency that returns it, and errors as problem responses.

A complete app:

    app = FastAPI(lifespan=lifespan())
    add_exception_handlers(app)

    @app.post(
        "/workspaces/{workspace_id}/runtimes/{alias}/stop",
        responses=PROBLEM_RESPONSES,
    )
    async def stop(workspace_id: str, alias: str, session: BctrlDep) -> RuntimeBody:
        return await session.stop_runtime(workspace_id, alias, stopped_ok=True)
"""

from bctrl_async.fastapi._app import (
    BctrlDep,
    add_exception_handlers,
    get_session,
    lifespan,
)
from bctrl_async.fastapi._bodies import RuntimeBody, StopOutcomeBody, StopReportBody
from bctrl_async.fastapi._openapi import PROBLEM_RESPONSES
from bctrl_async.fastapi._problems import Problem, problem
from bctrl_async.fastapi._validation import ValidationProblem

__all__ = [
    "PROBLEM_RESPONSES",
    "BctrlDep",
    "Problem",
    "RuntimeBody",
    "StopOutcomeBody",
    "StopReportBody",
    "ValidationProblem",
    "add_exception_handlers",
    "get_session",
    "lifespan",
    "problem",
]
