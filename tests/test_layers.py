"""The architecture: layers of imports, public names, and the cost of an import."""

import ast
import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import bctrl_async

NAME = "bctrl_async"
PACKAGE = Path(bctrl_async.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in PACKAGE.rglob("*.py")
}
"""Every module by its name within the package, such as `session` or `_limiter.rate`."""

# A module may import from lower layers, and without cycles from its own. A folder is one entry.
LAYERS = [
    {"_version", "_lifetime", "errors"},
    {"models", "_config", "stats"},
    {"_limiter", "_http", "outcomes", "filters"},
    {"observer", "journal"},
    {"_calls"},
    {"bulk"},
    {"session", "shards"},
    {"__init__"},
    {
        "dask",
        "otel",
        "pace",
        "redis",
        "testing",
        "fastapi",
        "cli",
        "__main__",
    },
]
CORE = frozenset().union(*LAYERS[:-1])
EXTRAS = LAYERS[-1]
# The emulator restates the wire format, so that one bug cannot hide on both sides.
ALONE = frozenset({"emulator"})
_BULK_PARTS = frozenset({"bulk", "_calls", "_http"})


def entry(module: str) -> str:
    """Return the file or folder of the package that a module is in."""
    return module.partition(".")[0]


def is_private(module: str) -> bool:
    return any(part.startswith("_") and part != "__init__" for part in module.split("."))


every_module = pytest.mark.parametrize("module", sorted(SOURCES))
every_core_module = pytest.mark.parametrize(
    "module", sorted(module for module in SOURCES if entry(module) in CORE)
)


class Import(NamedTuple):
    """One imported module, such as `aiohttp.web`, and the name taken from it, if any."""

    module: str
    name: str | None

    @property
    def inside(self) -> str | None:
        """The package's own module that is imported; None if it belongs to another package."""
        package, _, rest = self.module.partition(".")
        if package != NAME:
            return None
        path = ".".join(filter(None, [rest, self.name]))
        return next(
            name for name in (path, rest, f"{rest}.__init__", "__init__") if name in SOURCES
        )


@cache
def imports(module: str) -> frozenset[Import]:
    found: set[Import] = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            found.update(Import(alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute, so that this test can read them"
            found.update(Import(node.module or "", alias.name) for alias in node.names)
    return frozenset(found)


@cache
def inside(module: str) -> frozenset[str]:
    return frozenset(found.inside for found in imports(module) if found.inside is not None)


@cache
def outside(module: str) -> frozenset[str]:
    found = (found.module.partition(".")[0] for found in imports(module))
    return frozenset(found) - {NAME} - sys.stdlib_module_names


def layer(module: str) -> int:
    return next((n for n, names in enumerate(LAYERS) if entry(module) in names), len(LAYERS))


class TestImports:
    @every_module
    def test_every_module_is_in_a_layer(self, module: str) -> None:
        assert entry(module) in ALONE.union(*LAYERS), f"add {entry(module)} to LAYERS"

    @every_module
    def test_no_module_imports_from_a_higher_layer(self, module: str) -> None:
        if entry(module) in ALONE:
            assert {entry(name) for name in inside(module)} <= {entry(module)}
            return
        # The extras may start the emulator.
        alone = ALONE if entry(module) in EXTRAS else set()
        below = {name for name in inside(module) if entry(name) not in alone}
        above = {name for name in below if layer(name) > layer(module)}

        assert above == set()

    def test_there_is_no_import_cycle(self) -> None:
        remaining = {module: inside(module) for module in SOURCES}
        while free := {name for name, needs in remaining.items() if not needs & remaining.keys()}:
            for module in free:
                del remaining[module]

        assert remaining == {}

    def test_errors_import_nothing_of_the_package(self) -> None:
        assert inside("errors") == set()

    @every_module
    def test_only_http_code_imports_aiohttp(self, module: str) -> None:
        if "aiohttp" in outside(module):
            # A call carries an aiohttp.ClientTimeout.
            assert entry(module) in {"_calls", "_http", "session", *ALONE}

    @every_core_module
    def test_the_core_imports_only_its_dependencies(self, module: str) -> None:
        # multidict and yarl are dependencies of aiohttp, and part of its API.
        assert outside(module) <= {"aiohttp", "msgspec", "multidict", "yarl"}

    @every_module
    def test_the_emulator_imports_only_the_server_of_aiohttp(self, module: str) -> None:
        if entry(module) in ALONE:
            found = {found for found in imports(module) if "aiohttp" in found.module}

            assert found <= {Import("aiohttp", "web")}
            assert outside(module) <= {"aiohttp"}

    @every_module
    def test_only_the_command_imports_typer_and_rich(self, module: str) -> None:
        if entry(module) != "cli":
            assert outside(module) & {"typer", "click", "rich"} == set()

    @every_module
    def test_only_the_fastapi_extra_imports_fastapi(self, module: str) -> None:
        if entry(module) != "fastapi":
            found = {"fastapi", "starlette", "pydantic", "pydantic_core"}
            assert outside(module) & found == set()

    @every_module
    def test_only_the_otel_extra_imports_opentelemetry(self, module: str) -> None:
        if entry(module) != "otel":
            assert "opentelemetry" not in outside(module)

    @every_module
    def test_only_the_redis_extra_imports_redis(self, module: str) -> None:
        if entry(module) != "redis":
            assert "redis" not in outside(module)

    @every_module
    def test_only_one_file_imports_dask(self, module: str) -> None:
        if module != "dask._distributed":
            assert outside(module) & {"dask", "distributed"} == set()

    @every_module
    def test_the_extras_import_only_public_names(self, module: str) -> None:
        if entry(module) in EXTRAS:
            private = {name for name in inside(module) if entry(name) in CORE and is_private(name)}
            # `pace` re-exports the classes that the core needs without SQLite.
            allowed = {"_version", "_limiter.pace"}
            if entry(module) == "dask":
                # A run on a cluster is a bulk stop with the ledger, the input and the ending of
                # one; only its workers are elsewhere.
                allowed |= {"_config"} | {name for name in private if entry(name) in _BULK_PARTS}
            assert private <= allowed

    @every_core_module
    def test_no_function_imports_anything(self, module: str) -> None:
        """Fault: function-level imports that hide a cycle."""
        functions = [
            node
            for node in ast.walk(SOURCES[module])
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        found = [node for function in functions for node in ast.walk(function) if is_import(node)]

        assert found == []

    @every_module
    def test_there_is_no_star_import(self, module: str) -> None:
        assert "*" not in {found.name for found in imports(module)}


def is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


class TestPublicNames:
    def test_they_are_sorted_and_unique(self) -> None:
        assert bctrl_async.__all__ == sorted(set(bctrl_async.__all__))

    def test_every_name_that_the_package_imports_is_listed(self) -> None:
        imported = {found.name for found in imports("__init__")}

        assert set(bctrl_async.__all__) == imported

    @pytest.mark.parametrize("name", bctrl_async.__all__)
    def test_each_can_be_imported(self, name: str) -> None:
        assert getattr(bctrl_async, name) is not None

    def test_every_error_is_public(self) -> None:
        defined = {node.name for node in SOURCES["errors"].body if isinstance(node, ast.ClassDef)}

        assert defined <= set(bctrl_async.__all__)

    def test_the_package_is_marked_as_typed(self) -> None:
        """Fault: no `py.typed` (the vendor's SDK)."""
        assert (PACKAGE / "py.typed").is_file()


PUBLIC_MODULES = [
    "bctrl_async",
    "bctrl_async.bulk",
    "bctrl_async.cli",
    "bctrl_async.dask",
    "bctrl_async.emulator",
    "bctrl_async.errors",
    "bctrl_async.fastapi",
    "bctrl_async.filters",
    "bctrl_async.journal",
    "bctrl_async.models",
    "bctrl_async.observer",
    "bctrl_async.otel",
    "bctrl_async.outcomes",
    "bctrl_async.pace",
    "bctrl_async.redis",
    "bctrl_async.session",
    "bctrl_async.shards",
    "bctrl_async.stats",
    "bctrl_async.testing",
]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_every_public_module_lists_names_that_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    listed = module.__all__

    # Constants, classes, the rest: the order of ruff's RUF022.
    assert listed == sorted(set(listed), key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert [n for n in listed if not hasattr(module, n)] == []


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """Return the modules loaded in a fresh interpreter after importing the package."""
    program = f"import {NAME}, json, sys; print(json.dumps(sorted(sys.modules)))"
    # Coverage imports modules of its own.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=PACKAGE.parent,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return set(json.loads(done.stdout))


class TestFreshInterpreter:
    def test_it_imports_the_package_without_a_warning(self, loaded: set[str]) -> None:
        assert NAME in loaded

    @pytest.mark.parametrize(
        "heavy",
        [
            "click",
            "dask",
            "distributed",
            "fastapi",
            "opentelemetry",
            "pydantic",
            "pytest",
            "redis",
            "rich",
            "sqlite3",
            "typer",
        ],
    )
    def test_it_does_not_load_the_dependencies_of_extras(
        self, loaded: set[str], heavy: str
    ) -> None:
        assert heavy not in loaded

    @pytest.mark.parametrize("module", ["emulator", *sorted(EXTRAS)])
    def test_it_does_not_load_the_extras(self, loaded: set[str], module: str) -> None:
        assert f"{NAME}.{module}" not in loaded
