"""Translate whole NIfTI volumes with a trained checkpoint, on the input's own grid.

    python translate.py --ckpt runs/default/best.pt sub-01_T1w.nii.gz --out translated/
    python translate.py --ckpt runs/default/best.pt --bids DIR --direction t1w-to-t2w
    python translate.py --ckpt runs/default/best.pt --export onnx --out exported/

A T1w becomes a synthetic T2w and the reverse; the direction follows from the name or --direction.
Writes `sub-01_desc-synthetic_T2w.nii.gz` (float32 in [0, 1] or as --match has it, 0 outside the
brain, affine and header of the input) and a JSON file beside it that says how it was made. Of
several volumes, those that cannot be translated are named and left out (exit code 3). The same
command again goes on where it was stopped.

In Python: see `translate_volume`.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":  # imports make a million objects and no garbage: 0.5 s of 2.7
    gc.disable()  # until torch is there

import argparse
import logging
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import console
from data import brain, derivatives
from data.derivatives import read_record, sidecar, write_record
from data.histogram import MOST_SLICES
from data.subject import sha256
from data.nifti import Volume, image_like, read_volume, volume_from_image, write_like
from data.volume import IntensityScale
from translation_jobs import (CYCLE, SCATTER, STARTED, SYNTHETIC, Job, direction_of,
                              given_mask_sha256, plan_files, plan_tree)
from translator import (DIRECTIONS, EXTRACTIONS, PRECISIONS, Brain, NoExtractor, Translation,
                        Translator, Wanted, extracted_brain)

log = logging.getLogger("translate")
NAME, VERSION = "T1w-T2w CycleGAN", "0.1.0"
ENSEMBLE = 6  # looks of --ensemble: mirrored and not, each at the three places between slices
FORMATS = ("onnx", "torchscript", "torch-export")  # of `models.export`, which imports torch


def translate_volume(image: Any, ckpt: Any, direction: str = "auto", *, wanted: Wanted = Wanted(),
                     match: Any = None, **options: Any) -> Any:
    """Translate a nibabel image.

        import nibabel
        from translate import translate_volume

        t1w = nibabel.load("sub-01_T1w.nii.gz")
        t2w = translate_volume(t1w, "runs/default/best.pt")
        t2w.get_fdata()                      # (I, J, K), in [0, 1], 0 outside the brain
        t2w.to_filename("sub-01_desc-synthetic_T2w.nii.gz")

    For many volumes make a `Translator` once and give it in place of the checkpoint; for maps of
    uncertainty and cycle error see `Translator.translate`. What `--help` calls a warning is logged.

    Parameters
    ----------
    image : nibabel NIfTI image, one 3-D volume: a whole head or an extracted brain, any orientation
    ckpt : checkpoint file, or a `Translator`
    direction : "t1w-to-t2w", "t2w-to-t1w", or "auto": by the name of the file that the image came
        from, which then ends in _T1w or _T2w
    wanted : looks to average over, force, ...
    match : nibabel image of the target contrast whose intensities are taken; None for [0, 1]
    options : of `Translator`: brain_extraction, brain_ml, device, precision, batch_size

    Returns
    -------
    nibabel image on the same grid with the same affine and header, float32

    Raises
    ------
    ValueError : no brain is found, the volume is of the other contrast, ...; says what and why
    """
    if isinstance(ckpt, Translator) and options:
        raise ValueError(f"{', '.join(options)}: give this to the Translator")
    translator = ckpt if isinstance(ckpt, Translator) else Translator(ckpt, **options)
    volume = _volume_of(image, "the image")
    path = volume.path
    if direction == "auto":
        direction = direction_of(path)
    found = translator.translate(volume, direction, wanted)
    for warning in found.warnings:
        log.warning("warning: %s: %s", path, warning)
    if match is None:
        return image_like(volume, found.data)
    reference = _volume_of(match, "the reference")
    scale = translator.scale_of(reference, DIRECTIONS[direction][1], force=wanted.force)
    return image_like(volume, matched(found.data, found.inside, scale))


def _volume_of(image: Any, nameless: str) -> Volume:
    """Of a nibabel image, or of a file by its name."""
    if isinstance(image, (str, os.PathLike)):
        return read_volume(image)
    if not (hasattr(image, "get_filename") and hasattr(image, "header")):
        raise ValueError(f"a {type(image).__name__} is no nibabel image; nibabel.load gives one")
    return volume_from_image(image, image.get_filename() or nameless)


def matched(data: np.ndarray, inside: np.ndarray, scale: IntensityScale) -> np.ndarray:
    """[0, 1] in a reference's units: its own scale undone, so 0 and 1 become what it had there.

    Linear: a monotone curve of histograms would fit better, and would move contrasts of its own.
    """
    return np.where(inside, data * (scale.high - scale.low) + scale.low, 0).astype(np.float32)


# ------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of `translate.py`."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter,
                              allow_abbrev=False)
    p.add_argument("--ckpt", type=Path, required=True, default=argparse.SUPPRESS,
                   help="checkpoint, best.pt as a rule")
    p.add_argument("--out", type=Path, default=Path("translated"), help="folder to write into")
    p.add_argument("--overwrite", action="store_true",
                   help="write over what another checkpoint, other options or another program "
                        "made there; an input is never written over")
    p.add_argument("--export", choices=FORMATS,
                   help="write the nets for other programs instead of translating")
    g = p.add_argument_group("volumes")
    g.add_argument("inputs", nargs="*", type=Path, metavar="NIFTI", help="volumes to translate")
    g.add_argument("--bids", type=Path, metavar="DIR",
                   help="all T1w or all T2w of a BIDS tree, as --direction says; --out becomes a "
                        "tree alike")
    g.add_argument("--direction", choices=("auto", *DIRECTIONS), default="auto",
                   help="auto: from the names, which end in _T1w or _T2w")
    g.add_argument("--brain-extraction", choices=EXTRACTIONS, default="auto",
                   help="auto: none for an extracted volume, else as the training data")
    g.add_argument("--brain-ml", type=float, nargs=2, default=brain.ADULT_ML,
                   metavar=("MIN", "MAX"), help="brain volumes believed, in millilitres (adults)")
    g.add_argument("--force", action="store_true",
                   help="translate what looks like the other contrast, too")
    g = p.add_argument_group("results")
    g.add_argument("--match", type=Path, metavar="FILE",
                   help="a real volume of the target contrast whose intensities are taken: the "
                        "percentiles of its brain in place of 0 and 1")
    g.add_argument("--ensemble", action="store_true",
                   help=f"mean over {ENSEMBLE} mirrored and shifted looks: fewer seams between "
                        f"slices, {ENSEMBLE} times as long")
    g.add_argument("--uncertainty", type=int, default=0, metavar="N",
                   help="also write the voxels' standard deviation over N such looks (0: no)")
    g.add_argument("--cycle-error", action="store_true",
                   help="also translate back and write the distance to the input, in [0, 1]")
    g = p.add_argument_group("run")
    g.add_argument("--batch-size", type=int, default=4, help="slices translated at once")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:K")
    g.add_argument("--precision", choices=PRECISIONS, default="auto", help="arithmetic of the nets")
    args = p.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, alone or together."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    if not 0 < args.brain_ml[0] < args.brain_ml[1] < math.inf:
        raise ValueError(f"--brain-ml {' '.join(map(str, args.brain_ml))}: smallest, then largest "
                         "volume in millilitres")
    if args.uncertainty < 0 or args.uncertainty == 1:
        raise ValueError(f"--uncertainty {args.uncertainty}: a scatter needs at least 2 looks")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; name a folder")
    ways = [bool(args.inputs), args.bids is not None, args.export is not None]
    if sum(ways) != 1:
        raise ValueError("name volumes, or --bids DIR, or --export FORMAT; one of the three")
    if args.bids and args.direction == "auto":
        raise ValueError("--bids: say with --direction whether all T1w (t1w-to-t2w) or all T2w "
                         "(t2w-to-t1w) are to be translated")
    if args.bids and args.out.resolve() == args.bids.resolve():
        raise ValueError(f"--out {args.out}: is the tree itself; name another folder")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse_args(argv)
    if args.export:
        return export_nets(args)
    if args.bids:
        suffix = DIRECTIONS[args.direction][0]
        jobs = plan_tree(args.bids, derivatives.find_scans(args.bids, suffix), args)
    else:
        jobs = plan_files(args.inputs, args)
    described = describe(args)
    waiting = [job for job in jobs if not job.is_done(described, args.overwrite)]
    if len(waiting) < len(jobs):
        log.info("%d of %d volumes are there already", len(jobs) - len(waiting), len(jobs))
    if not waiting:
        return console.DONE
    with ThreadPoolExecutor(1) as beside:  # one core reads while the other imports torch
        reading = [beside.submit(open_scan, waiting[0].source, args)]
        translator = Translator(args.ckpt, brain_extraction=args.brain_extraction,
                                brain_ml=tuple(args.brain_ml), device=args.device,
                                precision=args.precision, batch_size=args.batch_size)
    if not gc.isenabled():  # see the top of this file
        gc.freeze()
        gc.enable()
    scale = match_scale(translator, waiting, args)
    args.out.mkdir(parents=True, exist_ok=True)
    derivatives.describe_dataset(args.out, name="Synthetic T1w and T2w volumes", source=args.bids,
                                 generator={"Name": NAME, "Version": VERSION})
    left_out: list[Exception] = []
    with logging_redirect_tqdm():
        for job in tqdm(waiting, unit="volume", desc="translate", disable=None):
            try:
                translate_job(
                    job, reading.pop().result() if reading else open_scan(job.source, args),
                    translator, wanted_of(args), scale, described)
            except (ValueError, FileNotFoundError) as error:
                no_net = isinstance(error, NoExtractor)
                # of "auto" alone there may be extracted volumes to come, which need no net
                if len(jobs) == 1 or no_net and args.brain_extraction != "auto":
                    raise
                left_out.append(error)
                text = f"{job.source}: {error}" if no_net else str(error)
                log.warning("warning: left out: %s", " ".join(text.split()))
    if left_out:
        if len(left_out) == len(jobs) and all(isinstance(e, NoExtractor) for e in left_out):
            raise left_out[0]
        log.warning("%d of %d volumes were left out", len(left_out), len(jobs))
    return console.LEFT_OUT if left_out else console.DONE


def open_scan(path: Path, args: argparse.Namespace) -> tuple[Volume, Brain | None]:
    """Read a volume and find its brain, as far as that takes no net."""
    volume = read_volume(path)
    return volume, extracted_brain(volume, args.brain_extraction, tuple(args.brain_ml))


def export_nets(args: argparse.Namespace) -> int:
    """Write the nets of the directions asked for, each with a JSON file on what it takes."""
    from models import checkpoint, export

    state = checkpoint.load(args.ckpt)
    with checkpoint.said_of(args.ckpt):
        nets = dict(zip(DIRECTIONS, checkpoint.load_generators(state)))
    record = state["preprocessing"]
    if args.export == "onnx":
        export.require_onnx()
    args.out.mkdir(parents=True, exist_ok=True)
    directions = DIRECTIONS if args.direction == "auto" else (args.direction,)
    paths = {d: args.out / f"{d}{export.ENDINGS[args.export]}" for d in directions}
    fingerprint = sha256(args.ckpt)
    for path in paths.values():
        refuse_other_net(path, fingerprint, args.overwrite)
    for direction, path in tqdm(paths.items(), unit="net", desc="export", disable=None):
        record_of_net(path).unlink(missing_ok=True)  # it is a net's word: that of before goes first
        export.export(nets[direction], record["size"], args.export, path)
        source, target = DIRECTIONS[direction]
        write_record(record_of_net(path), {
            "Description": f"{source} slices to synthetic {target} slices; not for diagnosis",
            "Format": args.export, "Input": export.INPUT, "Output": export.OUTPUT,
            "Shape": ["N", 1, record["size"], record["size"]], "DType": "float32",
            "Range": [-1, 1], "Background": -1, "SliceLayout": record.get("layout", ""),
            "Preprocessing": preprocessing_of(record),
            **histogram_of(record, source.lower()),
            "Checkpoint": args.ckpt.name, "CheckpointSHA256": fingerprint})
        log.info("%s -> %s", args.ckpt, path)
    return console.DONE


def record_of_net(path: Path) -> Path:
    """The JSON file of an exported net; each format has a record of its own."""
    return path.with_name(path.name + ".json")


def refuse_other_net(path: Path, fingerprint: str, overwrite: bool) -> None:
    """Refuse to write over a net of another checkpoint, or of another program."""
    made = read_record(record_of_net(path)).get("CheckpointSHA256")
    if path.exists() and made != fingerprint and not overwrite:
        raise ValueError(f"{path}: is there already, and not of this checkpoint; take another "
                         "--out, or --overwrite")


def wanted_of(args: argparse.Namespace) -> Wanted:
    """What the options ask of each translation."""
    looks = max(ENSEMBLE, args.uncertainty) if args.ensemble else 1
    return Wanted(looks, args.uncertainty, args.cycle_error, args.force)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The part of the records that is the same for all volumes of a run."""
    settings = {"BrainExtraction": args.brain_extraction, "BrainMl": list(args.brain_ml),
                "Precision": args.precision, **asdict(wanted_of(args)),
                "Match": args.match.name if args.match else None,
                "MatchSHA256": sha256(_existing(args.match, "file")) if args.match else None}
    return {"Checkpoint": args.ckpt.name, "Settings": settings,
            "CheckpointSHA256": sha256(_existing(args.ckpt, "checkpoint"))}


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {what}; check the name")
    return path


def match_scale(translator: Translator, jobs: list[Job],
                args: argparse.Namespace) -> IntensityScale | None:
    """The intensities that --match names, None without it."""
    if not args.match:
        return None
    return translator.scale_of(read_volume(args.match), DIRECTIONS[jobs[0].direction][1],
                               force=args.force)


def preprocessing_of(record: dict[str, Any]) -> dict[str, Any]:
    """What of a checkpoint's preprocessing decides how a volume is cut."""
    return {key: record[key] for key in ("size", "spacing_mm", "intensity")}


def histogram_of(record: dict[str, Any], contrast: str) -> dict[str, Any]:
    """What histogram a net wants slices of a contrast to have; {} where any will do."""
    found = record.get("standard", {})
    if contrast not in found:
        return {}
    return {"HistogramStandard": {
        "Percentiles": found["percentiles"], "Landmarks": found[contrast],
        "MinBrainArea": record["min_brain_area"], "Slices": MOST_SLICES,
        "Description": "before the net: -1, the volume's Percentiles inside the brain, and 1 are "
                       "moved to Landmarks, linearly in between; background stays -1. Percentiles "
                       "are taken from at most so many Slices at equal steps, of those with at "
                       "least MinBrainArea of the largest slice's brain"}}


def translate_job(job: Job, scan: tuple[Volume, Brain | None], translator: Translator,
                  wanted: Wanted, scale: IntensityScale | None, described: dict[str, Any]) -> None:
    """Translate one volume and write its files, the record last."""
    volume, known = scan
    found = translator.translate(volume, job.direction, wanted, found=known)
    for warning in found.warnings:
        log.warning("warning: %s: %s", job.source, warning)
    data, scatter = found.data, found.uncertainty
    if scale:
        data = matched(data, found.inside, scale)
        scatter = None if scatter is None else scatter * np.float32(scale.high - scale.low)
    start, end = DIRECTIONS[job.direction]
    parts = {SCATTER: (scatter, f"standard deviation of the synthetic {end} over "
                                f"{wanted.uncertainty} mirrored and shifted looks of the net"),
             CYCLE: (found.cycle_error, f"distance of the {start} from its translation to {end} "
                                        "and back, in [0, 1]"),
             SYNTHETIC: (data, f"{end} translated from {start}; synthetic, not for diagnosis")}
    for path in job.left_over():  # maps of another translation, --overwrite says
        path.unlink(missing_ok=True)
        sidecar(path).unlink(missing_ok=True)
    for path in job.outputs.values():  # a record is the files' word: that of before goes first
        derivatives.remove_parts(path)
        derivatives.remove_parts(sidecar(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(sidecar(path), STARTED)
    common = record_of(job, translator, found, described)
    for what, (values, _) in parts.items():
        if what in job.outputs:
            assert values is not None
            write_like(volume, values, job.outputs[what])
    for what, (_, text) in parts.items():
        if what in job.outputs:
            write_record(sidecar(job.outputs[what]),
                         {"Description": text, "Intensities": units_of(what, described, scale),
                          **common})
    log.info("%s -> %s", job.source, job.outputs[SYNTHETIC])


def units_of(what: str, described: dict[str, Any], scale: IntensityScale | None) -> str:
    """What the values of a file are in; a cycle's error is of what the nets are shown."""
    if scale is None or what == CYCLE:
        return "relative, 0 to 1"
    there = described["Settings"]["Match"]
    if what == SCATTER:
        return f"as {there}: 1 is {scale.high - scale.low:g}"
    return f"as {there}: 0 to 1 is {scale.low:g} to {scale.high:g}"


def record_of(job: Job, translator: Translator, found: Translation,
              described: dict[str, Any]) -> dict[str, Any]:
    """What is said of how a volume was made, in the records of all its files."""
    mask = {"BrainMaskSHA256": given_mask_sha256(job.source)} if found.method == "mask" else {}
    return {"Sources": [job.name], "SourceSHA256": sha256(job.source), "SkullStripped": True,
            "Direction": job.direction, "BrainExtraction": found.method, **mask,
            "Precision": str(translator.precision).removeprefix("torch."),
            "Preprocessing": preprocessing_of(translator.record), **described,
            "Warnings": found.warnings}


if __name__ == "__main__":
    sys.exit(console.run(main))
