"""Where bundles lie, as people write it: folders, URLs of object stores, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from guard.cli import run
from guard.errors import BundleError, ConfigError
from guard.storage.bundle import BundleStore
from guard.storage.places import is_url, may_exist, name_of, place_of
from guard.storage.stores import CACHE_VARIABLE, make_cache, open_store


@pytest.mark.parametrize(
    ("written", "known"),
    [
        ("bundles", Path("bundles")),
        (Path("a/b"), Path("a/b")),
        ("/a/b/", Path("/a/b")),
        ("odd:name", Path("odd:name")),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://my.bucket-1/a/date=2026-01-01/", "s3://my.bucket-1/a/date=2026-01-01"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("file:///a/b%20c", Path("/a/b c")),
        ("file://localhost/a", Path("/a")),
    ],
)
def test_a_place_has_one_form(written: str | Path, known: str | Path) -> None:
    assert place_of(written) == known
    assert isinstance(known, str) == (is_url(written) and not str(written).startswith("file:"))
    assert place_of(place_of(written)) == known


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("s3:///prefix", "names no place for bundles"),
        ("s3://", "names no place for bundles"),
        ("s3://bucket/a//b", "names no place for bundles"),
        ("s3://bucket/a/../b", "names no place for bundles"),
        ("s3://bucket/./b", "names no place for bundles"),
        ("s3://bucket/a%2e%2e", "names no place for bundles"),
        ("s3://bucket/a\\b", "names no place for bundles"),
        ("s3://bucket/a b", "names no place for bundles"),
        ("s3://bucket:99/a", "names no place for bundles"),
        ("s3://[bucket/a", "cannot be read"),
        ("s3://bucket/a?versionId=1", "no query"),
        ("s3://bucket/a#b", "no query"),
        ("az://bucket/a", r"got az://\. Name one of these"),
        ("memory:///a", r"got memory://\."),
        ("https://bucket.s3.amazonaws.com/a", r"got https://\."),
        ("file://elsewhere/a", r"got file://\."),
        (Path("s3://bucket/a"), "lost a slash"),
        ("s3:/bucket/a", "lost a slash"),
    ],
)
def test_other_urls_are_refused_with_what_to_write(written: str | Path, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        place_of(written)


@pytest.mark.parametrize("url", ["s3://key:hush@bucket/a", "s3://hush@bucket/a", "s3://bucket/a?X-Amz-Signature=hush"])
def test_a_secret_in_a_url_is_refused_and_never_repeated(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        open_store(url)
    assert "hush" not in str(refused.value)
    assert run(["bundle", "list", "--bundles", url]) == 2
    assert "hush" not in "".join(capfd.readouterr())


def test_a_folder_by_file_url_is_the_folder(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/bundles")
    assert type(store) is BundleStore
    assert store.root == tmp_path / "bundles"
    assert (may_exist(f"file://{tmp_path}"), may_exist(f"file://{tmp_path}/x"), may_exist("s3://b00/x")) == (1, 0, 1)


def test_an_archive_names_a_folder_by_its_absolute_path_and_a_url_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of("bundles") == str(tmp_path / "bundles")
    assert name_of("s3://bucket/a/") == "s3://bucket/a"


def test_folders_load_no_package_for_object_stores(tmp_path: Path) -> None:
    code = "import sys; from guard.storage.stores import open_store; open_store('b'); print('obstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_copies_lie_in_a_folder_of_their_own_that_is_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    first = make_cache("s3://bucket/a")
    assert first.stat().st_mode & 0o777 == 0o700
    assert first.parent == tmp_path / "cache"
    assert make_cache("s3://bucket/a") == first != make_cache("s3://bucket/b")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert make_cache("s3://bucket/a") != first
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert make_cache("s3://bucket/a").parent == tmp_path / "xdg" / "backdoor-guard"


def test_a_folder_for_copies_that_is_a_link_or_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = make_cache("s3://bucket/a")
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link, or belongs to another user"):
        make_cache("s3://bucket/a")
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(BundleError, match=f"Set {CACHE_VARIABLE}"):
        make_cache("s3://bucket/a")
