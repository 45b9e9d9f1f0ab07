"""Defective networks: masks that stay, blocks that exist, training that knows when to stop."""

from __future__ import annotations

from collections import OrderedDict

import architectures
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from guard.backups.backup_training import FitSettings
from guard.backups.clean_set import CleanSet
from guard.backups.defective import (
    DefectiveConv2d,
    DefectiveSettings,
    bottom_blocks,
    forget,
    make_defective,
    train_defective,
)
from guard.backups.network import backup_cnn
from guard.errors import DataError, SuspectModelError
from guard.lab.attacks.networks import NETWORKS
from guard.lab.attacks.networks import ResNet as WideResNet
from guard.suspect.digest import weights_digest

GREY = (1, 8, 8)


def small() -> nn.Module:
    return backup_cnn(3, 1, (8, 8), seed=0)


def layer(keep_probability: float = 0.5, **changes: object) -> DefectiveConv2d:
    settings = {"output_size": (9, 9), "generator": torch.Generator().manual_seed(0), "padding": 1, **changes}
    return DefectiveConv2d(1, 40, 3, keep_probability=keep_probability, **settings)  # type: ignore[arg-type]


def test_dead_neurons_give_zero_in_training_and_testing_and_living_ones_the_convolution():
    defective = layer()
    x = torch.rand(5, 1, 9, 9)
    whole = nn.functional.conv2d(x, defective.weight, defective.bias, padding=1)
    for mode in (True, False):
        y = defective.train(mode)(x)
        assert not y[:, ~defective.mask].any()
        torch.testing.assert_close(y[:, defective.mask], whole[:, defective.mask])


def test_share_of_living_neurons_is_the_keep_probability():
    assert float(layer(0.3).mask.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert layer(1.0).mask.all()
    assert layer(1e-9).mask.any()  # a layer without any would pass nothing on


def test_variants_mask_neurons_channels_or_the_same_places():
    neuron, channel, shared = (layer(variant=variant).mask for variant in ("neuron", "channel", "shared"))
    assert not torch.equal(neuron[0], neuron[1])
    assert (channel.flatten(1).all(1) | ~channel.flatten(1).any(1)).all()
    assert (shared == shared[:1]).all()
    assert 0 < float(shared.float().mean()) < 1


def test_mask_is_saved_with_the_weights_and_not_learned(tmp_path):
    first = make_defective(small(), 0.5, image_shape=GREY, seed=1)
    other = make_defective(small(), 0.5, image_shape=GREY, seed=2)
    assert weights_digest(first) != weights_digest(other)
    save_file(first.state_dict(), tmp_path / "network.safetensors")
    other.load_state_dict(load_file(tmp_path / "network.safetensors"))
    x = torch.rand(4, *GREY)
    assert torch.equal(first(x), other(x))
    assert not any("mask" in name for name, _ in first.named_parameters())


def test_masks_are_independent_over_layers_and_repeat_with_the_seed():
    same = [make_defective(small(), 0.5, ("blocks.0", "blocks.1"), image_shape=GREY, seed=3) for _ in range(2)]
    assert weights_digest(same[0]) == weights_digest(same[1])
    blocks = same[0].get_submodule("blocks")
    assert not torch.equal(blocks[0][0].mask[:32, :4, :4], blocks[1][0].mask[:32, :4, :4])
    assert not isinstance(blocks[2][0], DefectiveConv2d)


def test_make_defective_keeps_the_network_and_shares_no_weight_with_it():
    network, state = small(), torch.get_rng_state()
    before = weights_digest(network)
    defective = make_defective(network, 0.5, image_shape=GREY, seed=5)
    assert weights_digest(network) == before
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in network.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            assert not torch.equal(parameter, defective.get_parameter(name)), name
    same = make_defective(network, 1.0, image_shape=GREY, fresh=False)
    x = torch.rand(4, *GREY)
    torch.testing.assert_close(same(x), network(x))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("mnist_cnn", (1, 28, 28), {"conv1"}),
        ("gtsrb_cnn", (3, 32, 32), {"stage1.0", "stage1.2"}),
        ("resnet20", (3, 32, 32), {"conv1", "stages.0.0.conv1", "stages.1.2.conv2"}),
        ("vgg_small", (3, 32, 32), {"stages.0.0", "stages.1.3"}),
    ],
)
def test_bottom_is_what_sees_half_of_the_image_or_more(name, shape, expected):
    network = NETWORKS[name](10, channels=shape[0], seed=0)
    bottom = set(bottom_blocks(network, shape))
    assert expected <= bottom
    assert not any(block.startswith(("stages.2", "stage3", "conv2", "fc")) for block in bottom)
    made = make_defective(network, 0.5, image_shape=shape)
    assert {name for name, entry in made.named_modules() if isinstance(entry, DefectiveConv2d)} == bottom


def vgg19():
    """Sixteen convolutions in five stages, two, two and three times four, as narrow as can be."""
    layers, channels = [], 3
    for convolutions in (2, 2, 4, 4, 4):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU()]
            channels = 4
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        OrderedDict(features=nn.Sequential(*layers), flatten=nn.Flatten(), classifier=nn.Linear(4, 10))
    )


#: Networks of the paper's list, and how many convolutions are in the blocks that it makes defective on 32 x 32 images.
PAPERS_NETWORKS = {
    "ResNet-18": (lambda: NETWORKS["resnet18"](10, seed=0), ("conv1", "stages.0", "stages.1"), 1 + 4 + 5),
    "ResNet-50": (lambda: architectures.ResNet("bottleneck"), ("conv1", "layer1", "layer2"), 1 + 8 + 8),
    "DenseNet-121": (
        lambda: NETWORKS["densenet121"](10, seed=0),
        ("stem", "blocks.block1", "blocks.block2"),
        1 + 12 + 24,
    ),
    "SENet-18": (lambda: architectures.ResNet("gated"), ("conv1", "layer1", "layer2"), 1 + 4 + 5),
    "VGG-19": (vgg19, ("features.0", "features.2", "features.5", "features.7"), 4),
    "WRN-32": (lambda: WideResNet((8, 16, 32), 5, True, 10, 3), ("conv1", "stages.0", "stages.1"), 1 + 10 + 11),
}


@pytest.mark.parametrize("name", PAPERS_NETWORKS)
def test_bottoms_of_the_papers_networks_are_found_or_named(name):
    make, blocks, expected = PAPERS_NETWORKS[name]
    colour, network = (3, 32, 32), make()
    named = make_defective(network, 0.5, blocks, image_shape=colour, fresh=False)
    found = make_defective(network, 0.5, image_shape=colour, fresh=False)
    of_named, of_found = (
        {name for name, entry in made.named_modules() if isinstance(entry, DefectiveConv2d)} for made in (named, found)
    )
    assert len(of_named) == expected
    assert of_named <= of_found  # by themselves, first 1 x 1 convolutions of the next block are found too
    assert all(not any(name.startswith(block) for block in blocks) for name in of_found - of_named)
    assert named(torch.rand(2, *colour)).shape == (2, 10)


def test_training_learns_and_a_pretraining_hook_comes_first():
    labels = np.arange(90) % 3
    images = np.random.default_rng(0).random((90, *GREY), dtype=np.float32) * 0.5
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label + 1 : 2 * label + 3] += 0.5
    network = make_defective(small(), 0.7, image_shape=GREY)
    clean = CleanSet.split(images, labels, 3, 0)
    masks = [module.mask.clone() for module in network.modules() if isinstance(module, DefectiveConv2d)]
    seen: list[str] = []
    report = train_defective(
        network,
        clean,
        FitSettings(epochs=12, batch_size=16, learning_rate=5e-3),
        pretrain=lambda module: seen.append(weights_digest(module)),
    )
    assert seen == [weights_digest(make_defective(small(), 0.7, image_shape=GREY))]
    assert report.held_out_accuracy > 0.8
    assert all(
        torch.equal(mask, module.mask)
        for mask, module in zip(masks, (m for m in network.modules() if isinstance(m, DefectiveConv2d)), strict=True)
    )


# --- bad input


@pytest.mark.parametrize("keep_probability", [0.0, -0.1, 1.0001, float("nan")])
def test_keep_probability_outside_its_range_is_refused(keep_probability):
    for make in (
        lambda: layer(keep_probability),
        lambda: make_defective(small(), keep_probability, image_shape=GREY),
        lambda: DefectiveSettings(keep_probability=keep_probability),
    ):
        with pytest.raises(DataError, match=r"keep_probability must be in \(0, 1\], got"):
            make()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (("stage9",), r"the network has no block 'stage9'\. Its parts are blocks, pool"),
        (("fc",), "block 'fc' holds no convolution that runs"),
        ((), "name at least one block"),
    ],
)
def test_blocks_that_do_not_exist_or_hold_no_convolution_are_refused(blocks, message):
    with pytest.raises(SuspectModelError, match=message):
        make_defective(small(), 0.5, blocks, image_shape=GREY)


def test_images_of_another_size_and_other_faults_are_refused():
    with pytest.raises(DataError, match=r"outputs of size \(9, 9\), got \(7, 7\)"):
        layer()(torch.rand(1, 1, 7, 7))
    with pytest.raises(DataError, match="variant must be one of"):
        layer(variant="row")
    with pytest.raises(SuspectModelError, match=r"cannot be run on images of shape \(3, 8, 8\)"):
        make_defective(small(), 0.5, image_shape=(3, 8, 8))
    with pytest.raises(DataError, match="at least 8 pixels"):
        backup_cnn(3, 1, (7, 8), seed=0)
    with pytest.raises(SuspectModelError, match="holds no DefectiveConv2d"):
        train_defective(small(), None)  # type: ignore[arg-type]


def test_weights_that_no_layer_knows_how_to_draw_are_refused():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(SuspectModelError, match=r"holds weights and has no reset_parameters"):
        forget(Own())
