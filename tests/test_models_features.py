"""Tests of models/features.py with random weights of Inception v3, saved as torchvision's are."""

import numpy as np
import pytest
import torch
from painted_store import paint_head
from PIL import Image
from torchvision.models import inception_v3, resnet18

from models.features import N_FEATURES, load_features


@pytest.fixture(scope="module")
def inception():
    """Inception v3 with random weights, as torchvision sets it up for the ones it trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = inception_v3(weights=None, init_weights=False, transform_input=True)
        for part in net.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = 1.0  # takes over the batch's own figures, else features fade to 0
        with torch.no_grad():
            net(torch.randn(4, 3, 299, 299))
    return net.eval()


@pytest.fixture(scope="module")
def weights(inception, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def features(weights):
    return load_features(weights)


@pytest.fixture(scope="module")
def slices():
    """(3, 1, 48, 48) float32 in [0, 1]."""
    t1w, _, _ = paint_head(7, 3, 48)
    return (torch.from_numpy(t1w).float()[:, None] + 1) / 2


def test_features_are_those_of_torchvisions_net_with_its_own_preparation(
        features, inception, slices):
    seen = []
    hook = inception.avgpool.register_forward_hook(lambda net, given, out: seen.append(out))
    mean, sd = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406),
                                                         (0.229, 0.224, 0.225)))
    for image in slices:
        resized = Image.fromarray(image[0].numpy()).resize((299, 299), Image.Resampling.BILINEAR)
        prepared = (torch.from_numpy(np.array(resized)).expand(3, -1, -1) - mean) / sd
        with torch.no_grad():
            inception(prepared[None])
    hook.remove()
    found = features(slices)
    assert found.shape == (3, N_FEATURES) and found.dtype == torch.float32
    torch.testing.assert_close(found, torch.cat(seen).flatten(1), atol=1e-4, rtol=1e-3)


def test_each_slice_has_its_own_features_whatever_its_batch(features, slices):
    together = features(slices)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    torch.testing.assert_close(features(slices[1:2])[0], together[1], atol=1e-4, rtol=1e-3)


def test_features_ask_for_no_gradient_and_know_no_autocast(features, slices):
    wanted = features(slices[:1])
    assert not wanted.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(slices[:1]), wanted)
    assert features(slices[:1].half()).dtype == torch.float32


def test_other_shapes_are_refused(features, slices):
    for given in (slices[:, 0], slices.expand(-1, 3, -1, -1), slices.long()):
        with pytest.raises(ValueError, match=r"need \(N, 1, H, W\) float"):
            features(given)


def test_a_file_that_is_not_inceptions_is_refused_in_one_line_that_names_it(
        inception, weights, tmp_path):
    path = tmp_path / "given.pth"

    def refused(match):
        with pytest.raises(ValueError, match=match) as caught:
            load_features(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    with pytest.raises(FileNotFoundError, match="given.pth"):
        load_features(path)
    path.write_text("not weights")
    refused("damaged")
    torch.save({"state_dict": inception.state_dict()["fc.bias"], "epoch": 3}, path)
    refused("damaged, or not a state dict")
    torch.save(resnet18(weights=None).state_dict(), path)
    refused("not the weights of torchvision's Inception v3")
    state = dict(inception.state_dict())
    state["fc.weight"] = torch.zeros(1008, 2048)  # as of the Inception of published FIDs
    torch.save(state, path)
    refused("not the weights of torchvision's Inception v3")
    state["fc.weight"] = torch.full((1000, 2048), torch.nan)
    torch.save(state, path)
    refused("not finite")


def test_weights_in_the_format_of_before_2020_are_read_too(inception, features, slices, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(inception.state_dict(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_features(path)(slices[:1]), features(slices[:1]))
    path.write_bytes(path.read_bytes()[:50_000_000])
    with pytest.raises(ValueError, match="old.pth: damaged"):
        load_features(path)


def test_a_flipped_bit_or_a_missing_end_is_damage(weights, tmp_path):
    content = bytearray(weights.read_bytes())
    middle = len(content) // 2
    (tmp_path / "short.pth").write_bytes(content[:middle])
    content[middle] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    for name in ("short.pth", "flipped.pth"):
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            load_features(tmp_path / name)
