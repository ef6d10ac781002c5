"""Errors that are the user's to mend: one clear sentence, no traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """What was wrong, where, and what to do; entries print it as one line and exit with 2."""


def guarded(main: Callable[[], int | None]) -> int:
    """Runs an entry's main: a UserError becomes one line on stderr and exit code 2; `--debug` shows the traceback."""
    try:
        return main() or 0
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
