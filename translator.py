"""Whole volumes through a checkpoint's nets: cut as in training, translated, laid back.

What `translate.py` and a notebook share. Joins `data/` (brains, slices, grids) and `models/` (nets,
looks); reads no options and writes no files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data import bids, brain, contrast
from data.bias import bias_correction_of
from data.histogram import Standard, volume_landmarks
from data.subject import slices_kept
from data.nifti import Grid, Volume, image_like, volume_from_image
from data.volume import (IntensityScale, Placement, crop_or_pad, fit_scale, grid_of, place,
                         resample, restore, slicing_grid, to_slices)
from models.ensemble import Scatter, draw_looks

if TYPE_CHECKING:  # a second and a half, in which `translate.py` has other work to do
    import torch

DIRECTIONS = {"t1w-to-t2w": ("T1w", "T2w"), "t2w-to-t1w": ("T2w", "T1w")}
EXTRACTIONS = ("auto", *brain.METHODS)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")  # those of `device`, which imports torch
MOST_CUT = 0.005  # share of a brain that may lie outside the frame without a word
Net = Callable[[np.ndarray], np.ndarray]  # slices (n, H, W) float32 in [-1, 1] to others alike


class NoExtractor(ValueError):
    """A method of brain extraction that cannot run here: its package or its weights are missing."""


class Brain(NamedTuple):
    """A volume's brain.

    Attributes
    ----------
    mask : (I, J, K) bool, as in training: holes filled
    inside : where a translation belongs; an extracted volume has no tissue where it has no signal,
        holes included
    method : of the extraction
    """

    mask: np.ndarray
    inside: np.ndarray
    method: str


@dataclass(frozen=True)
class Wanted:
    """What is asked of a translation, besides the direction.

    Attributes
    ----------
    looks : how many mirrored and shifted looks the answer is the mean of; 1 is the plain one
    uncertainty : over how many looks the standard deviation is taken; 0 for none
    cycle_error : whether to translate back, too, and to give the distance to the input
    force : whether to translate what looks like the other contrast
    """

    looks: int = 1
    uncertainty: int = 0
    cycle_error: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.looks < 1:
            raise ValueError(f"{self.looks} looks: the answer is the mean of at least one")
        if self.uncertainty < 0 or self.uncertainty == 1:
            raise ValueError(f"uncertainty over {self.uncertainty} looks: a scatter needs at least "
                             "two (0: none)")


@dataclass(frozen=True)
class Translation:
    """A translated volume; all arrays (I, J, K) float32 on its RAS grid, 0 outside the brain.

    Attributes
    ----------
    data : in [0, 1]
    uncertainty : standard deviation over the looks, in the same unit; None if not asked for
    cycle_error : |F(G(x)) - x|, or |G(F(y)) - y|, in [0, 1]; None if not asked for
    inside : (I, J, K) bool, the brain
    method : the brain extraction that was used
    warnings : what the user should know of this volume, a line each
    """

    data: np.ndarray
    uncertainty: np.ndarray | None
    cycle_error: np.ndarray | None
    inside: np.ndarray
    method: str
    warnings: list[str] = field(default_factory=list)


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
                 precision: str = "auto", batch_size: int = 4) -> None:
        if brain_extraction not in EXTRACTIONS:
            raise ValueError(f"brain extraction '{brain_extraction}' is unknown; one of "
                             f"{', '.join(EXTRACTIONS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        if len(brain_ml) != 2 or not 0 < brain_ml[0] < brain_ml[1] < math.inf:
            raise ValueError(f"brain_ml {brain_ml}: smallest, then largest volume in millilitres")
        from device import choose_device, choose_precision
        from models import checkpoint

        state = checkpoint.load(ckpt)
        self.record: dict[str, Any] = state["preprocessing"]
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        # Weights in half precision give what autocast gives, to the bit, and on CPUs a fifth
        # sooner: autocast takes each reflection padding to float32 and back. As there the net is
        # given float32: in bfloat16 the darkest brain is -1, too, and taken for background.
        with checkpoint.said_of(ckpt):
            self.standard = Standard.of_record(self.record)
            nets = checkpoint.load_generators(state, self.device)
        for net in nets:
            net.to(self.precision).encode.register_forward_pre_hook(
                lambda _, slices: (slices[0].to(self.precision),))
        self.generators: dict[str, torch.nn.Module] = dict(zip(DIRECTIONS, nets))
        self._extraction, self._brain_ml, self._batch_size = brain_extraction, brain_ml, batch_size
        self._extractors: dict[str, brain.Extractor | NoExtractor] = {}

    def __call__(self, image: Any, direction: str, *, force: bool = False) -> Any:
        """Translate a nibabel image; the answer is one, on the same grid, float32 in [0, 1]."""
        volume = volume_from_image(image)
        return image_like(volume, self.translate(volume, direction, Wanted(force=force)).data)

    def translate(self, volume: Volume, direction: str, wanted: Wanted = Wanted(), *,
                  found: Brain | None = None) -> Translation:
        """Translate a volume.

        Parameters
        ----------
        volume : whole head or extracted brain
        direction : "t1w-to-t2w" or "t2w-to-t1w"
        wanted : see there
        found : its brain, where that is known

        Raises
        ------
        ValueError : no brain is found, or none that is believed; the volume looks like the other
            contrast; or no such direction
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"direction '{direction}' is unknown; one of {', '.join(DIRECTIONS)}")
        mask, inside, method = found or self.find_brain(volume)
        plain = cut(volume, mask, self.record)
        taken = ("; it was taken for an extracted brain: if it is a whole head, say so with "
                 "--brain-extraction" if method == "none" and self._extraction == "auto" else "")
        warnings = self._judge(plain, volume, mask, DIRECTIONS[direction][0], wanted.force, taken)
        if method not in ("none", "mask") and (fault := brain.strange_background(volume)):
            warnings.append(f"taken for a whole head (brain by {method}); if it is extracted: its "
                            f"{fault}")
        there, back = self.net(direction), self.net(_reverse(direction))
        shown = self._standardise(plain, DIRECTIONS[direction][0])
        box = _box(inside)
        target = _part(grid_of(volume), box)
        native = volume.spacing_mm[2] > 0.999 * plain.placement.grid.spacing_mm[2]
        looks = draw_looks(max(wanted.looks, wanted.uncertainty), between=not native)
        answer, scatter, error = Scatter(), Scatter(), None
        for number, look in enumerate(looks):
            stack = cut(volume, mask, self.record, look.phase) if look.phase else plain
            given = shown(stack.slices)
            fake = look.undo(there(look.show(given)))
            if number == 0 and wanted.cycle_error:
                away = np.abs(back(fake) - given) - 1  # of a range of 2, as a share: [-1, 1]
                error = stack.lay_back(away, target)
            laid = stack.lay_back(fake, target)
            if number < wanted.looks:
                answer.add(laid)
            if number < wanted.uncertainty:
                scatter.add(laid)

        def whole(part: np.ndarray | None) -> np.ndarray | None:
            if part is None:
                return None
            laid_out = np.zeros(volume.data.shape, np.float32)
            laid_out[box] = np.where(inside[box], part, 0)
            return laid_out

        data = whole(answer.mean)
        assert data is not None
        return Translation(data, whole(scatter.sd if wanted.uncertainty else None), whole(error),
                           inside, method, warnings)

    def _standardise(self, stack: Cut, suffix: str) -> Net:
        """What gives slices of a volume the histogram that the nets were trained with."""
        standard = self.standard
        if standard is None or suffix.lower() not in standard.wanted:
            return lambda slices: slices
        inside = stack.inside
        kept = slices_kept(inside, self.record["min_brain_area"])  # those that the store would have
        own = volume_landmarks(stack.slices[kept], inside[kept])
        return lambda slices: standard.move(slices, own, suffix.lower())

    def find_brain(self, volume: Volume) -> Brain:
        """Find a volume's brain."""
        found = extracted_brain(volume, self._extraction, self._brain_ml)
        if found:
            return found
        method = self._trained_method() if self._extraction == "auto" else self._extraction
        if method == "mask":
            mask = brain.given_mask(bids.brain_mask_path(bids.subject_of(volume.path)), volume)
        else:
            mask = self._extractor(method, volume)(volume)
        mask, _ = brain.judge_mask(mask, volume, limits_ml=self._brain_ml)
        return Brain(mask, mask, method)

    def _extractor(self, method: str, volume: Volume) -> brain.Extractor:
        """Load a method; one that cannot run is asked once, for a download's tries take minutes."""
        if method not in self._extractors:
            try:
                self._extractors[method] = brain.make_extractor(method, device=str(self.device))
            except ValueError as error:
                self._extractors[method] = NoExtractor(str(error))
        found = self._extractors[method]
        if isinstance(found, NoExtractor):
            fault = brain.strange_background(volume)
            raise NoExtractor(f"{found} (if {volume.path.name} is extracted already: its {fault})"
                              if fault else str(found))
        return found

    def scale_of(self, volume: Volume, suffix: str, *, force: bool = False) -> IntensityScale:
        """The intensities of a reference volume: what 0 and 1 of a translation become.

        Raises
        ------
        ValueError : as `translate`, where the reference is not of the contrast `suffix`
        """
        mask, _, _ = self.find_brain(volume)
        stack = cut(volume, mask, self.record)
        found = contrast.tell(stack.measure(self.record["spacing_mm"]))
        if found not in ("", suffix) and not force:
            raise ValueError(f"{volume.path}: looks like a {found}, and intensities of a {suffix} "
                             "are wanted; give another --match, or --force if it is one")
        return fit_scale(volume.data, mask, path=volume.path,
                         upper=self.record["intensity"]["upper_percentile"])

    def _trained_method(self) -> str:
        """How the training data's brains were found, for a volume that is not extracted."""
        methods = [m for m in self.record["brain_extraction"] if m != "none"]
        return methods[0] if methods else "hd-bet"

    def _judge(self, stack: Cut, volume: Volume, mask: np.ndarray, suffix: str,
               force: bool, taken: str) -> list[str]:
        """Refuse the other contrast; say what is unlike the training data.

        `taken` : how its brain was found, where that may be why
        """
        warnings = []
        figures = stack.measure(self.record["spacing_mm"])
        found = contrast.tell(figures)
        if found == "":
            warnings.append(f"cannot tell whether it is a T1w or a T2w ({figures}); look at it")
        elif found != suffix:
            text = f"looks like a {found}, not like a {suffix} ({figures})"
            if not force:
                raise ValueError(f"{volume.path}: {text}; choose the other --direction, or --force "
                                 f"if it is a {suffix}{taken}")
            warnings.append(text + taken)
        if stack.placement.cut_share > MOST_CUT:
            warnings.append(f"{100 * stack.placement.cut_share:.1f} % of the brain lies outside "
                            f"the frame of {self.record['size']} pixels and is filled with its rim")
        sizes = {"brain_ml": float(mask.sum()) * volume.voxel_ml,
                 "slice_spacing_mm": float(stack.placement.grid.spacing_mm[2])}
        return warnings + contrast.far_from_training(figures, suffix, sizes,
                                                     self.record.get("training", {}))

    def net(self, direction: str) -> Net:
        """A direction's generator as a function of slices; empty ones stay background."""
        import torch

        generator = self.generators[direction]

        def translate(batch: np.ndarray) -> np.ndarray:
            there = torch.from_numpy(batch)[:, None].to(self.device)
            with torch.inference_mode():
                return generator(there).float().cpu().numpy()[:, 0]

        def run(slices: np.ndarray) -> np.ndarray:
            full = np.flatnonzero((slices > -1).any(axis=(1, 2)))
            workers = torch.get_num_threads() if self.device.type == "cpu" else 1
            batches = [slices[part] for part in _share_out(full, self._batch_size, workers)]
            out = np.full_like(slices, -1)
            out[full] = np.concatenate(_side_by_side(translate, batches, workers))
            return out

        return run


def extracted_brain(volume: Volume, extraction: str = "auto",
                    brain_ml: tuple[float, float] = brain.ADULT_ML) -> Brain | None:
    """The brain of a volume that is extracted already; None where a net or a file has to tell.

    Parameters
    ----------
    volume : whole head or extracted brain
    extraction, brain_ml : as for `Translator`
    """
    if extraction != "none" and not (extraction == "auto"
                                     and brain.looks_extracted(volume, brain_ml)):
        return None
    mask, _ = brain.judge_mask(brain.nonzero_mask(volume), volume, limits_ml=brain_ml)
    return Brain(mask, mask & brain.signal_mask(volume), "none")


def _share_out(numbers: np.ndarray, most: int, workers: int) -> list[np.ndarray]:
    """Batches of at most `most`; for several workers as much for each, so that none waits."""
    if workers == 1:
        return [numbers[first:first + most] for first in range(0, len(numbers), most)]
    rounds = -(-len(numbers) // (most * workers))
    return np.array_split(numbers, min(rounds * workers, len(numbers)))


def _side_by_side(translate: Net, batches: list[np.ndarray], workers: int) -> list[np.ndarray]:
    """Translate batches, on a CPU one a core instead of one after the other with all cores.

    The same to the bit. Threads that share a convolution wait for each other after each of them,
    which costs half of the time where other programs want the cores, too.
    """
    import torch

    if workers == 1 or len(batches) < 2:
        return [translate(batch) for batch in batches]
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(translate, batches))


@dataclass(frozen=True)
class Cut:
    """A volume as slices, and where they were.

    Attributes
    ----------
    slices : (n, H, W) float32 in [-1, 1]
    mask : (I, J, K) bool, the brain on the slicing grid
    placement : see `data.volume`
    """

    slices: np.ndarray
    mask: np.ndarray
    placement: Placement

    def lay_back(self, slices: np.ndarray, target: Grid) -> np.ndarray:
        """Slices that answer these, on a grid in the world: `data.volume.restore`."""
        return restore(slices, self.mask, self.placement, target)

    @property
    def inside(self) -> np.ndarray:
        """(n, H, W) bool: the brain in the slices."""
        return to_slices(crop_or_pad(self.mask, self.placement.centre, self.slices.shape[1],
                                     fill=False))

    def measure(self, pixel_mm: float) -> contrast.Figures:
        """The figures of the brain's intensities."""
        return contrast.measure(self.slices, self.inside,
                                (float(self.placement.grid.spacing_mm[2]), pixel_mm))


def cut(volume: Volume, mask: np.ndarray, record: dict[str, Any], phase: float = 0.0) -> Cut:
    """Cut a volume into slices as training did.

    Parameters
    ----------
    volume : the scan
    mask : (I, J, K) bool, its brain
    record : a checkpoint's preprocessing record (`size`, `spacing_mm`, `intensity`)
    phase : how far between their places slices are cut, in slices
    """
    grid = slicing_grid(volume, record["spacing_mm"])
    if phase:  # and a slice more on the side that they move away from: a brain may begin there
        i, j, k = grid.shape
        affine = grid.affine.copy()
        affine[:3, 3] += (phase - (phase > 0)) * affine[:3, 2]
        grid = Grid((i, j, k + 1), affine)
    on_grid = resample(mask, volume.affine, grid, nearest=True)
    slices, placement = place(resample(volume.data, volume.affine, grid), on_grid, grid,
                              record["size"], path=volume.path,
                              bias_correction=bias_correction_of(record))
    return Cut(slices, on_grid, placement)


def _reverse(direction: str) -> str:
    return next(d for d in DIRECTIONS if d != direction)


def _box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box of voxels that holds a brain: nothing is interpolated outside of it."""
    hits = (np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    i, j, k = (slice(int(hit[0]), int(hit[-1]) + 1) for hit in hits)
    return i, j, k


def _part(grid: Grid, box: tuple[slice, slice, slice]) -> Grid:
    """A box of a grid's voxels as a grid of its own."""
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [float(side.start) for side in box]
    i, j, k = (side.stop - side.start for side in box)
    return Grid((i, j, k), affine)
