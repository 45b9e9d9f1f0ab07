"""Whether a guarded archive, or the server that runs it, judges as its guard was fitted: send clean images, count."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guard.detection.pipeline import Guard
from guard.errors import ArchiveError, ServerError
from guard.storage.stores import CACHE_VARIABLE
from guard.torchserve.archives.contents import ABOUT, read_guard_files
from guard.torchserve.archives.strict_zip import open_strict_zip
from guard.torchserve.client import Client
from guard.torchserve.trial import ANSWERS, BATCHES, FAILURE, MODEL
from guard.types import Float64Array

#: Images that are sent at most, and the batches that they come in besides alone.
MOST_IMAGES = 200
_BATCH = 8
#: A rate that so few sound guards would show is called broken.
_LEAST_CHANCE = 1e-3
#: P-values of the same image differ by no more than this, on whatever way its batch was rounded.
_SAME = 0.02
#: Share of the images whose p-value may differ by more all the same: some lie between two steps of a scale.
_FEW = 0.02
_LONGEST_S = 600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one image.

    Attributes
    ----------
    status : int
    verdict : str
        "" where the answer says none.
    p_value : float
        NaN where the answer tells none.
    bundle : str
        Digest of the bundle that judged, as far as the answer tells.
    message : str
        Of an error.
    """

    status: int
    verdict: str
    p_value: float
    bundle: str
    message: str

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str], message: str) -> Answer:
        """Return what status and headers say; names of headers in any case."""
        known = {name.lower(): value for name, value in headers.items()}
        return cls(
            status,
            known.get("guard-verdict", ""),
            float(known.get("guard-p-value", "nan")),
            known.get("guard-bundle", ""),
            message,
        )


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check has found; it raised if anything was wrong.

    Attributes
    ----------
    images, flagged : int
        Clean images sent one by one, and those of them that were called poisoned.
    requested : float
        The false-positive rate that was asked for.
    in_batches : int
        Images that were sent in batches as well.
    bundle : str
        Digest of the bundle that judged; "" if no answer tells.
    of_fit : float or None
        Share of all images of its fit that the guard flags, where these images are some of them.
    """

    images: int
    flagged: int
    requested: float
    in_batches: int
    bundle: str
    of_fit: float | None = None

    def line(self) -> str:
        """Return the report for a person."""
        together = f"; {self.in_batches} in batches as well" if self.in_batches else ""
        fitted = (
            f"; the guard was fitted on them, and flags {self.of_fit:.3f} of those it knows: others show the rate"
            if self.of_fit is not None
            else ""
        )
        return (
            f"{self.flagged} of {self.images} clean images flagged, {self.flagged / self.images:.3f} "
            f"of {self.requested:g} asked for{together}{fitted}"
        )


def chosen_rows(n: int) -> list[int]:
    """Return which of n images to send: all, or `MOST_IMAGES` of them in even steps."""
    return list(dict.fromkeys(np.linspace(0, n - 1, min(n, MOST_IMAGES)).astype(int).tolist()))


def share_of_fit(guard: Guard, rate: float, scope: str = "all") -> float:
    """Return the share of the images of its fit that a guard flags; above the rate where the network is often wrong.

    Its heads have seen that the network is wrong there. The rate is promised of other images, in a scope of
    `false_positive_rate_scope`.
    """
    of_class = {"false_positive_rate": rate} if scope == "class" else {}
    asked = guard.with_config(false_positive_rate_scope=scope, **of_class)
    return float((asked.scores(asked.reference).p_values <= rate).mean())


def judging_guard(archive: Path, bundle: Path | None) -> Guard:
    """Return the guard of a bundle, or else the one that an archive carries.

    Raises
    ------
    ArchiveError, BundleError
        If it cannot be read.
    """
    if bundle is not None:
        return Guard.load(bundle)
    with tempfile.TemporaryDirectory(prefix="guard-check-") as scratch, open_strict_zip(archive) as opened:
        opened.unpack(Path(scratch) / MODEL)
        return Guard.load(Path(scratch) / MODEL / read_guard_files(Path(scratch) / MODEL)[0]["embedded"])


def check_archive(
    archive: Path,
    bodies: Sequence[Any],
    requested: float,
    *,
    expected: Float64Array | None = None,
    digest: str | None = None,
    pinned: bool = False,
    of_fit: float | None = None,
    names: Sequence[str] = (),
) -> CheckReport:
    """Load a guarded archive afresh in another process, as a server would, and send clean images through it.

    Parameters
    ----------
    archive : Path
    bodies : sequence
        Bodies of requests with one clean image each: bytes, or what TorchServe makes of JSON and text.
    requested : float
        The false-positive rate that was asked for.
    expected : ndarray of shape (n,), float64, optional
        P-values that the guard gave these images when it was fitted.
    digest : str, optional
        Of the bundle that has to judge.
    pinned : bool
        Take the bundle in the archive, even if it follows a folder of bundles.
    of_fit : float, optional
        What `share_of_fit` says of its guard, where the images are those of the fit.
    names : sequence of str
        Of the images, for the error about one that gets no verdict.

    Raises
    ------
    ArchiveError
        If the archive does not start, an image gets no verdict, verdicts in batches are others than alone or than
        expected, or more images are flagged than the requested rate explains.
    """
    order = np.random.default_rng(0).permutation(len(bodies)).tolist()
    batches = [[row] for row in range(len(bodies))] + [order[at : at + _BATCH] for at in range(0, len(order), _BATCH)]
    answers = _answers_of(archive, [[bodies[row] for row in batch] for batch in batches], pinned)
    alone = [answer for (answer,) in answers[: len(bodies)]]
    together = {
        row: answer
        for batch, found in zip(batches[len(bodies) :], answers[len(bodies) :], strict=True)
        for row, answer in zip(batch, found, strict=True)
    }
    named = [names[row] for row in [*range(len(bodies)), *together]] if names else []
    _check_verdicts(archive.name, [*alone, *together.values()], named)
    _check_same(alone, [together[row] for row in range(len(bodies))], f"{archive.name}: in batches of {_BATCH}")
    if expected is not None:
        fitted = [Answer(200, "", float(p_value), "", "") for p_value in expected]
        _check_same(alone, fitted, f"{archive.name}: in the server the network gets other tensors than in the fit, and")
    return _report(archive.name, alone, requested, len(together), digest, of_fit)


def check_start(archive: Path) -> None:
    """Load a guarded archive afresh in another process, as a server would; ArchiveError if it does not start."""
    _answers_of(archive, [], pinned=False)


def check_server(
    url: str,
    model: str,
    bodies: Sequence[Any],
    requested: float,
    *,
    token: str | None,
    of_fit: float | None = None,
    names: Sequence[str] = (),
) -> CheckReport:
    """Send clean images to a running server, one by one.

    Parameters
    ----------
    url : str
        Its inference address, on loopback.
    model : str
    bodies, requested, of_fit, names
        As for `check_archive`.
    token : str or None
        Key for predictions.

    Raises
    ------
    ServerError
        If it does not answer.
    ArchiveError
        As `check_archive`.
    """
    alone = []
    with Client(url, token=token) as client:
        for body in bodies:
            is_bytes = isinstance(body, bytes)
            text = body if is_bytes or isinstance(body, str) else json.dumps(body)
            kind = "application/octet-stream" if is_bytes else "text/plain" if body is text else "application/json"
            reply = client.predict(model, text, content_type=kind)
            if reply.error:
                raise ServerError(f"{url} does not answer: {reply.error}. Is it running, and is this its address?")
            if reply.status == 400 and b"InvalidKeyException" in reply.body:
                key = "asks for a key" if token is None else "refuses the key that was given"
                raise ServerError(f"{url} {key}. Give the key_file.json of this start of TorchServe as --key-file.")
            message = reply.body[:300].decode(errors="replace") if reply.status >= 400 else ""
            alone.append(Answer.of(reply.status, reply.headers, message))
    _check_verdicts(model, alone, names)
    return _report(model, alone, requested, 0, None, of_fit)


def _answers_of(archive: Path, batches: Sequence[Sequence[Any]], pinned: bool) -> list[list[Answer]]:
    with tempfile.TemporaryDirectory(prefix="guard-check-") as scratch:
        folder = Path(scratch).resolve()
        with open_strict_zip(archive) as opened:
            opened.unpack(folder / MODEL)
        if pinned:
            about = folder / MODEL / ABOUT
            about.write_text(json.dumps({**json.loads(about.read_text()), "bundles": None}))
        (folder / BATCHES).write_text(json.dumps([[_entry(body) for body in batch] for batch in batches]))
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("GUARD_") or name == CACHE_VARIABLE
        }
        environment = {**kept, "GUARD_VERDICT_DETAIL": "full", "GUARD_REVIEW": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "guard.torchserve.trial", str(folder)]
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_LONGEST_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise ArchiveError(
                f"{archive.name} did not answer within {_LONGEST_S:g} s. Does its handler wait?"
            ) from None
        if (folder / FAILURE).exists():
            reason = " ".join((folder / FAILURE).read_text(encoding="utf-8").split()).rstrip(".")
            raise ArchiveError(f"{archive.name} does not start as a server would start it: {reason}.")
        if done.returncode != 0 or not (folder / ANSWERS).exists():
            last = (done.stderr.strip().splitlines() or ["without a word"])[-1].rstrip(".")
            raise ArchiveError(f"{archive.name} ended its process (status {done.returncode}): {last}.")
        return [
            [Answer.of(found["status"], found["headers"], found["message"]) for found in batch]
            for batch in json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
        ]


def _entry(body: Any) -> dict[str, Any]:
    return {"bytes": base64.b64encode(body).decode()} if isinstance(body, bytes) else {"parsed": body}


def _check_verdicts(name: str, answers: Sequence[Answer], names: Sequence[str]) -> None:
    bad = [row for row, answer in enumerate(answers) if answer.verdict not in ("clean", "poisoned")]
    if bad:
        first = answers[bad[0]]
        found = f"status {first.status}, verdict {first.verdict or 'none'} {first.message}".strip().rstrip(".")
        found += f" (image {names[bad[0]]})" if names else ""
        raise ArchiveError(f"{name}: {len(bad)} of {len(answers)} clean images got no verdict; the first: {found}.")


def _check_same(first: Sequence[Answer], second: Sequence[Answer], what_differs: str) -> None:
    differences = np.array([abs(a.p_value - b.p_value) for a, b in zip(first, second, strict=True)])
    n_differ = int((differences > _SAME).sum())
    if n_differ > _FEW * len(differences):
        raise ArchiveError(
            f"{what_differs} {n_differ} of {len(differences)} clean images are judged otherwise "
            f"(p-values differ by up to {differences.max():.2g})."
        )


def _report(
    name: str, alone: Sequence[Answer], requested: float, in_batches: int, digest: str | None, of_fit: float | None
) -> CheckReport:
    from scipy.stats import binomtest

    bundles = {answer.bundle for answer in alone} - {""}
    if digest is not None and bundles != {digest}:
        raise ArchiveError(f"{name} is judged by bundle {', '.join(sorted(bundles)) or 'none'}, not by {digest}.")
    flagged = sum(answer.verdict == "poisoned" for answer in alone)
    if binomtest(flagged, len(alone), max(requested, of_fit or 0.0), alternative="greater").pvalue < _LEAST_CHANCE:
        raise ArchiveError(
            f"{name} flags {flagged} of {len(alone)} clean images, and {requested:g} of them was asked for. Are these "
            "images what clients send, and are they of the kind that the guard was fitted on?"
        )
    return CheckReport(len(alone), flagged, requested, in_batches, min(bundles, default=""), of_fit)
