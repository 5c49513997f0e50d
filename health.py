"""Whether a training run is healthy: what is watched each epoch, and what is said of it.

Owns the healthy ranges. The figures come from `train.py`: shares and norms are means over the
epoch's steps, what is judged on slices comes from the validation subjects.
"""

from __future__ import annotations

from collections.abc import Mapping

# By chance a discriminator is right in half of its patches; one that always is teaches little.
ALWAYS_RIGHT = 0.98
MOSTLY_WRONG = 0.35
# As in evaluate.py: distance from a translation to its input, over that of the real target.
COPY_RATIO = 0.5
OUTSIDE = 0.05  # share of generated signal that may lie outside the brain
UNRELATED = 0.1  # a correlation this near to 0 is none; a translation that works has 0.8
WAITING = 0.05  # share of the time that may go into waiting for data
SKIPPED = 0.05  # share of fp16 steps that may overflow (one in 2000 is the scaler's normal probing)
LARGE_GRADIENT = 1e3
SMALL_GRADIENT = 1e-6


def warnings(figures: Mapping[str, float]) -> list[str]:
    """What leaves its healthy range, a line each.

    Parameters
    ----------
    figures : any of
        D_X_right_real, D_X_right_fake, D_Y_right_real, D_Y_right_fake : shares of patches judged
            rightly by the discriminators;
        gradient_G, gradient_F, gradient_D_X, gradient_D_Y : norms of the gradients;
        skipped : share of steps that fp16 skipped;
        t2w_correlation, t1w_correlation : of translation and real target in the brain;
        t2w_copy_ratio, t1w_copy_ratio : distance to the input, over the real target's;
        t2w_outside, t1w_outside : share of generated signal outside the brain;
        waiting : share of the time spent waiting for data
    """
    said = []
    for net in ("D_X", "D_Y"):
        real, fake = (figures.get(f"{net}_right_{kind}", 0.75) for kind in ("real", "fake"))
        if min(real, fake) > ALWAYS_RIGHT:
            said.append(f"{net} is right about {real:.0%} of real and {fake:.0%} of generated "
                        "patches: it has won, and its generator learns little from it")
        if max(real, fake) < MOSTLY_WRONG:
            said.append(f"{net} is right about {real:.0%} of real and {fake:.0%} of generated "
                        "patches: it has lost track")
    for net in ("G", "F", "D_X", "D_Y"):
        norm = figures.get(f"gradient_{net}", 1.0)
        if norm > LARGE_GRADIENT or norm < SMALL_GRADIENT:
            said.append(f"gradients of {net} have a norm of {norm:.2g}: "
                        + ("diverging; try a smaller --lr" if norm > 1 else "it learns nothing"))
    for target, source in (("t2w", "t1w"), ("t1w", "t2w")):
        name = f"{source} to {target}"
        correlation = figures.get(f"{target}_correlation", 1.0)
        if correlation < UNRELATED:
            what = "contrast is inverted" if correlation < -UNRELATED else "no contrast yet"
            said.append(f"{name}: {what} (correlation with the real one {correlation:.2f})")
        ratio = figures.get(f"{target}_copy_ratio", 1.0)
        if ratio < COPY_RATIO:
            said.append(f"{name}: nearly a copy of its input (distance to it {ratio:.0%} of the "
                        "real one's)")
        outside = figures.get(f"{target}_outside", 0.0)
        if outside > OUTSIDE:
            said.append(f"{name}: {outside:.0%} of the generated signal lies outside the brain")
    if figures.get("skipped", 0.0) > SKIPPED:
        said.append(f"{figures['skipped']:.0%} of the steps overflowed in fp16 and were skipped; "
                    "try --precision bf16 or fp32")
    if figures.get("waiting", 0.0) > WAITING:
        said.append(f"{figures['waiting']:.0%} of the time goes into waiting for data; raise "
                    "--workers, or put the store on a faster disk")
    return said
