"""The crontab and the systemd units of the docs, as printed.

They run in a mount namespace, in which the command is installed as the guide says,
and with as few variables as cron and systemd give.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from string import Template

import pytest
from support.commands import finish, start
from support.helpers import add_runtimes

from bctrl_async.emulator import Emulator

DOCS = Path(__file__).parents[2] / "docs"
UNITS = DOCS / "examples" / "systemd"
COUNT = 40
NIGHT = "2026-11-26"

# An overlay of two lower folders needs no work folder, and changes neither of them.
NAMESPACE = """
root=$1 prefix=$2
for folder in /etc /opt /usr/bin /usr/sbin /var/lib; do
  mount -t overlay -o "lowerdir=$root$folder:$folder" overlay "$folder" || exit 99
done
mount -t overlay -o "lowerdir=$root/opt/stop-runtimes:$prefix" \\
  overlay /opt/stop-runtimes || exit 99
mount --bind "$root/var/lib/stop-runtimes" /var/lib/stop-runtimes || exit 99
shift 2
exec "$@"
"""
FOLDERS = ("etc", "opt/stop-runtimes", "usr/bin", "usr/sbin", "var/lib/stop-runtimes")

Result = tuple[int | None, str, str]
"""An exit code, stdout and stderr."""


def in_namespace(root: Path, *command: str) -> list[str]:
    """Return the command that runs another with the folders of `root`."""
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", NAMESPACE, "sh"]
    return [*namespace, str(root), sys.prefix, *command]


def make_folders(root: Path) -> None:
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)


@cache
def obstacle() -> str | None:
    """Return why the tests cannot run on this machine, or None."""
    if not (Path(sys.prefix) / "bin" / "bctrl-async").exists():
        return "the command is not installed"
    if shutil.which("unshare") is None:
        return "there is no unshare"
    with tempfile.TemporaryDirectory() as root:
        make_folders(Path(root))
        command = in_namespace(Path(root), "env", "-i", "--chdir=/", "true")
        probe = subprocess.run(command, check=False, capture_output=True, text=True)
    if probe.returncode:
        return f"there is no mount namespace: {probe.stderr}"
    return None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folders of a machine on which the guide was followed."""
    reason = obstacle()
    if reason is not None:
        pytest.skip(reason)
    make_folders(tmp_path)
    page = (DOCS / "how-to" / "nightly.md").read_text("utf-8")
    [nightly] = re.findall("^```sh\n(#!.*?)^```$", page, re.DOTALL | re.MULTILINE)
    script = tmp_path / "opt" / "stop-runtimes" / "nightly.sh"
    script.write_text(nightly)
    script.chmod(0o755)
    return tmp_path


@pytest.fixture
async def api(root: Path) -> AsyncIterator[Emulator]:
    """An emulator whose key is in the environment file, and its runtimes."""
    async with Emulator(port=0) as api:
        targets = add_runtimes(api, COUNT)
        lines = "".join(f"{workspace_id},{alias}\n" for workspace_id, alias in targets)
        for name in ("all.csv", "runtimes.csv"):
            (root / "var/lib/stop-runtimes" / name).write_text(lines)
        variables = {
            "BCTRL_API_KEY": api.api_key,
            "BCTRL_BASE_URL": api.url,
            "NIGHT": NIGHT,
        }
        text = "".join(f"{name}={value}\n" for name, value in variables.items())
        (root / "etc/stop-runtimes.env").write_text(text)
        yield api


async def run(root: Path, variables: dict[str, str], *command: str) -> Result:
    """Run a command in the namespace with these variables alone, in the folder `/`."""
    environment = [f"{name}={value}" for name, value in variables.items()]
    args = ("env", "-i", "--chdir=/", *environment, *command)
    return await finish(await start(*in_namespace(root, *args)))


class TestCron:
    variables: dict[str, str]
    jobs: list[str]

    @pytest.fixture(autouse=True)
    def _crontab(self) -> None:
        page = (DOCS / "how-to" / "nightly.md").read_text("utf-8")
        [crontab] = re.findall(
            "^```text\n(PATH=.*?)^```$", page, re.DOTALL | re.MULTILINE
        )
        assignments = re.findall(r"^(\w+)=(.*)\n", crontab, re.MULTILINE)
        # The variables of the crontab replace cron's.
        cron = {
            "HOME": "/root",
            "LOGNAME": "root",
            "PATH": "/usr/bin:/bin",
            "SHELL": "/bin/sh",
        }
        self.variables = cron | dict(assignments)
        lines = crontab.splitlines()[len(assignments) :]
        # A line has five fields for the time, and the user.
        self.jobs = [line.split(maxsplit=6)[6] for line in lines]

    async def run(self, root: Path, job: str) -> Result:
        return await run(root, self.variables, "/bin/sh", "-c", job)

    def test_no_job_has_a_percent_sign(self) -> None:
        """Fault: cron takes it for the end of a line."""
        assert [job for job in self.jobs if "%" in job] == []

    async def test_a_night_without_failures_mails_nothing(
        self, root: Path, api: Emulator
    ) -> None:
        """Faults: `bctrl-async: not found`; 720 lines of progress every night."""
        for job in self.jobs:
            assert await self.run(root, job) == (0, "", "")
        assert len(api.stops) == len(api.requests) == COUNT

    async def test_a_night_with_a_failure_mails_what_remains(
        self, root: Path, api: Emulator
    ) -> None:
        with (root / "var/lib/stop-runtimes/runtimes.csv").open("a") as file:
            file.write("ws-1,gone\n")
        for job in self.jobs:
            code, out, err = await self.run(root, job)
            assert code == 1, err
            assert "ws-1 gone" in out
        assert len(api.stops) == COUNT + 2

    async def test_without_the_key_it_mails_why(self, root: Path) -> None:
        code, out, err = await self.run(root, self.jobs[0])
        assert (code, out, "stop-runtimes.env" in err) == (2, "", True)


class TestSystemd:
    def unit(self, name: str, instance: str = "") -> dict[str, str]:
        """Return the settings of a unit, with the specifiers that it uses."""
        text = (
            (UNITS / name)
            .read_text("utf-8")
            .replace("%i", instance)
            .replace("%H", "host")
        )
        return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))

    async def run(self, root: Path, unit: dict[str, str]) -> Result:
        environment = {"PATH": "/usr/bin:/bin"}
        for assignment in shlex.split(unit.get("Environment", "")):
            name, _, value = assignment.partition("=")
            environment[name] = value
        if "EnvironmentFile" in unit:
            text = (root / unit["EnvironmentFile"][1:]).read_text()
            environment |= dict(line.split("=", 1) for line in text.splitlines())
        if "StateDirectory" in unit:
            environment["STATE_DIRECTORY"] = f"/var/lib/{unit['StateDirectory']}"
        command = shlex.split(Template(unit["ExecStart"]).substitute(environment))
        folder = unit.get("WorkingDirectory", "/")
        return await run(root, environment, "env", f"--chdir={folder}", *command)

    async def test_the_service_stops_all_and_logs_nothing(
        self, root: Path, api: Emulator
    ) -> None:
        """Fault: `bctrl-async: not found`."""
        unit = self.unit("stop-runtimes.service")
        assert await self.run(root, unit) == (0, "", "")
        assert len(api.stops) == COUNT

    async def test_the_instances_stop_a_shard_each(
        self, root: Path, api: Emulator
    ) -> None:
        for shard in range(1, 5):
            unit = self.unit("stop-shard@.service", str(shard))
            assert await self.run(root, unit) == (0, "", "")
        assert len(api.stops) == len(api.requests) == COUNT

    @pytest.mark.parametrize("name", ["stop-runtimes.service", "stop-shard@.service"])
    async def test_a_failure_is_mailed_to_root(self, root: Path, name: str) -> None:
        for path, program in {
            "usr/bin/systemctl": 'echo "the log of $*"; exit 3',
            "usr/sbin/sendmail": 'cat > "/var/lib/stop-runtimes/mail to $1"',
        }.items():
            (root / path).write_text(f"#!/bin/sh\n{program}\n")
            (root / path).chmod(0o755)
        handler = self.unit(name)["OnFailure"].replace("%n", name)
        template, _, instance = handler.partition("@")
        unit = self.unit(f"{template}@.service", instance.removesuffix(".service"))
        assert await self.run(root, unit) == (0, "", "")
        text = (root / "var/lib/stop-runtimes/mail to root").read_text()
        header, _, body = text.partition("\n\n")
        assert header == f"Subject: {name} failed on host"
        assert re.fullmatch(f"the log of status .* {name}\n", body)

    @pytest.mark.skipif(
        shutil.which("systemd-analyze") is None, reason="there is no systemd"
    )
    async def test_systemd_accepts_the_units(self, root: Path) -> None:
        units = [str(path) for path in sorted(UNITS.iterdir())]
        (root / "usr/sbin/sendmail").touch(0o755)
        verify = ("systemd-analyze", "verify", "--man=no", *units)
        assert await run(root, {"PATH": "/usr/bin:/bin"}, *verify) == (0, "", "")
