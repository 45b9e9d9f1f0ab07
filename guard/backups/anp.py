"""Adversarial neuron pruning: neurons that a small push turns against the network are the backdoor's, and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from guard.backups.augmentation import Augmentation
from guard.backups.backup_training import Report
from guard.backups.clean_set import CleanSet
from guard.backups.purification import CurvePoint, Measure, Purification
from guard.backups.units import find_unit_layers
from guard.errors import DataError
from guard.suspect.outputs import logits_of, output_place
from guard.suspect.recording import device_of
from guard.types import Float32Array

#: Thresholds of the curve.
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(20))
_REPORT_EVERY = 20  # iterations
#: Images seldom come nearer to the border than this share of the side, so a shift of as much loses nothing.
_SHIFTED_ONLY = Augmentation(rotation=0.0, scale=0.0, shift=0.1, contrast=0.0, erase=0.0, noise=0.0)


@dataclass(frozen=True, slots=True)
class AnpSettings:
    """Settings of adversarial neuron pruning; the defaults are the paper's.

    Attributes
    ----------
    epsilon : float
        Largest relative change of a neuron's weights and bias that the adversary may make, > 0.
    alpha : float
        Weight of the loss without the adversary, in [0, 1]; the rest goes to the loss with it.
    learning_rate, momentum : float
        Of the masks' SGD, > 0 and in [0, 1).
    batch_size, iterations : int
        >= 1.
    threshold : float or None
        Neurons with a smaller mask are pruned, in [0, 1]. None takes the highest of the curve that costs at most
        `allowed_accuracy_loss`.
    allowed_accuracy_loss : float
        On held-out images, a fraction; without influence unless `threshold` is None.
    augmentation : Augmentation or None
        By default shifts by up to a tenth of the side.
    """

    epsilon: float = 0.4
    alpha: float = 0.2
    learning_rate: float = 0.2
    momentum: float = 0.9
    batch_size: int = 128
    iterations: int = 2000
    threshold: float | None = 0.2
    allowed_accuracy_loss: float = 0.02
    augmentation: Augmentation | None = field(default=_SHIFTED_ONLY)

    def __post_init__(self) -> None:
        if not self.epsilon > 0.0 or not self.learning_rate > 0.0:
            raise DataError(f"epsilon and learning_rate must be > 0, got {self.epsilon} and {self.learning_rate}.")
        if not 0.0 <= self.alpha <= 1.0 or not 0.0 <= self.momentum < 1.0:
            raise DataError(f"alpha must be in [0, 1] and momentum in [0, 1), got {self.alpha} and {self.momentum}.")
        if min(self.batch_size, self.iterations) < 1:
            raise DataError(f"batch_size and iterations must be >= 1, got {self.batch_size} and {self.iterations}.")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise DataError(f"threshold must be in [0, 1], got {self.threshold}.")
        if not 0.0 <= self.allowed_accuracy_loss < 1.0:
            raise DataError(f"allowed_accuracy_loss must be in [0, 1), got {self.allowed_accuracy_loss}.")


@dataclass(frozen=True, slots=True)
class _Neurons:
    """One layer whose neurons get masks."""

    weight: str  # name of the parameter; its first dimension counts neurons
    bias: str  # empty if the layer has none
    units: int


def prune_adversarially(
    twin: nn.Module, clean: CleanSet, settings: AnpSettings, seed: int, measure: Measure, progress: Report
) -> Purification:
    """Learn a mask in [0, 1] per neuron, and set the weights of those with a small mask to zero, in place.

    Every iteration draws a batch; from a random change of all neurons' weights and biases, of at most `epsilon`, one
    step along the sign of the gradient finds one that hurts; then the masks m take a step down

        alpha * L(m * w, b) + (1 - alpha) * L((m + delta) * w, (1 + xi) * b)

    and are cut to [0, 1]. Neurons are the channels of batch normalisation. A network without any has masks on the
    filters of its convolutions and the rows of its fully connected layers but the last, and a note says so. While masks
    are learned, batch normalisation uses the statistics of the batch, as in the authors' experiments: with the stored
    ones, pushed neurons throw the later layers so far off that masks fall everywhere. The stored ones stay as they are;
    the bias of a pruned neuron stays too, as in the paper's equation.

    Raises
    ------
    DataError
        If the loss is no longer finite.

    References
    ----------
    .. [1] Wu, Wang (2021), Adversarial neuron pruning purifies backdoored deep models, Algorithm 1.
    """
    neurons, notes = _find_neurons(twin, clean.images)
    masks = learn_masks(twin, neurons, clean, settings, seed, progress)
    points = {threshold: _prune(twin, neurons, masks, threshold, measure) for threshold in THRESHOLDS}
    threshold = settings.threshold
    if threshold is None:
        least = points[0.0].measured["clean_accuracy"] - settings.allowed_accuracy_loss
        fit = [at for at, point in points.items() if point.measured["clean_accuracy"] >= least - 1e-9]
        threshold = max(fit)
        notes = (*notes, f"The threshold was chosen by the clean accuracy: {threshold:g}.")
    pruned = _silence(twin, neurons, masks, threshold)
    return Purification(sum(layer.units for layer in neurons), pruned, tuple(points.values()), notes)


def learn_masks(
    twin: nn.Module, neurons: Sequence[_Neurons], clean: CleanSet, settings: AnpSettings, seed: int, progress: Report
) -> list[Float32Array]:
    """Return one mask per neuron, an array of shape (units,) per layer, each in [0, 1]; the network is not changed."""
    device, epsilon = device_of(twin), settings.epsilon
    generator = torch.Generator().manual_seed(seed)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)  # only masks and perturbations are learned
    fixed = dict(twin.named_parameters())
    x, y = torch.tensor(clean.images), torch.tensor(clean.labels)
    masks = [torch.ones(layer.units, device=device, requires_grad=True) for layer in neurons]
    optimizer = torch.optim.SGD(masks, lr=settings.learning_rate, momentum=settings.momentum)

    def loss(scales: Sequence[Tensor], shifts: Sequence[Tensor] | None, images: Tensor, labels: Tensor) -> Tensor:
        changed = {}
        for place, layer in enumerate(neurons):
            weight = fixed[layer.weight]
            changed[layer.weight] = weight * scales[place].reshape(-1, *[1] * (weight.ndim - 1))
            if shifts is not None and layer.bias:
                changed[layer.bias] = fixed[layer.bias] * shifts[place]
        return F.cross_entropy(logits_of(functional_call(twin, changed, (images,)), output_place(twin)), labels)

    def start(layer: _Neurons) -> Tensor:
        drawn = torch.empty(layer.units).uniform_(-epsilon, epsilon, generator=generator)
        return drawn.to(device).requires_grad_()

    with _batch_statistics(twin):
        for iteration in range(settings.iterations):
            rows = torch.randint(len(x), (settings.batch_size,), generator=generator)
            images, labels = x[rows], y[rows].to(device)
            if settings.augmentation is not None:
                images = settings.augmentation(images, generator)
            images = images.to(device)
            deltas, xis = ([start(layer) for layer in neurons] for _ in range(2))
            pushed = [mask.detach() + delta for mask, delta in zip(masks, deltas, strict=True)]
            worst = torch.autograd.grad(
                loss(pushed, [1.0 + xi for xi in xis], images, labels), [*deltas, *xis], allow_unused=True
            )
            steps = [
                torch.zeros_like(at)
                if slope is None
                else (at.detach() + epsilon * slope.sign()).clamp(-epsilon, epsilon)
                for slope, at in zip(worst, [*deltas, *xis], strict=True)
            ]
            delta_steps, xi_steps = steps[: len(neurons)], steps[len(neurons) :]
            robust = loss(
                [mask + step for mask, step in zip(masks, delta_steps, strict=True)],
                [1.0 + step for step in xi_steps],
                images,
                labels,
            )
            total = settings.alpha * loss(masks, None, images, labels) + (1.0 - settings.alpha) * robust
            if not torch.isfinite(total):
                raise DataError(
                    f"adversarial pruning diverged in iteration {iteration + 1}: the loss is no longer finite. Lower "
                    f"learning_rate (now {settings.learning_rate:g}) or epsilon (now {settings.epsilon:g})."
                )
            optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                for mask in masks:
                    mask.clamp_(0.0, 1.0)
            if iteration % _REPORT_EVERY == 0:
                progress(iteration / settings.iterations)
    return [mask.detach().cpu().numpy() for mask in masks]


@contextmanager
def _batch_statistics(twin: nn.Module) -> Iterator[None]:
    """Let batch normalisation use the statistics of each batch meanwhile, and leave the stored ones alone."""
    layers = [layer for layer in twin.modules() if isinstance(layer, _BatchNorm)]
    before = [(layer.training, layer.momentum) for layer in layers]
    buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    for layer in layers:
        layer.train()
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (training, momentum) in zip(layers, before, strict=True):
            layer.train(training)
            layer.momentum = momentum
        with torch.no_grad():
            for name, buffer in twin.named_buffers():
                buffer.copy_(buffers[name])


def _find_neurons(twin: nn.Module, images: Float32Array) -> tuple[list[_Neurons], tuple[str, ...]]:
    norms = [name for name, layer in twin.named_modules() if isinstance(layer, _BatchNorm) and layer.affine]
    parameters = dict(twin.named_parameters())
    if norms:
        return [_Neurons(f"{name}.weight", f"{name}.bias", len(parameters[f"{name}.weight"])) for name in norms], ()
    layers, _ = find_unit_layers(twin, images)
    neurons = [
        _Neurons(
            f"{unit_layer.name}.weight",
            bias if (bias := f"{unit_layer.name}.bias") in parameters else "",
            unit_layer.units,
        )
        for unit_layer in layers
    ]
    note = "The network has no batch normalisation: masks are on convolutions and hidden fully connected layers."
    return neurons, (note,)


def _prune(
    twin: nn.Module, neurons: Sequence[_Neurons], masks: Sequence[Float32Array], threshold: float, measure: Measure
) -> CurvePoint:
    """Measure the network pruned at a threshold, and leave it as it was."""
    parameters = dict(twin.named_parameters())
    before = {layer.weight: parameters[layer.weight].detach().clone() for layer in neurons}
    pruned = _silence(twin, neurons, masks, threshold)
    point = CurvePoint(threshold, pruned, dict(measure(twin)))
    with torch.no_grad():
        for name, values in before.items():
            parameters[name].copy_(values)
    return point


def _silence(twin: nn.Module, neurons: Sequence[_Neurons], masks: Sequence[Float32Array], threshold: float) -> int:
    parameters = dict(twin.named_parameters())
    pruned = 0
    for layer, mask in zip(neurons, masks, strict=True):
        rows = np.flatnonzero(mask < threshold)
        with torch.no_grad():
            parameters[layer.weight][torch.from_numpy(rows).to(parameters[layer.weight].device)] = 0.0
        pruned += len(rows)
    return pruned
