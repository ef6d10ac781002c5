"""Errors that are the user's to mend: one clear sentence, no traceback."""

import errno
import sys
import traceback
from collections.abc import Callable


class UserError(Exception):
    """What was wrong, where, and what to do; entries print it as one line and exit with 2. `details`: a table to show
    before that line."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


def guarded(main: Callable[[], int | None]) -> int:
    """Runs an entry's main: a UserError becomes one line on stderr and exit code 2; `--debug` shows the traceback."""
    try:
        return main() or 0
    except UserError as error:
        return _told(str(error), error.details)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _told(f"{where}{error.strerror}; free some and give the same command again")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _told(sentence: str, details: str = "") -> int:
    if "--debug" in sys.argv:
        traceback.print_exc()
    if details:
        print(details, file=sys.stderr)
    print(f"error: {sentence}", file=sys.stderr)
    return 2
