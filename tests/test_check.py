"""`guard check`: an archive loaded in another process, or a server that runs it, against what was promised."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared_process import PreparedProcess
from serving_helpers import HANDLERS, Workshop, png
from wrap_helpers import guard_command, stock_archive

from guard import Guard
from guard.errors import ArchiveError, ServerError
from guard.lab.attacks import MnistCnn
from guard.storage.bundle import BundleStore
from guard.torchserve.archives.contents import promise_of
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive
from guard.torchserve.archives.sources import architecture_files, imported_files
from guard.torchserve.check import (
    MOST_IMAGES,
    check_archive,
    check_server,
    check_start,
    chosen_rows,
    share_of_fit,
)


@pytest.fixture(scope="module")
def workshop(fitted_guard: Guard, badnet: MnistCnn, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(fitted_guard, badnet, tmp_path_factory.mktemp("checked"))


@pytest.fixture(scope="module")
def bodies(clean_split: Any) -> list[bytes]:
    return [png(image) for image in clean_split.validation.images[:60]]


def expected_of(guard: Guard, n: int = 60) -> Any:
    return guard.scores(guard.reference[:n]).p_values


def test_check_of_a_good_archive_counts_alone_and_in_batches(
    workshop: Workshop, bodies: list[bytes], prepared_process: PreparedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = workshop.guarded("stock", start=False, verdict_detail="flag")  # the answers need not tell more
    report = check_archive(
        archive, bodies, 0.05, expected=expected_of(workshop.guard), digest=workshop.bundle.name, pinned=True
    )
    assert (report.images, report.in_batches, report.requested, report.bundle) == (60, 60, 0.05, workshop.bundle.name)
    assert report.flagged <= 6
    flagged = f"{report.flagged} of 60 clean images flagged, {report.flagged / 60:.3f} of 0.05 asked for"
    assert report.line() == f"{flagged}; 60 in batches as well"
    monkeypatch.setattr("guard.torchserve.check.subprocess", prepared_process)
    with pytest.raises(ArchiveError, match=rf"is judged by bundle {workshop.bundle.name}, not by {'0' * 64}"):
        check_archive(archive, bodies[:2], 0.05, digest="0" * 64)


@pytest.mark.parametrize(
    ("code", "message", "quick"),
    [
        ("import no_such_module_anywhere\n", r"does not start .*ModuleNotFoundError.*no_such_module_anywhere", True),
        ("class Stock:\n    def initialize(self, context):\n        1 / 0\n\n    def handle(self, data, context):\n"
         "        return data\n", "does not start .*ZeroDivisionError", True),
        ("import os\n\nos._exit(3)\n", r"ended its process \(status 3\)", False),
    ],
)  # fmt: skip
def test_check_says_why_an_archive_does_not_start(
    workshop: Workshop, request: pytest.FixtureRequest, tmp_path: Path, code: str, message: str, quick: bool
) -> None:
    if quick:
        request.getfixturevalue("quick_checks")
    handler = tmp_path / "broken_handler.py"
    handler.write_text(code)
    torch.save(workshop.module.state_dict(), tmp_path / "weights.pt")
    model = ServedModel(tmp_path / "weights.pt", handler, model_file=HANDLERS / "mnist_network.py")
    archive = make_guarded_archive("broken", model, workshop.bundle, model_store=tmp_path)
    with pytest.raises(ArchiveError, match=message):
        check_start(archive)


SCALED = """
import torch
from stock_handler import StockHandler as Stock


class Served(Stock):
    def inference(self, data):
        return {INFERENCE}
"""


@pytest.mark.usefixtures("quick_checks")
@pytest.mark.parametrize(
    ("inference", "settings", "message"),
    [
        ("self.model(data * 0.7)", {}, r"in the server the network gets other tensors than in the fit, and \d+ of 60"),
        (
            "self.model(data if len(data) == 1 else data.flip(0) * 0.5)",
            {"batching": "declared"},
            r"in batches of 8 \d+ of 60 clean images are judged otherwise",
        ),
        ("torch.zeros(len(data), 10)", {}, r"of 120 clean images got no verdict; the first: status 500"),
        ("self.model(torch.cat([data, data]))[: len(data)]", {}, "got no verdict; the first: status 500"),
    ],
    ids=["scaled", "batches turned", "network not asked", "two rows"],
)
def test_check_tells_an_archive_that_judges_otherwise(
    workshop: Workshop, bodies: list[bytes], tmp_path: Path, inference: str, settings: dict[str, str], message: str
) -> None:
    handler = tmp_path / "served_handler.py"
    handler.write_text(SCALED.replace("{INFERENCE}", inference))
    torch.save(workshop.module.state_dict(), tmp_path / "weights.pt")
    model = ServedModel(
        tmp_path / "weights.pt", handler, model_file=HANDLERS / "mnist_network.py",
        extra_files=[HANDLERS / "stock_handler.py"],
    )  # fmt: skip
    archive = make_guarded_archive("served", model, workshop.bundle, model_store=tmp_path, settings=settings)
    with pytest.raises(ArchiveError, match=message):
        check_archive(archive, bodies, 0.05, expected=expected_of(workshop.guard))


@pytest.mark.usefixtures("quick_checks")
def test_check_of_images_of_another_kind_says_that_too_many_are_flagged(
    workshop: Workshop, clean_split: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    archive = workshop.guarded("image", start=False)
    assert promise_of(archive).false_positive_rate == 0.05
    for name, images in (("clean", clean_split.test.images), ("inverted", 1 - clean_split.test.images)):
        np.savez(tmp_path / f"{name}.npz", images=np.rint(images[:80, 0] * 255).astype(np.uint8))
    status, out, _ = guard_command(capfd, "check", archive, "--images", tmp_path / "clean.npz")
    assert status == 0
    assert "of 80 clean images flagged" in out
    assert f"judged by bundle {workshop.bundle.name}" in out
    status, _, err = guard_command(capfd, "check", archive, "--images", tmp_path / "inverted.npz")
    assert status == 1
    assert "of 80 clean images, and 0.05 of them was asked for" in err
    assert guard_command(capfd, "check", archive, "--images", tmp_path / "clean.npz", "--key-file", "x")[0] == 2


@pytest.mark.usefixtures("quick_checks")
def test_check_with_the_images_of_the_fit_says_that_the_guard_knows_them(
    workshop: Workshop, clean_split: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("clean", "elsewhere"):
        np.savez(tmp_path / f"{name}.npz", images=np.rint(clean_split.test.images[:20, 0] * 255).astype(np.uint8))
    bundle = replace(workshop.guard, images_from=str(tmp_path / "clean.npz")).save(tmp_path / "bundles")
    BundleStore(tmp_path / "bundles").activate(bundle.name)
    known = f"the guard was fitted on them, and flags {share_of_fit(workshop.guard, 0.05):.3f} of those it knows"
    for followed in (None, tmp_path / "bundles"):
        archive = workshop.guarded("image", start=False, bundle=bundle, bundles=followed)
        for name in ("clean", "elsewhere"):
            status, out, err = guard_command(capfd, "check", archive, "--images", tmp_path / f"{name}.npz")
            assert status == 0, err
            assert (known in out) == (name == "clean")


def test_promise_follows_the_settings_and_the_active_bundle(workshop: Workshop, tmp_path: Path) -> None:
    follows = workshop.guarded("image", start=False, bundles=tmp_path)
    assert promise_of(follows).false_positive_rate == 0.05  # the folder is empty: the copy in the archive serves
    other = workshop.guard.with_config(false_positive_rate=0.2).save(tmp_path)
    BundleStore(tmp_path).activate(other.name)
    assert promise_of(follows).false_positive_rate == 0.2
    assert promise_of(workshop.guarded("image", start=False, false_positive_rate=0.1)).false_positive_rate == 0.1
    assert promise_of(follows).scope == "all"
    assert promise_of(workshop.guarded("image", start=False, false_positive_rate_scope="class")).scope == "class"
    plain = workshop.plain("image", start=False)
    with pytest.raises(ArchiveError, match="has no guard"):
        promise_of(plain)
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ArchiveError, match=r"weights\.pt is no model archive: it holds no MAR-INF"):
        promise_of(tmp_path / "weights.pt")
    with pytest.raises(ArchiveError, match=r"no\.mar cannot be read: No such file or directory\. Check the path\.$"):
        promise_of(tmp_path / "no.mar")


def test_rows_are_all_or_spread_evenly() -> None:
    assert chosen_rows(7) == list(range(7))
    assert chosen_rows(1) == [0]
    many = chosen_rows(10_000)
    assert (len(many), many[0], many[-1]) == (MOST_IMAGES, 0, 9999)
    assert max(np.diff(many)) <= 52


# --- a server ---


@contextmanager
def serving(answer: dict[str, str], status: int = 200, content: bytes = b"{}") -> Iterator[tuple[str, list[Any]]]:
    """Answer every prediction alike, and keep what was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers["Authorization"], self.headers["Content-Type"], body))
            self.send_response(status)
            for name, value in {**answer, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_check_of_a_server_sends_what_clients_send(
    workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str], clean_split: Any
) -> None:
    with serving({"Guard-Verdict": "clean", "Guard-Bundle": "ab"}) as (url, asked):
        report = check_server(url, "digits", [b"png", "text", {"a": [1]}], 0.05, token="secret")
        assert (report.images, report.flagged, report.bundle) == (3, 0, "ab")
        assert asked == [
            ("/predictions/digits", "Bearer secret", "application/octet-stream", b"png"),
            ("/predictions/digits", "Bearer secret", "text/plain", b"text"),
            ("/predictions/digits", "Bearer secret", "application/json", b'{"a": [1]}'),
        ]
        np.savez(tmp_path / "clean.npz", images=np.rint(clean_split.test.images[:5, 0] * 255).astype(np.uint8))
        (tmp_path / "key_file.json").write_text(json.dumps({"inference": {"key": "from the file"}}))
        archive = workshop.guarded("image", start=False, name="named-here")
        command = ("check", archive, "--images", tmp_path / "clean.npz", "--url", url)
        status, _, err = guard_command(capfd, *command, "--key-file", tmp_path / "key_file.json")
        assert (status, asked[-1][:2]) == (0, ("/predictions/named-here", "Bearer from the file")), err
        assert guard_command(capfd, *command, "--key-file", tmp_path / "clean.npz")[0] == 2
    with serving({"Guard-Verdict": "poisoned"}) as (url, _):
        assert check_server(url, "digits", [b"png"] * 3, 0.05, token=None, of_fit=0.9).flagged == 3
        with pytest.raises(ArchiveError, match="flags 3 of 3"):
            check_server(url, "digits", [b"png"] * 3, 0.05, token=None)
    with serving({}, 503) as (url, _), pytest.raises(ArchiveError, match="no verdict; the first: status 503"):
        check_server(url, "digits", [b"png"] * 3, 0.05, token=None)
    refused = b'{"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed. ..."}'
    for token, said in ((None, "asks for a key"), ("old", "refuses the key that was given")):
        with (
            serving({}, 400, refused) as (url, _),
            pytest.raises(ServerError, match=rf"{said}\. Give the key_file\.json .* as --key-file\.$"),
        ):
            check_server(url, "digits", [b"png"], 0.05, token=token)
    with pytest.raises(ServerError, match=f"{url} does not answer"):
        check_server(url, "digits", [b"png"], 0.05, token=None)


# --- what is written is checked first ---


@pytest.mark.usefixtures("few_folds", "quick_checks")
def test_wrap_leaves_no_archive_that_did_not_pass(
    workshop: Workshop, clean_split: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = (HANDLERS / "stock_handler.py").read_text().replace("def decode(", "def decode_alone(", 1)
    here_only = "\n    def decode(self, *given):\n        image = self.decode_alone(*given)\n"
    here_only += "        return image if 'pytest' in sys.modules else image * 0.6\n"
    (tmp_path / "local_handler.py").write_text(f"import sys\n{source}{here_only}")
    torch.save(workshop.module.state_dict(), tmp_path / "weights.pt")
    archive = stock_archive(
        tmp_path / "store", "m", str(tmp_path / "local_handler.py"), tmp_path / "weights.pt", [],
        model_file=str(HANDLERS / "mnist_network.py"),
    )  # fmt: skip
    images, labels = clean_split.validation
    np.savez(tmp_path / "clean.npz", images=np.rint(images[:200, 0] * 255).astype(np.uint8), labels=labels[:200])
    command = ("wrap", archive, "--images", tmp_path / "clean.npz", "--false-positive-rate", "0.1")
    status, out, err = guard_command(capfd, *command)
    assert status == 1
    assert "the network gets other tensors than in the fit" in err
    assert "serve it" not in out
    assert [file.name for file in archive.parent.iterdir()] == [archive.name]


# --- files that an archive needs ---


def test_sources_of_an_architecture_are_found_through_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {
        "spaced_models/deep/net.py": "import layers_beside\nfrom spaced_models import parts\n",
        "spaced_models/parts.py": "import numpy, json, guard\nimport parted_package.inner as p\n",
        "layers_beside.py": "from . import nothing\ndef late():\n    import late_beside\n",
        "late_beside.py": "import layers_beside, no_such_module_anywhere\n",
        "parted_package/__init__.py": "from .inner import x\n",
        "parted_package/inner.py": "import last_beside\n",
        "last_beside.py": "this is no Python",
        "unused_beside.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = architecture_files("spaced_models.deep.net:make")
    assert found[0] == tmp_path / "spaced_models"
    assert {path.name for path in found} == {
        "spaced_models", "layers_beside.py", "late_beside.py", "parted_package", "last_beside.py",
    }  # fmt: skip
    assert imported_files([tmp_path / "late_beside.py", tmp_path / "layers_beside.py"]) == []


def test_sources_do_not_take_packages_that_pip_has_put_outside_of_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, source = tmp_path / "target", tmp_path / "source"  # as of pip install --target, or of a .pth file
    for folder, files in ((target, ("layers_of_pip/__init__.py", "net_of_pip.py")), (source, ("net_of_user.py",))):
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("import layers_of_pip, net_of_pip\n")
        monkeypatch.syspath_prepend(folder)
    (target / "layers_of_pip-1.0.dist-info").mkdir()
    assert architecture_files("net_of_user:make") == [source / "net_of_user.py"]
    assert architecture_files("net_of_pip:make") == []


@pytest.mark.parametrize(
    ("fitted", "options", "status", "message"),
    [
        ((-0.4242, 2.8215), [], 2, "fitted on images from -0.4242 to 2.8215, and the image handler feeds"),
        ((0.0, 255.0), [], 2, "fitted on images from 0 to 255, and the image handler feeds the network 0 to 1"),
        (
            (0.0, 1.0),
            ["--mean", "0.5", "--std", "0.1"],
            0,
            "warning: channel 0: the guard was fitted on images from 0 to 1",
        ),
        ((0.0, 1.0), ["--mean", "0.5", "--std", "0.5"], 0, ""),
        ((-0.4242, 2.8215), ["--mean", "0.1307", "--std", "0.3081"], 0, ""),
        ((0.0, 0.1), [], 0, "warning: channel 0: the guard was fitted on images from 0 to 0.1"),
        ((0.003, 1.01), [], 0, ""),
    ],
)
def test_archive_compares_what_was_fitted_with_what_the_image_handler_feeds(
    workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str], fitted: Any, options: list[str], status: int,
    message: str,
) -> None:  # fmt: skip
    bundle = replace(workshop.guard, input_range=(fitted,)).save(tmp_path / "bundles")
    BundleStore(tmp_path / "bundles").activate(bundle.name)
    assert Guard.load(bundle).input_range == (fitted,)
    weights = tmp_path / "weights.pt"
    torch.save(workshop.module.state_dict(), weights)
    command = ("archive", "m", "--weights", weights, "--architecture", "guard.lab.attacks.networks:mnist_cnn")
    stores = ("--bundles", tmp_path / "bundles", "--model-store", tmp_path / "store", "--no-check")
    found, _, err = guard_command(capfd, *command, *stores, *options)
    assert found == status, err
    assert message in " ".join(err.split())
    assert ("warning" in err) == message.startswith("warning")


@pytest.mark.usefixtures("quick_checks")
def test_check_names_the_image_that_gets_no_verdict(workshop: Workshop, bodies: list[bytes]) -> None:
    archive = workshop.guarded("stock", start=False)
    sent, names = [*bodies[:3], b"no image"], ["0/a.png", "0/b.png", "1/c.png", "1/d.png"]
    with pytest.raises(ArchiveError, match=r"2 of 8 clean images got no verdict; the first: .*\(image 1/d\.png\)\.$"):
        check_archive(archive, sent, 0.05, pinned=True, names=names)
