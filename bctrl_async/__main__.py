"""The entry point of `bctrl-async` and `python -m bctrl_async`, also without the extra `cli`."""

import sys


def main() -> int:
    """Run the command, or say how to install its dependencies; return the exit code."""
    try:
        # The import is in the `try`: the extra may be missing, and Ctrl-C may come meanwhile.
        from bctrl_async import cli  # noqa: PLC0415 - it may be missing.

        return cli.main()
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in {"cyclopts", "rich"}:
            raise
        from bctrl_async._config import missing_extra  # noqa: PLC0415 - it delays the start.

        problem = missing_extra(error, "cli")
        print(f"bctrl-async: error: {problem}", file=sys.stderr)  # noqa: T201 - without rich.
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
