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
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import console
from data import brain, derivatives
from data.derivatives import ENDING, derived_name, read_record, sidecar, stem, write_record
from data.subject import sha256
from data.volume import (IntensityScale, Volume, image_like, read_volume, volume_from_image,
                         write_like)
from translator import (DIRECTIONS, EXTRACTIONS, PRECISIONS, Brain, NoExtractor, Translation,
                        Translator, Wanted, extracted_brain)

log = logging.getLogger("translate")
NAME, VERSION = "T1w-T2w CycleGAN", "0.1.0"
ENSEMBLE = 6  # looks of --ensemble: mirrored and not, each at the three places between slices
FORMATS = ("onnx", "torchscript", "torch-export")  # of `models.export`, which imports torch
SYNTHETIC, SCATTER, CYCLE = "synthetic", "syntheticSD", "cycleError"
STARTED = {"Description": "unfinished: translate.py writes this volume, or was stopped in doing so"}


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
    path = image.get_filename() or "the image"
    if direction == "auto":
        direction = direction_of(Path(path))
    volume = volume_from_image(image, path)
    found = translator.translate(volume, direction, wanted)
    for warning in found.warnings:
        log.warning("warning: %s: %s", path, warning)
    if match is None:
        return image_like(volume, found.data)
    reference = volume_from_image(match, match.get_filename() or "the reference")
    scale = translator.scale_of(reference, DIRECTIONS[direction][1], force=wanted.force)
    return image_like(volume, matched(found.data, found.inside, scale))


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
    record, nets = state["preprocessing"], dict(zip(DIRECTIONS, checkpoint.load_generators(state)))
    if args.export == "onnx":
        export.require_onnx()
    args.out.mkdir(parents=True, exist_ok=True)
    directions = DIRECTIONS if args.direction == "auto" else (args.direction,)
    for direction in tqdm(directions, unit="net", desc="export", disable=None):
        path = args.out / f"{direction}{export.ENDINGS[args.export]}"
        export.export(nets[direction], record["size"], args.export, path)
        source, target = DIRECTIONS[direction]
        write_record(path.with_name(path.name + ".json"), {  # each format has a record of its own
            "Description": f"{source} slices to synthetic {target} slices; not for diagnosis",
            "Format": args.export, "Input": export.INPUT, "Output": export.OUTPUT,
            "Shape": ["N", 1, record["size"], record["size"]], "DType": "float32",
            "Range": [-1, 1], "Background": -1, "SliceLayout": record.get("layout", ""),
            "Preprocessing": preprocessing_of(record),
            **histogram_of(record, source.lower()),
            "Checkpoint": args.ckpt.name, "CheckpointSHA256": sha256(args.ckpt)})
        log.info("%s -> %s", args.ckpt, path)
    return console.DONE


# ---------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """One volume to translate.

    Attributes
    ----------
    source : the file
    direction : one of `DIRECTIONS`
    outputs : file to write by what it is (`SYNTHETIC`, `SCATTER`, `CYCLE`)
    name : of the source, for the record: below its tree, or of the file alone
    """

    source: Path
    direction: str
    outputs: dict[str, Path]
    name: str

    def is_done(self, described: dict[str, Any], overwrite: bool) -> bool:
        """Whether a run with the same checkpoint, options and source has made the files whole.

        Files whose record is `STARTED` are of a run that was killed, and are made again.

        Raises
        ------
        ValueError : they were made otherwise, or not by us, and may not be overwritten
        """
        found = {path: read_record(sidecar(path)) for path in self.outputs.values()}
        alike = {"CheckpointSHA256": described["CheckpointSHA256"], "Direction": self.direction,
                 "Settings": described["Settings"], "SourceSHA256": self._sha256_of_source()}
        for path, record in found.items():
            there = path.exists()
            if record == STARTED:
                continue
            if "CheckpointSHA256" not in record and (there or sidecar(path).exists()):
                fault = "is there already, and no record beside it says that translate.py made it"
            elif there and any(record.get(key) != value for key, value in alike.items()):
                fault = "made with another checkpoint, other options or from another file"
            else:
                continue
            if overwrite:
                return False
            raise ValueError(f"{path}: {fault}; take another --out, or --overwrite")
        return all(path.exists() and record != STARTED for path, record in found.items())

    def _sha256_of_source(self) -> str:
        """Of the source, once there is something made to compare it with."""
        made = self.source.is_file() and any(path.exists() for path in self.outputs.values())
        return sha256(self.source) if made else ""


def plan_files(inputs: Sequence[Path], args: argparse.Namespace) -> list[Job]:
    """Jobs for single files; refuses now what could not work later."""
    jobs = []
    for source in inputs:
        if source.is_dir():
            raise ValueError(f"{source}: is a folder; name the volumes in it, or give a BIDS tree "
                             f"as --bids {source}")
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such file; check the name")
        if not ENDING.search(source.name):
            raise ValueError(f"{source}: not a .nii or .nii.gz file")
        direction = args.direction if args.direction != "auto" else direction_of(source)
        jobs.append(Job(source, direction, outputs_of(source, direction, args.out, args),
                        source.name))
    return check_plan(jobs, args)


def plan_tree(root: Path, scans: Sequence[Path], args: argparse.Namespace) -> list[Job]:
    """Jobs for the scans of a BIDS tree, into a tree of derivatives."""
    jobs = []
    for source in scans:
        name = source.relative_to(root)
        outputs = outputs_of(source, args.direction, args.out / name.parent, args)
        jobs.append(Job(source, args.direction, outputs, f"bids:raw:{name.as_posix()}"))
    return check_plan(jobs, args)


def outputs_of(source: Path, direction: str, folder: Path,
               args: argparse.Namespace) -> dict[str, Path]:
    """The files that a volume's translation consists of; a cycle's error is of the source."""
    start, end = DIRECTIONS[direction]
    outputs = {SYNTHETIC: folder / derived_name(source, SYNTHETIC, end)}
    if args.uncertainty:
        outputs[SCATTER] = folder / derived_name(source, SCATTER, end)
    if args.cycle_error:
        outputs[CYCLE] = folder / derived_name(source, CYCLE, start)
    return outputs


def check_plan(jobs: list[Job], args: argparse.Namespace) -> list[Job]:
    """Refuse an input as output, two inputs for one output, and one --match for two contrasts."""
    inputs = [job.source for job in jobs] + ([args.match] if args.match else [])
    kept = {path.resolve() for source in inputs for path in (source, sidecar(source))}
    for job in jobs:
        for path in job.outputs.values():
            if not kept.isdisjoint((path.resolve(), sidecar(path).resolve())):
                raise ValueError(f"{job.source}: would be written to {path}, and that is one of "
                                 "the inputs; take another --out")
    counts = Counter(job.outputs[SYNTHETIC] for job in jobs)
    for job in jobs:
        if counts[job.outputs[SYNTHETIC]] > 1:
            raise ValueError(f"{job.source}: another input would be written to "
                             f"{job.outputs[SYNTHETIC]}, too; translate them into different --out "
                             "folders")
    if args.match and len({job.direction for job in jobs}) > 1:
        raise ValueError(f"--match {args.match}: T1w and T2w are to be made; translate them in two "
                         "runs, each with a reference of its own")
    return jobs


def direction_of(source: Path) -> str:
    """The direction that a file's name says."""
    for direction, (start, _) in DIRECTIONS.items():
        if stem(source).endswith(start):
            return direction
    raise ValueError(f"{source}: the name does not end in _T1w or _T2w; say which it is with "
                     "--direction")


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
    return {"HistogramStandard": {"Percentiles": found["percentiles"],
                                  "Landmarks": found[contrast]}} if contrast in found else {}


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
    for path in job.outputs.values():  # a record is the files' word: that of before goes first
        derivatives.remove_parts(path)
        derivatives.remove_parts(sidecar(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(sidecar(path), STARTED)
    common = record_of(job, translator, found, described, scale)
    for what, (values, _) in parts.items():
        if what in job.outputs:
            assert values is not None
            write_like(volume, values, job.outputs[what])
    for what, (_, text) in parts.items():
        if what in job.outputs:
            write_record(sidecar(job.outputs[what]), {"Description": text, **common})
    log.info("%s -> %s", job.source, job.outputs[SYNTHETIC])


def record_of(job: Job, translator: Translator, found: Translation, described: dict[str, Any],
              scale: IntensityScale | None) -> dict[str, Any]:
    """What is said of how a volume was made."""
    units = ("relative, 0 to 1" if scale is None else
             f"as {described['Settings']['Match']}: 0 to 1 is {scale.low:g} to {scale.high:g}")
    return {"Sources": [job.name], "SourceSHA256": sha256(job.source), "SkullStripped": True,
            "Direction": job.direction, "BrainExtraction": found.method, "Intensities": units,
            "Precision": str(translator.precision).removeprefix("torch."),
            "Preprocessing": preprocessing_of(translator.record), **described,
            "Warnings": found.warnings}


if __name__ == "__main__":
    sys.exit(console.run(main))
