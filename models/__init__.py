"""The nets of a CycleGAN, in the paper's letters (Zhu et al. 2017).

Domain map: X = T1w, Y = T2w. `G`: X -> Y and `F`: Y -> X are generators, `D_X` judges T1w slices
and `D_Y` judges T2w slices. `F` is a net, so the functional namespace is imported as `nnf`, never
as `F`.

    generator.py      ResnetGenerator, InstanceNorm
    discriminator.py  PatchDiscriminator
    cyclegan.py       CycleGAN (the four nets), weight initialisation, moving average of G and F
    checkpoint.py     the checkpoint format

Nothing here imports `data` or `losses`.
"""
