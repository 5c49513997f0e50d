"""Extracted heads as nibabel images, and checkpoints of random nets for them."""

import nibabel as nib
import numpy as np
import torch
from conftest import lay_affine, paint
from torch import nn

from models import checkpoint
from models.cyclegan import EMA, CycleGAN, init_weights
from translator import Translator

CONFIG = {"features": 4, "blocks": 1, "upsample": "transpose"}
ON_CPU = ["--device", "cpu", "--precision", "fp32"]


def write_checkpoint(path, *, size=48, spacing_mm=4.0, extraction=("none",), training=None,
                     config=None, standard=None):
    """A checkpoint of random nets.

    `training` is what `data.contrast.training_figures` gives, `standard` a `histogram.Standard`.
    """
    config = {**CONFIG, **(config or {})}
    nets = CycleGAN(**config)
    init_weights(nets, torch.Generator().manual_seed(0))
    record = {"size": size, "spacing_mm": spacing_mm, "brain_extraction": list(extraction),
              "intensity": {"rule": "painted", "upper_percentile": 99.5}, "subjects": {}}
    if training:
        record["training"] = training
    if standard:
        record |= {"standard": standard.record(), "min_brain_area": 0.25}
    checkpoint.save(path, {"config": config, "preprocessing": record, "step": 1, "epoch": 1,
                           "slices_seen": 1, "ema": EMA(nets).state_dict(), "best": {}})
    return path


def translator(ckpt, nets=(nn.Identity(), nn.Identity()), **options):
    """A translator whose nets are replaced."""
    made = Translator(ckpt, device="cpu", precision="fp32", **options)
    made.generators = dict(zip(("t1w-to-t2w", "t2w-to-t1w"), nets))
    return made


def scan(shape, spacing, axes="RAS", turn_deg=(0, 0, 0), dtype=np.int16, suffix="T1w"):
    """An extracted brain as a nibabel image."""
    affine = lay_affine(shape, spacing, axes, turn_deg=turn_deg, middle=(3, -5, 8))
    moved = np.eye(4)
    moved[:3, 3] = (3, -5, 8)
    data = paint(shape, affine, suffix, matrix=moved)
    image = nib.Nifti1Image(data.astype(dtype), affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"kept"
    return image


def scaled(image):
    """What identity should give: zero to 0, the brain's 99.5th percentile to 1, clipped."""
    data = image.get_fdata()
    return np.clip(data / np.percentile(data[data > 0], 99.5), 0, 1)
