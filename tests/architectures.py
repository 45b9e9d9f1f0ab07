"""Small hand-written networks, one per family, for tests. All take (n, 3, 32, 32) unless their docstring says else."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lenet() -> nn.Module:
    """Takes (n, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class FunctionalNet(nn.Module):
    """The MNIST network of many tutorials: layers as modules, everything else as functions. Takes (n, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.conv3 = nn.Conv2d(16, 16, 3)
        self.fc1 = nn.Linear(16 * 3 * 3, 24)
        self.fc2 = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (n, 8, 13, 13)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (n, 16, 5, 5)
        x = F.relu(self.conv3(x)).flatten(1)  # (n, 144)
        return self.fc2(F.relu(self.fc1(x)))


class Vgg(nn.Module):
    """Four stages with batch norm and in-place ReLU, and a head with dropout."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (8, 16, 24, 32):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(32 * 4, 40), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class Gate(nn.Module):
    """Squeeze and excite: a gate per channel from two fully connected layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(channels, channels // 2)
        self.fc2 = nn.Linear(channels // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(self.pool(x).flatten(1)))).sigmoid()
        return x * gate[:, :, None, None]


class BasicBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, gated: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)  # used twice
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = Gate(width) if gated else nn.Identity()
        self.downsample = (
            None if stride == 1 and channels == width else nn.Conv2d(channels, width, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """The stride sits in the second convolution, so the first one still runs at the old resolution."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, 2 * width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.conv3(out) + self.shortcut(x))


class ResNet(nn.Module):
    """One to five stages of residual blocks: "basic", "gated" (squeeze and excite) or "bottleneck"."""

    def __init__(self, kind: str = "basic", widths: tuple[int, ...] = (8, 16, 24, 32), blocks: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        channels = 8
        self.n_stages = len(widths)
        for stage, width in enumerate(widths, start=1):
            layers: list[nn.Module] = []
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                if kind == "bottleneck":
                    layers.append(Bottleneck(channels, width, stride))
                    channels = 2 * width
                else:
                    layers.append(BasicBlock(channels, width, stride, kind == "gated"))
                    channels = width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.n_stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(self.avgpool(x).flatten(1))


class Backbone(nn.Module):
    """A normalising layer and a network inside, as robust-training code likes it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.normalise = nn.BatchNorm2d(3, affine=False)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.normalise(x))


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 8, 3, padding=1, bias=False))
        channels = 8
        for index in (1, 2, 3, 4):
            block = nn.Sequential(DenseLayer(channels, 4), DenseLayer(channels + 4, 4))
            self.features.add_module(f"denseblock{index}", block)
            channels += 8
            if index < 4:
                transition = nn.Sequential(
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(channels, channels // 2, 1, bias=False),
                    nn.AvgPool2d(2),
                )
                self.features.add_module(f"transition{index}", transition)
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution with the stride, project."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            nn.Sequential(
                nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(inplace=True),
            ),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),  # 16 x 16
            InvertedResidual(8, 8, 1),
            InvertedResidual(8, 12, 2),  # 8 x 8
            InvertedResidual(12, 12, 1),
            InvertedResidual(12, 16, 2),  # 4 x 4
            InvertedResidual(16, 16, 1),
            InvertedResidual(16, 24, 2),  # 2 x 2
            nn.Sequential(nn.Conv2d(24, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU6(inplace=True)),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def nin() -> nn.Module:
    """Network in network: no fully connected layer at all."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 8, 1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class EncoderBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 16, n_blocks: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)  # 4 x 4 patches
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.blocks = nn.Sequential(*(EncoderBlock(width) for _ in range(n_blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class StemTransformer(VisionTransformer):
    """A transformer behind a stem of convolutions at three resolutions."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 4, 8, 16)
        self.patches = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(c_in, c_out, 3, 2, 1), nn.BatchNorm2d(c_out), nn.ReLU())
                for c_in, c_out in itertools.pairwise(widths)
            )
        )


def mlp() -> nn.Module:
    """Takes (n, 1, 28, 28)."""
    widths = (784, 48, 40, 32, 24)
    layers: list[nn.Module] = [nn.Flatten()]
    for width, next_width in itertools.pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


class NextBlock(nn.Module):
    """ConvNeXt's: depthwise convolution, then fully connected layers with the channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.project(F.gelu(self.expand(y))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.stages = nn.Sequential(
            nn.Sequential(NextBlock(8), NextBlock(8)),
            nn.Conv2d(8, 12, 2, 2),
            nn.Sequential(NextBlock(12), NextBlock(12)),
            nn.Conv2d(12, 16, 2, 2),
            nn.Sequential(NextBlock(16), NextBlock(16)),
            nn.Conv2d(16, 24, 2, 2),
            nn.Sequential(NextBlock(24), NextBlock(24)),
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class SwinBlock(nn.Module):
    """Maps of the order n, h, w, c throughout; where it attends, a module gives an attention matrix (n, 1, hw, hw)."""

    def __init__(self, width: int, attends: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.softmax = nn.Softmax(-1) if attends else None
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x)).roll((1, 1), (1, 2))
        if self.softmax is not None:
            tokens = x.flatten(1, 2).unsqueeze(1)
            x = x + (self.softmax(tokens @ tokens.transpose(2, 3)) @ tokens).view(x.shape)
        return x + self.mlp(x)


class Merging(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        return self.reduction(x.view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(n, h // 2, w // 2, 4 * c))


class Swin(nn.Module):
    """Four stages with the channels last: (n, 16, 16, 12) to (n, 2, 2, 96); the last two may attend."""

    def __init__(self, width: int = 12, attends: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.norm0 = nn.LayerNorm(width)
        self.stages = nn.Sequential()
        for index in range(4):
            layers = [Merging(width * 2 ** (index - 1))] if index else []
            self.stages.append(nn.Sequential(*layers, SwinBlock(width * 2**index, attends and index > 1)))
        self.norm = nn.LayerNorm(8 * width)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(self.stages(x)).mean((1, 2)))


class ClassAttention(nn.Module):
    """The class token alone asks: its query is a fully connected layer over one row per image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        x = self.norm(torch.cat([token, patches], 1))
        weights = (self.q(x[:, 0])[:, None] @ self.k(x).transpose(1, 2)).softmax(-1)
        return token + self.proj(weights @ self.v(x))


class Cait(nn.Module):
    """Blocks over patches, then class attention, as CaiT and XCiT have it."""

    def __init__(self, width: int = 16, n_class_blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(*(EncoderBlock(width) for _ in range(4)))
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.class_blocks = nn.ModuleList(ClassAttention(width) for _ in range(n_class_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        token = self.class_token.expand(len(x), -1, -1)
        for block in self.class_blocks:
            token = block(token, patches)
        return self.head(self.norm(torch.cat([token, patches], 1))[:, 0])


class Recurrent(nn.Module):
    """One block three times, and one fully connected layer twice: for the image and for its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(3):
            x = x + F.relu(self.block(x))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x.flip(-1))) + self.fc(self.features(x))


class CosineHead(nn.Module):
    """Angles to one vector per class; a module of its own kind, or plain code of the network's."""

    def __init__(self, as_module: bool, pooled: bool = True) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(c, d, 3, 2, 1), nn.ReLU()) for c, d in ((3, 8), (8, 16), (16, 24)))
        )
        self.pool = nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity()
        head = nn.Module()
        head.weight = nn.Parameter(torch.randn(10, 24))
        if as_module:
            head.forward = lambda x: F.linear(F.normalize(x), F.normalize(head.weight))  # type: ignore[method-assign]
        self.head, self.as_module = head, as_module

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stages(x)).mean((2, 3))
        return self.head(x) if self.as_module else F.linear(F.normalize(x), F.normalize(self.head.weight))


class WideMlp(nn.Module):
    """So many features that they are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 3, padding=1)
        self.fc = nn.Linear(48 * 32 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))
