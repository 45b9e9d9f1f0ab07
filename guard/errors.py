"""Every error that this package raises on purpose: one base class, one line per kind."""

import difflib
from collections.abc import Iterable


class GuardError(Exception):
    """Base of all errors of this package; its text is one line: what is wrong, the rule, what to do."""


class ConfigError(GuardError):
    """A setting is unknown, out of range, or contradicts another."""


class MissingExtraError(GuardError):
    """An optional part of this package is wanted and not installed."""


class UnsafeWeightsError(GuardError):
    """The weights file could run code when loaded, and was refused."""


class SuspectModelError(GuardError):
    """The suspect model cannot be built, loaded, or split."""


class NotApplicableError(SuspectModelError):
    """A detector has no meaning for networks of this kind."""


class DataError(GuardError, ValueError):
    """Images, labels or activations break a rule (shape, type, range, count)."""


class RowError(DataError):
    """One of several inputs breaks a rule; `row` is its position, so that who knows its name can say it."""

    def __init__(self, text: str, row: int) -> None:
        super().__init__(text)
        self.row = row


class NotFittedError(GuardError):
    """Something was asked to score before it was fitted."""


class BundleError(GuardError):
    """A bundle is missing, damaged, of another schema, or of another model."""


class StoreUnavailable(BundleError):  # noqa: N818
    """The object store with the bundles cannot be reached, or refuses; nothing is said of any bundle in it."""


class DatasetError(GuardError):
    """An image set is not where it should be, or its file is damaged."""


class ZooError(GuardError):
    """A model of the zoo is missing, damaged, or no longer what its card says."""


class ServerError(GuardError):
    """The model server cannot be started, reached or stopped."""


class ArchiveError(GuardError):
    """A model archive cannot be made."""


class ExportError(GuardError):
    """The suspect model cannot be written for another server, or what was written answers otherwise than it does."""


class QueueError(GuardError):
    """The queue of flagged inputs refuses: its schema is newer, a name is unknown, its history was changed."""


class LeaseExpired(QueueError):  # noqa: N818
    """The item is not, or no longer, claimed by this reviewer."""


class AlreadyDecided(QueueError):  # noqa: N818
    """The item, or the decision to be replaced, was answered already."""


class ItemGone(QueueError):  # noqa: N818
    """There is no such item, or its images were removed."""


class NotYours(QueueError):  # noqa: N818
    """The item is neither held by this reviewer nor answered by them."""


class TooManyHeld(QueueError):  # noqa: N818
    """The reviewer holds as many items as the queue's `max_held` allows."""


class UnknownLabel(QueueError):  # noqa: N818
    """The true label is none of the model's classes."""


class BodyTooLarge(QueueError):  # noqa: N818
    """A request's body is larger than the queue takes; `positions` says which of the inputs."""

    def __init__(self, message: str, positions: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.positions = positions


class QueueKeyError(QueueError):
    """The encryption key is missing, malformed, or another than the queue was written with."""


class QueueUnavailable(QueueError):  # noqa: N818
    """The queue cannot be reached or written now (locked, disk full, database gone); nothing was acknowledged."""


class ObservingError(GuardError):
    """Metrics cannot be read, or what keeps them cannot be asked or started."""


class SnapshotError(GuardError):
    """A snapshot cannot be taken, is damaged, or has no free place to be restored to."""


class RetrainingError(GuardError):
    """The retrainer cannot work: another one is at it, or there is nothing that it could work on."""


class InputRejectedError(GuardError):
    """One request's input cannot be scored; carries the HTTP status that its sender should see."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the closest known name, or all of them, as the end of an error about an unknown one."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(known)}."
