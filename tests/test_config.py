"""The options of a training run: each offered, with the paper's defaults, from line and file."""

import json
from dataclasses import fields

import pytest

from config import HELP, TrainConfig, parse_args, plain, read_config


def test_every_field_of_the_config_is_an_option_with_help():
    offered = [name for options in HELP.values() for name in options]
    assert sorted(offered) == sorted(f.name for f in fields(TrainConfig))
    assert parse_args([])[0] == TrainConfig()
    assert parse_args(["--lambda-cycle", "3"])[0].lambda_cycle == (3.0, 3.0)
    assert parse_args(["--lambda-cycle", "3", "4"])[0].lambda_cycle == (3.0, 4.0)


def test_the_defaults_are_the_papers_but_for_what_is_said():
    c = TrainConfig()
    assert (c.gan_loss, c.lambda_cycle, c.history_size, c.lr, c.betas, c.batch_size) == (
        "lsgan", (10.0, 10.0), 50, 2e-4, (0.5, 0.999), 1)
    assert (c.epochs, c.epochs_decay, c.features, c.upsample) == (100, 100, 64, "transpose")
    assert (c.lambda_identity, c.ema, c.start_pairs, c.lambda_start) == (0.1, 0.999, 500, 10.0)
    assert c.keep_background and c.balance and c.standardise == "t1w"
    assert c.standardise_targets == "both"
    assert (c.lambda_structure, c.deform) == (1.5, 1.0)


def test_the_papers_recipe_undoes_what_differs_and_stands_below_file_and_line(tmp_path):
    paper = parse_args(["--recipe", "paper"])[0]
    assert (paper.lambda_identity, paper.ema, paper.start_pairs) == (5.0, 0.0, 0)
    assert not (paper.keep_background or paper.deform or paper.lambda_structure or paper.balance)
    assert paper.standardise == paper.standardise_targets == "none"
    path = tmp_path / "c.toml"
    path.write_text("ema = 0.9\nlambda_identity = 2\n")
    mixed = parse_args(["--recipe", "paper", "--config", str(path), "--lambda-identity", "1"])[0]
    assert (mixed.lambda_identity, mixed.ema, mixed.start_pairs) == (1.0, 0.9, 0)
    assert parse_args(["--recipe", "default"])[0] == TrainConfig()


def test_a_file_gives_tuples_numbers_and_dashes_as_the_options_want_them(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("lambda-cycle = [5, 7]\nlr = 1\nmax_steps = 3\n")
    found = read_config(path)
    assert found == {"lambda_cycle": (5.0, 7.0), "lr": 1.0, "max_steps": 3}
    assert type(found["lr"]) is float and type(found["max_steps"]) is int


@pytest.mark.parametrize("line", ['compile = "never"', 'precision = "fp23"', 'gan_loss = "lsgn"',
                                  'upsample = "cubic"'])
def test_a_file_is_held_to_the_words_that_the_line_is_held_to(tmp_path, line):
    path = tmp_path / "c.toml"
    path.write_text(line)
    option = "--" + line.split(" ")[0].replace("_", "-")
    with pytest.raises(ValueError, match=f"{option} '.*': choose from"):
        parse_args(["--config", str(path)])


def test_a_runs_own_config_repeats_it(tmp_path):
    config = parse_args(["--lr", "1e-4", "--lambda-cycle", "3", "4", "--no-flip"])[0]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plain(vars(config))))
    assert parse_args(["--config", str(path)])[0] == config


def test_an_option_is_not_guessed_from_its_beginning(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse_args(["--epoch", "3"])
    assert leaving.value.code == 2 and "--epoch" in capsys.readouterr().err
