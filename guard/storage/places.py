"""Where bundles lie: a folder, or a place in an object store by its URL."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from guard.errors import ConfigError

#: A folder of bundles, or the URL of one in an object store; a URL is text, for a path would lose one of its slashes.
BundlePlace = str | Path

#: Environment variables that say which S3 server is meant; the first that is set counts.
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_SCHEMES = ("s3", "gs")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SQUEEZED = re.compile(r"(?:s3|gs):/(?!/)")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_SEGMENT = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9!_.*'()=+@,-]+")  # what every store takes as it is


def is_url(place: BundlePlace) -> bool:
    """Return whether a place is written as a URL."""
    return isinstance(place, str) and _URL.match(place) is not None


def place_of(place: BundlePlace) -> BundlePlace:
    """Return a place in its one form: the URL of an object store as text, everything else as a path.

    Raises
    ------
    ConfigError
        If a URL has another scheme than `s3`, `gs` or `file`, carries a password, a query or a port, or names no
        bucket; or if a URL was made a path.
    """
    if _SQUEEZED.match(str(place)):
        raise ConfigError(f"the URL {str(place)!r} lost a slash, as when it is made a path. Give it as text.")
    if not isinstance(place, str) or not is_url(place):
        return Path(place)
    try:
        parts = urlsplit(place)
        plain = parts.username is None and parts.password is None and "@" not in parts.netloc
    except ValueError:
        raise ConfigError("a URL of bundles cannot be read. Write it as s3://BUCKET/PREFIX.") from None
    if not plain:  # the URL is not repeated: it may hold a password
        raise ConfigError(
            "a URL of bundles carries no user and no password: archives and logs keep it. Leave them out, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what the store's own tools read."
        )
    if parts.scheme.lower() == "file" and parts.netloc in ("", "localhost") and parts.path and not parts.query:
        return Path(unquote(parts.path))
    if parts.query or parts.fragment:  # not repeated either: it may be a signature
        raise ConfigError("a URL of bundles has no query and no fragment. Write it as s3://BUCKET/PREFIX.")
    if parts.scheme.lower() not in _SCHEMES:
        raise ConfigError(
            f"bundles lie in a folder, or at {', '.join(f'{scheme}://' for scheme in _SCHEMES)} or file:///, "
            f"got {parts.scheme}://. Name one of these."
        )
    segments = parts.path.strip("/").split("/") if parts.path.strip("/") else []
    if not _BUCKET.fullmatch(parts.netloc) or not all(map(_SEGMENT.fullmatch, segments)):
        raise ConfigError(
            f"{place[:200]!a} names no place for bundles: a bucket, and below it names of letters, digits and "
            "!_.*'()=+@,- without empty ones. Write it as s3://BUCKET/PREFIX."
        )
    return "/".join([f"{parts.scheme.lower()}://{parts.netloc}", *segments])


def name_of(place: BundlePlace) -> str:
    """Return how an archive names the place that its server follows: a folder by its absolute path."""
    known = place_of(place)
    return known if isinstance(known, str) else str(known.absolute())


def may_exist(place: BundlePlace) -> bool:
    """Return whether bundles may lie there: a folder that is there, or an object store, which is not asked."""
    known = place_of(place)
    return isinstance(known, str) or known.is_dir()


def endpoint() -> str:
    """Return the address of the S3 server that the environment names; "" for Amazon's own."""
    return next((value for name in _ENDPOINTS if (value := os.environ.get(name))), "")
