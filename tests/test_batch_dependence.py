"""Networks whose answers depend on the batch, on chance or on their mode: found, named, and left as they were."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from guard import Guard, GuardConfig, SuspectModel
from guard.errors import ConfigError, SuspectModelError
from guard.serving.runtime import GuardRuntime
from guard.suspect.batch_dependence import batch_dependence
from guard.suspect.digest import weights_digest

IMAGES = np.random.default_rng(0).normal(size=(40, 1, 8, 8)).astype(np.float32)


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), *layers, nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).eval()


class Centred(nn.Module):
    """Subtracts the mean of the batch, with no layer that anybody knows."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images - images.mean(dim=0, keepdim=True)


class AlwaysDropout(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.dropout(images, 0.5, training=True)


@pytest.mark.parametrize(
    "layers",
    [(), (nn.BatchNorm2d(6),), (nn.InstanceNorm2d(6),), (nn.GroupNorm(2, 6),), (nn.Dropout(0.5),)],
    ids=["plain", "batch norm", "instance norm", "group norm", "dropout"],
)
def test_sound_network_answers_alike_alone_and_together(layers):
    assert batch_dependence(network(*layers), IMAGES) == ""


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.BatchNorm2d(6, track_running_stats=False), r"look at 1 \(BatchNorm2d without running statistics\)"),
        (nn.BatchNorm2d(6).train(), r"look at 1 \(BatchNorm2d in train mode\)"),
        (Centred(), r"labels change$"),
    ],
)
def test_network_that_looks_at_the_whole_batch_is_found(layer, named):
    module = network()
    module.insert(1, layer)
    before = weights_digest(module)
    finding = batch_dependence(module, IMAGES)
    assert "between batches of 1 and 32 its logits move by" in finding
    assert re.search(named, finding)
    assert weights_digest(module) == before


@pytest.mark.parametrize("layer", [nn.Dropout(0.5).train(), AlwaysDropout()])
def test_network_that_draws_its_answers_is_refused(layer):
    module = network()
    module.insert(1, layer)
    state = torch.get_rng_state()
    with pytest.raises(SuspectModelError, match="otherwise a second time"):
        batch_dependence(module, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)


def test_guard_is_fitted_as_it_is_served_or_refused():
    module = network(nn.BatchNorm2d(6, track_running_stats=False))
    rng = np.random.default_rng(1)
    images = rng.normal(size=(200, 1, 8, 8)).astype(np.float32)
    labels = np.arange(200) % 5
    with pytest.raises(SuspectModelError, match=r"depends on the others of its batch.*batching = 'never'"):
        Guard.fit(SuspectModel(module), images, labels, GuardConfig(false_positive_rate=0.2))
    config = GuardConfig(false_positive_rate=0.2, batching="never")
    guard = Guard.fit(SuspectModel(module), images, labels, config)
    alone = np.concatenate([module(torch.from_numpy(image[None])).detach().numpy() for image in images[:20]])
    np.testing.assert_allclose(guard.reference.logits[:20], alone, rtol=2**-11 + 1e-4, atol=1e-5)  # in half precision
    together = [verdict.p_value for verdict in guard.inspect(images[:20])]
    assert together == [guard.inspect(image[None])[0].p_value for image in images[:20]]


def test_guard_that_was_fitted_on_single_images_serves_no_batches(tmp_path):
    module = network(nn.BatchNorm2d(6, track_running_stats=False))
    images = np.random.default_rng(1).normal(size=(100, 1, 8, 8)).astype(np.float32)
    config = GuardConfig(false_positive_rate=0.2, batching="never")
    with pytest.raises(SuspectModelError, match="depends on the others of its batch"):
        Guard.fit(SuspectModel(module), images, np.arange(100) % 5, config.replace(rows_per_request="any"))
    folder = Guard.fit(SuspectModel(module), images, np.arange(100) % 5, config).save(tmp_path)
    loaded = Guard.load(folder, SuspectModel(module))
    assert loaded.batch_dependence.startswith("the network's answer to an image depends on the others of its batch")
    for changes in ({"batching": "shown"}, {"batching": "declared"}, {"rows_per_request": "any"}):
        with pytest.raises(ConfigError, match=r"do not go with this guard: .* its logits move by .*batching = 'never'"):
            loaded.with_config(**changes)
        with pytest.raises(ConfigError, match="do not go with this guard"):
            GuardRuntime(module, changes, bundles=None, embedded=folder, model_name="m")
    assert loaded.with_config(action="block", batching="never").config.action == "block"


def test_guard_of_a_handler_that_mixes_batches_can_be_kept_from_them_and_not_given_them(fitted_guard):
    guard = replace(fitted_guard, batch_dependence="the handler gives another row")
    assert guard.with_config(batching="never", rows_per_request="any").config.batching == "never"
    assert guard.with_config(batching="shown").config.batching == "shown"  # the adapter tries it out
    with pytest.raises(ConfigError, match="batching = 'declared'"):
        guard.with_config(batching="declared")


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(6), nn.Dropout(0.5)])
def test_network_left_in_train_mode_is_refused_by_the_names_of_its_layers(layer):
    module = network(layer).train()
    suspect = SuspectModel(module)
    before = weights_digest(module)
    with pytest.raises(
        SuspectModelError, match=rf"left in train mode.*look at 1 \({type(layer).__name__} in train mode"
    ):
        suspect.check_given_mode(IMAGES)
    assert weights_digest(module) == before
    assert not module.training


@pytest.mark.parametrize("module", [network().train(), network(nn.BatchNorm2d(6))])
def test_mode_that_changes_nothing_is_no_matter(module):
    SuspectModel(module).check_given_mode(IMAGES)
