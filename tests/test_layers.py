"""The architecture: layers of imports, public names, and the cost of an import."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import bctrl_async

NAME = "bctrl_async"
PACKAGE = Path(bctrl_async.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""The file of every module, by its name within the package, such as `session`."""

# A module may import from lower layers, and without cycles from its own. A folder is
# one entry.
LAYERS = [
    {"_version", "_lifetime", "errors"},
    {"models", "_config", "_refs", "stats"},
    {"pace", "outcomes"},
    {"_entries", "_kinds"},
    {"_quick_failures"},
    {"_limiter", "_http", "filters"},
    {"observer", "journal"},
    {"_calls"},
    {"bulk"},
    {"session", "shards"},
    {"__init__"},
    {"otel", "redis", "testing", "fastapi", "cli", "__main__"},
]
CORE = frozenset().union(*LAYERS[:-1])
EXTRAS = LAYERS[-1]
# The emulator restates the wire format, so that one bug cannot hide on both sides.
ALONE = frozenset({"emulator"})

IMPORTERS = {
    # A call carries an aiohttp.ClientTimeout.
    "aiohttp": {"_calls", "_http", "session", *ALONE},
    # They are dependencies of aiohttp, and part of its API.
    "multidict": {"_calls", "_http", "session"},
    "yarl": {"_calls", "_config", "_http", "cli", "observer"},
    "msgspec": {*CORE, *EXTRAS},
    "cyclopts": {"cli"},
    "rich": {"cli"},
    "fastapi": {"fastapi"},
    "pydantic": {"fastapi"},
    "pydantic_core": {"fastapi"},
    "opentelemetry": {"otel"},
    # A `RedisPace` takes a client; only the command makes its own.
    "redis": {"cli"},
    "aioresponses": {"testing"},
    "pytest": {"testing"},
}
"""The parts that may import each package that is not of the standard library."""


def entry(module: str) -> str:
    """Return the file or folder of the package that a module is in."""
    return module.partition(".")[0]


def is_private(module: str) -> bool:
    return any(
        part.startswith("_") and part != "__init__" for part in module.split(".")
    )


class Import(NamedTuple):
    """One imported module, such as `aiohttp.web`, and the name taken from it."""

    module: str
    name: str | None

    @property
    def inside(self) -> str | None:
        """The package's own module; None if it belongs to another package."""
        package, _, rest = self.module.partition(".")
        if package != NAME:
            return None
        path = ".".join(filter(None, [rest, self.name]))
        return next(
            name
            for name in (path, rest, f"{rest}.__init__", "__init__")
            if name in MODULES
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
            assert not node.level, (
                "imports are absolute, so that this test can read them"
            )
            found.update(Import(node.module or "", alias.name) for alias in node.names)
    return frozenset(found)


@cache
def inside(module: str) -> frozenset[str]:
    return frozenset(
        found.inside for found in imports(module) if found.inside is not None
    )


@cache
def outside(module: str) -> frozenset[str]:
    found = (found.module.partition(".")[0] for found in imports(module))
    return frozenset(found) - {NAME} - sys.stdlib_module_names


def layer(module: str) -> int:
    return next(
        (n for n, names in enumerate(LAYERS) if entry(module) in names), len(LAYERS)
    )


def modules_in(*entries: str) -> set[str]:
    """Return the modules in these files or folders of the package."""
    return {module for module in MODULES if entry(module) in entries}


class TestImports:
    def test_every_module_is_in_a_layer_and_imports_from_no_higher_one(self) -> None:
        assert {entry(module) for module in MODULES} <= ALONE.union(*LAYERS), (
            "add it to LAYERS"
        )
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

    def test_there_is_no_import_cycle(self) -> None:
        remaining = {module: inside(module) for module in MODULES}
        while free := {
            name for name, needs in remaining.items() if not needs & remaining.keys()
        }:
            for module in free:
                del remaining[module]
        assert remaining == {}

    def test_the_emulator_imports_only_the_server_of_aiohttp(self) -> None:
        for module in modules_in(*ALONE):
            assert {entry(name) for name in inside(module)} <= ALONE, module
            found = {found for found in imports(module) if "aiohttp" in found.module}
            assert found <= {Import("aiohttp", "web")}, module

    def test_only_the_parts_that_need_a_package_import_it(self) -> None:
        found = {
            (package, entry(module))
            for module in MODULES
            for package in outside(module)
        }
        assert found <= {
            (package, part) for package, parts in IMPORTERS.items() for part in parts
        }
        assert {module for module in MODULES if "redis" in outside(module)} == {
            "cli._pace"
        }

    def test_the_extras_import_only_public_names(self) -> None:
        for module in modules_in(*EXTRAS):
            private = {
                name
                for name in inside(module)
                if entry(name) in CORE and is_private(name)
            }
            # `_config` has the errors of wrong arguments; `_quick_failures` is the
            # switch of `testing`; `_lifetime` closes the client of the command's pace;
            # `_leases` has what stores share; `_kinds` has the problem and the exit
            # code of an error.
            allowed = {
                "_version",
                "_config",
                "_quick_failures",
                "_lifetime",
                "_kinds",
                "pace._leases",
            }
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

    def test_nothing_is_used_of_an_event_loop_that_only_some_have(self) -> None:
        """Fault: a timer was asked for its time, which uvloop may not know."""
        is_special = re.compile(r".*loop(\(\))?\._\w+|.*\.when").fullmatch
        found = [
            (module, node.lineno, ast.unparse(node))
            for module in MODULES
            for node in nodes(module)
            if isinstance(node, ast.Attribute) and is_special(ast.unparse(node))
        ]
        assert found == []


class TestPublicNames:
    def test_every_name_that_the_package_imports_is_public_and_every_error(
        self,
    ) -> None:
        imported = {
            found.name for found in imports("__init__") if found.inside is not None
        }
        errors = {
            node.name for node in nodes("errors") if isinstance(node, ast.ClassDef)
        }
        assert errors <= imported == set(bctrl_async.__all__)

    def test_each_is_in_dir_and_no_other_name_is_an_attribute(self) -> None:
        assert set(dir(bctrl_async)) >= {"__version__", *bctrl_async.__all__}
        assert not hasattr(bctrl_async, "nosuch")
        # A module is an attribute also before another has imported it.
        assert vars(bctrl_async)["__getattr__"]("journal") is import_module(
            f"{NAME}.journal"
        )

    def test_the_package_is_marked_as_typed(self) -> None:
        """Fault: no `py.typed` (the vendor's SDK)."""
        assert (PACKAGE / "py.typed").is_file()


@cache
def loaded_by(program: str) -> frozenset[str]:
    """Run a program in a fresh interpreter, and return what is loaded then."""
    # Coverage imports modules of its own.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            f"{program}; import sys; print(*sys.modules)",
        ],
        cwd=PACKAGE.parent,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return frozenset(done.stdout.splitlines()[-1].split())


class TestFreshInterpreter:
    def test_the_package_loads_no_extra_and_nothing_of_theirs(self) -> None:
        loaded = loaded_by(
            f"from {NAME} import *; assert BctrlSession.stop_runtime and shard"
        )

        heavy = {"cyclopts", "fastapi", "opentelemetry", "pydantic"}
        assert loaded & {*heavy, "pytest", "redis", "rich", "sqlite3"} == set()
        assert (
            loaded & {f"{NAME}.{module}" for module in ("emulator", *EXTRAS)} == set()
        )

    def test_it_loads_aiohttp_when_a_name_needs_it(self) -> None:
        """Fault: the help of the command took twice as long."""
        helps = [
            ["--help"],
            *([name, "--help"] for name in ("stop", "list", "get", "report")),
        ]
        program = f"from {NAME}.cli import main; assert not any(map(main, {helps}))"
        assert "aiohttp" not in loaded_by(program)
        assert "aiohttp" in loaded_by(
            f"import {NAME}; {NAME}.errors.BctrlError, {NAME}.StopBatch"
        )

    def test_the_command_loads_no_server(self) -> None:
        """Fault: the start of every command took a tenth longer."""
        loaded = loaded_by(f"import {NAME}.cli")
        assert loaded & {"aiohttp.web", f"{NAME}.emulator"} == set()
