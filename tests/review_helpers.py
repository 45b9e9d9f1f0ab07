"""What tests of the review page share: flagged inputs that are pictures, a workspace around a queue, and a client."""

from __future__ import annotations

import io
import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from anyio.from_thread import BlockingPortal, start_blocking_portal
from PIL import Image
from queue_helpers import N_CLASSES, flagged
from starlette.testclient import TestClient

from guard.relabel.items import FlaggedInput
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.relabel.rounds import Rounds
from guard.review.app import create_app
from guard.review.workspace import Workspace
from guard.storage.bundle import write_bundle

#: Only what a browser on this machine would ask for is answered.
URL = "http://localhost"


def png_of(image: np.ndarray) -> bytes:
    """Return a grey picture, shape (height, width), values in [0, 1], as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(255 * image).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(number: int = 0, **changes: Any) -> FlaggedInput:
    """Return a flagged input whose body is the picture that the model saw; more suspicious, the lower its number."""
    image = np.random.default_rng(number).random((1, 8, 8), dtype=np.float32)
    values = {"inputs": image, "body": png_of(image[0]), "p_value": 0.001 * (number + 1)}
    return flagged(number, **{**values, **changes})


def workspace_of(queue: Queue, **parts: Any) -> Workspace:
    return Workspace(queue, Reviewers(queue), Rounds(queue), **parts)


class OneLoop:
    """The event loop of all clients of this process; a client alone starts one, with threads, for every request."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None

    def portal(self) -> BlockingPortal:
        if self._portal is None:
            self._portal = self._stack.enter_context(start_blocking_portal())
        return self._portal

    def close(self) -> None:
        """End it; conftest.py does so at the end of a run, as its thread would keep the process alive."""
        self._stack.close()
        self._portal = None


LOOP = OneLoop()


def in_one_loop(client: TestClient) -> TestClient:
    """Return the client, its requests answered in the loop that all share."""
    client.portal = LOOP.portal()
    return client


def client_of(workspace: Workspace, url: str = URL) -> TestClient:
    return in_one_loop(TestClient(create_app(workspace), base_url=url, follow_redirects=False))


def log_in(workspace: Workspace, name: str = "ada", role: Any = "reviewer", token: str | None = None) -> TestClient:
    """Return a client of somebody who is logged in; made a reviewer first if no token is given."""
    client = client_of(workspace)
    token = token or workspace.reviewers.add(name, role)
    assert client.post("/login", data={"name": name, "token": token}).status_code == 303
    client.headers["X-CSRF-Token"] = csrf_of(client)
    return client


def csrf_of(client: TestClient) -> str:
    """Return the token that the page of a client holds for its scripts."""
    found = re.search(r"hx-headers=\'([^\']+)\'", client.get("/progress").text)
    assert found is not None
    token: str = json.loads(found[1])["X-CSRF-Token"]
    return token


def shown_item(html: str) -> int | None:
    """Return the number of the item that a page shows."""
    found = re.search(r'data-item="(\d+)"', html)
    return int(found[1]) if found else None


def small_bundle(
    folder: Path, class_names: list[str] | None, features: np.ndarray, labels: np.ndarray, **more: Any
) -> str:
    """Write a bundle without detectors, sound as far as the page looks, and return its digest."""
    n_classes = len(class_names) if class_names else int(labels.max()) + 1
    document = {
        "class_names": class_names,
        "settings": {"mode": "calibrated", "false_positive_rate": 0.01},
        "n_classes": n_classes,
        "clean_images": len(labels),
        "input_shape": None,
        "depths": [],
        "realised_false_positive_rate": 0.01,
    }
    arrays = {
        "reference.features": features.astype(np.float32),
        "reference.logits": np.eye(n_classes, dtype=np.float32)[labels],
        "labels": labels.astype(np.int64),
        "clean_scores": np.linspace(0.1, 1.0, len(labels)),
    }
    return write_bundle(folder, document | more, arrays).name


__all__ = ["N_CLASSES", "URL", "client_of", "csrf_of", "log_in", "picture", "png_of", "shown_item", "workspace_of"]
