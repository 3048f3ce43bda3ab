"""FastAPI: a session per app, a dependency that returns it, and errors as problem responses.

A complete app:

    app = FastAPI(lifespan=lifespan())
    add_exception_handlers(app)

    @app.post(
        "/workspaces/{workspace_id}/runtimes/{alias}/stop",
        responses=PROBLEM_RESPONSES,
    )
    async def stop(workspace_id: str, alias: str, session: BctrlDep) -> Runtime:
        return await session.stop_runtime(workspace_id, alias, stopped_ok=True)

`Runtime`, `StopOutcome` and `StopReport` are pydantic models that take what a session returned.
"""

from typing import TYPE_CHECKING

from bctrl_async.fastapi._app import BctrlDep, add_exception_handlers, get_session, lifespan
from bctrl_async.fastapi._problems import PROBLEM_RESPONSES, Problem, problem

if TYPE_CHECKING:
    # A type checker sees the classes that a route returns; FastAPI uses the pydantic models.
    from bctrl_async import Runtime, StopOutcome, StopReport
else:
    from bctrl_async.fastapi._bodies import Runtime, StopOutcome, StopReport

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
