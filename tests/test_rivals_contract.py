"""What every rival keeps to: clean images only, the suspect model untouched, the same scores again, passes counted."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CleanSplit
from torch import nn

from guard import SuspectModel
from guard.errors import DataError, NotApplicableError, NotFittedError
from guard.lab.attacks import MnistCnn, Poisoned
from guard.lab.attacks.networks import deepid, resnet20, vit_small
from guard.lab.rivals import RIVALS, CountedNetwork, Rival
from guard.statistics.evaluation import auroc
from guard.types import Float32Array, IntArray

#: Forward passes per request, as the papers' settings say; what runs before a request does not count.
PASSES = {
    "max-softmax": 1,
    "strip": 100,
    "scale-up": 6,
    "scale-up-limited": 6,
    "ibd-psc": 6,
    "ted": 1,
    "ted++": 1,
    "beatrix": 1,
    "psbd": 4,
    "badexpert": 3,
}
#: On the backdoored network of the fixtures, a pattern in the corner of MNIST. Multiplied digits are the same digits.
LEAST_AUROC = dict.fromkeys(PASSES, 0.6) | {"scale-up": 0.0, "scale-up-limited": 0.0, "ibd-psc": 0.0}


def quick(name: str, **settings: Any) -> Rival:
    """A rival whose training is short."""
    return RIVALS[name](**settings, **({"epochs": 2} if name == "badexpert" else {}))


class NormedMnist(nn.Module):
    """The network of the fixtures behind six batch norms that change nothing, so that all rivals can be had."""

    def __init__(self, badnet: MnistCnn) -> None:
        super().__init__()
        self.norms = nn.Sequential(*(nn.BatchNorm2d(1, eps=0.0) for _ in range(6)))
        self.badnet = copy.deepcopy(badnet)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.badnet(self.norms(images))
        return logits


@pytest.fixture(scope="module")
def network(badnet: MnistCnn) -> NormedMnist:
    return NormedMnist(badnet).eval()


@pytest.fixture(scope="module")
def clean(clean_split: CleanSplit) -> tuple[Float32Array, IntArray]:
    """Few, as fitting some rivals takes time."""
    return clean_split.validation.images[:100], clean_split.validation.labels[:100]


def test_every_rival_is_named_once_and_says_where_it_is_from() -> None:
    assert set(RIVALS) == set(PASSES)
    for rival in RIVALS.values():
        assert rival.title
        assert "arXiv" in rival.source
        assert "References" in (rival.__doc__ or "")


@pytest.mark.parametrize("name", RIVALS)
def test_rival_scores_counts_and_leaves_the_suspect_as_it_was(
    name: str,
    network: NormedMnist,
    clean: tuple[Float32Array, IntArray],
    clean_split: CleanSplit,
    triggered: Poisoned,
) -> None:
    suspect = SuspectModel(network)
    network.norms.train()  # a mode that somebody has set since
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    random_state = torch.get_rng_state()
    test, trigger = clean_split.test.images[:40], triggered.images[:40]
    both = np.concatenate([test, trigger])
    rival = quick(name, seed=5).fit(suspect, *clean)
    assert np.isnan(rival.passes)
    scores = rival.score(both)
    assert scores.shape == (80,)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert rival.passes == PASSES[name]
    np.testing.assert_allclose(rival.score(both[7:8]), scores[7:8], rtol=1e-3, atol=1e-3)  # whatever the batch
    assert rival.passes == PASSES[name]
    assert auroc(scores, np.arange(80) >= 40) >= LEAST_AUROC[name]
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert [module.training for module in network.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    torch.testing.assert_close(torch.get_rng_state(), random_state, rtol=0, atol=0)
    again = quick(name, seed=5).fit(suspect, *clean).score(both)
    np.testing.assert_array_equal(again, scores)


@pytest.mark.parametrize("name", RIVALS)
def test_rival_refuses_what_is_no_clean_set(
    name: str, network: NormedMnist, clean: tuple[Float32Array, IntArray]
) -> None:
    images, labels = clean[0][:30], clean[1][:30]
    suspect, rival = SuspectModel(network), RIVALS[name]()
    with pytest.raises(NotFittedError, match="was not fitted"):
        rival.score(images)
    spoiled = images.copy()
    spoiled[3, 0, 2, 2] = np.nan
    for bad in (spoiled, np.where(np.isnan(spoiled), np.inf, spoiled)):
        with pytest.raises(DataError, match="image 3 holds NaN or infinity"):
            rival.fit(suspect, bad, labels)
    for bad in (images.astype(np.float64), images[0], images[:0]):
        with pytest.raises(DataError, match="images must be float32"):
            rival.fit(suspect, bad, labels)
    with pytest.raises(DataError, match=r"pixels in \[0, 1\], got 0 to 255"):
        rival.fit(suspect, images * np.float32(255), labels)
    for wrong in (np.where(labels == labels[0], 10, labels), np.where(labels == labels[0], -1, labels)):
        with pytest.raises(DataError, match=r"labels must be in \[0, 10\)"):
            rival.fit(suspect, images, wrong)
    with pytest.raises(DataError, match="labels must be integers"):
        rival.fit(suspect, images, labels.astype(np.float64))
    with pytest.raises(DataError, match=r"labels must have shape \(30,\)"):
        rival.fit(suspect, images, labels[:20])


def test_fitted_rival_refuses_other_images(network: NormedMnist, clean: tuple[Float32Array, IntArray]) -> None:
    rival = RIVALS["max-softmax"]().fit(SuspectModel(network), *clean)
    spoiled = clean[0][:2].copy()
    spoiled[1] = np.nan
    with pytest.raises(DataError, match="image 1 holds NaN"):
        rival.score(spoiled)
    with pytest.raises(DataError, match=r"shape \(n, 1, 28, 28\), got \(2, 1, 27, 28\)"):
        rival.score(clean[0][:2, :, 1:])


@pytest.mark.parametrize("name", ["ted", "ted++"])
def test_rival_that_compares_with_right_answers_refuses_a_network_that_gives_none(
    name: str, network: NormedMnist, clean: tuple[Float32Array, IntArray]
) -> None:
    wrong = (SuspectModel(network).activations(clean[0]).predicted_labels + 1) % 10
    with pytest.raises(DataError, match="gets none of the 100 clean images right"):
        RIVALS[name]().fit(SuspectModel(network), clean[0], wrong)


class Undecided(nn.Module):
    """Gives NaN for a bright image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([torch.where(mean > 0.5, torch.nan, mean), mean], 1)


def test_input_that_cannot_be_scored_is_the_most_suspicious() -> None:
    images = np.full((3, 1, 4, 4), 0.1, np.float32)
    images[1] = 0.9
    scores = RIVALS["max-softmax"]().fit(SuspectModel(Undecided()), images[:1], np.zeros(1, np.int64)).score(images)
    assert scores[1] == np.inf
    assert np.isfinite(scores[[0, 2]]).all()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: deepid(5, channels=1, seed=0), (1, 64, 56)),
        (lambda: resnet20(5, channels=3, seed=0), (3, 32, 32)),
        (lambda: resnet20(5, channels=1, seed=0), (1, 64, 64)),
        (lambda: vit_small(5, channels=3, seed=0), (3, 32, 32)),
    ],
    ids=["grey 64x56", "colour 32x32", "grey 64x64", "transformer"],
)
@pytest.mark.parametrize("name", RIVALS)
def test_rival_takes_images_and_networks_of_every_kind(name: str, make: object, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    suspect = SuspectModel(make())  # type: ignore[operator]
    images = rng.random((5, *shape), dtype=np.float32)
    labels = suspect.activations(images).predicted_labels  # so few classes have images
    rival = quick(name)
    normed = any(isinstance(module, nn.BatchNorm2d) for module in suspect.module.modules())
    if name == "ibd-psc" and not normed:
        with pytest.raises(NotApplicableError, match="runs none"):
            rival.fit(suspect, images, labels)
        return
    scores = rival.fit(suspect, images, labels).score(rng.random((3, *shape), dtype=np.float32))
    assert scores.shape == (3,)
    assert np.isfinite(scores).all()


def test_passes_are_counted_whoever_sends_images_through() -> None:
    network = CountedNetwork(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval())
    images = np.zeros((300, 1, 2, 2), np.float32)
    network.logits(images)
    network.module(torch.zeros(5, 1, 2, 2))
    assert network.rows == 305
    watched = SuspectModel(network.module, split="1", depths=())
    watched.locate(images)
    before = network.rows
    watched.activations(images[:7])
    assert network.rows == before + 7


def test_second_network_counts_and_what_fitting_took_does_not() -> None:
    class Twice(Rival):
        """Asks two networks."""

        title, source = "twice", "arXiv"

        def _fit(self, images: Float32Array, labels: IntArray) -> None:
            self._second = self.counted(self.network.module)
            self._second.logits(images)

        def _score(self, images: Float32Array) -> np.ndarray:
            return self.network.logits(images)[:, 0] + self._second.logits(images)[:, 0]

    images = np.zeros((9, 1, 2, 2), np.float32)
    suspect = SuspectModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    rival = Twice().fit(suspect, images, np.zeros(9, np.int64))
    rival.score(images)
    assert rival.passes == 2
    rival.fit(suspect, images, np.zeros(9, np.int64)).score(images[:3])
    assert rival.passes == 2
