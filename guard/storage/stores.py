"""The store of bundles that a folder or a URL names, and where this machine keeps copies of what lies elsewhere."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from guard.errors import BundleError
from guard.extras import require
from guard.files import PRIVATE_FOLDER, make_private_folder
from guard.storage.bundle import BundleStore
from guard.storage.places import BundlePlace, endpoint, place_of

#: Environment variable: the folder that bundles of object stores are kept in on this machine.
CACHE_VARIABLE = "GUARD_CACHE_DIR"


def open_store(place: BundlePlace) -> BundleStore:
    """Return the store of a folder or a URL; nothing is asked of an object store yet.

    Raises
    ------
    ConfigError
        As `place_of`.
    MissingExtraError
        If the package for object stores is not installed.
    BundleError
        If there can be no folder for copies of its bundles on this machine.
    """
    known = place_of(place)
    if isinstance(known, Path):
        return BundleStore(known)
    require("object-store")
    from guard.storage.objects import Objects  # here: few need it, and its package is an extra
    from guard.storage.remote import RemoteBundleStore

    return RemoteBundleStore(Objects(known), make_cache(known))


def make_cache(url: str) -> Path:
    """Return the folder that copies of a store's bundles are kept in, closed to others; it is made if it is missing.

    It lies below `GUARD_CACHE_DIR`, or else in the user's folder of caches, one for each URL and `AWS_ENDPOINT_URL`.

    Raises
    ------
    BundleError
        If it cannot be made, is a link, or belongs to somebody else.
    """
    name = hashlib.sha256(f"{endpoint()} {url}".encode()).hexdigest()[:16]
    try:
        folder = _cache_root() / f"bundles-{name}"
        folder.parent.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        is_own = not folder.is_symlink() and (not folder.exists() or folder.stat().st_uid == os.geteuid())
        if is_own:
            make_private_folder(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows the home of this user
        raise BundleError(
            f"bundles of {url} cannot be kept on this machine: {error}. Set {CACHE_VARIABLE} to a folder that can be "
            "written to."
        ) from error
    if not is_own:
        raise BundleError(
            f"{folder} is a link, or belongs to another user, and keeps no bundles. Remove it, or set {CACHE_VARIABLE}."
        )
    return folder


def _cache_root() -> Path:
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if shared.startswith("/") else Path.home() / ".cache") / "backdoor-guard"
