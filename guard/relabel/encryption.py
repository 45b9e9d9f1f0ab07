"""Optional encryption at rest of bodies and tensors: Fernet, with a key from the environment."""

from __future__ import annotations

import os

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from guard.errors import QueueKeyError

#: Environment variable with the key; several, separated by commas: the first encrypts, all decrypt.
KEY_VARIABLE = "GUARD_QUEUE_KEY"
#: Sealed when the key is first used, so that a wrong key is noticed when the queue is opened.
_CHECK = b"backdoor-guard queue"


class Cipher:
    """Seals and opens bytes with the first key, opens with any.

    Raises
    ------
    QueueKeyError
        If a key is not what `Fernet.generate_key()` makes.
    """

    def __init__(self, keys: str) -> None:
        try:
            self._fernet = MultiFernet([Fernet(key.strip()) for key in keys.split(",")])
        except ValueError:  # its text may hold the key
            raise QueueKeyError(
                f"{KEY_VARIABLE} must hold 32 bytes in URL-safe base64, or several such keys separated by commas. Make "
                'one with: python -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'
            ) from None

    @classmethod
    def from_environment(cls) -> Cipher | None:
        """Return the cipher of `GUARD_QUEUE_KEY`; None if the variable is unset or empty."""
        keys = os.environ.get(KEY_VARIABLE, "")
        return cls(keys) if keys.strip() else None

    def seal(self, data: bytes) -> bytes:
        """Return encrypted and authenticated bytes, about a third longer."""
        return self._fernet.encrypt(data)

    def open(self, data: bytes) -> bytes:
        """Return what was sealed.

        Raises
        ------
        QueueKeyError
            If another key sealed it, or it was changed since.
        """
        try:
            return self._fernet.decrypt(data)
        except InvalidToken:
            raise QueueKeyError(
                f"{KEY_VARIABLE} does not open what the queue holds: another key sealed it, or it was changed. "
                "Give the key that it was written with, if need be after the new one and a comma."
            ) from None

    def make_check(self) -> bytes:
        """Return a sealed constant to keep beside the data."""
        return self.seal(_CHECK)

    def verify_check(self, check: bytes) -> None:
        """Raise `QueueKeyError` if `check` was made with another key."""
        self.open(check)
