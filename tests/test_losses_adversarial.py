"""Tests of losses/adversarial.py."""
import math

import pytest
import torch
from torch.nn import functional as nnf

from losses.adversarial import GAN_KINDS, discriminator_loss, generator_loss, rightly_judged

REAL = torch.tensor([[2.0, 0.0]])
FAKE = torch.tensor([[-1.0, 3.0], [0.5, -2.0]])


def log_1_plus_exp(value: float) -> float:
    return math.log(1 + math.exp(value))


# Worked by hand, half of the sum of both means:
#   lsgan    real (1 + 1) / 2 = 1; fake (1 + 9 + 0.25 + 4) / 4 = 3.5625
#   vanilla  -log sigmoid(s) for real, -log(1 - sigmoid(s)) for fake
#   hinge    real (0 + 1) / 2 = 0.5; fake (0 + 4 + 1.5 + 0) / 4 = 1.375
@pytest.mark.parametrize("kind, wanted", [
    ("lsgan", 0.5 * (1 + 3.5625)),
    ("vanilla", 0.5 * ((log_1_plus_exp(-2) + log_1_plus_exp(0)) / 2
                       + sum(map(log_1_plus_exp, (-1, 3, 0.5, -2))) / 4)),
    ("hinge", 0.5 * (0.5 + 1.375))])
def test_the_discriminator_loss_is_the_hand_computed_one(kind, wanted):
    assert discriminator_loss(REAL, FAKE, kind).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind, wanted", [
    ("lsgan", (4 + 4 + 0.25 + 9) / 4),
    ("vanilla", sum(map(log_1_plus_exp, (1, -3, -0.5, 2))) / 4),
    ("hinge", -(-1 + 3 + 0.5 - 2) / 4)])
def test_the_generator_loss_is_the_hand_computed_one(kind, wanted):
    assert generator_loss(FAKE, kind).item() == pytest.approx(wanted, rel=1e-6)


def test_least_squares_is_the_default():
    assert discriminator_loss(REAL, FAKE) == discriminator_loss(REAL, FAKE, "lsgan")
    assert generator_loss(FAKE) == generator_loss(FAKE, "lsgan")


def test_the_vanilla_losses_are_torchs_cross_entropy_with_logits():
    entropy = nnf.binary_cross_entropy_with_logits
    wanted = 0.5 * (entropy(REAL, torch.ones_like(REAL)) + entropy(FAKE, torch.zeros_like(FAKE)))
    torch.testing.assert_close(discriminator_loss(REAL, FAKE, "vanilla"), wanted)
    wanted = entropy(FAKE, torch.ones_like(FAKE))
    torch.testing.assert_close(generator_loss(FAKE, "vanilla"), wanted)


def test_a_perfect_discriminator_has_no_least_squares_or_hinge_loss():
    ones, zeros = torch.ones(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    assert discriminator_loss(ones, zeros, "lsgan") == 0
    assert generator_loss(ones, "lsgan") == 0
    assert discriminator_loss(ones, -ones, "hinge") == 0


@pytest.mark.parametrize("kind", GAN_KINDS)
def test_discriminator_and_generator_pull_fake_scores_in_opposite_directions(kind):
    scores = torch.zeros(4, requires_grad=True)
    assert (torch.autograd.grad(discriminator_loss(REAL, scores, kind), scores)[0] >= 0).all()
    assert (torch.autograd.grad(generator_loss(scores, kind), scores)[0] < 0).all()
    real = torch.zeros(4, requires_grad=True)
    assert (torch.autograd.grad(discriminator_loss(real, FAKE, kind), real)[0] < 0).all()


@pytest.mark.parametrize("kind", GAN_KINDS)
def test_a_sure_discriminator_still_teaches_the_generator(kind):
    scores = torch.full((4,), -20.0, requires_grad=True)
    generator_loss(scores, kind).backward()
    assert (scores.grad < -0.2).all()


@pytest.mark.parametrize("kind", GAN_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_scores_are_computed_in_float32(kind, dtype):
    # 300^2 overflows float16, and 4097 scores have no exact bfloat16 mean.
    real = torch.linspace(-300, 300, 4097).to(dtype)
    fake = real.flip(0)
    found = discriminator_loss(real, fake, kind), generator_loss(fake, kind)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in found)
    real, fake = real.float(), fake.float()
    assert found == (discriminator_loss(real, fake, kind), generator_loss(fake, kind))


@pytest.mark.parametrize("kind", GAN_KINDS)
def test_autocast_does_not_lower_the_precision_of_the_losses(kind):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = discriminator_loss(REAL, FAKE, kind), generator_loss(FAKE, kind)
    assert losses == (discriminator_loss(REAL, FAKE, kind), generator_loss(FAKE, kind))


@pytest.mark.parametrize("kind", GAN_KINDS)
def test_a_nan_score_shows_in_the_loss(kind):
    scores = torch.tensor([1.0, math.nan])
    assert discriminator_loss(scores, FAKE, kind).isnan()
    assert generator_loss(scores, kind).isnan()


def test_unknown_kinds_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'wgan'.*lsgan, vanilla, hinge"):
        discriminator_loss(REAL, FAKE, "wgan")
    with pytest.raises(ValueError, match="'wgan'.*lsgan, vanilla, hinge"):
        generator_loss(FAKE, "wgan")


def test_patches_are_judged_rightly_on_their_side_of_the_border():
    real, fake = torch.tensor([0.9, 0.6, 0.4, 2.0]), torch.tensor([-1.0, 0.4, 0.6, 0.2])
    assert [v.item() for v in rightly_judged(real, fake)] == [0.75, 0.75]
    assert [v.item() for v in rightly_judged(real, fake, "hinge")] == [1.0, 0.25]
    assert [v.item() for v in rightly_judged(fake, real, "vanilla")] == [0.75, 0.0]
