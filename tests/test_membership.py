"""Clean images that the network was trained on: noticed where the network has learned them by heart, else not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import CleanSplit

from guard import SuspectModel
from guard.cli.fitting import tell_membership
from guard.detection.membership import Membership, membership
from guard.detection.pipeline import Guard
from guard.lab.attacks import MnistCnn


@pytest.fixture(scope="module")
def overfitted(clean_split: CleanSplit) -> SuspectModel:
    """Trained on 300 images until it knows them by heart."""
    torch.manual_seed(0)
    network = MnistCnn()
    images, labels = (torch.from_numpy(np.array(part[:300])) for part in clean_split.train)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(25):
        for rows in torch.randperm(300).split(50):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimiser.step()
    return SuspectModel(network.eval())


def test_images_of_the_training_are_noticed_and_unseen_ones_are_not(
    overfitted: SuspectModel, clean_split: CleanSplit
) -> None:
    seen = membership(overfitted, clean_split.train.images[:300], clean_split.train.labels[:300])
    unseen = membership(overfitted, *clean_split.validation)
    assert seen.is_noticed
    assert not unseen.is_noticed
    assert (seen.n, unseen.n) == (300, 1000)
    assert seen.moved_loss / seen.loss > 3 * unseen.moved_loss / unseen.loss


def test_unseen_images_of_a_good_network_are_not_taken_for_seen(suspect: SuspectModel, clean_split: CleanSplit) -> None:
    images, labels = clean_split.test
    for rows in (slice(0, 50), slice(50, 250), slice(0, 1000)):
        assert not membership(suspect, images[rows], labels[rows]).is_noticed


@pytest.mark.parametrize(
    ("errors", "moved_errors", "loss", "moved_loss", "n", "noticed"),
    [
        (0.0, 0.05, 0.01, 0.2, 300, True),
        (0.0, 0.05, 0.05, 0.2, 300, False),  # the loss grows as that of unseen images does
        (0.02, 0.05, 0.01, 0.2, 300, False),  # so do the errors
        (0.0, 0.05, 0.01, 0.2, 50, False),  # too few images to say
        (0.0, 0.0, 0.0, 0.0, 300, False),
    ],
)
def test_membership_needs_both_signs(
    errors: float, moved_errors: float, loss: float, moved_loss: float, n: int, noticed: bool
) -> None:
    assert Membership(loss, moved_loss, errors, moved_errors, n).is_noticed is noticed


@pytest.mark.usefixtures("few_folds")
def test_command_line_warns_of_them_in_one_line(
    overfitted: SuspectModel, clean_split: CleanSplit, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = (part[:300] for part in clean_split.train)
    guard = Guard.fit(overfitted, images, labels)
    tell_membership(overfitted, images, guard)
    told = capsys.readouterr().err
    assert told.startswith(
        "warning: the network seems to have been trained on these images: it gets 0.0 % of them wrong"
    )
    assert told.count("\n") == 1
