"""The adversarial terms, from D's raw scores (Zhu et al. 2017, eq. 1 and sec. 4).

Pure functions; the same for (G, D_Y) and (F, D_X). Freezing D while the generators learn, and
keeping fakes from carrying gradients while D learns, is the training loop's part.
"""
from torch import Tensor
from torch.nn import functional as nnf

GAN_KINDS = ("lsgan", "vanilla", "hinge")


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor, kind: str = "lsgan") -> Tensor:
    """Score how badly D tells real from fake; D minimises this.

    Parameters
    ----------
    real_scores, fake_scores : D's raw output for real and for generated slices, any shape and float
        dtype; each is averaged over all its elements, in float32.
    kind : "lsgan": (D(real) - 1)^2 + D(fake)^2 (sec. 4);
        "vanilla": cross entropy of sigmoid(D), eq. 1 with its sign turned;
        "hinge": max(0, 1 - D(real)) + max(0, 1 + D(fake)) (Lim & Ye 2017; Miyato et al. 2018).

    Returns
    -------
    loss : scalar, float32; half the sum of both means for every kind: "we divide the objective by 2
        while optimizing D" (appendix 7.1).

    Raises
    ------
    ValueError
        If `kind` is none of these.
    """
    real, fake = real_scores.float(), fake_scores.float()
    if kind == "lsgan":
        on_real, on_fake = (real - 1).square(), fake.square()
    elif kind == "vanilla":
        # softplus(-s) = -log sigmoid(s), softplus(s) = -log(1 - sigmoid(s)): no log of 0 anywhere.
        on_real, on_fake = nnf.softplus(-real), nnf.softplus(fake)
    elif kind == "hinge":
        on_real, on_fake = nnf.relu(1 - real), nnf.relu(1 + fake)
    else:
        raise _unknown(kind)
    return 0.5 * (on_real.mean() + on_fake.mean())


def rightly_judged(real_scores: Tensor, fake_scores: Tensor,
                   kind: str = "lsgan") -> tuple[Tensor, Tensor]:
    """Shares of real and of generated patches that D takes for what they are, float32 scalars.

    Parameters
    ----------
    real_scores, fake_scores, kind : as for `discriminator_loss`; the border is where both of its
        terms are equal, 0.5 for "lsgan" and 0 for the others
    """
    border = 0.5 if kind == "lsgan" else 0.0
    return (real_scores > border).float().mean(), (fake_scores < border).float().mean()


def generator_loss(fake_scores: Tensor, kind: str = "lsgan") -> Tensor:
    """Score how badly generated slices pass for real; the generator minimises this.

    Parameters
    ----------
    fake_scores : D's raw output for generated slices, any shape and float dtype.
    kind : "lsgan": (D(fake) - 1)^2 (sec. 4);
        "vanilla": -log sigmoid(D(fake)), the non-saturating form (Goodfellow et al. 2014, sec. 3)
        and so not eq. 1's log(1 - sigmoid(D(fake))), which hardly teaches while D wins;
        "hinge": -D(fake).

    Returns
    -------
    loss : scalar, float32, the mean over all elements; not halved.

    Raises
    ------
    ValueError
        If `kind` is none of these.
    """
    fake = fake_scores.float()
    if kind == "lsgan":
        return (fake - 1).square().mean()
    if kind == "vanilla":
        return nnf.softplus(-fake).mean()
    if kind == "hinge":
        return -fake.mean()
    raise _unknown(kind)


def _unknown(kind: str) -> ValueError:
    """Make the error for a kind of loss that does not exist."""
    return ValueError(f"unknown GAN loss {kind!r}; choose one of {', '.join(GAN_KINDS)}")
