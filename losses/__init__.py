"""The terms of the CycleGAN objective, and the measures of its results.

Domain map: X = T1w, Y = T2w; `G`: X -> Y, `F`: Y -> X, `D_X` judges T1w, `D_Y` judges T2w.

    adversarial.py  what D_X, D_Y and the generators make of D's scores (Zhu et al. 2017, eq. 1)
    consistency.py  cycle (eq. 2) and identity (sec. 5.2) terms
    history.py      the buffer of earlier fakes that D is trained with (sec. 4)
    quality.py      PSNR, SSIM and MAE under the three protocols; for evaluation only

Weights between the terms (eq. 3) belong to the training loop. Nothing here imports `data` or
`models`.
"""
