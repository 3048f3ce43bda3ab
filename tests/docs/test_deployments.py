"""The image, jobs and units of docs/examples, without their schedulers."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bctrl_async import cli

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
COUNT = 4
NIGHT = "2026-11-26"
TARGETS = [("ws", f"r{number}") for number in range(40)]

Capture = pytest.CaptureFixture[str]


def example(path: str) -> str:
    return (EXAMPLES / path).read_text("utf-8")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home with the lists in `stops`, and programs that stand for others."""
    for folder in ("bin", "stops"):
        (tmp_path / folder).mkdir()
    for name, program in {
        "bctrl-async": 'printf "%s\\n" "$@" >> calls; exit ${CODE:-0}',
        "srun": 'exec "$@"',
        "sleep": 'echo "sleep $1" >> calls',
    }.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)
    monkeypatch.chdir(tmp_path / "stops")
    for name in ("all.csv", "runtimes.csv"):
        Path(name).write_text("".join(f"{ws},{alias}\n" for ws, alias in TARGETS))
    Path("key.env").write_text("export BCTRL_API_KEY=key\n")


def run(script: str, **variables: str) -> tuple[int, list[str]]:
    """Run a script; return its exit code, and the lines that the programs wrote."""
    home, calls = Path.cwd().parent, Path("calls")
    calls.write_text("")
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {"HOME": str(home), "PATH": path, "NIGHT": NIGHT, **variables}
    done = subprocess.run(["/bin/sh", "-c", script], env=environment, check=False)
    return done.returncode, calls.read_text().splitlines()


def assert_divided(commands: list[list[str]], capsys: Capture) -> None:
    """Check that these commands stop each target once, and have a journal each."""
    found = []
    for args in commands:
        assert cli.main([*args, "--dry-run"]) == 0
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        found += [(line["workspace_id"], line["alias"]) for line in lines]
    assert sorted(found) == sorted(TARGETS)
    journals = {args[args.index("--journal") + 1] for args in commands}
    assert journals == {f"{NIGHT}-{shard}.jsonl" for shard in range(1, COUNT + 1)}


def test_process_1_of_the_image_is_the_command_and_not_root() -> None:
    """Fault: a shell is process 1, and the command never gets SIGTERM."""
    image = example("docker/Dockerfile")
    lines = dict(line.split(" ", 1) for line in image.splitlines() if " " in line)
    assert json.loads(lines["ENTRYPOINT"])[0].endswith("/bctrl-async")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", lines["USER"])
    assert "BCTRL_API_KEY" not in image


class TestKubernetes:
    def test_the_cron_job_stops_all_with_a_journal_that_is_kept(
        self, capsys: Capture
    ) -> None:
        claim, cron_job = yaml.safe_load_all(example("kubernetes/cronjob.yaml"))
        job = cron_job["spec"]["jobTemplate"]["spec"]
        # What the command rejects would be rejected again.
        _, misused = job["podFailurePolicy"]["rules"]
        assert (misused["action"], misused["onExitCodes"]["values"]) == ("FailJob", [2])
        pod = job["template"]["spec"]
        [container] = pod["containers"]
        assert "command" not in container
        assert "JOB_NAME" in {variable["name"] for variable in container["env"]}
        args = [
            arg.replace("$(JOB_NAME)", "stop-runtimes-1") for arg in container["args"]
        ]
        assert "--journal=stop-runtimes-1.jsonl" in args
        assert cli.main([*args, "--dry-run"]) == 0
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        assert [(line["workspace_id"], line["alias"]) for line in lines] == TARGETS

        [mount], [volume] = container["volumeMounts"], pod["volumes"]
        assert (mount["name"], mount["mountPath"]) == (
            volume["name"],
            container["workingDir"],
        )
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]

    def test_each_index_of_the_job_stops_its_shard(self, capsys: Capture) -> None:
        job: dict[str, Any] = yaml.safe_load(example("kubernetes/indexed-job.yaml"))
        spec, pod = job["spec"], job["spec"]["template"]["spec"]
        assert (spec["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
        assert spec["completions"] == spec["parallelism"] == COUNT
        [container] = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        # Kubernetes takes texts only, and YAML would make a date of this text.
        assert {"name": "NIGHT", "value": NIGHT} in container["env"]
        assert container["command"] == ["sh", "-c"]

        [script] = container["args"]
        runs = [run(script, JOB_COMPLETION_INDEX=str(index)) for index in range(COUNT)]
        assert_divided([args for _, args in runs], capsys)
        assert run(script, JOB_COMPLETION_INDEX="0", NIGHT="")[1] == []


class TestSlurm:
    script = example("slurm/stop.sbatch")

    def test_each_task_of_the_array_stops_its_shard(self, capsys: Capture) -> None:
        assert f"#SBATCH --array=1-{COUNT}\n" in self.script
        runs = [
            run(self.script, SLURM_ARRAY_TASK_ID=str(task))
            for task in range(1, COUNT + 1)
        ]
        assert_divided([args for _, args in runs], capsys)

    @pytest.mark.parametrize(
        ("code", "times"), [(0, 1), (1, 5), (2, 1), (75, 5), (130, 1), (137, 1)]
    )
    def test_a_task_is_repeated_if_that_may_help(self, code: int, times: int) -> None:
        """Fault: a task gives up while a dead machine holds the journal."""
        ended, calls = run(self.script, SLURM_ARRAY_TASK_ID="1", CODE=str(code))
        assert (ended, calls.count("stop")) == (code, times)

    def test_a_task_without_a_night_or_a_key_stops_nothing(self) -> None:
        """Fault: the journal of every night is `-1.jsonl`."""
        assert run(self.script, SLURM_ARRAY_TASK_ID="1", NIGHT="")[1] == []
        Path("key.env").unlink()
        code, calls = run(self.script, SLURM_ARRAY_TASK_ID="1")
        assert (code == 0, calls) == (False, [])


def test_each_instance_of_the_systemd_unit_stops_its_shard(capsys: Capture) -> None:
    unit = example("systemd/stop-shard@.service")
    [command] = re.findall("^ExecStart=(.*)$", unit, re.MULTILINE)
    commands = [
        shlex.split(command.replace("%i", str(shard)).replace("${NIGHT}", NIGHT))[1:]
        for shard in range(1, COUNT + 1)
    ]
    assert_divided(commands, capsys)
    assert "RestartPreventExitStatus=2\n" in unit
    [check] = re.findall("^ExecStartPre=(.*)$", unit, re.MULTILINE)
    for night, code in {NIGHT: 0, "": 1}.items():
        args = [night if arg == "${NIGHT}" else arg for arg in shlex.split(check)]
        assert subprocess.run(args, check=False).returncode == code
