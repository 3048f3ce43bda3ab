"""`bctrl-async` and `python -m bctrl_async`: the way in, which also works without the extra."""

import sys

_INTERRUPTED = 130


def main() -> int:
    """Run the command, or say how to install what it needs; return the exit code."""
    try:
        from bctrl_async import cli  # noqa: PLC0415 - it may be missing, and loading takes time.

        return cli.main()
    except ModuleNotFoundError as error:
        if error.name not in {"rich", "typer"}:
            raise
        need = "bctrl-async: error: the command needs more packages:"
        print(need, "python -m pip install 'bctrl-async[cli]'", file=sys.stderr)  # noqa: T201 - nothing else is there.
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
