"""What the review page works with, from what the command line names: folders of bundles, clean images, networks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from guard.cli.output import print_warning
from guard.errors import ConfigError, DataError, GuardError, did_you_mean
from guard.storage.places import BundlePlace, may_exist, place_of

if TYPE_CHECKING:
    from guard.cli.images import NamedImages
    from guard.relabel.queue import Queue
    from guard.review.known_bundles import KnownBundles
    from guard.review.status.history import MetricsSource
    from guard.review.workspace import CleanImages, Workspace
    from guard.storage.bundle import BundleStore
    from guard.suspect.model import SuspectModel


def known_bundles(folders: Sequence[str] | None, archives: Sequence[str] = ()) -> KnownBundles:
    """Return the bundles of the folders that were named, FOLDER or MODEL=FOLDER; warn of those that hold none.

    Where none was named, they are those that the archives, FILE or NAME=FILE, follow, or else `bundles`.

    Raises
    ------
    ConfigError
        If a model has two folders, or two folders hold one bundle and nobody says whose they are.
    """
    from guard.review.known_bundles import KnownBundles
    from guard.torchserve.archives.contents import followed_bundles

    named = by_model("--bundles", folders or [], several=True)
    for name, file in by_model("--archive", archives, several=True).items() if not folders else ():
        with contextlib.suppress(GuardError):  # said when its network is to be run
            if (followed := followed_bundles(Path(file[0]))) is not None and may_exist(followed):
                named[name] = [followed]
    if not named:
        return KnownBundles(Path("bundles") if may_exist("bundles") else None)
    known = KnownBundles(*named.pop("", []), of_models={model: each[0] for model, each in named.items()})
    for store in known.stores:
        if store.known_active() is None:
            whose = " and ".join(known.models_in(store.root)) or "its models"
            print_warning(
                f"no bundle is active in {store.address}, so the page shows numbers for the classes of {whose}, and no "
                "clean images. Check the path; `guard fit` or `guard bundle activate` makes a bundle active."
            )
    return known


@overload
def by_model(option: str, texts: Sequence[str], *, several: Literal[True]) -> dict[str, list[BundlePlace]]: ...
@overload
def by_model(option: str, texts: Sequence[str]) -> dict[str, BundlePlace]: ...
def by_model(option: str, texts: Sequence[str], *, several: bool = False) -> dict[str, Any]:
    """Return the paths or URLs that an option names, PATH or MODEL=PATH, by model; those of all others under "".

    Parameters
    ----------
    option : str
        Its name, for the error.
    texts : sequence of str
    several : bool
        Whether there may be several without a model; then every value is a list.

    Raises
    ------
    ConfigError
        If a model, or where there may be one only all others, has two different ones.
    """
    found: dict[str, list[BundlePlace]] = {}
    for text in texts:
        model, _, path = ("", "", text) if Path(text).exists() or "=" not in text else text.partition("=")
        if "/" in model:  # a path that is not there, or a URL
            model, path = "", text
        paths, place = found.setdefault(model, []), place_of(path)
        if place in paths:
            continue
        if paths and (model or not several):
            whose = f"model {model!r}" if model else "everything that no MODEL= stands before"
            raise ConfigError(f"{option} names {paths[0]} and {path} for {whose}. Name one.")
        paths.append(place)
    return dict(found) if several else {model: paths[0] for model, paths in found.items()}


def open_workspace(
    queue: Queue,
    bundles: BundlePlace | KnownBundles,
    images: Path | Mapping[str, Path] | None = None,
    weights: Path | None = None,
    architecture: str | None = None,
    device: str = "cpu",
    settings: Any = None,
    metrics: MetricsSource | None = None,
    state_key: str | None = None,
    served: Mapping[str, SuspectModel] | None = None,
) -> Workspace:
    """Return what the page works with, from what the command line names, and what the active bundles remember.

    Parameters
    ----------
    queue : Queue
    bundles : path-like or KnownBundles
        The folder of all models, or the folders of each.
    images : Path or mapping of str to Path, optional
        Clean images, of all models or by the name of one ("" = all others); default: those that a bundle remembers.
    weights, architecture, device, state_key
        Of the suspect model, for maps of where it looks.
    settings : ReviewSettings, optional
    metrics : MetricsSource, optional
    served : mapping of str to SuspectModel, optional
        Networks that are at hand already, by the name of their model ("" = all others).

    Raises
    ------
    ConfigError
        If only one of weights and architecture is given, or images are of a model that no folder is named for.
    """
    from guard.relabel.reviewers import Reviewers
    from guard.relabel.rounds import Rounds
    from guard.review.known_bundles import KnownBundles
    from guard.review.occlusion import Occlusion
    from guard.review.workspace import ReviewSettings, Workspace

    if (weights is None) != (architecture is None):
        raise ConfigError("--weights and --architecture go together. Give both, or neither.")
    known = bundles if isinstance(bundles, KnownBundles) else KnownBundles(bundles if may_exist(bundles) else None)
    named = dict(images) if isinstance(images, Mapping) else {"": images} if images is not None else {}
    if strange := sorted({*named} - {"", *known.of_models}):
        raise ConfigError(
            f"--images {strange[0]}=... is of no model that --bundles names. "
            f"{did_you_mean(strange[0], known.of_models) if known.of_models else 'Leave the name out.'}"
        )
    networks = dict(served or {})
    if weights is not None and architecture is not None:
        from guard.suspect.model import SuspectModel

        network = SuspectModel.load(weights, architecture, state_key=state_key, device=device)
        networks |= dict.fromkeys(_models_of(network, known), network)
        _use_active_points(network, known.stores)
    clean, of_folders = _clean_sets(named, known)
    return Workspace(
        queue,
        Reviewers(queue),
        Rounds(queue),
        known,
        clean,
        {model: Occlusion(network) for model, network in networks.items()},
        settings or ReviewSettings(),
        metrics,
        of_folders,
    )


def _models_of(network: SuspectModel, known: KnownBundles) -> list[str]:
    """Return the models that a network is of, as the folders that are named for them say; else "", all others."""
    if len(known.stores) < 2:
        return [""]
    roots = [store.root for store in known.stores if _active_document(store).get("weights_digest") == network.digest]
    return [model for model, root in known.of_models.items() if root in roots] or [""]


def _use_active_points(suspect: SuspectModel, stores: Iterable[BundleStore]) -> None:
    """Read the model's output as the first active bundle does that was fitted for these weights."""
    from guard.suspect.split_points import SplitPoints

    for store in stores:
        document = _active_document(store)
        if document.get("split_points") and document["weights_digest"] == suspect.digest:
            suspect.use_split_points(SplitPoints.from_dict(document["split_points"]))
            return


def _active_document(store: BundleStore) -> dict[str, Any]:
    digest = store.active_digest() if store.exists() else None
    return store.document(digest) if digest else {}


@dataclass(frozen=True, slots=True)
class _OnDisk(Sequence[Any]):
    """Images that are read when the page shows them: they may differ in size, and there may be many."""

    found: NamedImages

    def __len__(self) -> int:
        return len(self.found.names)

    def __getitem__(self, row: Any) -> Any:
        return self.found.read(row)


def _clean_sets(named: Mapping[str, Path], known: KnownBundles) -> tuple[CleanImages | None, dict[Path, CleanImages]]:
    """Return the clean images of all bundles, or where there are several folders, those of each."""
    if len(known.stores) < 2:
        return _clean_images(next(iter(named.values()), None), known, known.store), {}
    found = {}
    for store in known.stores:
        own = next((named[model] for model in known.models_in(store.root) if model in named), None)
        clean = _clean_images(own or named.get(""), known, store)
        if own is None and clean is not None and clean.fitted is None:  # those of another folder's models, perhaps
            clean = _clean_images(None, known, store) or clean
        if clean is not None:
            found[store.root] = clean
    return None, found


def _clean_images(named: Path | None, bundles: KnownBundles, store: BundleStore | None) -> CleanImages | None:
    """Return the clean images that were named, else those that the active bundle was fitted on, if they are there."""
    from guard.cli.images import as_fitted, find_labelled
    from guard.review.workspace import CleanImages

    bundle = bundles.active_in(store)
    path = named or (Path(bundle.images_from) if bundle is not None and bundle.images_from else None)
    if path is None or (named is None and not path.exists()):
        return None
    try:
        found = find_labelled(path)
    except DataError as error:
        if named is not None:
            raise
        print_warning(f"the page shows no clean images. {error}")
        return None
    while bundle is not None:
        same = bundle.images_from is not None and path.resolve() == Path(bundle.images_from).resolve()
        labelled = as_fitted(found, bundle.labels, bundle.class_names, is_its_folder=same)
        clean = CleanImages(_OnDisk(found), labelled.labels, fitted=bundle)
        if clean.are_of(bundle):
            return clean
        bundle = bundles.find(bundle.parent)  # retrained on a part of them
    return CleanImages(_OnDisk(found), found.labels)


def networks_of(
    archives: Sequence[str], bundles: BundlePlace | KnownBundles, device: str, beside: ExitStack
) -> dict[str, SuspectModel]:
    """Return the networks of guarded archives, FILE or NAME=FILE, by name; warn of those that do not start here."""
    from guard.review.known_bundles import KnownBundles
    from guard.storage.stores import open_store
    from guard.suspect.model import SuspectModel
    from guard.torchserve.archives.contents import followed_bundles
    from guard.torchserve.archives.wrapping import open_guarded

    known = bundles if isinstance(bundles, KnownBundles) else KnownBundles(bundles)
    found = {}
    for text in archives:
        name, _, file = ("", "", text) if Path(text).exists() else text.rpartition("=")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                module = beside.enter_context(open_guarded(Path(file))).module
            found[name] = SuspectModel(module, device=device)
            followed, own = followed_bundles(Path(file)), known.store_of(name)
            first = [open_store(followed)] if followed is not None else []
            _use_active_points(found[name], [*first, *([own] if own is not None else known.stores)])
        except GuardError as error:
            print_warning(f"the page shows no maps of where {name or 'the model'} looks. {error}")
    return found
