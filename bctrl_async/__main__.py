"""The entry point of `bctrl-async`, which works without the extra `cli`, too."""

import sys


def main() -> int:
    """Run the command, or say how to install its dependencies; return the exit code."""
    try:
        # The extra may be missing, and Ctrl-C may come during the import.
        from bctrl_async import cli  # noqa: PLC0415 - it may be missing.

        return cli.main()
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in {"cyclopts", "rich"}:
            raise
        from bctrl_async._config import missing_extra  # noqa: PLC0415 - it is slow.

        problem = missing_extra(error, "cli")
        line = f"bctrl-async: error: {problem}"
        print(line, file=sys.stderr)  # noqa: T201 - rich may be missing.
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
