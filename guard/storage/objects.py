"""Objects below one URL of an object store: read within bounds, written on a condition, every failure in one line."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import from_url

from guard.errors import BundleError, StoreUnavailable
from guard.storage.places import endpoint

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

#: A request for a few lines is given up after so long, one more try included twice that.
_QUICK: ClientConfig = {"connect_timeout": timedelta(seconds=2), "timeout": timedelta(seconds=4)}
#: A transfer of a bundle may take long, but not stand still; `timeout` is of one request, for downloads see `deadline`.
_LONG: ClientConfig = {
    "connect_timeout": timedelta(seconds=2),
    "read_timeout": timedelta(seconds=10),
    "timeout": timedelta(minutes=10),
}
_RETRIES: RetryConfig = {"max_retries": 1, "retry_timeout": timedelta(seconds=5)}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MOST_OBJECTS, _LONGEST_LIST_S = 100_000, 30.0
#: Room that a download leaves on the disk.
_SPARE_BYTES = 2**26
_STATUS = re.compile(r"status code: (\d{3}(?: [A-Za-z ]+)?)")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")


class NotThere(BundleError):  # noqa: N818
    """There is no such object; where a store shows what is written late, not yet."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object that was read.

    Attributes
    ----------
    data : bytes
    version : mapping
        Names what was read, for `Objects.write_if`.
    written : float
        In seconds since 1970.
    """

    data: bytes
    version: UpdateVersion
    written: float


class Objects:
    """The objects below a URL, by name. Credentials are those of the environment, as the store's own tools read them.

    Parameters
    ----------
    url : str
        Of `places.place_of`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        may_be_plain = url.startswith("s3:") and _is_loopback(endpoint())
        with self._told("opened"):
            self._quick, self._long = (_client(url, times, may_be_plain) for times in (_QUICK, _LONG))

    def read(self, name: str, most_bytes: int, known: Found | None = None) -> Found | None:
        """Return a small object; None if there is none; `known` itself if that is still what is there.

        Raises
        ------
        StoreUnavailable
            If the store cannot be asked.
        BundleError
            If it is larger than `most_bytes`.
        """
        tag = known.version.get("e_tag") if known is not None else None
        with self._told(f"asked for {name}"):
            try:
                got = obstore.get(self._quick, name, options={"if_none_match": tag} if tag else None)
                data = bytearray()
                for part in self._parts(got, name, most_bytes):
                    data += part
            except FileNotFoundError:
                return None
            except exceptions.NotModifiedError:
                return known
            return Found(bytes(data), _version(got.meta), got.meta["last_modified"].timestamp())

    def download(self, name: str, path: Path, most_bytes: int, deadline: float) -> None:
        """Write an object to a new file.

        Parameters
        ----------
        name : str
        path : Path
        most_bytes : int
        deadline : float
            Of `time.monotonic`; what has not come by then is given up.

        Raises
        ------
        StoreUnavailable
            If the store cannot be asked, or is too slow.
        NotThere
            If there is no such object.
        BundleError
            If it is larger than `most_bytes`, or there is no room for it.
        """
        with self._told(f"asked for {name}"):
            try:
                got = obstore.get(self._long, name)
            except FileNotFoundError:
                raise NotThere(f"{self.url} does not hold {name} (yet).") from None
            disk = os.statvfs(path.parent)
            if most_bytes >= got.meta["size"] > disk.f_bavail * disk.f_frsize - _SPARE_BYTES:
                raise BundleError(
                    f"{name} of {self.url} has {got.meta['size']} bytes, and there is no room for it in {path.parent}."
                )
            with path.open("xb") as file:
                for part in self._parts(got, name, most_bytes):
                    file.write(part)
                    if time.monotonic() > deadline:
                        raise StoreUnavailable(f"{self.url} is too slow: {name} did not come in time.")
                file.flush()
                os.fsync(file.fileno())

    def size(self, name: str) -> int | None:
        """Return how many bytes an object has; None if there is none."""
        with self._told(f"asked for {name}"):
            try:
                return int(obstore.head(self._quick, name)["size"])
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes | Path) -> None:
        """Write an object, whatever is there; a reader sees the old one or the new one.

        Raises
        ------
        StoreUnavailable
            If the store cannot be reached, or refuses.
        """
        with self._told(f"given {name}"):
            obstore.put(self._quick if isinstance(data, bytes) else self._long, name, data)

    def write_if(self, name: str, data: bytes, known: Found | None) -> bool:
        """Write an object if what is there is what was read (None: nothing); return whether it was written.

        A store without conditional writes is written to and read again: there, the last writer wins.

        Raises
        ------
        StoreUnavailable
            If the store cannot be reached, or refuses; it is not known then whether the object was written.
        """
        with self._told(f"given {name}"):
            if known is not None and not known.version.get("e_tag"):  # nothing to make a condition of
                return self._write_and_look(name, data)
            try:
                obstore.put(self._quick, name, data, mode="create" if known is None else known.version)
            except (exceptions.PreconditionError, exceptions.AlreadyExistsError):
                return False
            except (NotImplementedError, exceptions.NotSupportedError):
                return self._write_and_look(name, data)
            except exceptions.GenericError as error:
                if _status(error).startswith("409"):  # S3: another conditional write at the same moment
                    return False
                if not _status(error).startswith("501"):
                    raise
                return self._write_and_look(name, data)
            return True

    def remove(self, name: str) -> None:
        """Remove an object; it need not be there."""
        with self._told(f"asked to remove {name}"):
            try:
                obstore.delete(self._quick, name)
            except FileNotFoundError:
                return

    def written(self) -> dict[str, float]:
        """Return when every object was written, in seconds since 1970, by name.

        Raises
        ------
        StoreUnavailable
            If the store cannot be asked, or its list does not end in time.
        BundleError
            If there are far too many.
        """
        with self._told("asked for its list"), ThreadPoolExecutor(1) as thread:  # where no other loop runs
            try:
                return thread.submit(asyncio.run, self._listed()).result()
            except TimeoutError:
                raise StoreUnavailable(f"{self.url} is too slow: its list did not end in time.") from None

    async def _listed(self) -> dict[str, float]:
        found: dict[str, float] = {}
        async with asyncio.timeout(_LONGEST_LIST_S):  # a list of empty pages without end yields nothing to count
            async for some in obstore.list(self._quick):
                found |= {about["path"]: about["last_modified"].timestamp() for about in some}
                if len(found) > _MOST_OBJECTS:
                    raise BundleError(
                        f"{self.url} holds more than {_MOST_OBJECTS} objects. Give bundles a prefix of their own."
                    )
        return found

    def _write_and_look(self, name: str, data: bytes) -> bool:
        obstore.put(self._quick, name, data)
        found = self.read(name, len(data))
        return found is not None and found.data == data

    def _parts(self, got: Any, name: str, most_bytes: int) -> Iterator[bytes]:
        """Yield an object in parts as they come; stop where it is larger than it may be, whatever it says of itself."""
        size = got.meta["size"]
        for part in got.stream(min_chunk_size=1) if size <= most_bytes else ():
            size -= len(part)
            if size < 0:
                break
            yield bytes(part)
        if size:
            raise BundleError(f"{name} of {self.url} has more than {most_bytes} bytes, or not as many as it says.")

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Tell a failure of the store in one line without secrets: of its own words, only status and code are kept."""
        try:
            yield
        except BundleError:
            raise
        except (exceptions.BaseError, FileNotFoundError, NotImplementedError, ValueError) as error:
            raise StoreUnavailable(f"{self.url} cannot be {what}: {_reason(error)}") from None
        except OSError as error:
            raise BundleError(
                f"a bundle of {self.url} cannot be kept on this machine: {error.strerror or error}. Is there room?"
            ) from error
        except BaseException as error:
            if type(error).__module__ != "pyo3_runtime":  # a panic in Rust is no Exception, and would end a thread
                raise
            raise StoreUnavailable(f"{self.url} cannot be {what}: its answer makes no sense.") from None


def _client(url: str, times: ClientConfig, may_be_plain: bool) -> ObjectStore:
    options: Any = {**times, **({"allow_http": True} if may_be_plain else {})}
    return from_url(url, client_options=options, retry_config=_RETRIES)


def _version(meta: Any) -> UpdateVersion:
    known: UpdateVersion = {}
    if meta["e_tag"] is not None:
        known["e_tag"] = meta["e_tag"]
    if meta.get("version") is not None:
        known["version"] = meta["version"]
    return known


def _is_loopback(endpoint: str) -> bool:
    try:
        return urlsplit(endpoint).hostname in _LOOPBACK
    except ValueError:
        return False


def _status(error: Exception) -> str:
    found = _STATUS.search(str(error))
    return found[1].strip() if found else ""


def _reason(error: Exception) -> str:
    text = str(error)
    code, status = _CODE.search(text), _status(error)
    if isinstance(error, FileNotFoundError) or (code and code[1] == "NoSuchBucket"):
        return "there is no such bucket, or nothing in it. Make the bucket, and check the URL."
    if "169.254.169.254" in text or "metadata.google" in text:
        return "there are no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of the store."
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return f"access is denied ({code[1] if code else status or 'no reason given'}). Check credentials and rights."
    if isinstance(error, exceptions.InvalidPathError):
        return "an object below it has a name with an empty part, '..' or a control character. Remove it."
    if "BadScheme" in text:
        return "AWS_ENDPOINT_URL has no TLS. Use https, or set AWS_ALLOW_HTTP=true where the network is trusted."
    if "kind: Timeout" in text:
        return "no answer in time."
    if status:
        return f"status {status}{f', {code[1]}' if code else ''}."
    if "kind: Connect" in text or "error sending request" in text:
        return "no connection. Check the network and AWS_ENDPOINT_URL."
    return f"{type(error).__name__}. Check the URL and the store's settings in the environment."
