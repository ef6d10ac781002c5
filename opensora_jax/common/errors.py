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


# Called with exit code, sentence and traceback when an entry fails: how a run on several processes tells its peers.
at_failure: list[Callable[[int, str, str], None]] = []


def guarded(main: Callable[[], int | None]) -> int:
    """Runs an entry's main: a UserError becomes one line on stderr and exit code 2; `--debug` shows the traceback."""
    try:
        return main() or 0
    except UserError as error:
        return _told(str(error), error.details)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _fail(130, "interrupted")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f"{error.filename}: " if error.filename else ""
            return _told(f"{where}{error.strerror}; free some and give the same command again")
        first = str(error).strip().partition("\n")[0]
        _fail(1, f"{type(error).__name__}: {first[:300]}", traceback.format_exc())
        raise


def _told(sentence: str, details: str = "") -> int:
    if "--debug" in sys.argv:
        traceback.print_exc()
    if details:
        print(details, file=sys.stderr)
    print(f"error: {sentence}", file=sys.stderr)
    return _fail(2, sentence)


def _fail(code: int, sentence: str, details: str = "") -> int:
    for call in at_failure:
        call(code, sentence, details)
    return code
