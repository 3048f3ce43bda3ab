"""The architecture: layers of imports, public names, and the cost of an import."""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import bctrl_async

NAME = "bctrl_async"
PACKAGE = Path(bctrl_async.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""The file of every module, by its name within the package, such as `session`."""

# A module may import from lower layers, and without cycles from its own. A folder is one entry.
LAYERS = [
    {"_version", "_lifetime", "errors"},
    {"models", "_config", "stats"},
    {"pace"},
    {"_limiter", "_http", "outcomes", "filters"},
    {"observer", "journal"},
    {"_calls"},
    {"bulk"},
    {"session", "shards"},
    {"__init__"},
    {
        "dask",
        "otel",
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
            name for name in (path, rest, f"{rest}.__init__", "__init__") if name in MODULES
        )


def nodes(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(MODULES[module].read_text("utf-8"))))


@cache
def imports(module: str) -> frozenset[Import]:
    found: set[Import] = set()
    for node in nodes(module):
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


def modules_in(*entries: str) -> set[str]:
    """Return the modules in these files or folders of the package."""
    return {module for module in MODULES if entry(module) in entries}


def importers(*packages: str) -> set[str]:
    """Return the modules that import any of these packages."""
    return {module for module in MODULES if outside(module) & set(packages)}


class TestImports:
    def test_every_module_is_in_a_layer(self) -> None:
        entries = {entry(module) for module in MODULES}

        assert entries <= ALONE.union(*LAYERS), "add the others to LAYERS"

    def test_no_module_imports_from_a_higher_layer(self) -> None:
        above = [
            (module, name)
            for module in MODULES
            if entry(module) not in ALONE
            for name in inside(module)
            if layer(name) > layer(module)
            # The extras may start the emulator.
            and not (entry(module) in EXTRAS and entry(name) in ALONE)
        ]

        assert above == []

    def test_the_emulator_imports_nothing_of_the_rest(self) -> None:
        for module in modules_in(*ALONE):
            assert {entry(name) for name in inside(module)} <= {entry(module)}, module

    def test_there_is_no_import_cycle(self) -> None:
        remaining = {module: inside(module) for module in MODULES}
        while free := {name for name, needs in remaining.items() if not needs & remaining.keys()}:
            for module in free:
                del remaining[module]

        assert remaining == {}

    def test_errors_import_nothing_of_the_package(self) -> None:
        assert inside("errors") == set()

    def test_only_http_code_imports_aiohttp(self) -> None:
        # A call carries an aiohttp.ClientTimeout.
        assert importers("aiohttp") <= modules_in("_calls", "_http", "session", *ALONE)

    def test_the_core_imports_only_its_dependencies(self) -> None:
        # Only the extra `redis` imports `pace._redis`.
        modules = modules_in(*CORE) - {"pace._redis"}
        found = {package for module in modules for package in outside(module)}

        # multidict and yarl are dependencies of aiohttp, and part of its API.
        assert found <= {"aiohttp", "msgspec", "multidict", "yarl"}

    def test_the_emulator_imports_only_the_server_of_aiohttp(self) -> None:
        for module in modules_in(*ALONE):
            found = {found for found in imports(module) if "aiohttp" in found.module}

            assert found <= {Import("aiohttp", "web")}, module
            assert outside(module) <= {"aiohttp"}, module

    def test_only_the_command_imports_cyclopts_and_rich(self) -> None:
        assert importers("cyclopts", "rich") <= modules_in("cli")

    def test_only_the_fastapi_extra_imports_fastapi(self) -> None:
        found = importers("fastapi", "starlette", "pydantic", "pydantic_core")

        assert found <= modules_in("fastapi")

    def test_only_the_otel_extra_imports_opentelemetry(self) -> None:
        assert importers("opentelemetry") <= modules_in("otel")

    def test_only_the_redis_extra_imports_redis(self) -> None:
        assert importers("redis") <= {"pace._redis"}

    def test_only_one_file_imports_dask(self) -> None:
        assert importers("dask", "distributed") <= {"dask"}

    def test_the_extras_import_only_public_names(self) -> None:
        for module in modules_in(*EXTRAS):
            private = {name for name in inside(module) if entry(name) in CORE and is_private(name)}
            # `redis` is a name of `pace._redis`, which needs the extra; `_config` has the errors of
            # wrong arguments.
            allowed = {"_version", "_config", "pace._redis"}
            if entry(module) == "dask":
                # A run on a cluster is a bulk stop with the ledger, the input and the ending of
                # one; only its workers are elsewhere.
                allowed |= {name for name in private if entry(name) in _BULK_PARTS}
            assert private <= allowed, module

    def test_no_function_of_the_core_imports_anything(self) -> None:
        """Fault: function-level imports that hide a cycle."""
        found = [
            (module, node.lineno)
            for module in modules_in(*CORE)
            for function in nodes(module)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]

        assert found == []

    def test_there_is_no_star_import(self) -> None:
        found = {module for module in MODULES for each in imports(module) if each.name == "*"}

        assert found == set()


class TestPublicNames:
    def test_they_are_sorted_and_unique(self) -> None:
        assert bctrl_async.__all__ == sorted(set(bctrl_async.__all__))

    def test_every_name_that_the_package_imports_is_listed(self) -> None:
        imported = {found.name for found in imports("__init__") if found.inside is not None}

        assert set(bctrl_async.__all__) == imported

    def test_each_can_be_imported(self) -> None:
        assert [n for n in bctrl_async.__all__ if getattr(bctrl_async, n, None) is None] == []

    def test_each_is_in_dir_and_no_other_name_is_an_attribute(self) -> None:
        assert set(dir(bctrl_async)) >= {"__version__", *bctrl_async.__all__}
        assert not hasattr(bctrl_async, "nosuch")
        # A module is an attribute also before another has imported it.
        assert vars(bctrl_async)["__getattr__"]("journal") is import_module(f"{NAME}.journal")

    def test_every_error_is_public(self) -> None:
        defined = {node.name for node in nodes("errors") if isinstance(node, ast.ClassDef)}

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
    module = import_module(name)
    listed = module.__all__

    # Constants, classes, the rest: the order of ruff's RUF022.
    assert listed == sorted(set(listed), key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert [n for n in listed if not hasattr(module, n)] == []


def run_fresh(program: str) -> str:
    """Run a program in a fresh interpreter, and return its stdout."""
    # Coverage imports modules of its own.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=PACKAGE.parent,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def loaded_in_turn() -> tuple[set[str], set[str]]:
    """The modules that a fresh interpreter has loaded after importing the package, and the command.

    Returns:
        Those after `import bctrl_async`, and those after `import bctrl_async.cli`.
    """
    program = (
        f"from {NAME} import *; import json, sys; print(json.dumps(sorted(sys.modules)));"
        f"import {NAME}.cli; print(json.dumps(sorted(sys.modules)))"
    )
    package, command = map(json.loads, run_fresh(program).splitlines())
    return set(package), set(command)


@pytest.fixture
def loaded(loaded_in_turn: tuple[set[str], set[str]]) -> set[str]:
    """The modules that a fresh interpreter has loaded after importing the package."""
    return loaded_in_turn[0]


class TestFreshInterpreter:
    def test_it_imports_the_package_without_a_warning(self, loaded: set[str]) -> None:
        assert NAME in loaded

    def test_it_does_not_load_the_dependencies_of_extras(self, loaded: set[str]) -> None:
        heavy = {
            *("cyclopts", "dask", "distributed", "fastapi", "opentelemetry", "pydantic", "pytest"),
            *("redis", "rich", "sqlite3"),
        }

        assert loaded & heavy == set()

    def test_it_does_not_load_the_extras(self, loaded: set[str]) -> None:
        assert loaded & {f"{NAME}.{module}" for module in ("emulator", *EXTRAS)} == set()

    def test_it_loads_aiohttp_when_a_name_needs_it(self) -> None:
        """Fault: the help of the command took twice as long."""
        help_of_all = f"import {NAME}.cli; assert {NAME}.cli.main(['--help']) == 0"
        run_fresh(f"{help_of_all}; import sys; assert 'aiohttp' not in sys.modules")
        run_fresh(f"from {NAME} import *; assert BctrlSession.stop_runtime and shard")
        run_fresh(f"import {NAME}; assert {NAME}.errors.BctrlError and {NAME}.StopBatch")

    def test_the_command_loads_no_server(self, loaded_in_turn: tuple[set[str], set[str]]) -> None:
        """Fault: the start of every command took a tenth longer."""
        _, loaded = loaded_in_turn

        assert f"{NAME}.cli" in loaded
        assert loaded & {"aiohttp.web", f"{NAME}.emulator"} == set()


BUDGETS = {
    ("__init__", "__main__", "_config", "_lifetime", "_version"): 322,
    ("errors", "filters", "models", "observer", "outcomes", "stats"): 1131,
    ("session", "shards"): 698,
    ("otel", "testing"): 360,
    ("pace", "redis"): 645,
    ("_calls",): 736,
    ("_http",): 1727,
    ("_limiter",): 863,
    ("bulk",): 1757,
    ("dask",): 744,
    ("journal",): 335,
    ("cli",): 2300,
    ("emulator",): 949,
    ("fastapi",): 567,
}
"""The most lines of each part of the package. A number rises only for a promise that is new."""


def test_every_part_has_a_budget() -> None:
    names = [name for part in BUDGETS for name in part]

    assert sorted(names) == sorted({entry(module) for module in MODULES})


@pytest.mark.parametrize("part", BUDGETS, ids="-".join)
def test_no_part_grows_beyond_its_budget(part: tuple[str, ...]) -> None:
    """Fault: the package grew from 8,285 to 21,115 lines in two days."""
    lines = sum(len(MODULES[name].read_text("utf-8").splitlines()) for name in modules_in(*part))

    assert lines <= BUDGETS[part], "take something out, or lower what another change has left"
