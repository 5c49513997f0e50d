"""The options of a training run: one frozen dataclass, its command line and its files.

`TrainConfig` is the only place with defaults. Adding an option is a field, its line of `HELP`, and
what uses it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import console
from data.histogram import STANDARDISED
from device import PRECISIONS
from losses.adversarial import GAN_KINDS
from models.generator import UPSAMPLING

FREE_ON_RESUME = ("slices", "run", "epochs", "epochs_decay", "max_steps", "device", "precision",
                  "compile", "cuda_graph", "workers", "log_every", "save_minutes", "keep_best")
# ... and what it cannot, whatever is asked for: the weights would not fit.
FIXED_ON_RESUME = ("features", "blocks", "upsample")
# What a checkpoint that knows nothing of an option was trained with.
BEFORE_THERE_WAS = {"start_pairs": 0, "balance": False, "standardise": "none",
                    "standardise_targets": "none", "deform": 0.0,
                    "keep_background": False, "lambda_structure": 0.0}
# `--recipe`: the defaults, and Zhu et al. 2017 to the letter (sec. 4, 5.2 and 7.1; identity weight
# half of the cycle's)
RECIPES: dict[str, dict[str, Any]] = {
    "default": {}, "paper": {"lambda_identity": 5.0, "ema": 0.0, "start_pairs": 0,
                             "balance": False, "standardise": "none",
                             "standardise_targets": "none", "deform": 0.0,
                             "keep_background": False, "lambda_structure": 0.0}}


@dataclass(frozen=True)
class TrainConfig:
    """All options of a run and the only place with their defaults (Zhu et al. 2017, sec. 4, 7.1).

    What differs from the paper, and why (figures: benchmarks/RECIPES.md): background is kept
    (`keep_background`) and so are edges (`lambda_structure`); a first guess leads the first slices
    (`start_pairs`); slices are deformed (`deform`) and drawn so that volumes count alike
    (`balance`); T1w are shown with one histogram (`standardise`), and D and the cycle see both
    contrasts with one (`standardise_targets`); the identity weight is 0.1 (T1w and T2w contrast is
    inverted, and on real heads a weight of 5 taught copying); G and F are averaged for use (`ema`).
    `--recipe paper` undoes it all.
    """

    slices: str = "slices"
    run: str = "runs/default"
    epochs: int = 100
    epochs_decay: int = 100
    steps_per_epoch: int = 0
    max_steps: int = 0
    batch_size: int = 1
    strict_unpaired: bool = False
    balance: bool = True
    standardise: str = "t1w"
    standardise_targets: str = "both"
    flip: bool = True
    deform: float = 1.0
    features: int = 64
    blocks: int = 0
    upsample: str = "transpose"
    keep_background: bool = True
    gan_loss: str = "lsgan"
    lambda_cycle: tuple[float, float] = (10.0, 10.0)
    lambda_identity: float = 0.1
    lambda_structure: float = 1.5
    lambda_start: float = 10.0
    start_pairs: int = 500
    history_size: int = 50
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    ema: float = 0.999
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: str = "auto"
    cuda_graph: bool = True
    workers: int = 1
    log_every: int = 50
    save_minutes: float = 10.0
    keep_best: int = 3


HELP = {
    "data": {
        "slices": "the store that preprocess.py built",
        "batch_size": "slices of each domain a step, in each process",
        "strict_unpaired": "T1w from one half of the training subjects, T2w from the other, so "
                           "that no head is seen in both",
        "balance": "show each volume equally often, however many slices it has",
        "standardise": "contrasts whose volumes the nets are shown with one histogram, the median "
                       "of training (landmarks of Nyul and Udupa 1999), here and wherever the "
                       "checkpoint is used",
        "standardise_targets": "contrasts whose slices have that histogram where D judges them and "
                               "where the cycle is to come back to, whatever they are shown with",
        "flip": "mirror slices left to right at random",
        "deform": "turn, scale, shift and bend slices at random: 1 is up to 10 degrees, 8 %%, 4 %% "
                  "of the side, 3 of 128 pixels; 0 is off",
        "workers": "batches read ahead by threads (0: read when asked)",
    },
    "model": {
        "features": "channels after the first layer of each net",
        "blocks": "residual blocks of a generator (0: 9 above 128 pixels, else 6)",
        "upsample": "transposed convolution then a blur against checkerboards, the convolution "
                    "alone (the paper), or nearest neighbour then convolution",
        "keep_background": "G and F give background where their input has it, and nowhere else",
    },
    "loss": {
        "gan_loss": "least squares, log form of eq. 1, or hinge",
        "lambda_cycle": "weight of the cycle loss of T1w and of T2w (one number serves both)",
        "lambda_identity": "weight of the identity loss",
        "lambda_structure": "weight of the structure loss: edges of a translation that its input "
                            "does not have, or the other way round",
        "lambda_start": "weight of the distance to a first guess, the histogram in reversed order",
        "start_pairs": "slice pairs over which that weight falls to 0 (0: no first guess)",
        "history_size": "generated slices kept for the discriminators, in each process (0: off)",
    },
    "optimiser": {
        "epochs": "epochs at the full learning rate",
        "epochs_decay": "epochs of linear decay to 0 after them",
        "steps_per_epoch": "steps (0: one pass over the training slices)",
        "max_steps": "end after so many steps (0: no limit)",
        "lr": "learning rate of Adam",
        "betas": "of Adam",
        "ema": "share that the averaged G and F keep of themselves a step",
    },
    "run": {
        "run": "folder of checkpoints and logs",
        "seed": "of weights, drawing and history",
        "device": "auto, cpu or cuda",
        "precision": "auto: bf16 where the hardware has it, else fp16 on CUDA, fp32 on CPU",
        "compile": "torch.compile the nets: auto where the run is long enough to gain by it",
        "cuda_graph": "record the update once and replay it, on one GPU in bf16 or fp32",
        "log_every": "steps between two lines of the log",
        "save_minutes": "minutes between two writes of last.pt inside an epoch",
        "keep_best": "checkpoints best_SSIM_EPOCH.pt kept",
    },
}
MOST = 2 ** 31  # of any number: beyond it a mistake, and more than some libraries take
CHOICES = {"gan_loss": GAN_KINDS, "upsample": UPSAMPLING, "precision": PRECISIONS,
           "compile": ("auto", "yes", "no"), "standardise": tuple(STANDARDISED),
           "standardise_targets": tuple(STANDARDISED)}


def parse_args(argv: list[str] | None,
               description: str | None = None) -> tuple[TrainConfig, argparse.Namespace]:
    """Command line, made from the fields of `TrainConfig`; and what is no part of a config.

    Raises
    ------
    ValueError, FileNotFoundError : options that cannot work, or a config file that cannot be used
    """
    parser = console.OneLineParser(description=description, formatter_class=console.Formatter,
                                   allow_abbrev=False)
    defaults = TrainConfig()
    for title, options in HELP.items():
        group = parser.add_argument_group(title)
        for name, text in options.items():
            value, option = getattr(defaults, name), flag(name)
            if isinstance(value, bool):
                group.add_argument(option, action=argparse.BooleanOptionalAction, default=value,
                                   help=text)
            elif isinstance(value, tuple):
                group.add_argument(option, type=float, nargs="+", default=value, help=text)
            else:
                group.add_argument(option, type=type(value), default=value, help=text,
                                   choices=CHOICES.get(name))
    group.add_argument("--recipe", choices=RECIPES, default="default",
                       help="options that belong together: the defaults, or the paper's own (also "
                            "identity weight 5, no averages, no first guess, background and edges "
                            "as they come); --config and the command line stand above it")
    group.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS,
                       help="options from a TOML file, or from a run's config.json; the command "
                            "line stands above it")
    group.add_argument("--resume", nargs="?", const="", metavar="CKPT",
                       help="go on from this checkpoint, or from last.pt, which must be there then "
                            "(without this option: from last.pt if it is there)")
    group.add_argument("--override", action="store_true",
                       help="on resume, take options or subjects that differ from the checkpoint's")
    group.add_argument("--gif", action="store_true",
                       help="train nothing; write progress_t1w.gif and progress_t2w.gif of the run "
                            "as far as it is (each run does so at its end)")
    first = parser.parse_known_args(argv)[0]
    parser.set_defaults(**RECIPES[first.recipe])
    if hasattr(first, "config"):
        parser.set_defaults(**read_config(first.config))
    args = parser.parse_args(argv)
    values = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    values["betas"] = tuple(values["betas"])
    weights = tuple(values["lambda_cycle"])
    values["lambda_cycle"] = weights * 2 if len(weights) == 1 else weights
    config = TrainConfig(**values)
    _check_config(config)
    return config, args


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def read_config(path: Path) -> dict[str, Any]:
    """Options of `TrainConfig` from a file, by their names (`batch_size` or `batch-size`).

    Raises
    ------
    FileNotFoundError, ValueError : no such file, not TOML or JSON, an unknown option or a value of
        another kind than its default
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--config {path}: not a text file") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"--config {path}: no such file") from None
    try:
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of either
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ValueError(f"--config {path}: not {kind} ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: should hold options by name, as in "
                         '{"lr": 0.0001}')
    defaults, values = asdict(TrainConfig()), {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name == "recipe":
            raise ValueError(f"--config {path}: a recipe is named on the command line, with "
                             f"--recipe {value}")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            raise ValueError(f"--config {path}: '{key}' is no option of train.py"
                             + (f"; is {near[0]} meant?" if near else ""))
        values[name] = _as_kind(value, defaults[name], f"--config {path}: {key}")
    return values


def _as_kind(value: Any, default: Any, where: str) -> Any:
    """A value of a config file, refused where it is not of its default's kind."""
    if isinstance(default, tuple):
        found = value if isinstance(value, list) else [value]
        return tuple(_as_kind(item, default[0], where) for item in found)
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
        raise ValueError(f"{where} is {value!r}, should be like {default!r}")
    try:
        return type(default)(value)
    except OverflowError:
        raise ValueError(f"{where} is beyond any number that is of use") from None


def _check_config(c: TrainConfig) -> None:
    """Refuse what would fail later, or never end."""
    for name, allowed in CHOICES.items():  # argparse checks no values of a config file
        if getattr(c, name) not in allowed:
            raise ValueError(f"{flag(name)} {getattr(c, name)!r}: choose from "
                             f"{', '.join(map(str, allowed))}")
    least = {"epochs": 0, "epochs_decay": 0, "steps_per_epoch": 0, "max_steps": 0, "batch_size": 1,
             "features": 1, "blocks": 0, "history_size": 0, "workers": 0, "log_every": 1, "seed": 0,
             "keep_best": 0, "lambda_identity": 0, "lambda_structure": 0, "lambda_start": 0,
             "start_pairs": 0, "deform": 0, "save_minutes": 0}
    for name, low in least.items():
        if not low <= getattr(c, name) < math.inf:
            raise ValueError(f"{flag(name)} {getattr(c, name)}: must be at least {low}")
        if getattr(c, name) > MOST and name != "seed":
            raise ValueError(f"{flag(name)}: must be at most {MOST}")
    if c.seed >= 2 ** 32:
        raise ValueError(f"--seed {c.seed}: must be below {2 ** 32}")
    if c.epochs + c.epochs_decay == 0:
        raise ValueError("--epochs 0 --epochs-decay 0: nothing to train; raise one")
    if len(c.lambda_cycle) != 2 or not all(0 <= weight < math.inf for weight in c.lambda_cycle):
        raise ValueError(f"--lambda-cycle {c.lambda_cycle}: one or two numbers of at least 0")
    if len(c.betas) != 2 or not all(0 <= beta < 1 for beta in c.betas):
        raise ValueError(f"--betas {c.betas}: two numbers from 0 to below 1")
    if not 0 < c.lr < 1 or not 0 <= c.ema < 1:
        raise ValueError(f"--lr {c.lr} --ema {c.ema}: lr lies between 0 and 1, ema from 0 to "
                         "below 1")
    if Path(c.run).exists() and not Path(c.run).is_dir():
        raise ValueError(f"--run {c.run}: is a file; name a folder")


def plain(value: Any) -> Any:
    """Tuples to lists all through, as a weights-only file and JSON want it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
