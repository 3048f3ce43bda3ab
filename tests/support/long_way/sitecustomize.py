"""Wrap `aiohttp.ClientSession._request`, as tracers do: no fast path is taken.

Python imports this file at its start if this folder is in PYTHONPATH. aiohttp is
wrapped when it is imported, so a program that does not use it does not import it
either.
"""

from __future__ import annotations

import sys
from collections.abc import Coroutine, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULE = "aiohttp.client"


def _wrap(module: ModuleType) -> None:
    request = module.ClientSession._request

    def wrapper(*args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:  # noqa: ANN401 - any.
        coroutine: Coroutine[Any, Any, Any] = request(*args, **kwargs)
        return coroutine

    module.ClientSession._request = wrapper


class _Finder(MetaPathFinder):
    """A finder that wraps aiohttp's client once it is loaded."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        del path, target
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_wrap(module: ModuleType) -> None:
            load(module)
            _wrap(module)

        spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec


def _run_next() -> None:
    """Run the `sitecustomize` that this hides, if there is any."""
    here = Path(__file__).parent
    spec = PathFinder.find_spec(
        __name__, [entry for entry in sys.path if Path(entry) != here]
    )
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


if _MODULE in sys.modules:
    _wrap(sys.modules[_MODULE])
else:
    sys.meta_path.insert(0, _Finder())
if __name__ == "sitecustomize":
    _run_next()
