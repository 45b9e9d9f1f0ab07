"""Architectures that the demo, the benchmarks and the zoo of models are trained with.

This one file imports only torch and the standard library: copied alone, it builds every network of the zoo. All of
them take float32 images (n, channels, height, width) in [0, 1], not normalised further, and give logits
(n, n_classes). Activations, pooling and shortcuts are modules of their own, so that hooks see them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class MnistCnn(nn.Module):
    """Two convolutions and two fully connected layers for 28 x 28 images.

    Conv 1-16 k5, ReLU, MaxPool 2, Conv 16-32 k5, ReLU, MaxPool 2, Linear 512-512, ReLU, Linear 512-10; no padding,
    281,034 weights.

    References
    ----------
    .. [1] Gu, Dolan-Gavitt, Garg (2019), BadNets (arXiv 1708.06733), Table 1, which pools by average.
    .. [2] Fu et al. (2020), arXiv 2011.02526, Table 9.
    """

    def __init__(self, n_classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(512, 512)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(512, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, n_classes)."""
        x = self.pool1(self.relu1(self.conv1(images)))  # (n, 16, 12, 12)
        x = self.pool2(self.relu2(self.conv2(x)))  # (n, 32, 4, 4)
        x = self.relu3(self.fc1(self.flatten(x)))  # (n, 512)
        logits: Tensor = self.fc2(x)
        return logits


class MnistSmall(nn.Module):
    """`MnistCnn` with 4 instead of 32 channels before the fully connected layers, for 28 x 28 images.

    Conv 1-16 k5, ReLU, MaxPool 2, Conv 16-4 k5, ReLU, MaxPool 2, Linear 64-512, ReLU, Linear 512-10; no padding,
    40,430 weights.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, Table 10.
    """

    def __init__(self, n_classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 4, kernel_size=5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64, 512)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(512, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, n_classes)."""
        x = self.pool1(self.relu1(self.conv1(images)))  # (n, 16, 12, 12)
        x = self.pool2(self.relu2(self.conv2(x)))  # (n, 4, 4, 4)
        x = self.relu3(self.fc1(self.flatten(x)))  # (n, 512)
        logits: Tensor = self.fc2(x)
        return logits


class GtsrbCnn(nn.Module):
    """Six convolutions in pairs and two fully connected layers for 32 x 32 images, without batch norm.

    Padded: Conv 3-32 k3 p1, Conv 32-32 k3, MaxPool 2, the same with 64 and with 128 channels (p1 in the first of each
    pair), Linear 512-512, Linear 512-43; 571,723 weights. Not padded: no padding and no third MaxPool, so the features
    are 128 x 1 x 1: Linear 128-512, Linear 512-43; 375,115 weights. ReLU after every layer but the last; start weights
    normal after He et al.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, Table 11 (padded) and Table 3 (not padded).
    """

    def __init__(self, n_classes: int = 43, channels: int = 3, padded: bool = True) -> None:
        super().__init__()
        padding = 1 if padded else 0
        self.stage1 = nn.Sequential(*_conv_relu(channels, 32, 3, padding), *_conv_relu(32, 32, 3))
        self.pool1 = nn.MaxPool2d(2)
        self.stage2 = nn.Sequential(*_conv_relu(32, 64, 3, padding), *_conv_relu(64, 64, 3))
        self.pool2 = nn.MaxPool2d(2)
        self.stage3 = nn.Sequential(*_conv_relu(64, 128, 3, padding), *_conv_relu(128, 128, 3))
        self.pool3 = nn.MaxPool2d(2) if padded else nn.Identity()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(512 if padded else 128, 512)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(512, n_classes)
        _he_initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, n_classes)."""
        x = self.pool1(self.stage1(images))  # (n, 32, 15, 15), not padded 14 x 14
        x = self.pool2(self.stage2(x))  # (n, 64, 6, 6), not padded 5 x 5
        x = self.pool3(self.stage3(x))  # (n, 128, 2, 2), not padded 1 x 1
        x = self.relu(self.fc1(self.flatten(x)))  # (n, 512)
        logits: Tensor = self.fc2(x)
        return logits


class Nin(nn.Module):
    """Network in network for 32 x 32 images: no fully connected layer, no batch norm.

    Conv 3-192 k5 p2, 192-160 k1, 160-96 k1, MaxPool 3 s2 p1, dropout; Conv 96-192 k5 p2, 192-192 k1, 192-192 k1,
    MaxPool 3 s2 p1, dropout; Conv 192-192 k3 p1, 192-192 k1, 192-10 k1, AvgPool 8. ReLU after every convolution, also
    the last, so logits are >= 0. 966,986 weights; start weights normal after He et al., in the last layer a tenth of
    it and bias 1. [1]_ prints no dropout rate; it is 0.5 as in [2]_.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, Table 12.
    .. [2] Lin, Chen, Yan (2014), Network in network (arXiv 1312.4400).
    """

    def __init__(self, n_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            *_conv_relu(channels, 192, 5, padding=2), *_conv_relu(192, 160, 1), *_conv_relu(160, 96, 1)
        )
        self.pool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.dropout1 = nn.Dropout(0.5)
        self.stage2 = nn.Sequential(
            *_conv_relu(96, 192, 5, padding=2), *_conv_relu(192, 192, 1), *_conv_relu(192, 192, 1)
        )
        self.pool2 = nn.MaxPool2d(3, stride=2, padding=1)
        self.dropout2 = nn.Dropout(0.5)
        self.stage3 = nn.Sequential(*_conv_relu(192, 192, 3, padding=1), *_conv_relu(192, 192, 1))
        self.classifier = nn.Conv2d(192, n_classes, kernel_size=1)
        self.relu = nn.ReLU()
        self.average = nn.AvgPool2d(8)
        self.flatten = nn.Flatten()
        _he_initialise(self)
        # Small positive logits: else one step can push all of them below zero, where the ReLU passes no gradient back.
        nn.init.ones_(self.classifier.get_parameter("bias"))
        with torch.no_grad():
            self.classifier.weight.mul_(0.1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, n_classes)."""
        x = self.dropout1(self.pool1(self.stage1(images)))  # (n, 96, 16, 16)
        x = self.dropout2(self.pool2(self.stage2(x)))  # (n, 192, 8, 8)
        x = self.relu(self.classifier(self.stage3(x)))  # (n, n_classes, 8, 8)
        logits: Tensor = self.flatten(self.average(x))
        return logits


class DeepId(nn.Module):
    """Four convolutions for faces; the fully connected layer sees the last two feature maps. No batch norm.

    Conv c-20 k4, MaxPool 2, Conv 20-40 k3, MaxPool 2, Conv 40-60 k3, MaxPool 2 (P), Conv 60-80 k2 (C), ReLU after each
    convolution; Linear from P and C to 160, ReLU, Linear 160-n_classes; start weights normal after He et al. 598,798
    weights for 1 x 64 x 56 images and 38 classes; 601,483 for 3 x 55 x 47 images and 1283 classes.

    [1]_ adds a layer on P and a layer on C; here they are one layer on both, as in [2]_: the same sum with one bias
    per unit instead of two, and one input, the features, that holds all that the head sees.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, Table 13.
    .. [2] Sun, Wang, Tang (2014), Deep learning face representation from predicting 10,000 classes.
    """

    def __init__(self, n_classes: int = 38, channels: int = 1, image_size: tuple[int, int] = (64, 56)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 20, kernel_size=4)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 40, kernel_size=3)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(40, 60, kernel_size=3)
        self.relu3 = nn.ReLU()
        self.pool3 = nn.MaxPool2d(2)
        self.conv4 = nn.Conv2d(60, 80, kernel_size=2)
        self.relu4 = nn.ReLU()
        self.flatten3 = nn.Flatten()
        self.flatten4 = nn.Flatten()
        height, width = ((((side - 3) // 2 - 2) // 2 - 2) // 2 for side in image_size)  # of P
        self.fc1 = nn.Linear(60 * height * width + 80 * (height - 1) * (width - 1), 160)
        self.relu5 = nn.ReLU()
        self.fc2 = nn.Linear(160, n_classes)
        _he_initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, n_classes)."""
        x = self.pool1(self.relu1(self.conv1(images)))  # (n, 20, 30, 26) for images of 64 x 56
        x = self.pool2(self.relu2(self.conv2(x)))  # (n, 40, 14, 12)
        x = self.pool3(self.relu3(self.conv3(x)))  # (n, 60, 6, 5)
        last = self.relu4(self.conv4(x))  # (n, 80, 5, 4)
        x = torch.cat([self.flatten3(x), self.flatten4(last)], 1)  # (n, 1800 + 1600)
        logits: Tensor = self.fc2(self.relu5(self.fc1(x)))
        return logits


class PadShortcut(nn.Module):
    """A shortcut without weights: every second pixel, and zeros for the channels that are new."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, channels + new_channels, height / 2, width / 2)."""
        return F.pad(
            x[:, :, ::2, ::2], (0, 0, 0, 0, self.new_channels // 2, self.new_channels - self.new_channels // 2)
        )


class ProjectionShortcut(nn.Sequential):
    """A shortcut that learns: 1 x 1 convolution with stride 2, and batch norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm around which a shortcut leads."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, out_channels, height / stride, width / stride)."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """Residual network of basic blocks for 32 x 32 images: 3 x 3 stem with stride 1, no max pool.

    ResNet-18: four stages of two blocks with 64, 128, 256 and 512 channels; where the size changes, the shortcut is a
    1 x 1 convolution with batch norm (option B of [1]_); 11,173,962 weights. Narrow ResNet-18: the same with a quarter
    of all widths, 16, 32, 64 and 128 channels; 701,466 weights. ResNet-20: three stages of three blocks with 16, 32 and
    64 channels; the shortcut pads with zeros (option A); 269,722 weights. All for 10 classes.

    References
    ----------
    .. [1] He et al. (2016), Deep residual learning for image recognition (arXiv 1512.03385): ResNet-18 Table 1 without
       its stem for large images, ResNet-20 Section 4.2.
    """

    def __init__(self, widths: tuple[int, ...], n_blocks: int, project: bool, n_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.stages = nn.Sequential()
        before = widths[0]
        for width in widths:
            stage = nn.Sequential()
            for _ in range(n_blocks):
                shortcut: nn.Module = nn.Identity()
                if width != before:
                    shortcut = ProjectionShortcut(before, width) if project else PadShortcut(width - before)
                stage.append(BasicBlock(before, width, 1 if width == before else 2, shortcut))
                before = width
            self.stages.append(stage)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(before, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, n_classes)."""
        x = self.relu(self.bn1(self.conv1(images)))  # (n, widths[0], 32, 32)
        x = self.stages(x)  # (n, widths[-1], 4, 4) after four stages, 8 x 8 after three
        logits: Tensor = self.fc(self.flatten(self.average(x)))
        return logits


class VggSmall(nn.Module):
    """Eight convolutions with batch norm in four stages of 64, 128, 256 and 256 channels, for 32 x 32 images.

    Twice Conv k3 p1, batch norm, ReLU per stage, then MaxPool 2; Linear 1024-256, ReLU, dropout 0.5, Linear 256-10;
    2,591,946 weights. VGG-11 of [1]_ cut down: a narrower last stage instead of two wide ones, one hidden layer.
    Narrow: a quarter of all widths, 16, 32, 64 and 64 channels, Linear 256-64, Linear 64-10; 163,386 weights.

    References
    ----------
    .. [1] Simonyan, Zisserman (2015), Very deep convolutional networks (arXiv 1409.1556), Table 1.
    """

    def __init__(self, n_classes: int = 10, channels: int = 3, widths: tuple[int, ...] = (64, 128, 256, 256)) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        before = channels
        for width in widths:
            layers: list[nn.Module] = []
            for in_channels in (before, width):
                layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            self.stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
            before = width
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(4 * before, before)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(before, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, n_classes)."""
        x = self.flatten(self.stages(images))  # (n, 256, 2, 2) -> (n, 1024), narrow (n, 64, 2, 2) -> (n, 256)
        logits: Tensor = self.fc2(self.dropout(self.relu(self.fc1(x))))
        return logits


class DenseLayer(nn.Module):
    """Batch norm, ReLU, Conv k1 to four times the growth, batch norm, ReLU, Conv k3; appended to what came in."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, in_channels + growth, height, width)."""
        new = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(new)))], 1)


class DenseNet121(nn.Module):
    """Densely connected blocks of 6, 12, 24 and 16 layers with growth 32, for 32 x 32 images.

    Stem Conv 3-64 k3 p1 with stride 1, no pooling. Between blocks batch norm, ReLU, Conv k1 that halves the channels,
    AvgPool 2; at the end batch norm, ReLU, average over the 4 x 4 map, Linear 1024-10; 6,956,298 weights.

    References
    ----------
    .. [1] Huang et al. (2017), Densely connected convolutional networks (arXiv 1608.06993), Table 1 without its stem
       for large images.
    """

    def __init__(self, n_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        growth, block_sizes = 32, (6, 12, 24, 16)
        width = 2 * growth
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        for index, size in enumerate(block_sizes, start=1):
            self.blocks.add_module(
                f"block{index}", nn.Sequential(*(DenseLayer(width + i * growth, growth) for i in range(size)))
            )
            width += size * growth
            if index < len(block_sizes):
                transition = nn.Sequential(
                    nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)
                )
                self.blocks.add_module(f"transition{index}", transition)
                width //= 2
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.average = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, n_classes)."""
        x = self.relu(self.norm(self.blocks(self.stem(images))))  # (n, 1024, 4, 4)
        logits: Tensor = self.fc(self.flatten(self.average(x)))
        return logits


class EncoderBlock(nn.Module):
    """Self-attention, then two fully connected layers, each with layer norm before it and a shortcut around it.

    Written out because the fast path of `nn.TransformerEncoderLayer` passes by the hooks of what is inside.
    """

    def __init__(self, width: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (n, n_tokens, width)."""
        n, n_tokens, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).view(n, n_tokens, 3, self.n_heads, width // self.n_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (n, n_heads, n_tokens, width / n_heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, n_tokens, width)
        tokens = tokens + self.project(mixed)
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class VisionTransformer(nn.Module):
    """Vision transformer for 32 x 32 images: 64 patches of 4 x 4, blocks of three heads, no class token.

    Conv 3-width k4 s4, learned positions, blocks with 2 * width hidden units, layer norm, average over the patches,
    Linear width-10. Small: six blocks of width 192; 1,806,154 weights. Tiny: four blocks of width 96; 311,146 weights.

    References
    ----------
    .. [1] Dosovitskiy et al. (2021), An image is worth 16x16 words (arXiv 2010.11929), Section 3.1; average instead of
       class token as in its Appendix D.3.
    """

    def __init__(self, width: int, n_blocks: int, n_classes: int, channels: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 4, stride=4)
        self.positions = nn.Parameter(torch.empty(1, 64, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, n_heads=3, hidden=2 * width) for _ in range(n_blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, n_classes)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (n, 64, width)
        tokens = self.norm(self.blocks(tokens + self.positions))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def mnist_cnn(n_classes: int = 10, *, channels: int = 1, seed: int | None = None) -> MnistCnn:
    """Return an untrained `MnistCnn`.

    Parameters
    ----------
    n_classes : int
        Number of logits, at least 2.
    channels : int
        Of the images, at least 1.
    seed : int, optional
        Start weights drawn from this seed, the global random state left as it was. None draws from the global state.

    Raises
    ------
    ValueError
        If a number is too small.
    """
    return _build(MnistCnn, n_classes, channels, seed)


def mnist_small(n_classes: int = 10, *, channels: int = 1, seed: int | None = None) -> MnistSmall:
    """Return an untrained `MnistSmall`; arguments as for `mnist_cnn`."""
    return _build(MnistSmall, n_classes, channels, seed)


def gtsrb_cnn(n_classes: int = 43, *, channels: int = 3, seed: int | None = None) -> GtsrbCnn:
    """Return an untrained `GtsrbCnn` with padding; arguments as for `mnist_cnn`."""
    return _build(GtsrbCnn, n_classes, channels, seed)


def gtsrb_cnn_unpadded(n_classes: int = 43, *, channels: int = 3, seed: int | None = None) -> GtsrbCnn:
    """Return an untrained `GtsrbCnn` without padding; arguments as for `mnist_cnn`."""
    return _build(lambda n, c: GtsrbCnn(n, c, padded=False), n_classes, channels, seed)


def nin(n_classes: int = 10, *, channels: int = 3, seed: int | None = None) -> Nin:
    """Return an untrained `Nin`; arguments as for `mnist_cnn`."""
    return _build(Nin, n_classes, channels, seed)


def deepid(
    n_classes: int = 38, *, channels: int = 1, image_size: tuple[int, int] = (64, 56), seed: int | None = None
) -> DeepId:
    """Return an untrained `DeepId`; arguments as for `mnist_cnn`, and `image_size`: height and width, each >= 31."""
    if min(image_size) < 31:
        raise ValueError(f"image_size must be at least (31, 31), got {tuple(image_size)}. Enlarge the images.")
    return _build(lambda n, c: DeepId(n, c, image_size), n_classes, channels, seed)


def resnet18(n_classes: int = 10, *, channels: int = 3, seed: int | None = None) -> ResNet:
    """Return an untrained ResNet-18 (see `ResNet`); arguments as for `mnist_cnn`."""
    return _build(lambda n, c: ResNet((64, 128, 256, 512), 2, True, n, c), n_classes, channels, seed)


def resnet18_narrow(n_classes: int = 10, *, channels: int = 3, seed: int | None = None) -> ResNet:
    """Return an untrained ResNet-18 of a quarter of the widths (see `ResNet`); arguments as for `mnist_cnn`."""
    return _build(lambda n, c: ResNet((16, 32, 64, 128), 2, True, n, c), n_classes, channels, seed)


def resnet20(n_classes: int = 10, *, channels: int = 3, seed: int | None = None) -> ResNet:
    """Return an untrained ResNet-20 (see `ResNet`); arguments as for `mnist_cnn`."""
    return _build(lambda n, c: ResNet((16, 32, 64), 3, False, n, c), n_classes, channels, seed)


def vgg_small(n_classes: int = 10, *, channels: int = 3, seed: int | None = None) -> VggSmall:
    """Return an untrained `VggSmall`; arguments as for `mnist_cnn`."""
    return _build(VggSmall, n_classes, channels, seed)


def vgg_narrow(n_classes: int = 10, *, channels: int = 3, seed: int | None = None) -> VggSmall:
    """Return an untrained `VggSmall` of a quarter of the widths; arguments as for `mnist_cnn`."""
    return _build(lambda n, c: VggSmall(n, c, (16, 32, 64, 64)), n_classes, channels, seed)


def densenet121(n_classes: int = 10, *, channels: int = 3, seed: int | None = None) -> DenseNet121:
    """Return an untrained `DenseNet121`; arguments as for `mnist_cnn`."""
    return _build(DenseNet121, n_classes, channels, seed)


def vit_small(n_classes: int = 10, *, channels: int = 3, seed: int | None = None) -> VisionTransformer:
    """Return an untrained small `VisionTransformer`; arguments as for `mnist_cnn`."""
    return _build(lambda n, c: VisionTransformer(192, 6, n, c), n_classes, channels, seed)


def vit_tiny(n_classes: int = 10, *, channels: int = 3, seed: int | None = None) -> VisionTransformer:
    """Return an untrained tiny `VisionTransformer`; arguments as for `mnist_cnn`."""
    return _build(lambda n, c: VisionTransformer(96, 4, n, c), n_classes, channels, seed)


#: Name -> factory, as benchmarks and the zoo name them.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        mnist_cnn,
        mnist_small,
        gtsrb_cnn,
        gtsrb_cnn_unpadded,
        nin,
        deepid,
        resnet18,
        resnet18_narrow,
        resnet20,
        vgg_small,
        vgg_narrow,
        densenet121,
        vit_small,
        vit_tiny,
    )
}


def _build(make: Callable[[int, int], NetworkT], n_classes: int, channels: int, seed: int | None) -> NetworkT:
    if n_classes < 2:
        raise ValueError(f"n_classes must be at least 2, got {n_classes}. If a seed was meant, write seed={n_classes}.")
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}. Grey images have 1, RGB images 3.")
    if seed is None:
        return make(n_classes, channels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also set the GPUs' state
        return make(n_classes, channels)


def _conv_relu(in_channels: int, out_channels: int, kernel_size: int, padding: int = 0) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding), nn.ReLU()]


def _he_initialise(network: nn.Module) -> None:
    """Draw start weights that keep the variance through ReLUs; torch's default lets deep plain networks stall."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
