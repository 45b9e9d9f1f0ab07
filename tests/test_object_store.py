"""A store of bundles on a real S3 server: what two machines see, and what slow, false, late and absent answers do."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_store_helpers import BUCKET, Proxy, holding, refused

from guard.cli import run
from guard.errors import BundleError, SnapshotError, StoreUnavailable
from guard.storage import objects, remote
from guard.storage.bundle import BundleStore, read_bundle, write_bundle
from guard.storage.remote import RemoteBundleStore
from guard.storage.snapshot import restore_snapshot, save_snapshot
from guard.storage.stores import CACHE_VARIABLE, open_store

_numbers = itertools.count()


@pytest.fixture
def url(s3: Proxy) -> str:
    """A prefix that nothing lies below."""
    return f"s3://{BUCKET}/store-{next(_numbers)}"


Machine = Callable[[str], RemoteBundleStore]


@pytest.fixture
def machine(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Open the store as on a machine of a name, with copies of its own."""

    def opened(name: str) -> RemoteBundleStore:
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))
        store = open_store(url)
        assert isinstance(store, RemoteBundleStore)
        return store

    return opened


@pytest.fixture
def store(machine: Machine) -> RemoteBundleStore:
    return machine("here")


def put(store: BundleStore, number: int) -> str:
    """Write a bundle, and bring it to the store."""
    document = {"settings": {"seed": number}, "class_names": None}
    digest = write_bundle(store.root, document, {"scores": np.full(5, float(number))}).name
    store.publish(digest)
    return digest


@pytest.fixture
def three(store: RemoteBundleStore) -> list[str]:
    """Three bundles that were active one after the other."""
    digests = [put(store, number) for number in range(3)]
    assert store._write(None, digests)  # as three switches leave it
    return digests


def object_path(store: BundleStore, name: str) -> str:
    return f"/{store.address.removeprefix('s3://')}/{name}"


def answering(proxy: Proxy, store: BundleStore, replies: dict[str, Any], method: str = "GET") -> None:
    """Let the proxy answer in place of the server for objects by name."""
    paths = {object_path(store, name): reply for name, reply in replies.items()}
    proxy.before = lambda asked, path, _: paths.get(path) if asked == method else None


def gets(proxy: Proxy, store: BundleStore, name: str) -> int:
    return sum(method == "GET" and path == object_path(store, name) for method, path, _ in proxy.seen)


# --- what two machines see


def test_another_machine_reads_what_one_wrote(store: RemoteBundleStore, machine: Machine, three: list[str]) -> None:
    there = machine("there")
    assert there.root != store.root
    assert (there.active_digest(), there.previous_digest(), there.digests()) == (three[2], three[1], sorted(three))
    folder = there.active_path()
    assert folder.parent == there.root
    np.testing.assert_array_equal(read_bundle(folder).arrays["scores"], np.full(5, 2.0))
    assert {entry.digest: entry.is_active for entry in there.entries()} == {
        digest: digest == three[2] for digest in three
    }
    assert there.document(three[0])["settings"] == {"seed": 0}
    assert [path.name for path in there.root.iterdir()] == [three[2]]  # a list brings nothing here
    assert abs(there.written()[three[0]] - time.time()) < 60
    assert there.roll_back() == three[1]
    assert store.active_digest() == three[1]
    assert store.history() == three[:2]


def test_the_pointer_comes_after_the_bundle_and_sums_come_last(s3: Proxy, store: RemoteBundleStore) -> None:
    digest = put(store, 1)
    store.activate(digest)
    written = [path for method, path, _ in s3.seen if method == "PUT"]
    names = [f"{digest}/guard.json", f"{digest}/arrays.safetensors", f"{digest}/SHA256SUMS", "ACTIVE"]
    assert written == [object_path(store, name) for name in names]


def test_a_new_store_is_empty_and_says_what_to_do(store: RemoteBundleStore) -> None:
    assert (store.active_digest(), store.known_active(), store.digests(), store.is_empty()) == (None, None, [], True)
    for act in (store.active_path, store.roll_back, lambda: store.resolve("abcdef"), lambda: store.activate("0" * 64)):
        with pytest.raises(BundleError, match=store.address):
            act()


def test_switches_at_the_same_moment_lose_no_line_of_history(machine: Machine, three: list[str]) -> None:
    stores = [machine(str(number)) for number in range(3)]
    mine = [[put(store, 10 * number + turn) for turn in (11, 12)] for number, store in enumerate(stores)]
    errors: list[Exception] = []

    def switch(store: RemoteBundleStore, digests: list[str]) -> None:
        try:
            for digest in digests:
                store.activate(digest)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=switch, args=pair) for pair in zip(stores, mine, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    stores[0].active_digest()
    history = stores[0].history()
    assert sorted(history[3:]) == sorted(itertools.chain.from_iterable(mine))
    for digests in mine:
        assert [line for line in history if line in digests] == digests


def between(proxy: Proxy, act: Callable[[], object]) -> None:
    """Do something once, between the moment at which ACTIVE is read and the one at which it is written."""

    def before(method: str, path: str, _: object) -> None:
        if method == "PUT" and path.endswith("/ACTIVE"):
            proxy.before = None
            act()

    proxy.before = before


def test_a_promotion_is_refused_where_somebody_else_switched_meanwhile(
    s3: Proxy, store: RemoteBundleStore, machine: Machine, three: list[str]
) -> None:
    there = machine("there")
    fresh = put(store, 9)
    between(s3, lambda: there.activate(three[0]))
    with pytest.raises(BundleError, match=rf"but {three[0][:12]} is active now: nothing was changed"):
        store.activate(fresh, instead_of=three[2])
    assert there.history() == [*three, three[0]]
    between(s3, lambda: there.activate(three[1]))
    store.activate(fresh)  # a person's word counts, after what the other one did
    there.active_digest()
    assert there.history() == [*three, three[0], three[1], fresh]
    between(s3, lambda: there.activate(three[2]))
    with pytest.raises(BundleError, match="nothing was rolled back"):
        store.roll_back()
    with pytest.raises(BundleError, match="nothing was changed"):
        store.roll_back(instead_of=fresh)
    assert store.active_digest() == three[2]


def test_a_switch_whose_answer_is_lost_is_done_once(s3: Proxy, store: RemoteBundleStore, three: list[str]) -> None:
    def lose(method: str, path: str, *_: object) -> Any:
        if method == "PUT" and path.endswith("/ACTIVE"):
            s3.after = None
            return refused(500, "InternalError")
        return None

    s3.after = lose
    store.activate(three[0])
    assert store.history() == [*three, three[0]]
    s3.after = lose
    assert store.roll_back() == three[2]
    assert store.history() == three


@pytest.mark.parametrize("status", [501, 400])
def test_without_conditional_writes_the_last_writer_wins_or_the_switch_is_refused(
    s3: Proxy, store: RemoteBundleStore, three: list[str], status: int
) -> None:
    def before(method: str, _: str, headers: dict[str, str]) -> Any:
        is_conditional = method == "PUT" and {"If-Match", "If-None-Match"} & {name.title() for name in headers}
        return refused(status, "NotImplemented") if is_conditional else None

    s3.before = before
    if status == 501:
        store.activate(three[0])
        assert store.history() == [*three, three[0]]
    else:
        with pytest.raises(StoreUnavailable, match="status 400 Bad Request, NotImplemented"):
            store.activate(three[0])


def test_polls_that_find_nothing_new_carry_no_history(s3: Proxy, store: RemoteBundleStore, three: list[str]) -> None:
    answers: list[int] = []
    s3.after = lambda _, path, headers, data: answers.append(len(data)) if path.endswith("/ACTIVE") else None
    assert [store.active_digest() for _ in range(3)] == [three[2]] * 3
    assert answers[1:] == [0, 0]


# --- what a hostile or broken store says


def damaged(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("name", ["SHA256SUMS", "guard.json", "arrays.safetensors"])
def test_bytes_that_do_not_fit_the_digest_are_refused_and_name_it(
    s3: Proxy, store: RemoteBundleStore, machine: Machine, three: list[str], name: str
) -> None:
    digest, there = three[1], machine("there")
    for data in (
        damaged((store.root / digest / name).read_bytes()),
        b"",
        (store.root / digest / name).read_bytes()[:-1],
    ):
        answering(s3, store, {f"{digest}/{name}": holding(data)})
        with pytest.raises(BundleError, match=digest[:12]) as error:
            machine(f"{len(data)}").fetch(digest)
        assert store.address in str(error.value)
        with pytest.raises(BundleError, match=digest[:12]):
            there.fetch(digest)
        assert not list(there.root.iterdir())
    if name != "arrays.safetensors":
        with pytest.raises(BundleError, match="damaged"):
            there.document(digest)
        assert digest not in {entry.digest for entry in there.entries()}
    s3.before = None
    assert machine("another").fetch(digest).name == digest


def test_a_bundle_under_another_ones_digest_is_refused(
    s3: Proxy, store: RemoteBundleStore, machine: Machine, three: list[str]
) -> None:
    files = ("SHA256SUMS", "guard.json", "arrays.safetensors")
    answering(s3, store, {f"{three[0]}/{name}": holding((store.root / three[1] / name).read_bytes()) for name in files})
    with pytest.raises(BundleError, match=f"{three[0][:12]} in s3://.* has another digest"):
        machine("there").fetch(three[0])


def test_a_lie_is_not_brought_here_again_at_every_look_and_truth_is_taken_after_a_pause(
    s3: Proxy, machine: Machine, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PAUSE_S", 0.3)
    there = machine("there")
    answering(s3, there, {f"{three[0]}/arrays.safetensors": holding(b"lie")})
    for _ in range(5):
        with pytest.raises(BundleError, match="gave what is no bundle"):
            there.fetch(three[0])
    assert gets(s3, there, f"{three[0]}/arrays.safetensors") == 1
    s3.before = None
    time.sleep(0.3)
    assert there.fetch(three[0]) == there.root / three[0]


def test_what_is_there_later_is_taken_when_it_comes(
    s3: Proxy, store: RemoteBundleStore, machine: Machine, three: list[str]
) -> None:
    there = machine("there")
    for name in ("SHA256SUMS", "guard.json", "arrays.safetensors"):
        answering(s3, store, {f"{three[2]}/{name}": refused(404, "NoSuchKey")})
        assert there.active_digest() == three[2]
        with pytest.raises(BundleError, match=r"\(yet\)"):
            there.active_path()
    s3.before = None
    assert there.active_path().name == three[2]


GARBAGE = (
    b"",
    b"\n",
    b"../../etc/passwd\n",
    b"\xff\x00\xfe",
    b"a" * 64,
    b"A" * 64 + b"\n",
    b"0" * 65 + b"\n",
    b"0" * 64 + b"\r\n",
    b"garbage\n" + b"0" * 64 + b"\n",
    b"<html>sign in</html>\n",
)


def test_a_pointer_with_garbage_is_refused_and_mended_by_activate(store: RemoteBundleStore, three: list[str]) -> None:
    for number, text in enumerate(GARBAGE):
        objects.obstore.put(store._objects._quick, "ACTIVE", text)
        with pytest.raises(BundleError, match=r"is damaged: it holds no digest. Run `guard bundle activate"):
            store.active_digest()
        store._looked = float("-inf")
        assert store.known_active() is None
        store.activate(three[number % 2])
        assert store.active_digest() == three[number % 2]


def endless(seconds: float = 30.0) -> Iterator[bytes]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield b"x"
        time.sleep(0.02)


def test_gigantic_objects_are_refused_by_their_length_and_endless_ones_by_the_clock(
    s3: Proxy, store: RemoteBundleStore, machine: Machine, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, stamp = machine("there"), {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"x"'}
    started = time.monotonic()
    for name in (f"{three[0]}/arrays.safetensors", f"{three[0]}/SHA256SUMS", "ACTIVE"):
        answering(s3, store, {name: (200, {**stamp, "Content-Length": str(2**45)}, endless())})
        with pytest.raises(BundleError, match="has more than"):
            machine(name.replace("/", "-")).fetch(three[0]) if "/" in name else there.active_digest()
    answering(s3, store, {f"{three[0]}/arrays.safetensors": (200, {**stamp, "Content-Length": "9999"}, endless())})
    with pytest.raises(StoreUnavailable, match=r"is too slow: .* did not come in time"):
        there.fetch(three[0], within_s=0.3)
    monkeypatch.setattr(objects, "_SPARE_BYTES", 2**60)
    with pytest.raises(BundleError, match="there is no room for it in"):
        machine("full").fetch(three[1])
    assert time.monotonic() - started < 10
    assert not list(there.root.iterdir())


def test_a_full_disk_keeps_nothing_and_says_so(
    machine: Machine, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = machine("there")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(objects.os, "fsync", full)
        with pytest.raises(BundleError, match=r"No space left on device\. Is there room\?"):
            there.fetch(three[0])
        there.remember(three[0])  # does not raise: the bundle serves all the same
    assert not list(there.root.iterdir())
    there._refusals.clear()
    assert there.fetch(three[0]).is_dir()


def test_objects_of_other_names_are_no_bundles(s3: Proxy, store: RemoteBundleStore, three: list[str]) -> None:
    for name in (
        "README",
        "x/SHA256SUMS",
        f"{'g' * 64}/SHA256SUMS",
        f"{'0' * 64}/guard.json",
        f"a/{'0' * 64}/SHA256SUMS",
    ):
        objects.obstore.put(store._objects._quick, name, b"odd")
    assert store.digests() == sorted(three)
    odd = urllib.request.Request(f"{s3.url}{object_path(store, '/x')}", b"", method="PUT")  # an empty part in its name
    urllib.request.urlopen(odd).close()
    with pytest.raises(StoreUnavailable, match=r"a name with an empty part, '\.\.' or a control character"):
        store.digests()
    assert store.resolve(three[0]) == store.root / three[0]  # a whole digest needs no list


PAGE = (
    "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>{}"
    "</ListBucketResult>"
)
ENTRY = "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00Z</LastModified><Size>1</Size></Contents>"


@pytest.mark.parametrize("n", [0, 60])
def test_a_list_without_end_is_given_up(
    s3: Proxy, store: RemoteBundleStore, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_MOST_OBJECTS", 100)
    monkeypatch.setattr(objects, "_LONGEST_LIST_S", 1.0)
    prefix, pages = store.address.split("/", 3)[3], itertools.count()

    def page(*_: object) -> Any:
        first = n * next(pages)
        entries = "".join(ENTRY.format(f"{prefix}/{first + number:064x}/SHA256SUMS") for number in range(n))
        return 200, {"Content-Type": "application/xml"}, [PAGE.format(entries).encode()]

    s3.before = page
    with pytest.raises(BundleError, match="more than 100 objects" if n else "its list did not end in time"):
        store.digests()
    asked = len(s3.seen)
    time.sleep(0.2)
    assert len(s3.seen) <= asked + 1


def test_words_of_the_store_are_not_repeated(s3: Proxy, store: RemoteBundleStore, three: list[str]) -> None:
    secret = "<AWSAccessKeyId>AKIAOFTESTS</AWSAccessKeyId><StringToSign>hush-hush</StringToSign>"
    for status, code in ((403, "SignatureDoesNotMatch"), (400, "ExpiredToken"), (503, "SlowDown"), (302, "")):
        reply = refused(status, code, secret)
        s3.before = lambda *_, reply=reply: reply
        with pytest.raises(StoreUnavailable) as error:
            store.active_digest()
        text = str(error.value)
        assert "AKIA" not in text
        assert "hush" not in text
        assert code in text
        assert len(text) < 300
        assert "\n" not in text


def test_a_panic_of_the_library_is_an_error_like_any_other(
    store: RemoteBundleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    def fail(*_: object, **__: object) -> None:
        raise panic("unwrap on None")

    monkeypatch.setattr(objects.obstore, "get", fail)
    with pytest.raises(StoreUnavailable, match="its answer makes no sense"):
        store.active_digest()


def test_the_history_is_cut_at_its_old_end(
    store: RemoteBundleStore, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_MOST_LINES", 2)
    store.activate(three[0])
    assert store.history() == [three[2], three[0]]


# --- slow and down


def test_down_is_told_at_once_and_pages_do_not_wait_again(
    s3: Proxy, store: RemoteBundleStore, three: list[str]
) -> None:
    assert store.known_active() == three[2]
    s3.go_down()
    with pytest.raises(StoreUnavailable, match="no connection"):
        store.active_digest()
    started = time.monotonic()
    assert [store.known_active() for _ in range(100)] == [three[2]] * 100
    assert store.previous_digest() == three[1]
    assert time.monotonic() - started < 0.5
    for act in (store.digests, store.entries, store.begun_promotion, lambda: store.activate(three[0])):
        with pytest.raises(StoreUnavailable):
            act()
    again = s3.come_back()
    assert store.active_digest() == three[2]
    again.go_down()


def test_slow_is_given_up_after_a_time(
    s3: Proxy, machine: Machine, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(objects._QUICK, "timeout", objects.timedelta(seconds=0.3))
    there = machine("there")

    def wait(*_: object) -> None:
        time.sleep(1.0)

    s3.before = wait
    with pytest.raises(StoreUnavailable, match="no answer in time"):
        there.active_digest()


# --- the copies here


def test_a_copy_is_used_without_the_store_and_a_damaged_one_or_a_link_is_brought_again(
    s3: Proxy, machine: Machine, three: list[str], tmp_path: Path
) -> None:
    there = machine("there")
    folder = there.fetch(three[0])
    asked = len(s3.seen)
    assert there.fetch(three[0]) == folder
    assert len(s3.seen) == asked
    (folder / "arrays.safetensors").write_bytes(b"damaged")
    assert read_bundle(there.fetch(three[0])).digest == three[0]
    shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert not there.fetch(three[0]).is_symlink()
    assert read_bundle(folder).digest == three[0]
    assert (tmp_path / "moved" / "SHA256SUMS").exists()  # what the link led to is left alone


def test_copies_may_be_removed_while_the_store_is_in_use(machine: Machine, three: list[str]) -> None:
    there = machine("there")
    there.fetch(three[0])
    shutil.rmtree(there.root.parent)
    assert there.fetch(three[0]) == there.root / three[0]
    assert there.root.stat().st_mode & 0o777 == 0o700


def test_activate_brings_a_bundle_again_that_somebody_removed_from_the_store(
    store: RemoteBundleStore, machine: Machine, three: list[str]
) -> None:
    objects.obstore.delete(store._objects._quick, [f"{three[0]}/{name}" for name in ("SHA256SUMS", "guard.json")])
    store.activate(three[0])
    assert machine("there").active_path().name == three[0]


def test_two_processes_that_share_copies_both_get_the_bundle(machine: Machine, three: list[str]) -> None:
    stores = [machine("there") for _ in range(4)]
    assert len({store.root for store in stores}) == 1
    found: list[Path] = []
    threads = [threading.Thread(target=lambda store=store: found.append(store.fetch(three[0]))) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [stores[0].root / three[0]] * 4
    assert [path.name for path in stores[0].root.iterdir()] == [three[0]]


def test_old_copies_go_and_the_active_one_stays(
    machine: Machine, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_KEPT", 1)
    there = machine("there")
    there.fetch(three[0])
    there.remember(three[0])
    there.fetch(three[1])
    there.fetch(three[2])
    assert sorted(BundleStore(there.root).digests()) == sorted([three[0], three[2]])


def test_what_a_crash_left_is_removed_after_a_while(machine: Machine, three: list[str]) -> None:
    there = machine("there")
    for name, age in ((".fetching-old", 7200), (".fetching-new", 10)):
        (there.root / name).mkdir()
        os.utime(there.root / name, (time.time() - age,) * 2)
    machine("there")
    assert [path.name for path in there.root.iterdir()] == [".fetching-new"]


def test_a_start_without_the_store_takes_what_served_here_last(s3: Proxy, machine: Machine, three: list[str]) -> None:
    there, never = machine("there"), machine("never")
    folder, problem = there.starting_folder()
    assert (folder, problem) == (there.root / three[2], "")
    there.remember(three[2])
    s3.go_down()
    folder, problem = machine("there").starting_folder()
    assert folder == there.root / three[2]
    assert "no connection" in problem
    assert never.starting_folder() == (None, problem)
    (there.root / three[2] / "arrays.safetensors").write_bytes(b"damaged")
    assert machine("there").starting_folder() == (None, problem)


def test_a_fit_that_could_not_be_published_is_not_lost(s3: Proxy, store: RemoteBundleStore, three: list[str]) -> None:
    folder = write_bundle(store.root, {"settings": {}, "class_names": None}, {"scores": np.zeros(2)})
    s3.before = lambda method, *_: refused(503, "SlowDown") if method == "PUT" else None
    with pytest.raises(StoreUnavailable, match="SlowDown"):
        store.publish(folder.name)
    s3.before = None
    assert store.resolve(folder.name[:8]) == folder
    store.activate(folder.name)
    assert store.active_digest() == folder.name
    assert folder.name in store.digests()


def test_activate_mends_a_bundle_that_was_damaged_in_the_store(
    store: RemoteBundleStore, machine: Machine, three: list[str]
) -> None:
    objects.obstore.put(store._objects._quick, f"{three[0]}/arrays.safetensors", b"damaged")
    with pytest.raises(BundleError, match="gave what is no bundle"):
        machine("there").fetch(three[0])
    machine("here").activate(three[0])
    assert machine("there").active_path().name == three[0]


# --- snapshots, and the command line


def test_snapshot_of_a_store_is_that_of_a_folder_and_comes_back_to_either(
    store: RemoteBundleStore, machine: Machine, three: list[str], url: str, tmp_path: Path
) -> None:
    saved = save_snapshot(tmp_path / "copy", queue_url=None, bundles=url)
    assert (saved.active, set(saved.bundles)) == (three[2], set(three))
    restore_snapshot(tmp_path / "copy", queue_url=None, bundles=tmp_path / "folder")
    local = BundleStore(tmp_path / "folder")
    assert (local.active_digest(), local.history()) == (three[2], three)
    again = f"{url}-again"
    assert restore_snapshot(tmp_path / "copy", queue_url=None, bundles=again) == saved
    other = open_store(again)
    assert (other.active_digest(), other.history(), other.digests()) == (three[2], three, sorted(three))
    with pytest.raises(SnapshotError, match=f"{url} is not empty"):
        restore_snapshot(tmp_path / "copy", queue_url=None, bundles=url)


def test_bundle_commands_work_below_a_url(
    url: str, fitted_guard: Any, second_guard: Any, s3: Proxy, capfd: pytest.CaptureFixture[str]
) -> None:
    store = open_store(url)
    first, second = (guard.save(store.root).name for guard in (fitted_guard, second_guard))
    for digest in (first, second):
        store.publish(digest)
        assert run(["bundle", "activate", digest[:8], "--bundles", url]) == 0
    shutil.rmtree(store.root)
    assert run(["bundle", "list", "--bundles", url, "--json"]) == 0
    listed = json.loads(capfd.readouterr().out.partition("[")[2].join(["[", ""]))
    assert {row["digest"]: row["active"] for row in listed} == {first: False, second: True}
    assert run(["bundle", "show", "--bundles", url]) == 0
    assert second[:12] in capfd.readouterr().out
    assert run(["bundle", "rollback", "--bundles", url]) == 0
    assert capfd.readouterr().out == f"active: {first}\n"
    assert run(["bundle", "clean", first[:12], "--bundles", url]) == 0
    assert capfd.readouterr().out == f"nothing to leave out: {first}\n"
    s3.go_down()
    assert run(["bundle", "list", "--bundles", url]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "no connection. Check the network" in line
