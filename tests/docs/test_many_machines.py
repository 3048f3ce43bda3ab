"""The recipes for several machines in docs/examples, without their schedulers."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from bctrl_async import cli

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
COUNT = 4
NIGHT = "2026-11-26"
TARGETS = [("ws", f"r{number}") for number in range(40)]


def example(path: str) -> str:
    return (EXAMPLES / path).read_text("utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the list, and programs that stand for those of the recipes."""
    for name, program in {
        "bctrl-async": 'printf "%s\\n" "$@" >> calls; exit ${CODE:-0}',
        "srun": 'exec "$@"',
        "sleep": 'echo "sleep $1" >> calls',
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)
    (tmp_path / "all.csv").write_text("".join(f"{ws},{alias}\n" for ws, alias in TARGETS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(script: str, **variables: str) -> tuple[int, list[str]]:
    """Run a script; return its exit code, and the lines that the programs wrote."""
    calls = Path("calls")
    calls.write_text("")
    path = f"{Path.cwd() / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-c", script], env={"PATH": path, "NIGHT": NIGHT, **variables}, check=False
    )
    return done.returncode, calls.read_text().splitlines()


def assert_divided(arguments: Sequence[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Check that these commands stop each target once, and have a journal each."""
    found = []
    for args in arguments:
        assert cli.main([*args, "--dry-run"]) == 0
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        found += [(line["workspace_id"], line["alias"]) for line in lines]
    assert sorted(found) == sorted(TARGETS)
    journals = {args[args.index("--journal") + 1] for args in arguments}
    assert journals == {f"{NIGHT}-{shard}.jsonl" for shard in range(1, COUNT + 1)}


@pytest.mark.usefixtures("folder")
def test_each_index_of_the_kubernetes_job_stops_its_shard(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job: dict[str, Any] = yaml.safe_load(example("kubernetes/indexed-job.yaml"))
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["kind"], spec["completionMode"], pod["restartPolicy"]) == (
        "Job",
        "Indexed",
        "Never",
    )
    assert spec["completions"] == spec["parallelism"] == COUNT
    assert {each["name"] for each in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    # Kubernetes takes texts only, and YAML would make a date of this one.
    assert {"name": "NIGHT", "value": NIGHT} in container["env"]
    assert container["command"] == ["sh", "-c"]

    (script,) = container["args"]
    runs = [run(script, JOB_COMPLETION_INDEX=str(index)) for index in range(COUNT)]
    assert_divided([args for _, args in runs], capsys)
    assert run(script, JOB_COMPLETION_INDEX="0", NIGHT="")[1] == []


class TestSlurm:
    @pytest.fixture
    def script(self, folder: Path) -> str:
        (folder / "stops").mkdir()
        (folder / "stops" / "all.csv").write_text((folder / "all.csv").read_text())
        (folder / "stops" / "key.env").write_text("export BCTRL_API_KEY=key\n")
        # The programs write beside it.
        return (
            example("slurm/stop.sbatch")
            .replace("$HOME/stops", ".")
            .replace("./key.env", "stops/key.env")
        )

    def test_each_task_of_the_array_stops_its_shard(
        self, script: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert f"#SBATCH --array=1-{COUNT}\n" in script
        runs = [run(script, SLURM_ARRAY_TASK_ID=str(task)) for task in range(1, COUNT + 1)]
        assert_divided([args for _, args in runs], capsys)

    def test_a_task_is_repeated_if_that_may_help(self, script: str) -> None:
        """Fault: a task gives up if the journal is still locked for the machine that died."""
        for code, times in {0: 1, 1: 5, 2: 1, 75: 5, 130: 1, 137: 1}.items():
            ended, calls = run(script, SLURM_ARRAY_TASK_ID="1", CODE=str(code))
            assert (ended, calls.count("stop")) == (code, times)

    def test_a_task_without_a_night_stops_nothing(self, script: str) -> None:
        """Fault: the journal of every night is `-1.jsonl`."""
        assert run(script, SLURM_ARRAY_TASK_ID="1", NIGHT="")[1] == []

    def test_a_task_without_its_key_stops_nothing(self, script: str) -> None:
        broken = script.replace("stops/key.env", "stops/gone.env")
        Path("calls").touch()
        done = subprocess.run(["/bin/sh", "-c", broken], capture_output=True, check=False)
        # The status of a failed `.` is that of the shell.
        assert done.returncode not in {0, None}
        assert Path("calls").read_text() == ""


@pytest.mark.usefixtures("folder")
def test_each_instance_of_the_systemd_unit_stops_its_shard(
    capsys: pytest.CaptureFixture[str],
) -> None:
    unit = example("systemd/stop-shard@.service")
    (start,) = re.findall("^ExecStart=(.*)$", unit, re.MULTILINE)
    commands = [
        shlex.split(start.replace("%i", str(shard)).replace("${NIGHT}", NIGHT))[1:]
        for shard in range(1, COUNT + 1)
    ]
    assert_divided(commands, capsys)
    assert "RestartPreventExitStatus=2\n" in unit
    (check,) = re.findall("^ExecStartPre=(.*)$", unit, re.MULTILINE)
    for night, code in {NIGHT: 0, "": 1}.items():
        args = [night if arg == "${NIGHT}" else arg for arg in shlex.split(check)]
        assert subprocess.run(args, check=False).returncode == code
