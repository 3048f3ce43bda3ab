"""How the package is built: what may import what, what is public, and what an import costs."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
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

# A module imports from lower layers, or from its own without a circle. A folder is one entry.
LAYERS = [
    {"_version", "errors"},
    {"models", "_config", "stats"},
    {"_limiter", "_http", "outcomes", "filters"},
    {"observer", "journal"},
    {"_calls"},
    {"bulk"},
    {"session"},
    {"__init__"},
    {
        "otel",
        "testing",
        "fastapi",
        "cli",
        "__main__",
    },
]
CORE = frozenset().union(*LAYERS[:-1])
EXTRAS = LAYERS[-1]
# It restates the wire format, so that one bug cannot hide on both sides.
ALONE = frozenset({"emulator"})


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


def imports(tree: ast.AST) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute, so that this test can read them"
            yield from (Import(node.module or "", alias.name) for alias in node.names)


def inside(module: str) -> set[str]:
    return {found.inside for found in imports(SOURCES[module]) if found.inside is not None}


def outside(module: str) -> set[str]:
    found = (found.module.partition(".")[0] for found in imports(SOURCES[module]))
    return set(found) - {NAME} - sys.stdlib_module_names


def layer(module: str) -> int:
    return next((n for n, names in enumerate(LAYERS) if entry(module) in names), len(LAYERS))


class TestImports:
    @every_module
    def test_every_module_has_a_place_in_the_layers(self, module: str) -> None:
        assert entry(module) in ALONE.union(*LAYERS), f"give {entry(module)} a place in LAYERS"

    @every_module
    def test_a_module_imports_nothing_from_a_layer_above_its_own(self, module: str) -> None:
        if module in ALONE:
            assert inside(module) == set()
            return
        # The emulator may be started by the extras.
        below = inside(module) - (ALONE if entry(module) in EXTRAS else set())
        above = {name for name in below if layer(name) > layer(module)}

        assert above == set()

    def test_there_is_no_circle(self) -> None:
        left = {module: inside(module) for module in SOURCES}
        while free := {module for module, needed in left.items() if not needed & left.keys()}:
            for module in free:
                del left[module]

        assert left == {}

    def test_errors_import_nothing_of_the_package(self) -> None:
        assert inside("errors") == set()

    @every_module
    def test_only_what_sends_or_serves_imports_aiohttp(self, module: str) -> None:
        if "aiohttp" in outside(module):
            # A call carries a time limit of aiohttp's.
            assert entry(module) in {"_calls", "_http", "session", *ALONE}

    @every_core_module
    def test_the_core_needs_no_more_than_its_dependencies(self, module: str) -> None:
        # aiohttp brings multidict and yarl, and has them in its own interface.
        assert outside(module) <= {"aiohttp", "msgspec", "multidict", "yarl"}

    @pytest.mark.skipif("emulator" not in SOURCES, reason="there is no emulator")
    def test_the_emulator_is_a_server_only(self) -> None:
        found = {found for found in imports(SOURCES["emulator"]) if "aiohttp" in found.module}

        assert found == {Import("aiohttp", "web")}
        assert outside("emulator") == {"aiohttp"}

    @every_module
    def test_only_the_command_line_imports_what_draws_it(self, module: str) -> None:
        if entry(module) != "cli":
            assert outside(module) & {"typer", "click", "rich"} == set()

    @every_module
    def test_only_the_extra_for_fastapi_imports_it(self, module: str) -> None:
        if entry(module) != "fastapi":
            found = {"fastapi", "starlette", "pydantic", "pydantic_core"}
            assert outside(module) & found == set()

    @every_module
    def test_only_the_module_for_it_imports_opentelemetry(self, module: str) -> None:
        if entry(module) != "otel":
            assert "opentelemetry" not in outside(module)

    @every_module
    def test_the_extras_know_only_what_is_public(self, module: str) -> None:
        if entry(module) in EXTRAS:
            private = {name for name in inside(module) if entry(name) in CORE and is_private(name)}
            assert private <= {"_version"}

    @every_core_module
    def test_no_function_imports_anything(self, module: str) -> None:
        """Fault: function-level imports that hide a circle."""
        functions = [
            node
            for node in ast.walk(SOURCES[module])
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        found = [node for function in functions for node in ast.walk(function) if is_import(node)]

        assert found == []

    @every_module
    def test_nothing_is_imported_by_star(self, module: str) -> None:
        assert "*" not in {found.name for found in imports(SOURCES[module])}


def is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


class TestPublicNames:
    def test_they_are_sorted_and_listed_once(self) -> None:
        assert bctrl_async.__all__ == sorted(set(bctrl_async.__all__))

    def test_all_that_the_package_imports_is_listed(self) -> None:
        imported = {found.name for found in imports(SOURCES["__init__"])}

        assert set(bctrl_async.__all__) == imported

    @pytest.mark.parametrize("name", bctrl_async.__all__)
    def test_each_can_be_imported_and_used(self, name: str) -> None:
        assert getattr(bctrl_async, name) is not None

    def test_every_error_is_public(self) -> None:
        defined = {node.name for node in SOURCES["errors"].body if isinstance(node, ast.ClassDef)}

        assert defined <= set(bctrl_async.__all__)

    def test_type_checkers_are_told_that_it_is_typed(self) -> None:
        """Fault: no `py.typed` (the vendor's SDK)."""
        assert (PACKAGE / "py.typed").is_file()


PUBLIC_MODULES = [
    "bctrl_async",
    "bctrl_async.bulk",
    "bctrl_async.cli",
    "bctrl_async.emulator",
    "bctrl_async.fastapi",
    "bctrl_async.journal",
    "bctrl_async.models",
    "bctrl_async.observer",
    "bctrl_async.otel",
    "bctrl_async.outcomes",
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
    """Return what a fresh interpreter has loaded after it imported the package."""
    program = f"import {NAME}, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=PACKAGE.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return set(json.loads(done.stdout))


class TestFreshInterpreter:
    def test_it_imports_the_package_without_a_warning(self, loaded: set[str]) -> None:
        assert NAME in loaded

    @pytest.mark.parametrize(
        "heavy", ["typer", "click", "rich", "fastapi", "opentelemetry", "pydantic", "pytest"]
    )
    def test_it_does_not_load_what_an_extra_needs(self, loaded: set[str], heavy: str) -> None:
        assert heavy not in loaded

    @pytest.mark.parametrize("module", ["emulator", *sorted(EXTRAS)])
    def test_it_does_not_load_the_extras(self, loaded: set[str], module: str) -> None:
        assert f"{NAME}.{module}" not in loaded
