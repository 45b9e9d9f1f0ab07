"""One backup: trained, kept as arrays, restored; independent of the suspect model where it says so."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from test_purify import QUICK, QUICK_SETTINGS, bands, tiny

from guard.backups.backup import BACKUP_KINDS, Backup
from guard.backups.defective import DefectiveSettings
from guard.backups.purified_twin import METHODS
from guard.errors import BundleError, ConfigError, DataError
from guard.suspect.digest import weights_digest

SETTINGS = {**QUICK_SETTINGS, "defective": DefectiveSettings(fit=QUICK)}


def test_kinds_are_defective_and_all_methods():
    assert list(BACKUP_KINDS) == ["defective", *METHODS]


@pytest.mark.parametrize("kind", BACKUP_KINDS)
def test_backup_survives_a_round_trip(kind):
    suspect, (images, labels) = tiny(), bands(60)
    before = weights_digest(suspect)
    backup = Backup.train(kind, suspect, images, labels, settings=SETTINGS[kind])
    assert backup.seconds > 0
    description = json.loads(json.dumps(backup.description, allow_nan=False))
    again = Backup.restore(description, load(save(backup.arrays())), suspect)
    np.testing.assert_array_equal(again.logits(images), backup.logits(images))
    assert not again.network.training
    assert weights_digest(suspect) == before
    assert 0 <= backup.description["clean_accuracy"] <= 1


def test_defective_backup_takes_no_weight_from_the_suspect_and_needs_none():
    images, labels = bands(60)
    suspect, other = tiny(), tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-3)
    entry, two = (
        Backup.train("defective", model, images, labels, settings=SETTINGS["defective"]) for model in (suspect, other)
    )
    np.testing.assert_array_equal(entry.logits(images), two.logits(images))
    alone = Backup.restore(entry.description, entry.arrays(), None)
    np.testing.assert_array_equal(alone.logits(images), entry.logits(images))


def test_bad_input_is_refused():
    images, labels = bands(60)
    with pytest.raises(ConfigError, match=r"there is no backup 'defect'\. Did you mean 'defective'\?"):
        Backup.train("defect", tiny(), images, labels)
    with pytest.raises(ConfigError, match="takes DefectiveSettings, got FitSettings"):
        Backup.train("defective", tiny(), images, labels, settings=QUICK)
    with pytest.raises(DataError, match="at least 5 clean images"):
        Backup.train("defective", tiny(), images[:12], labels[:12])
    twin = Backup.train("anp", tiny(), images, labels, settings=SETTINGS["anp"])
    with pytest.raises(BundleError, match="is a twin of the suspect model"):
        Backup.restore(twin.description, twin.arrays(), None).logits(images)
    with pytest.raises(BundleError, match="cannot be built again"):
        Backup.restore(twin.description, twin.arrays(), tiny(norm=False))
    with pytest.raises(BundleError, match="unknown backup 'oracle'"):
        Backup.restore({"kind": "oracle"}, {}, None)
