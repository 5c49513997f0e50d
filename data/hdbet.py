"""HD-BET 2 (Isensee et al. 2019): its weights, and its predictor loaded once.

Owns what can go wrong with the weights; what a mask is worth is judged in `data/brain.py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable

import numpy as np

from data.volume import Volume


def make_extractor(device: str, *, tta: bool = False) -> Callable[[Volume], np.ndarray]:
    """HD-BET 2 (Isensee et al. 2019) without test-time augmentation, loaded once."""
    import torch

    with _stdout_kept():
        try:
            from HD_BET.checkpoint_download import maybe_download_parameters
            from HD_BET.hd_bet_prediction import get_hdbet_predictor
            from HD_BET.paths import folder_with_parameter_files as weights
        except ImportError as error:
            raise ValueError(f"brain extraction hd-bet: {error}; pip install HD-BET") from None
        try:
            maybe_download_parameters()
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            reason = type(error).__name__
            raise ValueError(
                f"brain extraction hd-bet: its weights are not in {weights} and cannot be fetched "
                f"({reason}); unzip HD-BET's release there, or use --brain-extraction deepbet"
            ) from None
        try:
            predictor = get_hdbet_predictor(use_tta=tta, device=torch.device(device))
        except Exception as error:  # a half-written folder fails in as many ways as it has files
            raise ValueError(
                f"brain extraction hd-bet: the weights in {weights} do not load ({error}); delete "
                "that folder and run again, or use --brain-extraction deepbet"
            ) from None

    def extract(volume: Volume) -> np.ndarray:
        # nnU-Net's reader gives (1, K, J, I) and the spacing in that order
        image = np.ascontiguousarray(volume.data.transpose(2, 1, 0))[None]
        properties = {"spacing": [float(s) for s in volume.spacing_mm[::-1]]}
        with _stdout_kept():
            labels = predictor.predict_single_npy_array(image, properties, None, None, False)
        return np.asarray(labels).transpose(2, 1, 0) > 0

    return extract


@contextlib.contextmanager
def _stdout_kept():
    """Leave sys.stdout as it was: importing HD-BET replaces it, and its helpers print."""
    before = sys.stdout
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(io.StringIO()):
        sys.stdout = sink
        try:
            yield
        finally:
            sys.stdout = before
