"""Run a command in this process as a terminal would: exit code and what it printed."""

import contextlib
import io
import logging
import signal
from dataclasses import dataclass

import torch

import console

TINY = ["--features", "4", "--blocks", "1", "--device", "cpu", "--precision", "fp32",
        "--workers", "0"]  # nets that a test can afford, and arithmetic that it can compare


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def complaint(self):
        """The one line that a refused command prints; fails where there is more, or a traceback."""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


def run_command(main, *args):
    """Call a script's `main` through `console.run`, as its last line does."""
    out, err = io.StringIO(), io.StringIO()
    terminated = signal.getsignal(signal.SIGTERM)
    handlers, level = logging.root.handlers[:], logging.root.level
    nibabels = logging.getLogger("nibabel.global")
    its_level = nibabels.level
    trying_out = torch.backends.cudnn.benchmark  # a training turns it on, for its process
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = console.run(lambda _: main([str(a) for a in args]))
            except SystemExit as leaving:
                code = leaving.code
    finally:
        signal.signal(signal.SIGTERM, terminated)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        nibabels.setLevel(its_level)
        torch.backends.cudnn.benchmark = trying_out
    return Outcome(code, out.getvalue(), err.getvalue())
