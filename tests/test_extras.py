"""The modules of extras, without the packages that they need."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "package", "name"),
    [
        ("dask", "distributed", "dask.distributed"),
        ("fastapi", "fastapi", "FastAPI"),
        ("otel", "opentelemetry", "OpenTelemetry"),
        ("redis", "redis", "redis-py"),
    ],
)
def test_without_an_extra_the_import_says_what_to_install(
    module: str, package: str, name: str
) -> None:
    program = f"import sys; sys.modules['{package}'] = None; import bctrl_async.{module}"
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: bctrl_async.{module} needs {name}: "
        f"python -m pip install 'bctrl-async[{module}]'"
    )
