import architectures as nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from guard.errors import SuspectModelError
from guard.suspect.split_points import find_split_points, pool_features

GREY, COLOUR = (1, 28, 28), (3, 32, 32)


def images(shape, n=2):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "shape", "split", "depths"),
    [
        pytest.param(nets.lenet, GREY, "7", ("1", "2", "4"), id="lenet"),
        pytest.param(nets.FunctionalNet, GREY, "fc1", ("conv1", "conv2"), id="functional"),
        pytest.param(nets.Vgg, COLOUR, "classifier.0", ("features.6", "features.10", "features.14"), id="vgg"),
        pytest.param(nets.ResNet, COLOUR, "fc", ("layer1", "layer2", "layer3"), id="resnet"),
        pytest.param(
            lambda: nets.ResNet(widths=(8, 16, 24)),
            COLOUR,
            "fc",
            ("layer1", "layer2", "layer3.0"),
            id="resnet-3-stages",
        ),
        pytest.param(
            lambda: nets.ResNet("bottleneck"), COLOUR, "fc", ("layer1", "layer2", "layer3"), id="resnet-bottleneck"
        ),
        pytest.param(lambda: nets.ResNet("gated"), COLOUR, "fc", ("layer1", "layer2", "layer3"), id="se-resnet"),
        pytest.param(
            lambda: nets.Backbone(nets.ResNet("bottleneck")),
            COLOUR,
            "inner.fc",
            ("inner.layer1", "inner.layer2", "inner.layer3"),
            id="normalised-resnet",
        ),
        pytest.param(
            nets.DenseNet,
            COLOUR,
            "classifier",
            ("features.denseblock1", "features.denseblock2", "features.denseblock3"),
            id="densenet",
        ),
        pytest.param(
            nets.MobileNetV2, COLOUR, "classifier.1", ("features.1", "features.3", "features.5"), id="mobilenet-v2"
        ),
        pytest.param(nets.nin, COLOUR, "12", ("3", "4", "8"), id="nin"),
        pytest.param(nets.VisionTransformer, COLOUR, "head", ("blocks.1", "blocks.3", "blocks.5"), id="vit"),
        pytest.param(nets.ConvNeXt, COLOUR, "head", ("stages.0", "stages.2", "stages.4"), id="convnext"),
        pytest.param(nets.mlp, GREY, "9", ("2", "4", "6"), id="mlp"),
    ],
)
def test_find_split_points_of_each_family_finds_head_and_stage_ends(build, shape, split, depths):
    points = find_split_points(build(), images(shape))

    assert (points.split, points.depths) == (split, depths)


def test_find_split_points_from_one_ndarray_image_equals_batch():
    model = nets.lenet()

    assert find_split_points(model, images(GREY, 1).numpy()) == find_split_points(model, images(GREY, 5))


def test_find_split_points_named_by_user_are_kept():
    points = find_split_points(nets.Vgg(), images(COLOUR), split="classifier.3", depths=["features.3", "classifier.1"])

    assert (points.split, points.depths) == ("classifier.3", ("features.3", "classifier.1"))


def test_find_split_points_behind_a_named_second_layer_keeps_the_last_stage():
    points = find_split_points(nets.Vgg(), images(COLOUR), split="classifier.3")

    assert points.depths == ("features.10", "features.14", "avgpool")


def test_find_split_points_of_named_output_takes_only_earlier_depths():
    points = find_split_points(nets.ResNet(), images(COLOUR), split="layer3:output")

    assert (points.split, points.depths) == ("layer3:output", ("layer1", "layer2", "layer3.0"))


def test_find_split_points_with_empty_depths_takes_none():
    assert find_split_points(nets.lenet(), images(GREY), depths=()).depths == ()


def test_find_split_points_unknown_name_lists_close_ones():
    with pytest.raises(SuspectModelError, match=r"no layer 'clasifier.0'. Did you mean .*'classifier.0'"):
        find_split_points(nets.Vgg(), images(COLOUR), split="clasifier.0")
    with pytest.raises(SuspectModelError, match="no layer 'layer9'"):
        find_split_points(nets.ResNet(), images(COLOUR), depths=["layer9"])


@pytest.mark.parametrize(
    ("build", "shape", "named", "message"),
    [
        pytest.param(nets.ResNet, COLOUR, {"depths": ["layer1.0.relu"]}, "exactly once", id="shared"),
        pytest.param(nets.Vgg, COLOUR, {"depths": ["features"]}, "must not be called 'features'", id="reserved"),
        pytest.param(nets.VisionTransformer, COLOUR, {"split": "blocks.0.attention.out_proj"}, "once", id="never-run"),
    ],
)
def test_find_split_points_named_layer_that_cannot_serve_is_refused(build, shape, named, message):
    with pytest.raises(SuspectModelError, match=message):
        find_split_points(build(), images(shape), **named)


def test_find_split_points_without_any_layer_says_what_to_name():
    class Formula(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    with pytest.raises(SuspectModelError, match="Name a layer"):
        find_split_points(Formula(), images(COLOUR))


def test_find_split_points_leaves_no_hooks_and_keeps_training_flags():
    model = nets.Vgg().train()
    model.classifier.eval()
    before = [module.training for module in model.modules()]

    find_split_points(model, images(COLOUR))

    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_find_split_points_removes_hooks_when_the_model_raises():
    model = nets.Vgg()

    with pytest.raises(RuntimeError):
        find_split_points(model, images(GREY))

    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        ((2, 8, 8, 8), 512),
        ((2, 9, 8, 8), 9 * 7 * 7),
        ((2, 64, 32, 32), 256),
        ((2, 64, 3, 40), 256),
        ((2, 512, 7, 7), 512),
        ((2, 600, 4, 4), 512),
        ((2, 2048, 7, 7), 512),
        ((2, 17, 16), 16),
        ((2, 5, 768), 512),
        ((2, 10), 10),
        ((2, 4096), 512),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pool_features_of_any_shape_gives_float32_within_limit(shape, columns, dtype):
    pooled = pool_features(torch.rand(shape).to(dtype))

    assert pooled.shape == (2, columns)
    assert pooled.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 32, 12, 12), (1, 64, 32, 32), (4, 32, 60, 60), (2, 32, 14, 14)])
def test_pool_features_on_a_grid_equals_adaptive_average(shape):
    maps = torch.rand(shape)
    grid = int((512 // shape[1]) ** 0.5)

    torch.testing.assert_close(pool_features(maps), F.adaptive_avg_pool2d(maps, grid).flatten(1))


def test_pool_features_beyond_limit_averages_neighbouring_channels():
    row = torch.arange(8.0)[None]

    np.testing.assert_allclose(pool_features(row, limit=4).numpy(), [[0.5, 2.5, 4.5, 6.5]])


def test_pool_features_of_five_dimensions_is_refused():
    with pytest.raises(SuspectModelError, match="2, 3 or 4 dimensions"):
        pool_features(torch.zeros(1, 2, 3, 4, 5))
