import architectures as nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from guard.errors import SuspectModelError
from guard.suspect.contents import layer_contents
from guard.suspect.model import SuspectModel
from guard.suspect.split_points import SplitPoints, find_split_points, pool_features
from guard.types import Activations

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
        pytest.param(
            lambda: nets.ResNet(widths=(8, 16, 24, 32, 40)),
            (3, 16, 16),
            "fc",
            ("layer2", "layer3", "layer4"),
            id="resnet-to-one-pixel",
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
        pytest.param(nets.StemTransformer, COLOUR, "head", ("blocks.1", "blocks.3", "blocks.5"), id="stem-vit"),
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
        pytest.param(nets.Vgg, COLOUR, {"depths": ["features"]}, "must not be called 'features'", id="reserved"),
        pytest.param(nets.VisionTransformer, COLOUR, {"split": "blocks.0.attention.out_proj"}, "not", id="never-run"),
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


@pytest.mark.parametrize(
    ("build", "split", "depths", "widths"),
    [
        pytest.param(nets.Swin, "head", ("stages.0", "stages.1", "stages.2"), (96, 432, 384, 432), id="swin"),
        pytest.param(  # attention matrices as large as the maps of the first and the third stage
            lambda: nets.Swin(attends=True),
            "head",
            ("stages.0", "stages.1", "stages.2"),
            (96, 432, 384, 432),
            id="attending-swin",
        ),
        pytest.param(nets.Cait, "head", ("blocks.0", "blocks.1", "blocks.2"), (16, 16, 16, 16), id="cait"),
        pytest.param(
            lambda: nets.Cait(n_class_blocks=1), "head", ("blocks.0", "blocks.1", "blocks.2"), (16,) * 4, id="xcit"
        ),
        pytest.param(nets.Recurrent, "fc", ("stem",), (8, 512), id="recurrent"),
        pytest.param(
            lambda: nets.CosineHead(True), "pool:output", ("stages.0", "stages.1"), (24, 512, 400), id="cosine"
        ),
        pytest.param(
            lambda: nets.CosineHead(False), "pool:output", ("stages.0", "stages.1"), (24, 512, 400), id="functional"
        ),
        pytest.param(
            lambda: nets.CosineHead(False, False),
            "pool:output",
            ("stages.0", "stages.1"),
            (384, 512, 400),
            id="unpooled",
        ),
        pytest.param(nets.WideMlp, "fc", (), (4096,), id="wide"),
    ],
)
def test_layers_of_unusual_layouts_carry_what_differs_between_images(build, split, depths, widths):
    torch.manual_seed(0)
    suspect = SuspectModel(build())

    got = suspect.activations(images(COLOUR, 64).numpy())

    assert (suspect.split_points.split, suspect.split_points.depths) == (split, depths)
    assert tuple(array.shape[1] for _, array in got.items()[1:]) == widths
    assert [content.name for content in suspect.contents] == ["features", *depths]
    for content in suspect.contents:
        assert content.rank > 5
        assert content.spread > 0
        assert not content.problem


def test_channels_last_maps_are_pooled_over_height_and_width():
    torch.manual_seed(0)
    model, data = nets.Swin(), images(COLOUR, 4)
    suspect = SuspectModel(model, depths=["stages.1", "stages.1.1.mlp"])
    kept = {}
    model.stages[1].register_forward_hook(lambda _m, _a, output: kept.update(maps=output))

    got = suspect.activations(data.numpy())

    assert suspect.split_points.channels_last == ("stages.1", "stages.1.1.mlp")
    wanted = F.adaptive_avg_pool2d(kept["maps"].permute(0, 3, 1, 2), 4).flatten(1)  # 24 channels on a grid of 4 x 4
    np.testing.assert_allclose(got.depths["stages.1"], wanted, atol=1e-6)
    older = SuspectModel(model)
    older.use_split_points(SplitPoints.from_dict({"split": "head", "depths": ["stages.1"]}))  # of a bundle made before
    before = F.adaptive_avg_pool2d(kept["maps"], 8).flatten(1)
    np.testing.assert_allclose(older.activations(data.numpy()).depths["stages.1"], before, atol=1e-6)


@pytest.mark.parametrize("size", [8, 12, 16])
def test_channels_first_maps_of_convnext_stay_so_where_all_sizes_agree(size):
    points = find_split_points(nets.ConvNeXt(), images((3, 2 * size, 2 * size)))

    assert points.channels_last == ()


def test_layer_that_runs_several_times_is_watched_the_last_time():
    torch.manual_seed(0)
    model, data = nets.Recurrent(), images(COLOUR, 4)

    got = SuspectModel(model, depths=["block"]).activations(data.numpy())

    with torch.no_grad():
        np.testing.assert_allclose(got.features, model.eval().features(data), atol=1e-6)
    assert got.depths["block"].shape == (4, 512)


def test_split_of_one_example_or_two_equal_ones_is_that_of_many():
    for data in (images(COLOUR, 1), images(COLOUR, 1).repeat(2, 1, 1, 1), torch.zeros(2, *COLOUR)):
        assert find_split_points(nets.Cait(), data).split == "head"


def test_split_named_under_a_second_name_of_its_module_is_taken():
    model = nets.ResNet()
    model.classifier = model.fc

    assert find_split_points(model, images(COLOUR), split="classifier").split == "classifier"


def test_huge_split_is_averaged_to_fewer_columns():
    torch.manual_seed(0)
    model, data = nets.WideMlp(), images(COLOUR, 3)
    suspect = SuspectModel(model)

    got = suspect.activations(data.numpy())

    assert suspect.split_points.columns == 4096
    assert "4096 numbers, averaged from many more" in str(suspect.contents[0])
    with torch.no_grad():
        whole = model.conv(data).flatten(1)
    np.testing.assert_allclose(got.features, whole.view(3, 4096, 12).mean(2), atol=1e-6)


def test_contents_name_a_layer_that_carries_nothing():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
            nn.init.zeros_(self.conv.weight)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)))

    suspect = SuspectModel(Dead())
    assert suspect.contents == ()
    suspect.activations(images(COLOUR, 20).numpy())

    (content,) = suspect.contents
    assert (content.width, content.rank, content.spread) == (4, 0, 0.0)
    assert content.problem == "features is the same for every image: name another layer"


def test_contents_of_known_features_have_their_rank_and_spread():
    base = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    features = np.concatenate([base, base @ np.ones((3, 5), np.float32)], axis=1)
    (content,) = layer_contents(Activations(base, features))

    assert (content.rank, content.rows, content.width) == (3, 256, 8)
    assert not content.problem
    (content,) = layer_contents(Activations(base, features[:, 3:]))
    assert content.rank == 1
    assert "carries 1 of 5 directions" in content.problem
    assert str(content).startswith("features: 5 numbers, rank 1 in 256 images, spread ")


@pytest.mark.filterwarnings("ignore")
def test_split_of_quantised_networks_lies_before_the_last_layer():
    model = torch.ao.quantization.quantize_dynamic(nets.Vgg().eval(), {nn.Linear}, dtype=torch.qint8)

    assert find_split_points(model, images(COLOUR)).split == "classifier.4:output"
