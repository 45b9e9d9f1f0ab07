"""What a guarded archive carries for its guard: its handler, its bundle, its settings; no place, no secret."""

from __future__ import annotations

import json
import logging
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.config import PLACES, SERVING_SETTINGS, load_settings
from guard.errors import ArchiveError, BundleError, ConfigError, StoreUnavailable
from guard.files import read_plain
from guard.storage.bundle import DOCUMENT, BundleStore
from guard.storage.places import BundlePlace, name_of, place_of
from guard.storage.stores import open_store
from guard.torchserve.archives.manifest import MANIFEST
from guard.torchserve.archives.strict_zip import read_member

logger = logging.getLogger(__name__)

ABOUT, SETTINGS = "guard_archive.json", "guard.toml"
#: Folder of an archive with bodies of requests.
EXAMPLES = "guard_examples"
_MOST_BYTES = 2**20


def write_guard_files(
    handler: str,
    bundle: Path,
    bundles: BundlePlace | None,
    settings: Mapping[str, Any],
    example: Path | None,
    examples: Sequence[Path],
    scratch: Path,
) -> list[Path]:
    """Return what the guard adds to an archive beside its adapter; parameters as for `make_guarded_archive`.

    Of the settings only those of `ServingSettings` go in. Where a queue was named, the archive says that it wants one
    (`review = true`), and not where it is: the server's environment does (`GUARD_QUEUE_URL`).
    """
    bodies = [*([example] if example is not None else []), *examples]
    names = [f"{EXAMPLES}/{number}{body.suffix}" for number, body in enumerate(bodies)]
    about = {
        "handler": handler,
        "bundles": name_of(bundles) if bundles is not None else None,
        "embedded": bundle.name,
        "example": names[0] if example is not None else None,
        "examples": names,
    }
    (scratch / ABOUT).write_text(json.dumps(about, indent=2))
    chosen = {"review": True} if settings.get("queue_url") else {}
    chosen |= {key: value for key, value in settings.items() if key in SERVING_SETTINGS}
    (scratch / SETTINGS).write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in chosen.items()))
    added = [scratch / ABOUT, scratch / SETTINGS, bundle]
    for name, body in zip(names, bodies, strict=True):
        (scratch / EXAMPLES).mkdir(exist_ok=True)
        try:
            shutil.copyfile(body, scratch / name)
        except OSError as error:
            raise ArchiveError(
                f"the example {body} does not exist, or cannot be read ({error.strerror}). Name another."
            ) from error
    return [*added, scratch / EXAMPLES] if names else added


def read_guard_files(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what an unpacked archive says of its guard, and its settings under those of the environment.

    Raises
    ------
    ArchiveError
        If one of its files cannot be read, or names a file outside of the archive.
    ConfigError
        If a setting is unknown, or breaks its rule.
    """
    try:
        about = json.loads(read_plain(folder / ABOUT, _MOST_BYTES))
        BundleStore(folder).folder_of(str(about["embedded"]))
        first = [about["example"]] if about.get("example") else []  # all that an archive of version 0.1 may hold
        about["examples"] = about.get("examples", first)
        if not all(_lies_inside(name) for name in (*first, *about["examples"])):
            raise ValueError("one of its examples lies outside of the archive")
        text = read_plain(folder / SETTINGS, _MOST_BYTES).decode()
        kept = PLACES & tomllib.loads(text).keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, BundleError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ArchiveError(f"the guard's files in the archive are damaged ({reason}). Make it again.") from error
    if kept:
        logger.warning(
            "this archive holds %s, which may tell a password to whoever reads it: make it again, "
            "and set GUARD_QUEUE_URL for the server instead.",
            ", ".join(sorted(kept)),
        )
    return about, load_settings(folder / SETTINGS)


@dataclass(frozen=True, slots=True)
class Promise:
    """What a guarded archive says that it will do.

    Attributes
    ----------
    model : str
        Name of the model in its manifest.
    false_positive_rate : float
        By its settings, or else those of the bundle that judges: the active one of the folder that it follows, where
        that is there, or the one in the archive.
    scope : str
        Where that rate holds, by the same: `false_positive_rate_scope`.
    bundle : Path or None
        Folder of that active bundle; None: the one in the archive judges.
    images_from : str or None
        Where the images were that the guard was fitted on.
    """

    model: str
    false_positive_rate: float
    scope: str
    bundle: Path | None
    images_from: str | None


def promise_of(archive: Path) -> Promise:
    """Return what a guarded archive promises.

    Raises
    ------
    ArchiveError
        If it has no guard, or cannot be read.
    StoreUnavailable
        If the object store that it follows does not give its bundle.
    """
    try:
        about, settings, manifest = (read_member(archive, name, _MOST_BYTES) for name in (ABOUT, SETTINGS, MANIFEST))
        if manifest is None:
            raise ArchiveError(f"{archive.name} is no model archive: it holds no {MANIFEST}. Name a .mar file.")
        if about is None or settings is None:
            raise ArchiveError(f"{archive.name} has no guard. Put one around it with `guard wrap`.")
        known = json.loads(about)
        followed = followed_bundles(archive)
        store = open_store(followed) if followed is not None else None
        active = store.known_active() if store is not None else None
        bundle = store.fetch(active) if store is not None and active is not None else None
        if bundle is not None:
            document = json.loads(bundle.joinpath(DOCUMENT).read_bytes())
        else:
            document = json.loads(read_member(archive, f"{known['embedded']}/{DOCUMENT}", 2**26) or b"")
        served = {**document["settings"], **tomllib.loads(settings.decode())}
        scope = str(served.get("false_positive_rate_scope", "all"))
        name = json.loads(manifest)["model"]["modelName"]
        return Promise(name, float(served["false_positive_rate"]), scope, bundle, document.get("images_from"))
    except StoreUnavailable:
        raise
    except (ValueError, KeyError, TypeError, OSError, RecursionError, BundleError) as error:
        raise ArchiveError(f"{archive.name} cannot be read ({type(error).__name__}). Make it again.") from error


def _lies_inside(name: object) -> bool:
    return isinstance(name, str) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def is_guarded(archive: Path) -> bool:
    """Return whether an archive carries a guard; ArchiveError if it cannot be read."""
    return read_member(archive, ABOUT, _MOST_BYTES) is not None


def followed_bundles(archive: Path) -> BundlePlace | None:
    """Return the folder or URL of bundles whose ACTIVE an archive's guard follows; None without a guard, or if pinned.

    Raises
    ------
    ArchiveError
        If the archive cannot be read.
    """
    try:
        text = read_member(archive, ABOUT, _MOST_BYTES)
        bundles = None if text is None else json.loads(text)["bundles"]
        if not isinstance(bundles, str | None):
            raise ValueError("bundles")
        return None if bundles is None else place_of(bundles)
    except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise ArchiveError(f"{archive.name} cannot be read ({type(error).__name__}). Make it again.") from error
