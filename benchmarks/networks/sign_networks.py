"""Networks of timm and transformers for images of 32 by 32 pixels: factories without arguments, random weights."""

from __future__ import annotations

from torch import nn
from torchvision_stand_in import torchvision_for_timm

with torchvision_for_timm():
    import timm

N_CLASSES = 43


def vit() -> nn.Module:
    """Vision transformer with a class token: 64 patches and 4 blocks of 64 features."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=N_CLASSES
    )


def swin() -> nn.Module:
    """Shifted windows of 4 by 4, maps with the channels last: stages of 8 by 8, 4 by 4 and 2 by 2."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=48,
        depths=(2, 2, 2),
        num_heads=(3, 6, 12),
        num_classes=N_CLASSES,
    )


def convnext() -> nn.Module:
    """ConvNeXt of four stages, from 16 by 16 to 2 by 2."""
    return timm.create_model(
        "convnext_atto", patch_size=2, depths=(1, 1, 3, 1), dims=(32, 64, 128, 192), num_classes=N_CLASSES
    )


def resnet18() -> nn.Module:
    """ResNet-18 at a quarter of its widths; returns a `ModelOutput`, not a tensor."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 32, 64, 128],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            num_labels=N_CLASSES,
        )
    )


#: Every network by name.
NETWORKS = {"vit": vit, "swin": swin, "convnext": convnext, "resnet18": resnet18}
