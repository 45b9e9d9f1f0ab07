"""A guarded archive as a model of this process: unpacked, its handler started, its network under guard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from guard.errors import ArchiveError
from guard.serving.guarded_model import GuardedModel
from guard.suspect.weights import check_weights_file
from guard.torchserve.archives.contents import is_guarded, read_guard_files
from guard.torchserve.archives.manifest import MANIFEST
from guard.torchserve.archives.strict_zip import open_strict_zip
from guard.torchserve.user_handler import open_unpacked_handler


@contextmanager
def open_archived_model(archive: Path, folder: Path, name: str) -> Iterator[GuardedModel]:
    """Unpack a guarded archive, let its handler make the network, and put the guard on it.

    The handler's `initialize` runs, as it does in TorchServe; what it does to a request does not: a client of the open
    inference protocol sends what the network takes.

    Parameters
    ----------
    archive : Path
        A `.mar` file.
    folder : Path
        To unpack to; it must not exist.
    name : str
        Of the model, in metrics and queue.

    Raises
    ------
    ArchiveError
        If the archive is damaged, or not guarded.
    UnsafeWeightsError, SuspectModelError, BundleError, ConfigError
        If its weights, its handler, its bundle or its settings are not sound.
    """
    if not is_guarded(archive):
        raise ArchiveError(f"{archive.name} has no guard. Make a guarded one with `guard archive` or `guard wrap`.")
    with open_strict_zip(archive) as opened:
        opened.unpack(folder)
    about, settings = read_guard_files(folder)
    manifest = json.loads((folder / MANIFEST).read_bytes())["model"]
    if "serializedFile" in manifest:
        check_weights_file(folder / manifest["serializedFile"])
    config = manifest.get("configFile")
    model_settings = yaml.safe_load((folder / config).read_text(encoding="utf-8")) if config else {}
    attribute = settings.pop("model_attribute", "model")
    with (
        open_unpacked_handler(
            folder, about["handler"], model_attribute=attribute, model_settings=model_settings
        ) as user,
        GuardedModel(
            user.module,
            bundles=about["bundles"],
            bundle=folder / about["embedded"],
            name=name,
            **settings,
        ) as model,
    ):
        yield model
