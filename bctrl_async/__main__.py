"""The entry point of `bctrl-async` and `python -m bctrl_async`, also without the extra `cli`."""

import gc
import sys

_USAGE = 2
_INTERRUPTED = 130


def main() -> int:
    """Run the command, or say how to install its dependencies; return the exit code."""
    try:
        # Here, because it may be missing, and Ctrl-C may come while it loads.
        from bctrl_async import cli  # noqa: PLC0415 - it may be missing.

        # The process is the command's own, and what it has imported is never garbage: a full
        # collection would search it for 10 ms, in which no answer is read.
        gc.freeze()
        return cli.main()
    except ModuleNotFoundError as error:
        if (name := (error.name or "").partition(".")[0]) not in {"cyclopts", "rich"}:
            raise
        problem = f"{name} is missing: install bctrl-async with the extra cli"
        print(f"bctrl-async: error: {problem}", file=sys.stderr)  # noqa: T201 - without rich.
        return _USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
