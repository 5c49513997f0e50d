"""Translate whole NIfTI volumes with a trained checkpoint, on the input's own grid.

    python translate.py --ckpt runs/default/best.pt sub-01_T1w.nii.gz --out translated/

A T1w becomes a synthetic T2w and the reverse; the direction follows from the name or --direction.
Writes `sub-01_desc-synthetic_T2w.nii.gz` (float32 in [0, 1], 0 outside the brain, affine and header
of the input) and a JSON file beside it that says how it was made.

In Python:

    import nibabel
    from translate import Translator
    translator = Translator("runs/default/best.pt")
    t2w = translator(nibabel.load("sub-01_T1w.nii.gz"), "t1w-to-t2w")   # a nibabel image
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import console
from data import bids, brain
from data.store import write_atomically
from data.volume import (Volume, grid_of, image_like, place, read_volume, resample, restore,
                         slicing_grid, volume_from_image, write_like)
from device import PRECISIONS, autocast, choose_device, choose_precision
from models import checkpoint

log = logging.getLogger("translate")
DIRECTIONS = {"t1w-to-t2w": ("T1w", "T2w"), "t2w-to-t1w": ("T2w", "T1w")}
EXTRACTIONS = ("auto", *brain.METHODS)
NAME, VERSION = "T1w-T2w CycleGAN", "0.1.0"


class Translator:
    """A checkpoint's G and F, applied to volumes.

    Parameters
    ----------
    ckpt : checkpoint file, `best.pt` as a rule
    brain_extraction : "auto" takes the volume as extracted if its signal has the size of a brain,
        else the method of the checkpoint's training data; or one of `data.brain.METHODS`
    brain_ml : smallest and largest brain believed, in millilitres
    device, precision : as on the command line
    batch_size : slices translated at once

    Raises
    ------
    ValueError, FileNotFoundError : as `models.checkpoint.load`
    """

    def __init__(self, ckpt: str | os.PathLike, *, brain_extraction: str = "auto",
                 brain_ml: tuple[float, float] = brain.ADULT_ML, device: str = "auto",
                 precision: str = "auto", batch_size: int = 16) -> None:
        state = checkpoint.load(ckpt)
        self.record: dict[str, Any] = state["preprocessing"]
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        nets = checkpoint.load_generators(state, self.device)
        self.generators: dict[str, torch.nn.Module] = dict(zip(DIRECTIONS, nets))
        self._extraction, self._brain_ml, self._batch_size = brain_extraction, brain_ml, batch_size
        self._extractors: dict[str, brain.Extractor] = {}

    def __call__(self, image: Any, direction: str) -> Any:
        """Translate a nibabel image; the answer is one, on the same grid, float32 in [0, 1]."""
        volume = volume_from_image(image)
        return image_like(volume, self.translate(volume, direction)[0])

    def translate(self, volume: Volume, direction: str) -> tuple[np.ndarray, str]:
        """Translate a volume.

        Parameters
        ----------
        volume : whole head or extracted brain
        direction : "t1w-to-t2w" or "t2w-to-t1w"

        Returns
        -------
        translated : (I, J, K) float32 in [0, 1] on the volume's RAS grid, 0 outside the brain
        method : the brain extraction that was used

        Raises
        ------
        ValueError : no brain is found, or none that is believed; or no such direction
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"direction '{direction}' is unknown; one of {', '.join(DIRECTIONS)}")
        mask, method = self._brain(volume)
        translated = translate_slices(volume, mask, self._net(direction), self.record)
        # an extracted volume has no tissue where it has no signal, holes in its mask included
        inside = mask & brain.signal_mask(volume) if method == "none" else mask
        return np.where(inside, translated, 0).astype(np.float32), method

    def _brain(self, volume: Volume) -> tuple[np.ndarray, str]:
        method = self._extraction
        if method == "auto":
            extracted = brain.looks_extracted(volume, self._brain_ml)
            method = "none" if extracted else self._trained_method()
        if method == "mask":
            found = brain.given_mask(bids.brain_mask_path(bids.subject_of(volume.path)), volume)
        else:
            if method not in self._extractors:
                self._extractors[method] = brain.make_extractor(method, device=str(self.device))
            found = self._extractors[method](volume)
        return brain.judge_mask(found, volume, limits_ml=self._brain_ml)[0], method

    def _trained_method(self) -> str:
        """How the training data's brains were found, for a volume that is not extracted."""
        methods = [m for m in self.record["brain_extraction"] if m != "none"]
        return methods[0] if methods else "hd-bet"

    def _net(self, direction: str) -> Callable[[np.ndarray], np.ndarray]:
        net = self.generators[direction]

        def run(slices: np.ndarray) -> np.ndarray:
            out = []
            for first in range(0, len(slices), self._batch_size):
                batch = torch.from_numpy(slices[first:first + self._batch_size])[:, None]
                with torch.no_grad(), autocast(self.device, self.precision):
                    fake: Tensor = net(batch.to(self.device))
                out.append(fake.float().cpu().numpy()[:, 0])
            return np.concatenate(out)

        return run


def translate_slices(volume: Volume, mask: np.ndarray, net: Callable[[np.ndarray], np.ndarray],
                     record: dict[str, Any]) -> np.ndarray:
    """Cut a volume into slices as in training, translate them, and put them back on its own grid.

    Parameters
    ----------
    volume : the scan
    mask : (I, J, K) bool, its brain
    net : from slices (n, H, W) float32 in [-1, 1] to their translations alike
    record : a checkpoint's preprocessing record (`size`, `spacing_mm`, `intensity`)

    Returns
    -------
    translated : (I, J, K) float32 in [0, 1], meaningful inside the mask only
    """
    grid = slicing_grid(volume, record["spacing_mm"])
    on_grid = resample(mask, volume.affine, grid, nearest=True)
    slices, placement = place(resample(volume.data, volume.affine, grid), on_grid, grid,
                              record["size"], path=volume.path)
    if placement.cut_share > 0.005:
        log.warning("warning: %s: %.1f %% of the brain lies outside the frame of %d pixels and is "
                    "filled with its rim", volume.path, 100 * placement.cut_share, record["size"])
    full = np.flatnonzero(on_grid.any(axis=(0, 1)))
    translated = np.full_like(slices, -1)
    translated[full] = net(slices[full])
    return restore(translated, on_grid, placement, grid_of(volume))


# ------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of `translate.py`."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter,
                              allow_abbrev=False)
    p.add_argument("inputs", nargs="+", type=Path, metavar="NIFTI", help="volumes to translate")
    p.add_argument("--ckpt", type=Path, required=True, default=argparse.SUPPRESS,
                   help="checkpoint, best.pt as a rule")
    p.add_argument("--out", type=Path, default=Path("translated"), help="folder to write into")
    p.add_argument("--direction", choices=("auto", *DIRECTIONS), default="auto",
                   help="auto: from the names, which end in _T1w or _T2w")
    p.add_argument("--brain-extraction", choices=EXTRACTIONS, default="auto",
                   help="auto: none for an extracted volume, else as the training data")
    p.add_argument("--brain-ml", type=float, nargs=2, default=brain.ADULT_ML,
                   metavar=("MIN", "MAX"), help="brain volumes believed, in millilitres (adults)")
    p.add_argument("--batch-size", type=int, default=16, help="slices translated at once")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:K")
    p.add_argument("--precision", choices=PRECISIONS, default="auto", help="arithmetic of the nets")
    args = p.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; name a folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse_args(argv)
    plan = plan_outputs(args.inputs, args.out, args.direction)
    translator = Translator(args.ckpt, brain_extraction=args.brain_extraction,
                            brain_ml=tuple(args.brain_ml), device=args.device,
                            precision=args.precision, batch_size=args.batch_size)
    hashed = checkpoint.fingerprint(args.ckpt)
    args.out.mkdir(parents=True, exist_ok=True)
    _describe_dataset(args.out)
    for source, direction, target in tqdm(plan, unit="volume", desc="translate", disable=None):
        volume = read_volume(source)
        translated, method = translator.translate(volume, direction)
        sidecar = {
            "Description": f"{DIRECTIONS[direction][1]} translated from "
                           f"{DIRECTIONS[direction][0]}; synthetic, not for diagnosis",
            "Sources": [source.name], "SkullStripped": True, "Direction": direction,
            "BrainExtraction": method, "Checkpoint": args.ckpt.name, "CheckpointSHA256": hashed,
            "Precision": str(translator.precision).removeprefix("torch."),
            "Preprocessing": {k: translator.record[k] for k in ("size", "spacing_mm", "intensity")},
        }
        write_like(volume, translated, target)
        write_atomically(target.with_name(_stem(target) + ".json"),
                         (json.dumps(sidecar, indent=1) + "\n").encode())
        log.info("%s -> %s", source, target)
    return console.DONE


def plan_outputs(inputs: list[Path], out: Path, direction: str) -> list[tuple[Path, str, Path]]:
    """Input, direction and output of each file; refuses now what could not work later."""
    plan = []
    for source in inputs:
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such file; check the name")
        if not re.search(r"\.nii(\.gz)?$", source.name):
            raise ValueError(f"{source}: not a .nii or .nii.gz file")
        way = direction if direction != "auto" else _direction_of(source)
        stem = re.sub(r"_?T[12]w$", "", _stem(source))
        target = out / f"{stem}{'_' if stem else ''}desc-synthetic_{DIRECTIONS[way][1]}.nii.gz"
        plan.append((source, way, target))
    targets = [target for _, _, target in plan]
    for source, _, target in plan:
        if targets.count(target) > 1:
            raise ValueError(f"{source}: another input would be written to {target}, too; "
                             "translate them into different --out folders")
    return plan


def _direction_of(source: Path) -> str:
    for direction, (start, _) in DIRECTIONS.items():
        if _stem(source).endswith(start):
            return direction
    raise ValueError(f"{source}: the name does not end in _T1w or _T2w; say which it is with "
                     "--direction")


def _stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def _describe_dataset(out: Path) -> None:
    """BIDS asks a folder of derivatives to say what made them."""
    path = out / "dataset_description.json"
    if not path.exists():
        text = {"Name": "Synthetic T1w and T2w volumes", "BIDSVersion": "1.8.0",
                "DatasetType": "derivative", "GeneratedBy": [{"Name": NAME, "Version": VERSION}]}
        write_atomically(path, (json.dumps(text, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(console.run(main))
