"""The image and the CronJob of docs/examples, as far as they run without Docker."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bctrl_async import cli

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
DOCKERFILE = (EXAMPLES / "docker" / "Dockerfile").read_text("utf-8")
CRON_JOB = (EXAMPLES / "kubernetes" / "cronjob.yaml").read_text("utf-8")
TARGETS = [("ws", f"r{number}") for number in range(5)]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The specification of the CronJob."""
    _, cron_job = yaml.safe_load_all(CRON_JOB)
    assert (cron_job["kind"], cron_job["spec"]["concurrencyPolicy"]) == ("CronJob", "Forbid")
    specification: dict[str, Any] = cron_job["spec"]["jobTemplate"]["spec"]
    return specification


def test_the_cron_job_stops_every_target_with_a_journal_of_its_own(
    job: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (container,) = job["template"]["spec"]["containers"]
    assert "command" not in container
    assert "JOB_NAME" in {variable["name"] for variable in container["env"]}
    args = [arg.replace("$(JOB_NAME)", "stop-runtimes-1") for arg in container["args"]]
    assert "--journal=stop-runtimes-1.jsonl" in args
    (tmp_path / "runtimes.csv").write_text("".join(f"{ws},{alias}\n" for ws, alias in TARGETS))
    monkeypatch.chdir(tmp_path)

    assert cli.main([*args, "--dry-run"]) == 0

    lines = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(line["workspace_id"], line["alias"]) for line in lines] == TARGETS


def test_the_cron_job_repeats_what_may_help_and_keeps_its_journal(job: dict[str, Any]) -> None:
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    disrupted, misused = job["podFailurePolicy"]["rules"]

    # The API server rejects a failure policy with any other.
    assert (pod["restartPolicy"], job["podReplacementPolicy"]) == ("Never", "Failed")
    assert disrupted["action"] == "Ignore"
    assert (misused["action"], misused["onExitCodes"]["values"]) == ("FailJob", [2])
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    claim, _ = yaml.safe_load_all(CRON_JOB)
    assert (mount["name"], mount["mountPath"]) == (volume["name"], container["workingDir"])
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_process_1_of_the_image_is_the_command_and_not_root() -> None:
    """Fault: a shell is process 1, and the command never gets SIGTERM."""
    lines = dict(line.split(" ", 1) for line in DOCKERFILE.splitlines() if " " in line)

    assert json.loads(lines["ENTRYPOINT"])[0].endswith("/bctrl-async")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", lines["USER"])
    assert "BCTRL_API_KEY" not in DOCKERFILE
