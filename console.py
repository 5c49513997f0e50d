"""What the commands share on a terminal: exit codes, one-line errors, plain logging.

Exit codes: 0 done; 2 the user's input is wrong; 3 preprocessing left subjects out; 1 anything else.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable

DONE, FAILED, WRONG_INPUT, LEFT_OUT = 0, 1, 2, 3
_CURES: dict[type[OSError], str] = {
    PermissionError: "give yourself the right to, or name another place",
    FileExistsError: "move away what is there, or name another place",
    NotADirectoryError: "a file is where a folder should be: name another place",
    IsADirectoryError: "a folder is where a file should be: move it away, or name another place"}
_THEIRS = (errno.ENAMETOOLONG, errno.EROFS)  # as wrong a place as those above
_MAKE_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no mistake, but for the user to mend


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error here."""

    def error(self, message: str):
        """Print `error: ...` and exit with 2."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(WRONG_INPUT)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show each option's default, except where it has none, and the description as it is."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        if isinstance(action.default, (tuple, list)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def run(main: Callable[[list[str] | None], int]) -> int:
    """Call a command's `main`, turn what it raises into one line on stderr and an exit code.

    ValueError, FileNotFoundError and places that cannot be used are the user's input (2), other
    operating system errors such as a full disk and interruptions are 1. Anything else is a fault of
    ours and keeps its traceback.
    """
    # nibabel says what is wrong with a header without the file's name; data/nifti.py says it with
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    for command in ("preprocess", "train", "evaluate", "translate"):  # not every library's chatter
        logging.getLogger(command).setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _interrupt)
    if os.environ.get("TRACEBACK"):  # for developers
        return main(None)
    logging.raiseExceptions = False  # a reader that left (`| head`) stops no work
    try:
        return main(None)
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        print(f"error: {_text(error)}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:
        return FAILED
    except OSError as error:
        print(f"error: {_text(error)}", file=sys.stderr)
        theirs = isinstance(error, tuple(_CURES)) or error.errno in _THEIRS
        return WRONG_INPUT if theirs and error.filename else FAILED
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return FAILED
    finally:
        _flush()


def _text(error: Exception) -> str:
    """One line: of the system's own errors what is wrong where, and what helps."""
    cure = next((text for kind, text in _CURES.items() if isinstance(error, kind)), "")
    if isinstance(error, OSError) and error.errno in _MAKE_ROOM:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror}; make room there, then run the same command again"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error.strerror}: {os.fsdecode(error.filename or '')[:60]}...; take a shorter one"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{os.fsdecode(error.filename or '')}: {error.strerror}; name another place"
    if cure and isinstance(error, OSError) and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}; {cure}"
    return " ".join(str(error).split())


def _flush() -> None:
    """Write out what is printed; where nobody reads it, keep Python from saying so at its exit."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
