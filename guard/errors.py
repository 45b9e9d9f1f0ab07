"""Every error that this package raises on purpose: one base class, one line per kind."""


class GuardError(Exception):
    """Base of all errors of this package; its text is one line: what is wrong, the rule, what to do."""


class ConfigError(GuardError):
    """A setting is unknown, out of range, or contradicts another."""


class UnsafeWeightsError(GuardError):
    """The weights file could run code when loaded, and was refused."""


class SuspectModelError(GuardError):
    """The suspect model cannot be built, loaded, or split."""


class DataError(GuardError, ValueError):
    """Images, labels or activations break a rule (shape, type, range, count)."""


class NotFittedError(GuardError):
    """Something was asked to score before it was fitted."""


class BundleError(GuardError):
    """A bundle is missing, damaged, of another schema, or of another model."""


class DatasetError(GuardError):
    """An image set is not where it should be, or its file is damaged."""


class ZooError(GuardError):
    """A model of the zoo is missing, damaged, or no longer what its card says."""


class ServerError(GuardError):
    """The model server cannot be started, reached or stopped."""


class ArchiveError(GuardError):
    """A model archive cannot be made."""


class InputRejectedError(GuardError):
    """One request's input cannot be scored; carries the HTTP status that its sender should see."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status
