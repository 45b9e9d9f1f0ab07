"""The architectures: weights counted by hand, shapes, seeds, split points, and that the file works alone."""

from __future__ import annotations

import ast
import collections
import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guard import SuspectModel
from guard.data.datasets import load_dataset, to_tensor_images
from guard.lab.attacks import networks
from guard.lab.attacks.networks import NETWORKS, EncoderBlock, PadShortcut, deepid, gtsrb_cnn, mnist_cnn, nin, resnet20

# Image shape, classes, split, columns of the features, of each factory called without arguments.
EXPECTED = {
    "mnist_cnn": ((1, 28, 28), 10, "fc1", 512),
    "mnist_small": ((1, 28, 28), 10, "fc1", 64),
    "gtsrb_cnn": ((3, 32, 32), 43, "fc1", 512),
    "gtsrb_cnn_unpadded": ((3, 32, 32), 43, "fc1", 128),
    "nin": ((3, 32, 32), 10, "classifier", 192),
    "deepid": ((1, 64, 56), 38, "fc1", 3400),
    "resnet18": ((3, 32, 32), 10, "fc", 512),
    "resnet18_narrow": ((3, 32, 32), 10, "fc", 128),
    "resnet20": ((3, 32, 32), 10, "fc", 64),
    "vgg_small": ((3, 32, 32), 10, "fc1", 1024),
    "vgg_narrow": ((3, 32, 32), 10, "fc1", 256),
    "densenet121": ((3, 32, 32), 10, "fc", 1024),
    "vit_small": ((3, 32, 32), 10, "head", 192),
    "vit_tiny": ((3, 32, 32), 10, "head", 96),
}
every_network = pytest.mark.parametrize("name", list(NETWORKS))


@functools.cache
def network(name: str) -> nn.Module:
    return NETWORKS[name](seed=0).eval()


def random_images(name: str, n: int = 2) -> Tensor:
    return torch.rand(n, *EXPECTED[name][0], generator=torch.Generator().manual_seed(0))


def n_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def conv(c_in: int, c_out: int, k: int) -> int:
    return c_in * c_out * k * k + c_out


def linear(n_in: int, n_out: int) -> int:
    return n_in * n_out + n_out


def conv_norm(c_in: int, c_out: int, k: int) -> int:
    return c_in * c_out * k * k + 2 * c_out  # no bias; scale and shift of the batch norm


# 896 + 9,248 + 18,496 + 36,928 + 73,856 + 147,584 = 287,008
GTSRB_CONVS = (
    conv(3, 32, 3) + conv(32, 32, 3) + conv(32, 64, 3) + conv(64, 64, 3) + conv(64, 128, 3) + conv(128, 128, 3)
)
# 20 * 9 * 40 + 40 = 7,240; 40 * 9 * 60 + 60 = 21,660; 60 * 4 * 80 + 80 = 19,280
DEEPID_CONVS = conv(20, 40, 3) + conv(40, 60, 3) + conv(60, 80, 2)


@pytest.mark.parametrize(
    ("name", "by_hand", "total"),
    [
        # 416 + 12,832 + 262,656 + 5,130
        ("mnist_cnn", conv(1, 16, 5) + conv(16, 32, 5) + linear(512, 512) + linear(512, 10), 281_034),
        # 416 + 1,604 + 33,280 + 5,130
        ("mnist_small", conv(1, 16, 5) + conv(16, 4, 5) + linear(64, 512) + linear(512, 10), 40_430),
        # 32 -> 32, 30, 15 -> 15, 13, 6 -> 6, 4, 2: 128 * 2 * 2 = 512 features. 287,008 + 262,656 + 22,059
        ("gtsrb_cnn", GTSRB_CONVS + linear(512, 512) + linear(512, 43), 571_723),
        # 32 -> 30, 28, 14 -> 12, 10, 5 -> 3, 1: 128 features. 287,008 + 66,048 + 22,059
        ("gtsrb_cnn_unpadded", GTSRB_CONVS + linear(128, 512) + linear(512, 43), 375_115),
        (
            "nin",
            # 14,592 + 30,880 + 15,456; 460,992 + 2 * 37,056; 331,968 + 37,056 + 1,930
            conv(3, 192, 5)
            + conv(192, 160, 1)
            + conv(160, 96, 1)
            + conv(96, 192, 5)
            + 3 * conv(192, 192, 1)
            + conv(192, 192, 3)
            + conv(192, 10, 1),
            966_986,
        ),
        # 64 x 56 -> 61 x 53, 30 x 26 -> 28 x 24, 14 x 12 -> 12 x 10, 6 x 5 -> 5 x 4: P 60 * 30, C 80 * 20
        ("deepid", conv(1, 20, 4) + DEEPID_CONVS + linear(1800 + 1600, 160) + linear(160, 38), 598_798),
        (
            "resnet18",
            conv_norm(3, 64, 3)
            + 4 * conv_norm(64, 64, 3)
            + sum(conv_norm(w // 2, w, 3) + 3 * conv_norm(w, w, 3) + conv_norm(w // 2, w, 1) for w in (128, 256, 512))
            + linear(512, 10),
            11_173_962,
        ),
        (
            "resnet18_narrow",
            conv_norm(3, 16, 3)
            + 4 * conv_norm(16, 16, 3)
            + sum(conv_norm(w // 2, w, 3) + 3 * conv_norm(w, w, 3) + conv_norm(w // 2, w, 1) for w in (32, 64, 128))
            + linear(128, 10),
            701_466,
        ),
        (
            "resnet20",
            conv_norm(3, 16, 3)
            + 6 * conv_norm(16, 16, 3)
            + sum(conv_norm(w // 2, w, 3) + 5 * conv_norm(w, w, 3) for w in (32, 64))
            + linear(64, 10),
            269_722,
        ),
        (
            "vgg_small",
            conv_norm(3, 64, 3)
            + conv_norm(64, 64, 3)
            + conv_norm(64, 128, 3)
            + conv_norm(128, 128, 3)
            + conv_norm(128, 256, 3)
            + 3 * conv_norm(256, 256, 3)
            + linear(1024, 256)  # 256 * 2 * 2
            + linear(256, 10),
            2_591_946,
        ),
        (
            "vgg_narrow",
            conv_norm(3, 16, 3)
            + conv_norm(16, 16, 3)
            + conv_norm(16, 32, 3)
            + conv_norm(32, 32, 3)
            + conv_norm(32, 64, 3)
            + 3 * conv_norm(64, 64, 3)
            + linear(256, 64)  # 64 * 2 * 2
            + linear(64, 10),
            163_386,
        ),
        (
            "densenet121",
            3 * 64 * 9
            # a layer with c channels: norm 2c, conv c * 128, norm 256, conv 128 * 32 * 9
            + sum(
                2 * c + 128 * c + 256 + 36_864
                for start, size in ((64, 6), (128, 12), (256, 24), (512, 16))
                for c in range(start, start + 32 * size, 32)
            )
            + sum(2 * c + c * (c // 2) for c in (256, 512, 1024))  # transitions
            + 2 * 1024
            + linear(1024, 10),
            6_956_298,
        ),
        (
            "vit_small",
            conv(3, 192, 4)
            + 64 * 192  # positions
            + 6 * (4 * 192 + linear(192, 576) + linear(192, 192) + linear(192, 384) + linear(384, 192))
            + 2 * 192
            + linear(192, 10),
            1_806_154,
        ),
        (
            "vit_tiny",
            conv(3, 96, 4)
            + 64 * 96  # positions
            + 4 * (4 * 96 + linear(96, 288) + linear(96, 96) + linear(96, 192) + linear(192, 96))
            + 2 * 96
            + linear(96, 10),
            311_146,
        ),
    ],
)
def test_network_weights_equal_count_by_hand(name, by_hand, total):
    assert n_weights(network(name)) == by_hand == total


def test_networks_name_every_factory_once():
    assert list(NETWORKS) == list(EXPECTED)
    assert all(NETWORKS[name] is getattr(networks, name) for name in NETWORKS)


@every_network
def test_network_runs_every_module_once_and_returns_logits(name):
    module = network(name)
    calls: collections.Counter[str] = collections.Counter()
    handles = [
        inner.register_forward_hook(lambda *_, key=key: calls.update([key])) for key, inner in module.named_modules()
    ]
    with torch.no_grad():
        logits = module(random_images(name))
    for handle in handles:
        handle.remove()
    assert calls == dict.fromkeys(dict(module.named_modules()), 1)
    assert logits.shape == (2, EXPECTED[name][1])
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


@every_network
def test_network_is_split_before_its_head(name):
    _, n_classes, split, n_features = EXPECTED[name]
    suspect = SuspectModel(network(name))
    activations = suspect.activations(random_images(name))
    assert suspect.split_points.split == split
    assert activations.features.shape == (2, n_features)
    assert activations.logits.shape == (2, n_classes)
    assert len(activations.depths) == 3
    assert all(array.std() > 0 for array in activations.depths.values())


@every_network
def test_network_takes_other_classes_and_channels(name):
    height, width = EXPECTED[name][0][1:]
    module = NETWORKS[name](7, channels=2, seed=0).eval()
    with torch.no_grad():
        assert module(torch.zeros(1, 2, height, width)).shape == (1, 7)


@every_network
def test_network_seed_fixes_weights_and_leaves_global_random_state_alone(name):
    before = torch.get_rng_state()
    again, other = (NETWORKS[name](seed=seed).state_dict() for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    first = network(name).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_network_without_seed_draws_from_global_random_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, second = mnist_cnn(), mnist_cnn()
    assert torch.equal(first.fc1.weight, mnist_cnn(seed=5).fc1.weight)
    assert not torch.equal(first.fc1.weight, second.fc1.weight)


@every_network
def test_network_refuses_too_few_classes_or_channels(name):
    with pytest.raises(ValueError, match="n_classes must be at least 2, got 1"):
        NETWORKS[name](1)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        NETWORKS[name](2, channels=0)


def test_deepid_size_of_the_paper_has_its_flat_sizes():
    module = deepid(1283, channels=3, image_size=(55, 47), seed=0)
    # 980 + 48,180 + (1200 + 960 inputs) 345,760 + 206,563
    assert n_weights(module) == conv(3, 20, 4) + DEEPID_CONVS + linear(1200 + 960, 160) + linear(160, 1283) == 601_483
    assert module(torch.zeros(1, 3, 55, 47)).shape == (1, 1283)


def test_deepid_features_are_both_last_feature_maps():
    module, images = deepid(seed=0), random_images("deepid")
    kept = {}
    for layer in ("pool3", "relu4"):
        module.get_submodule(layer).register_forward_hook(lambda _m, _a, out, key=layer: kept.update({key: out}))
    features = torch.from_numpy(SuspectModel(module).activations(images).features)
    torch.testing.assert_close(features, torch.cat([kept["pool3"].flatten(1), kept["relu4"].flatten(1)], 1))


def test_deepid_refuses_images_that_vanish_under_its_pooling():
    assert deepid(image_size=(31, 31))(torch.zeros(1, 1, 31, 31)).shape == (1, 38)
    with pytest.raises(ValueError, match=r"image_size must be at least \(31, 31\), got \(31, 30\)"):
        deepid(image_size=(31, 30))


def test_encoder_block_equals_torch_encoder_layer():
    torch_layer = nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    ours = EncoderBlock(12, n_heads=3, hidden=20)
    ours.norm1.load_state_dict(torch_layer.norm1.state_dict())
    ours.norm2.load_state_dict(torch_layer.norm2.state_dict())
    attention = torch_layer.self_attn
    ours.qkv.load_state_dict({"weight": attention.in_proj_weight, "bias": attention.in_proj_bias})
    ours.project.load_state_dict(attention.out_proj.state_dict())
    ours.mlp[0].load_state_dict(torch_layer.linear1.state_dict())
    ours.mlp[2].load_state_dict(torch_layer.linear2.state_dict())
    tokens = torch.rand(2, 5, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(tokens), torch_layer(tokens))  # in training mode: not torch's fast path


def test_pad_shortcut_keeps_every_second_pixel_and_pads_channels():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    zeros = torch.zeros(2, 2)
    expected = torch.stack([zeros, torch.tensor([[0.0, 2.0], [8.0, 10.0]]), zeros, zeros])[None]
    assert torch.equal(PadShortcut(3)(x), expected)


def test_resnet20_shortcuts_have_no_weights():
    names = [name for name, _ in resnet20(seed=0).named_parameters()]
    assert len(names) == 19 + 2 * 19 + 2  # convolutions, their batch norms, the last layer
    assert not any("shortcut" in name for name in names)


def test_nin_start_passes_gradients_from_every_logit():
    module = nin(seed=0).eval()
    logits = module(random_images("nin"))
    assert (logits > 0.3).all()
    gradient = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0, 1])), module.stage1[0].weight)[0]
    assert gradient.abs().max() > 0


# 24 steps of Adam on 128 MNIST digits padded to 32 x 32; the loss starts near log(10) = 2.3 or above.
@pytest.mark.parametrize("name", ["gtsrb_cnn", "gtsrb_cnn_unpadded", "deepid"])
def test_plain_deep_network_starts_to_learn(name):
    digits = load_dataset("mnist", "test")[:128]
    images = F.pad(torch.from_numpy(to_tensor_images(digits.images)), (2, 2, 2, 2))
    labels = torch.from_numpy(digits.labels)
    options = {"image_size": (32, 32)} if name == "deepid" else {}
    module = NETWORKS[name](10, channels=1, seed=0, **options)
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
    for step in range(24):
        rows = slice(step % 4 * 32, step % 4 * 32 + 32)
        optimiser.zero_grad()
        F.cross_entropy(module(images[rows]), labels[rows]).backward()
        optimiser.step()
    with torch.no_grad():
        assert F.cross_entropy(module(images), labels) < 1.0


def test_networks_file_works_alone():
    path = Path(networks.__file__)
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= {"torch", *sys.stdlib_module_names}
    spec = importlib.util.spec_from_file_location("copied_networks", path)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    copied.gtsrb_cnn(seed=3).load_state_dict(gtsrb_cnn(seed=4).state_dict())
