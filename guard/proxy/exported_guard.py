"""The guard in use for a model that another server runs: bundles of the exported layers, without the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from guard.detection.pipeline import Guard
from guard.errors import BundleError
from guard.export.record import ExportRecord
from guard.serving.active_guard import ActiveGuard
from guard.storage.places import BundlePlace


class ExportedGuard(ActiveGuard):
    """Follows ACTIVE as any other, and takes bundles of the exported model and its layers only.

    Parameters
    ----------
    record : ExportRecord
    settings, bundles, model_name
        As of `ActiveGuard`.

    Raises
    ------
    BundleError
        If the active bundle is another model's, watches other layers, or needs the network itself.
    """

    def __init__(
        self, record: ExportRecord, settings: Mapping[str, Any], *, bundles: BundlePlace, model_name: str
    ) -> None:
        self._record = record
        super().__init__(settings, bundles=bundles, embedded=None, model_name=model_name)

    def _read(self, path: Path) -> Guard:
        guard, record, name = Guard.load(path), self._record, f"bundle {path.name[:12]}"
        if guard.weights_digest != record.suspect:
            raise BundleError(
                f"{name} was fitted for weights {str(guard.weights_digest)[:12]}, and the exported model has "
                f"{record.suspect[:12]}. Export the model again, with this bundle."
            )
        if guard.split_points != record.split_points or guard.input_shape != record.input_shape:
            raise BundleError(
                f"{name} watches other layers than were exported. Export the model again with this bundle."
            )
        config = guard.config.replace(**{k: v for k, v in self._settings.items() if k in ("batching", "action")})
        if config.batching == "never" or guard.batch_dependence:
            raise BundleError(f"{name} wants one request at a time (batching), and the upstream may put some together.")
        if guard.backup is None or guard.backup.network is not None:
            return guard
        kind = guard.backup.kind
        if "backup" in guard.ensemble.names or config.action == "relabel":
            raise BundleError(
                f"{name} asks a backup ({kind}) that is a twin of the network, which is not here. Take another action "
                "than relabel, or fit with --backup defective, which has a network of its own."
            )
        return replace(guard, backup=None)  # reviewers see the replacement head's opinion
