"""What every command shows on a terminal: one line for a mistake, the exit code, readable help."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_command

import console

ROOT = Path(__file__).parents[1]


def raising(error):
    def main(argv):
        raise error
    return main


@pytest.mark.parametrize("error, code", [
    (ValueError("x.nii: no\n  good"), 2), (FileNotFoundError("x.nii: no good"), 2),
    (IsADirectoryError("x.nii: no good"), 2), (OSError(28, "x.nii: no good"), 1),
    (PermissionError("x.nii: no good"), 1), (PermissionError(13, "no good", "x.nii"), 2),
    (FileExistsError(17, "no good", "x.nii"), 2), (NotADirectoryError(20, "no good", "x.nii"), 2),
])
def test_a_mistake_of_the_users_is_two_a_fault_of_the_machine_one_and_both_one_line(error, code):
    result = run_command(raising(error))
    assert result.code == code and "x.nii: no good" in result.complaint
    assert result.out == ""


def test_an_interruption_is_one_and_says_how_to_go_on():
    result = run_command(raising(KeyboardInterrupt()))
    assert (result.code, result.err) == (1, "stopped; the same command goes on from here\n")


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_command(raising(KeyError("bug")))


def test_the_commands_own_code_is_passed_on():
    assert [run_command(lambda argv, n=n: n).code for n in (0, 2, 3)] == [0, 2, 3]


def test_help_shows_units_and_defaults_and_no_default_where_there_is_none(capsys):
    parser = console.OneLineParser("prog", description="Lines\n    as they are",
                                   formatter_class=console.Formatter)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--limits", nargs=2, default=(800.0, 2000.0), help="in ml")
    parser.add_argument("--out", help="a folder")
    parser.add_argument("--fast", action="store_true", help="skip it")
    parser.add_argument("--hidden", default=argparse.SUPPRESS, help="nothing said")
    text = parser.format_help()
    assert "Lines\n    as they are" in text
    assert "pixels (default: 128)" in text and "in ml (default: 800.0 2000.0)" in text
    assert text.count("default:") == 2
    with pytest.raises(SystemExit) as leaving:
        parser.parse_args(["--size", "big"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == \
        "error: argument --size: invalid int value: 'big'; see prog --help\n"


@pytest.mark.parametrize("script", ["preprocess", "train", "evaluate", "translate"])
def test_each_commands_help_can_be_shown(script, capsys):
    module = __import__(script)
    with pytest.raises(SystemExit) as leaving:
        module.main(["--help"])
    assert leaving.value.code == 0 and "default" in capsys.readouterr().out


def test_a_reader_that_leaves_stops_no_work_and_causes_no_traceback(tmp_path):
    program = ("import logging, sys, console\n"
               "def main(argv):\n"
               "    for n in range(20000): logging.getLogger('train').info('line %d', n)\n"
               "    open(sys.argv[1], 'w').write('to the end')\n"
               "    return 0\n"
               "sys.exit(console.run(main))\n")
    for reader in ("head -1", "true"):
        marker = tmp_path / reader
        done = subprocess.run(f'"{sys.executable}" -c "{program}" "{marker}" | {reader}',
                              shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stderr == "" and marker.read_text() == "to the end"


@pytest.mark.parametrize("number, code, said", [
    (errno.ENOSPC, 1, "/there: No space left on device; make room there"),
    (errno.EROFS, 2, "/there: Read-only file system; name another place"),
    (errno.ENAMETOOLONG, 2, "File name too long: /there"),
])
def test_what_a_disk_refuses_is_said_with_its_cure(number, code, said):
    outcome = run_command(raising(OSError(number, os.strerror(number), "/there")))
    assert outcome.code == code and said in outcome.complaint
