"""Generate TypeScript from the OpenAPI of apps, and compile a use. Needs npx.

`python tests/nightly/typescript.py`
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "fastapi"))
sys.path.append(str(Path(__file__).parents[2] / "docs" / "examples" / "fastapi"))

from app import app as example
from test_fastapi_openapi import app_with_routes

PACKAGES = ["openapi-typescript@7", "typescript@5"]
CODE = """\
import type { components, paths } from "./bodies";
import type { components as ExampleComponents, paths as ExamplePaths } from "./example";

type Problem = components["schemas"]["Problem"];
type Stop = paths["/runtime"]["get"];
type Responses = Stop["responses"];
type Stopped = Responses[200]["content"]["application/json"];
type Invalid = Responses[422]["content"]["application/problem+json"];
type Progress = ExampleComponents["schemas"]["Progress"];
type Follow = ExamplePaths["/runs/{run_id}"]["get"];
type InvalidRequest = Follow["responses"][422]["content"]["application/json"];
type Unavailable = Responses[503]["content"]["application/problem+json"];
type Report = paths["/report"]["get"]["responses"][200]["content"]["application/json"];

export const describe = (runtime: Stopped): string =>
  `${runtime.alias} ${runtime.status} ${runtime.summary?.launchMode ?? "?"}`;

export const mayHaveStopped = (problem: Problem): boolean => problem.mayHaveStopped;

export const requestId = (problem: Problem): string =>
  // @ts-expect-error - it is absent if the API sent none.
  problem.requestId;

export const invalid = (problem: Invalid): string => problem.alias ?? "";

export const invalidRequest = (answer: InvalidRequest): string[] =>
  (answer.detail ?? []).map((error) => error.loc.join("."));

export const unsettled = (report: Report): string[] =>
  report.failures
    .filter((failure) => failure.result === "unknown")
    .map(({ workspace_id, alias, error }) =>
      `${workspace_id}/${alias} ${error?.message ?? ""}`);

export const share = (progress: Progress): number =>
  (progress.counts.stopped ?? 0) / progress.total;

export const mistypedProgress = (progress: Progress): number =>
  // @ts-expect-error - the JSON has `in_flight`.
  progress.inFlight;

export const failures = (progress: Progress): number =>
  progress.report?.failures.length ?? 0;

export const unavailable = (problem: Unavailable): number => problem.attempts;

export const mistyped = (report: Report): boolean =>
  // @ts-expect-error - there is no such result.
  report.failures.some((failure) => failure.result === "stoped");
"""


def main() -> None:
    npx = shutil.which("npx") or sys.exit("npx is not installed")
    with tempfile.TemporaryDirectory() as folder:
        for name, app in {"bodies": app_with_routes(), "example": example}.items():
            Path(folder, f"{name}.json").write_text(json.dumps(app.openapi()), "utf-8")
        Path(folder, "client.ts").write_text(CODE, "utf-8")
        packages = [f"--package={package}" for package in PACKAGES]
        for command in (
            ["openapi-typescript", "bodies.json", "--output", "bodies.ts"],
            ["openapi-typescript", "example.json", "--output", "example.ts"],
            ["tsc", "--strict", "--noEmit", "client.ts"],
        ):
            done = subprocess.run(
                [npx, "--yes", *packages, *command], cwd=folder, check=False
            )
            if done.returncode:
                sys.exit(f"{command[0]} failed")
    print("The TypeScript compiles.")  # noqa: T201 - a command.


if __name__ == "__main__":
    main()
