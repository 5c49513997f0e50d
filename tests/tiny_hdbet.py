"""A model folder as HD-BET 2 has one, of a net of few weights: nnU-Net runs it as its own.

Two nets: `shifted` says brain where the voxel one above and one in front is bright (so that axes,
directions and spacing show in the mask), `random` has random weights and no symmetry.
"""

import json
import shutil
import zipfile

import torch
from torch import nn

SPACING_MM = (5.0, 4.0, 3.0)  # of the net's voxels: superior, anterior, right
PATCH = (32, 48, 48)
THRESHOLD = 0.5  # standard deviations above the mean
CHECKPOINT = "fold_all/checkpoint_final.pth"
LABELS = {"background": 0, "brain": 1}


def build(folder, net="shifted", *, spacing_mm=SPACING_MM, patch=PATCH):
    """Write dataset.json, plans.json and fold_all/checkpoint_final.pth; returns the folder."""
    (folder / "fold_all").mkdir(parents=True)
    architecture = _architecture(norm=net == "random")
    plans = _plans(architecture, spacing_mm, patch)
    about = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": 1,
             "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about, indent=4))
    (folder / "plans.json").write_text(json.dumps(plans, indent=4))
    checkpoint = {
        "network_weights": WEIGHTS[net](_network(architecture)), "optimizer_state": {},
        "grad_scaler_state": None, "logging": {}, "_best_ema": 0.9, "current_epoch": 1,
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": "all",
                      "dataset_json": about, "unpack_dataset": True},
        "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, folder / CHECKPOINT)
    return folder


def zipped(folder, path, *, inside=""):
    """Zip a model folder as HD-BET's release is, or with a folder around it; returns the path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("dataset.json", "plans.json", CHECKPOINT):
            archive.write(folder / name, inside + name)
    return path


def copied(folder, to):
    """A copy of a model folder that a test may damage."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


def _architecture(norm):
    """A U-Net of two stages, in the words of nnU-Net's plans."""
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 2, "features_per_stage": [2, 4], "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]],
            "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d" if norm else None,
            "norm_op_kwargs": {"eps": 1e-05, "affine": True} if norm else None,
            "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _plans(architecture, spacing_mm, patch):
    resampling = {
        f"resampling_fn_{what}": "resample_data_or_seg_to_shape"
        for what in ("data", "seg", "probabilities")
    } | {
        f"resampling_fn_{what}_kwargs": {"is_seg": what == "seg", "order": order, "order_z": 0,
                                         "force_separate_z": None}
        for what, order in (("data", 3), ("seg", 1), ("probabilities", 1))
    }
    statistics = dict.fromkeys(("max", "mean", "median", "min", "std", "percentile_00_5",
                                "percentile_99_5"), 1.0)
    return {
        "dataset_name": "Dataset500_TinyBET", "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(spacing_mm),
        "original_median_shape_after_transp": list(patch), "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner", "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "configurations": {"3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2, "patch_size": list(patch),
            "median_image_size_in_voxels": list(map(float, patch)), "spacing": list(spacing_mm),
            "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False],
            **resampling, "architecture": architecture, "batch_dice": False,
        }},
    }


def _network(architecture):
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    return get_network_from_plans(architecture["network_class_name"], architecture["arch_kwargs"],
                                  architecture["_kw_requires_import"], 1, 2, allow_init=True,
                                  deep_supervision=False)


def _shifted(network):
    """Intensity of the voxel one above and in front, minus a threshold, by way of the skip."""
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    weights = network.state_dict()
    _set(weights, "encoder.stages.0.0.convs.0", (0, 0, 2, 2, 1))  # from k + 1, j + 1
    _set(weights, "decoder.stages.0.convs.0", (0, 2, 1, 1, 1))  # the skip follows the upsampled
    head = "decoder.seg_layers.0"
    _set(weights, head, (1, 0, 0, 0, 0))
    weights[f"{head}.bias"][1] = -THRESHOLD
    return weights


def _set(weights, layer, where):
    """One weight of a convolution to 1, under each of the names that nnU-Net's blocks give it."""
    found = [name for name in weights if name.startswith(layer) and name.endswith("weight")]
    assert found
    for name in found:
        weights[name][where] = 1


def _random(network):
    """Random convolutions; brain where the last two features' difference is positive."""
    draws = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim == 5:
            nn.init.normal_(parameter, generator=draws)
    weights = network.state_dict()
    head = torch.tensor([[0.0, 0.0], [1.0, -1.0]]).reshape(2, 2, 1, 1, 1)
    weights["decoder.seg_layers.0.weight"][:] = head
    weights["decoder.seg_layers.0.bias"][:] = 0
    return weights


WEIGHTS = {"shifted": _shifted, "random": _random}
