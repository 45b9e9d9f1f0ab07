"""Defective convolutional networks: some neurons are dead for good, so that texture cannot be trusted, only shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from guard.backups.backup_training import FitReport, FitSettings, Report, Traffic, copy_network, fit_network
from guard.backups.clean_set import CleanSet
from guard.errors import DataError, SuspectModelError
from guard.suspect.outputs import logits_of, output_place
from guard.suspect.recording import device_of

#: `neuron`: every place of every channel for itself. `channel`: whole channels. `shared`: the same places in all.
Variant = Literal["neuron", "channel", "shared"]
_VARIANTS = ("neuron", "channel", "shared")


class DefectiveConv2d(nn.Conv2d):
    """A convolution some of whose output neurons always give zero, in training and in testing alike.

    The mask is drawn once, from Bernoulli's distribution, and saved with the weights as the buffer `mask`, shape
    (out_channels, height, width), bool, True = alive. With a ReLU behind the convolution this is equation 5 of [1]_;
    with batch normalisation between, a dead neuron gives its channel's constant instead of zero.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, **settings
        As for `Conv2d`.
    output_size : (int, int)
        Height and width of the output, as many places have a mask.
    keep_probability : float
        Chance that a neuron lives, in (0, 1].
    variant : {"neuron", "channel", "shared"}
    generator : Generator, optional
        Draws the mask.

    Raises
    ------
    DataError
        If `keep_probability` is outside (0, 1], or the variant is unknown.

    References
    ----------
    .. [1] Luo et al. (2020), Defective convolutional networks (arXiv 1911.08432), equations 3 to 5; variants Table 5.
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        output_size: tuple[int, int],
        keep_probability: float,
        variant: Variant = "neuron",
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> None:
        check_keep_probability(keep_probability)
        if variant not in _VARIANTS:
            raise DataError(f"variant must be one of {', '.join(_VARIANTS)}, got {variant!r}.")
        super().__init__(in_channels, out_channels, kernel_size, **settings)
        self.keep_probability = keep_probability
        self.variant = variant
        drawn = {"neuron": (out_channels, *output_size), "channel": (out_channels, 1, 1), "shared": (1, *output_size)}[
            variant
        ]
        alive = torch.rand(drawn, generator=generator) < keep_probability
        if not alive.any():
            alive.view(-1)[0] = True  # a layer without a living neuron would pass nothing on
        self.register_buffer("mask", alive.expand(out_channels, *output_size).clone())

    @classmethod
    def of(
        cls,
        layer: nn.Conv2d,
        output_size: tuple[int, int],
        keep_probability: float,
        variant: Variant,
        generator: torch.Generator,
    ) -> Self:
        """Return a defective layer with another one's shape and weights."""
        padding: Any = layer.padding
        defective = cls(
            layer.in_channels,
            layer.out_channels,
            (layer.kernel_size[0], layer.kernel_size[1]),
            output_size=output_size,
            keep_probability=keep_probability,
            variant=variant,
            generator=generator,
            stride=layer.stride,
            padding=padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
        )
        defective.load_state_dict(layer.state_dict(), strict=False)  # all but the mask
        return defective.to(layer.weight.device).train(layer.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the convolution of inputs (n, in_channels, h, w), dead neurons zero.

        Raises
        ------
        DataError
            If the output's size is not the mask's: images must have the size that the layer was made for.
        """
        outputs = super().forward(inputs)
        if outputs.shape[1:] != self.mask.shape:
            raise DataError(
                f"a defective layer was made for outputs of size {tuple(self.mask.shape[1:])}, got "
                f"{tuple(outputs.shape[2:])}. Give images of the same size."
            )
        return outputs * self.mask  # (n, out_channels, height, width)

    def extra_repr(self) -> str:
        """Return what `Conv2d` says, and the mask's settings."""
        shown = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shown}, keep_probability={self.keep_probability:g}, variant={self.variant}"


def make_defective(
    model: nn.Module,
    keep_probability: float,
    blocks: Sequence[str] | None = None,
    *,
    image_shape: tuple[int, int, int],
    variant: Variant = "neuron",
    fresh: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a network in which every convolution of some blocks is defective.

    Parameters
    ----------
    model : Module
        Not changed.
    keep_probability : float
        Chance that a neuron lives, in (0, 1]; 1 leaves all alive.
    blocks : sequence of str, optional
        Names of modules: a convolution, or what holds some. None takes the bottom (see `bottom_blocks`).
    image_shape : (channels, height, width)
        Of what the network takes: masks are as large as the layers' outputs.
    variant : {"neuron", "channel", "shared"}
        Masks of neurons are independent over channels and layers; of `"shared"` over layers only.
    fresh : bool
        Draw all weights anew. A suspect's weights may carry its backdoor, so False is for networks of one's own.
    seed : int
        Of masks and fresh weights.

    Raises
    ------
    DataError
        If the keep probability is outside (0, 1].
    SuspectModelError
        If a block does not exist or holds no convolution that runs, or the network cannot be copied or run.
    """
    check_keep_probability(keep_probability)
    network = copy_network(model)
    sizes = _output_sizes(network, image_shape)
    names = _convolutions(network, bottom_blocks(model, image_shape) if blocks is None else tuple(blocks), sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if fresh:
            forget(network)
        for name in names:
            parent, _, attribute = name.rpartition(".")
            layer = network.get_submodule(name)
            assert isinstance(layer, nn.Conv2d)
            setattr(
                network.get_submodule(parent),
                attribute,
                DefectiveConv2d.of(layer, sizes[name], keep_probability, variant, generator),
            )
    return network.eval()


def bottom_blocks(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Return the convolutions whose output is at least half as high as the image: the bottom of a network.

    On 32 x 32 images these are blocks 0, 1 and 2 of ResNet-18, as in the paper, and the same of ResNet-50, DenseNet,
    SENet, VGG and wide ResNets made for such images.

    Raises
    ------
    SuspectModelError
        If there are none.
    """
    sizes = _output_sizes(copy_network(model), image_shape)
    names = tuple(name for name, (height, _) in sizes.items() if 2 * height >= image_shape[1])
    if not names:
        raise SuspectModelError(
            "no convolution of this network gives an output half as high as the image. Name the blocks that are to be "
            f"defective; its convolutions are {', '.join(sizes) or 'none'}."
        )
    return names


def forget(network: nn.Module) -> None:
    """Draw all weights of a network anew, in place, by its layers' own rules; convolutions after He et al.

    Raises
    ------
    SuspectModelError
        If a layer holds weights and no rule to draw them.
    """
    known: set[int] = set()
    for name, layer in network.named_modules():
        parameters = list(layer.parameters(recurse=False))
        reset: Callable[[], None] | None = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
            known.update(id(parameter) for parameter in layer.parameters())
        elif parameters and not {id(parameter) for parameter in parameters} <= known:
            raise SuspectModelError(
                f"layer {name or type(network).__name__!r} holds weights and has no reset_parameters(), so they cannot "
                "be drawn anew. Use a network of your own with fresh=False."
            )
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


@dataclass(frozen=True, slots=True)
class DefectiveSettings:
    """Settings of a defective backup.

    Attributes
    ----------
    keep_probability : float
        In (0, 1].
    variant : {"neuron", "channel", "shared"}
    fit : FitSettings
    """

    keep_probability: float = 0.7
    variant: Variant = "neuron"
    fit: FitSettings = field(default_factory=FitSettings)

    def __post_init__(self) -> None:
        check_keep_probability(self.keep_probability)


def train_defective(
    network: nn.Module,
    clean: CleanSet,
    settings: FitSettings | None = None,
    *,
    seed: int = 0,
    traffic: Traffic | None = None,
    pretrain: Callable[[nn.Module], None] | None = None,
    progress: Report | None = None,
) -> FitReport:
    """Train a defective network in place: strong augmentation, and the weights of the best epoch.

    Parameters
    ----------
    network : Module
        From `make_defective`.
    clean : CleanSet
    settings : FitSettings, optional
    seed : int
    traffic : Traffic, optional
        Unflagged inputs with the suspect's answers, to distil from as well.
    pretrain : callable, optional
        Called with the network first: a hook for learning without labels.
    progress : callable, optional

    Raises
    ------
    SuspectModelError
        If the network holds no defective layer.
    DataError
        If training diverges.
    """
    if not any(isinstance(layer, DefectiveConv2d) for layer in network.modules()):
        raise SuspectModelError("the network holds no DefectiveConv2d. Make one with make_defective().")
    if pretrain is not None:
        pretrain(network)
    return fit_network(network, clean, settings or FitSettings(), seed=seed, traffic=traffic, progress=progress)


def check_keep_probability(keep_probability: float) -> None:
    """Refuse a keep probability outside (0, 1]."""
    if not 0.0 < keep_probability <= 1.0:
        raise DataError(f"keep_probability must be in (0, 1], got {keep_probability}.")


def _output_sizes(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, int]]:
    """Return height and width of every convolution's output, by name, in the order in which they run."""
    sizes: dict[str, tuple[int, int]] = {}
    handles = []

    def watch(name: str, layer: nn.Module) -> None:
        def keep(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            sizes[name] = (output.shape[-2], output.shape[-1])

        handles.append(layer.register_forward_hook(keep))

    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            watch(name, layer)
    try:
        with torch.no_grad():
            logits_of(network.eval()(torch.zeros(2, *image_shape, device=device_of(network))), output_place(network))
    except (RuntimeError, ValueError, TypeError) as error:
        raise SuspectModelError(
            f"the network cannot be run on images of shape {tuple(image_shape)}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _convolutions(network: nn.Module, blocks: Sequence[str], sizes: dict[str, tuple[int, int]]) -> list[str]:
    """Return the names of all convolutions in some blocks, each once, in the order in which they run."""
    chosen = set()
    for block in blocks:
        try:
            network.get_submodule(block)
        except AttributeError:
            top = ", ".join(name for name, _ in network.named_children())
            raise SuspectModelError(f"the network has no block {block!r}. Its parts are {top}.") from None
        inside = [name for name in sizes if name == block or name.startswith(f"{block}.")]
        if not inside:
            raise SuspectModelError(f"block {block!r} holds no convolution that runs. Name another.")
        chosen.update(inside)
    if not chosen:
        raise SuspectModelError("name at least one block that is to be defective.")
    return [name for name in sizes if name in chosen]
