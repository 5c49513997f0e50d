"""torchrun that hands every option after the script's name to the script.

torch's own torchrun reads each option before and after the script's name as a possible abbreviation
of one of its own. It takes train.py's `--run` for `--run-path` and refuses the command as ambiguous
(pytorch issue 120601; seen with torch 2.14 on Python 3.11). `make` puts this file in the place of
torchrun in .venv. Elsewhere write `python torchrun.py --nproc_per_node=2 train.py --run DIR`, or
put `--` before train.py.
"""

import argparse
import sys

from torch.distributed import run

_parser = run.get_args_parser


def exact_parser() -> argparse.ArgumentParser:
    """torch's own parser, without abbreviations."""
    parser = _parser()
    parser.allow_abbrev = False
    return parser


if __name__ == "__main__":
    run.get_args_parser = exact_parser
    sys.exit(run.main())
