"""Rivals of the guard: small cases whose right value follows by hand from the formulas of the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor, nn

from guard import SuspectModel
from guard.errors import DataError, NotApplicableError
from guard.lab.rivals.badexpert import BadExpert
from guard.lab.rivals.base import CountedNetwork, Layer, executed_layers, weighted_layers
from guard.lab.rivals.beatrix import Band, Beatrix, gram_entries
from guard.lab.rivals.ibd_psc import IbdPsc
from guard.lab.rivals.max_softmax import MaxSoftmax
from guard.lab.rivals.psbd import Psbd
from guard.lab.rivals.scale_up import ScaleUp, ScaleUpLimited
from guard.lab.rivals.strip import Strip, detection_boundary
from guard.lab.rivals.ted import PcaOutliers, Ted, nearest_of_class
from guard.lab.rivals.ted_plus import TedPlus
from guard.types import Float32Array, IntArray


def linear(weight: list[list[float]], bias: list[float] | None = None) -> SuspectModel:
    """A network whose logits are a linear function of the pixels."""
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return SuspectModel(nn.Sequential(nn.Flatten(), layer))


def pixels(rows: list[list[float]]) -> Float32Array:
    """Images of one row of pixels, (n, 1, 1, width)."""
    return np.array(rows, dtype=np.float32)[:, np.newaxis, np.newaxis]


def labels(*values: int) -> IntArray:
    return np.array(values, dtype=np.int64)


def test_max_softmax_is_the_log_odds_of_the_largest_probability() -> None:
    suspect = linear([[4.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    scores = MaxSoftmax().fit(suspect, pixels([[0, 0]]), labels(0)).score(pixels([[1, 0], [0, 0.5], [0, 0]]))
    p = np.array([math.exp(4) / (math.exp(4) + 2), math.e / (math.e + 2), 1 / 3])
    np.testing.assert_allclose(scores, np.log(p / (1 - p)), rtol=1e-6)


def test_max_softmax_tells_probabilities_apart_that_round_to_one() -> None:
    suspect = linear([[100.0], [0.0]])
    scores = MaxSoftmax().fit(suspect, pixels([[0]]), labels(0)).score(pixels([[0.5], [0.9]]))
    np.testing.assert_allclose(scores, [50.0, 90.0], rtol=1e-6)


def test_strip_is_the_mean_entropy_in_bits_over_all_overlays() -> None:
    """Logits (3 x, 0): three overlays make 0.2 to 0.5, 0.2 and 1, as sums are cut off at 1."""
    suspect = linear([[3.0], [0.0]])
    clean = pixels([[0.3], [0.0], [0.9]])
    score = Strip(overlays=100).fit(suspect, clean, labels(0, 0, 0)).score(pixels([[0.2]]))
    p = 1 / (1 + np.exp(-3 * np.array([0.5, 0.2, 1.0])))
    entropies = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    np.testing.assert_allclose(score, -entropies.mean(), rtol=1e-6)


def test_strip_of_a_network_that_is_never_sure_is_log2_of_the_classes_and_of_a_sure_one_zero() -> None:
    clean, image = pixels([[0.1], [0.2]]), pixels([[0.5]])
    unsure = Strip().fit(linear([[0.0]] * 8), clean, labels(0, 7)).score(image)
    sure = Strip().fit(linear([[1000.0], [0.0]]), clean, labels(0, 1)).score(image)
    np.testing.assert_allclose([unsure[0], sure[0]], [-3.0, 0.0], atol=1e-9)


def test_strip_draws_as_many_overlays_as_it_was_asked_for() -> None:
    rival = Strip(overlays=3).fit(linear([[1.0], [0.0]]), pixels([[i / 10] for i in range(10)]), labels(*[0] * 10))
    rival.score(pixels([[0.1], [0.2]]))
    assert rival.passes == 3


def test_strip_boundary_is_the_quantile_of_a_normal_distribution() -> None:
    scores = np.array([-1.0, -2.0, -3.0])  # mean -2, standard deviation sqrt(2/3)
    assert detection_boundary(scores, 0.5) == pytest.approx(-2.0)
    assert detection_boundary(scores, 0.01) == pytest.approx(-2.0 + 2.3263478740 * math.sqrt(2 / 3))


def test_scale_up_is_the_share_of_multiplied_copies_that_keep_the_label() -> None:
    """Label 0 if x0 + 0.02 > x1, else 1; pixels are cut off at 1, so (0.2, 0.3) gets label 0 from factor 5 on."""
    suspect = linear([[1.0, 0.0], [0.0, 1.0]], [0.02, 0.0])
    images = pixels([[0.2, 0.3], [0.3, 0.2], [0.05, 0.5]])
    scores = ScaleUp().fit(suspect, images, labels(0, 0, 0)).score(images)
    # (0.2, 0.3) becomes (0.6, 0.9), label 1, then (1, 1), label 0; (0.05, 0.5) at most (0.55, 1)
    np.testing.assert_allclose(scores, [1 / 5, 1.0, 1.0])


def test_scale_up_with_clean_images_is_standardised_by_the_predicted_class() -> None:
    suspect = linear([[1.0, 0.0], [0.0, 1.0]], [0.02, 0.0])
    clean = pixels([[0.2, 0.3], [0.05, 0.5], [0.05, 0.5], [0.3, 0.2]])  # SPC 0.2, 1, 1 in class 1; 1 in class 0
    rival = ScaleUpLimited().fit(suspect, clean, labels(1, 1, 1, 0))
    mean, std = np.mean([0.2, 1, 1]), np.std([0.2, 1, 1])
    scores = rival.score(pixels([[0.2, 0.3], [0.05, 0.5], [0.3, 0.2]]))
    np.testing.assert_allclose(scores, [(0.2 - mean) / std, (1 - mean) / std, 0.0], atol=1e-12)


class Normed(nn.Module):
    """Pixels times 1, 2, then three batch norms that shift by 0.5 each, as logits beside a constant one."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(*(nn.BatchNorm2d(1, eps=0.0) for _ in range(3)))
        for norm in self.norms:
            norm.bias.data.fill_(-0.5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norms(x).flatten(1)
        return torch.cat([out, torch.zeros_like(out)], 1)


def test_ibd_psc_is_the_mean_probability_in_the_amplified_copies() -> None:
    """With omega = 2 the last k norms compute 2 (x - 0.5), the others x - 0.5."""
    rival = IbdPsc(factor=2.0, copies=2, error_rate=0.4).fit(
        SuspectModel(Normed()), pixels([[0.9], [0.8]]), labels(1, 1)
    )
    assert rival.depths == (2, 3)  # no count makes a clean image wrong, so the last two are left
    x = 0.9
    logits = [2 * (2 * ((x - 0.5) - 0.5) - 0.5), 2 * (2 * (2 * (x - 0.5) - 0.5) - 0.5)]
    expected = np.mean([1 / (1 + math.exp(logit)) for logit in logits])  # of label 1, whose logit is 0
    np.testing.assert_allclose(rival.score(pixels([[x]])), expected, rtol=1e-6)


def test_ibd_psc_starts_where_the_error_rate_is_passed() -> None:
    """x - 1.5 < 0 has label 1; with all three amplified 8 x - 7 is above 0 for 0.95, with two 4 x - 4 - 1 never."""
    images = pixels([[0.95], [0.99], [0.1]])
    rival = IbdPsc(factor=2.0, copies=1, error_rate=0.6).fit(SuspectModel(Normed()), images, labels(1, 1, 1))
    assert rival.depths == (3,)
    rival = IbdPsc(factor=2.0, copies=1, error_rate=0.6).fit(SuspectModel(Normed()), images, labels(0, 0, 0))
    assert rival.depths == (1,)


def test_ibd_psc_says_that_a_network_without_batch_norm_is_not_for_it() -> None:
    with pytest.raises(NotApplicableError, match=r"batch-norm layers, and the suspect model runs none"):
        IbdPsc().fit(linear([[1.0], [0.0]]), pixels([[0.5]]), labels(0))


def brute_force_rank(query: Float32Array, label: int, references: Float32Array, of: IntArray) -> int:
    order = np.argsort([math.dist(query, reference) for reference in references], kind="stable")
    places = [place for place, row in enumerate(order, start=1) if of[row] == label]
    return places[0] if places else len(references) + 1


def test_ted_ranks_are_those_of_sorting_by_hand() -> None:
    rng = np.random.default_rng(0)
    references, queries = (rng.normal(size=(n, 5)).astype(np.float32) for n in (40, 30))
    of, asked = rng.integers(0, 4, 40), rng.integers(0, 5, 30)  # class 4 has no reference
    nearest = nearest_of_class(queries, asked, references, of, are_references=False)
    assert nearest.ranks.tolist() == [
        brute_force_rank(q, c, references, of) for q, c in zip(queries, asked, strict=True)
    ]
    assert np.isinf(nearest.distances[asked == 4]).all()
    among = nearest_of_class(references, of, references, of, are_references=True)
    without = [np.delete(np.arange(40), row) for row in range(40)]
    expected = [brute_force_rank(references[i], of[i], references[w], of[w]) for i, w in enumerate(without)]
    assert among.ranks.tolist() == expected


def test_pca_outlier_score_is_the_sum_of_squared_components_by_their_variances() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3)) + 5
    new = rng.normal(size=(4, 3))
    standardised, others = ((part - rows.mean(0)) / rows.std(0) for part in (rows, new))
    precision = np.linalg.inv(np.corrcoef(standardised.T) + np.eye(3) / 50)
    expected = np.einsum("ij,jk,ik->i", others, precision, others)
    np.testing.assert_allclose(PcaOutliers.fit(rows).score(new), expected)


def test_pca_outlier_score_is_finite_for_a_rank_that_never_varies() -> None:
    outliers = PcaOutliers.fit(np.ones((25, 2)))
    # spread 1 / 5, variance 1 / 25: one step away is 5 spreads, and 25 / (1 / 25)
    np.testing.assert_allclose(outliers.score(np.array([[1.0, 1.0], [2.0, 1.0]])), [0.0, 625.0])


def two_clusters() -> tuple[SuspectModel, Float32Array, IntArray]:
    """Two layers that keep distances; clean images of class 0 left of 0.5, of class 1 right of it."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    first.weight.data, second.weight.data = weight, weight
    images = pixels([[0.9, 0.1], [0.8, 0.1], [0.7, 0.1], [0.1, 0.9], [0.1, 0.8], [0.1, 0.7]])
    return SuspectModel(nn.Sequential(nn.Flatten(), first, second)), images, labels(0, 0, 0, 1, 1, 1)


def test_ted_takes_all_layers_and_the_images_that_are_answered_rightly() -> None:
    suspect, images, true = two_clusters()
    images, true = np.concatenate([images, pixels([[0.3, 0.31], [0.31, 0.3]])]), np.append(true, [1, 1])
    rival = Ted().fit(suspect, images, true)  # the network answers the last one with 0, so it is not compared with
    ranks = rival._trajectories(rival._watched.activations(pixels([[0.32, 0.31], [0.32, 0.33], [0.75, 0.1]])))
    # the nearest to (0.32, 0.31), label 0, is (0.3, 0.31) of class 1; then comes (0.7, 0.1)
    np.testing.assert_array_equal(ranks, [[2, 2], [1, 1], [1, 1]])


def test_ted_plus_gives_the_worst_rank_outside_of_the_tube() -> None:
    suspect, images, true = two_clusters()
    rival = TedPlus(quantile=1.0).fit(suspect, images, true)
    for radii in rival._radii.values():
        np.testing.assert_allclose(radii, [0.1, 0.1], atol=1e-6)
    ranks = rival._trajectories(rival._watched.activations(pixels([[0.75, 0.1], [0.75, 0.25], [0.1, 0.65]])))
    np.testing.assert_array_equal(ranks, [[1, 1], [7, 7], [1, 1]])


def test_ted_plus_radius_is_a_quantile_of_the_class_or_of_all_where_the_class_is_alone() -> None:
    suspect, _, _ = two_clusters()
    images = pixels([[0.9, 0.1], [0.8, 0.1], [0.5, 0.1], [0.1, 0.9]])
    rival = TedPlus(quantile=0.5).fit(suspect, images, labels(0, 0, 0, 1))
    for radii in rival._radii.values():
        np.testing.assert_allclose(radii, [0.1, 0.1], atol=1e-6)  # 0.1, 0.1, 0.3; class 1 has one image


def test_gram_entries_are_roots_of_products_of_powers() -> None:
    features = np.array([[[1.0, 2.0], [3.0, -1.0]]], dtype=np.float32)
    np.testing.assert_allclose(gram_entries(features, 1), [[1 + 4, 3 - 2, 9 + 1]])
    np.testing.assert_allclose(gram_entries(features, 2), [[math.sqrt(17), math.sqrt(13), math.sqrt(82)]])
    cubes = [1 + 64, 27 - 8, 729 + 1]
    np.testing.assert_allclose(gram_entries(features, 3), [np.cbrt(cubes)])
    negative = np.array([[[1.0], [-2.0]]], dtype=np.float32)
    np.testing.assert_allclose(gram_entries(negative, 3), [[1.0, -2.0, 4.0]])


def test_gram_band_is_median_and_ten_median_absolute_deviations() -> None:
    entries = np.array([[1.0, 10.0], [2.0, 10.0], [3.0, 10.0], [4.0, 10.0], [9.0, 10.0]])
    band = Band.fit(entries, width=10.0)  # medians 3 and 10, deviations 2 1 0 1 6 -> 1, and 0
    np.testing.assert_allclose(band.lower, [-7.0, 10.0])
    np.testing.assert_allclose(band.upper, [13.0, 10.0])
    # 26 is (26 - 13) / 13 above, 5 is (10 - 5) / 10 below, -14 is 7 below -7
    np.testing.assert_allclose(band.deviation(np.array([[26.0, 10.0], [3.0, 5.0], [-14.0, 10.0]])), [1.0, 0.5, 1.0])


def test_beatrix_sums_deviations_over_orders_in_the_class_that_is_predicted() -> None:
    """A layer that leaves maps as they are; label 0 if the pixels' sum is above 1."""
    identity = nn.Conv2d(1, 1, 1, bias=False)
    identity.weight.data.fill_(1.0)
    head = nn.Linear(2, 2)
    head.weight.data, head.bias.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0])
    suspect = SuspectModel(nn.Sequential(identity, nn.Flatten(), head))
    clean = pixels([[0.8, 0.8], [0.8, 0.9], [0.9, 0.9], [0.1, 0.1], [0.2, 0.1], [0.2, 0.2]])
    rival = Beatrix(orders=2, width=1.0).fit(suspect, clean, labels(0, 0, 0, 1, 1, 1))
    new = pixels([[1.0, 1.0], [0.4, 0.5], [0.2, 0.1]])
    expected = []
    for image, of_class in zip(new, (clean[:3], clean[3:], clean[3:]), strict=True):
        total = 0.0
        for order in (1, 2):
            known = np.sum(of_class.astype(float) ** (2 * order), axis=(1, 2, 3)) ** (1 / order)
            median = np.median(known)
            mad = np.median(np.abs(known - median))
            value = np.sum(image.astype(float) ** (2 * order)) ** (1 / order)
            low, high = median - mad, median + mad
            total += max(low - value, 0) / max(abs(low), median) + max(value - high, 0) / max(abs(high), median)
        expected.append(total)
    assert expected[2] == 0.0
    np.testing.assert_allclose(rival.score(new), expected, rtol=1e-6)


def test_psbd_is_what_dropout_takes_from_the_probability_of_the_label() -> None:
    """Two linear layers; masks are those that their seeds draw, in front of the second."""
    first, second = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)
    rng = np.random.default_rng(2)
    weights = [rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)]
    first.weight.data, second.weight.data = map(torch.from_numpy, weights)
    images = pixels(rng.random((5, 4)).tolist())
    suspect = SuspectModel(nn.Sequential(nn.Flatten(), first, second))
    rival = Psbd(seed=7, runs=3).fit(suspect, images, labels(0, 1, 2, 0, 1))
    hidden = images.reshape(5, 4) @ weights[0].T
    plain = softmax(hidden @ weights[1].T, axis=1)
    answers, rows = plain.argmax(axis=1), np.arange(5)
    with_dropout = []
    for run in range(3):
        draws = np.random.default_rng([7, run, 0]).random(6, dtype=np.float32)
        kept = np.where(draws >= rival.rate, hidden / (1 - rival.rate), 0.0)
        with_dropout.append(softmax(kept @ weights[1].T, axis=1)[rows, answers])
    uncertainty = plain[rows, answers] - np.mean(with_dropout, axis=0)
    np.testing.assert_allclose(rival.score(images), -uncertainty, atol=1e-6)


def test_psbd_takes_the_lowest_rate_that_shifts_enough_clean_images() -> None:
    """Label 1 needs the unit that is dropped at 0.4, so all images shift there, to label 0."""
    first, second = nn.Linear(1, 1), nn.Linear(1, 2)
    first.weight.data, first.bias.data = torch.tensor([[0.0]]), torch.tensor([1.0])
    second.weight.data, second.bias.data = torch.tensor([[0.0], [1.0]]), torch.tensor([0.5, 0.0])
    suspect = SuspectModel(nn.Sequential(nn.Flatten(), first, second))
    draws = [np.random.default_rng([3, run, 0]).random(1, dtype=np.float32)[0] for run in range(3)]
    for share in (0.2, 0.5, 0.9):
        rival = Psbd(seed=3, shift_share=share).fit(suspect, pixels([[0.1], [0.9]]), labels(1, 1))
        rates = [tenth / 10 for tenth in range(1, 10)]
        expected = next((rate for rate in rates if np.mean([draw < rate for draw in draws]) >= share), 0.9)
        assert rival.rate == expected


def test_psbd_says_that_a_network_of_one_layer_is_not_for_it() -> None:
    with pytest.raises(NotApplicableError, match="has one only"):
        Psbd().fit(linear([[1.0], [0.0]]), pixels([[0.5]]), labels(0))


def test_badexpert_is_the_log_ratio_of_two_probabilities() -> None:
    suspect = linear([[2.0, 0.0], [0.0, 2.0]], [0.0, 0.0])
    images = pixels([[0.9, 0.1], [0.1, 0.9], [0.8, 0.3], [0.2, 0.7]])
    rival = BadExpert(learning_rate=0.5).fit(suspect, images, labels(0, 1, 0, 1))
    answers = np.array([0, 1, 0, 1])

    def probability(network: CountedNetwork) -> np.ndarray:
        weight, bias = (parameter.detach().numpy() for parameter in network.module.parameters())
        return softmax(images.reshape(4, 2) @ weight.T + bias, axis=1)[np.arange(4), answers]

    expert, auxiliary = probability(rival._expert), probability(rival._auxiliary)
    np.testing.assert_allclose(rival.score(images), np.log(expert / auxiliary), rtol=1e-4, atol=1e-6)
    assert (expert < 0.5).all()  # unlearned
    assert (auxiliary > 0.5).all()


def test_layers_are_those_that_run_in_their_order_once() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 2)
            self.unused = nn.Linear(3, 3)
            self.norm = nn.BatchNorm1d(3)
            self.first = nn.Conv2d(1, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.norm(self.first(x).mean((2, 3)))))

    layers = executed_layers(CountedNetwork(Backwards().eval()), np.zeros((1, 1, 2, 2), np.float32))
    assert [(layer.name, layer.shape) for layer in layers] == [
        ("first", (1, 3, 2, 2)),
        ("norm", (1, 3)),
        ("last", (1, 2)),
    ]
    assert [layer.name for layer in weighted_layers(layers)] == ["first", "last"]
    assert [layer.positions for layer in layers] == [4, 1, 1]


@pytest.mark.parametrize(
    ("shape", "positions"), [((1, 8, 4, 4), 16), ((1, 64, 192), 64), ((1, 10), 1), ((4, 16, 8), 0), ((1,), 0), ((), 0)]
)
def test_positions_are_pixels_or_tokens_of_what_has_a_row_per_image(shape: tuple[int, ...], positions: int) -> None:
    assert Layer("any", nn.Identity(), shape).positions == positions


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Strip(overlays=0), "overlays must be >= 1, got 0"),
        (lambda: Strip(seed=-1), "seed must be >= 0, got -1"),
        (lambda: ScaleUp(factors=()), "factors must be"),
        (lambda: ScaleUp(factors=(1.0, 3.0)), "numbers > 1"),
        (lambda: IbdPsc(factor=1.0), "factor must be > 1"),
        (lambda: IbdPsc(copies=0), "copies >= 1"),
        (lambda: IbdPsc(error_rate=1.0), r"error_rate in \(0, 1\)"),
        (lambda: TedPlus(quantile=0.0), r"quantile must be in \(0, 1\]"),
        (lambda: Beatrix(orders=0), "orders must be >= 1"),
        (lambda: Beatrix(width=0.0), "width > 0"),
        (lambda: Psbd(runs=0), "runs must be >= 1"),
        (lambda: Psbd(shift_share=1.0), r"shift_share in \(0, 1\)"),
        (lambda: BadExpert(left_accuracy=0.0), r"left_accuracy must be in \(0, 1\)"),
        (lambda: BadExpert(epochs=0), "epochs"),
        (lambda: BadExpert(learning_rate=0.0), "learning_rate must be > 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        make()  # type: ignore[operator]
