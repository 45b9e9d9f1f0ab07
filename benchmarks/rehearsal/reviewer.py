"""A simulated reviewer who answers through the review page's own HTTP interface."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.torchserve.client import Client
from guard.types import Float32Array, IntArray

NAME = "rehearsal"


class Reviewer:
    """Knows what was sent, and finds it by its pixels.

    Parameters
    ----------
    review_url, queue_url : str
    clean, triggered : (images, labels)
        Images float32 in [0, 1] of shape (n, 1, height, width), true labels.
    """

    def __init__(
        self,
        review_url: str,
        queue_url: str,
        clean: tuple[Float32Array, IntArray],
        triggered: tuple[Float32Array, IntArray],
    ) -> None:
        with Queue.open(queue_url) as queue:
            self._token = Reviewers(queue).add(NAME, "admin")
        self._url = review_url
        self._truth: dict[bytes, tuple[int, bool]] = {}
        for is_triggered, (images, labels) in ((False, clean), (True, triggered)):
            for image, label in zip(images, labels.tolist(), strict=True):
                self._truth[_key(np.rint(255 * image[0]).astype(np.uint8))] = (label, is_triggered)

    def answer(self, count: int, order: str = "age") -> int:
        """Answer up to so many inputs, skipping what was never sent like this; return how many."""
        answered = 0
        with Client(self._url, token=self._token) as page:
            items = _parsed(page, "GET", f"/api/v1/items/next?n={count}&order={order}")["items"]
            for item in items:
                with Image.open(io.BytesIO(page.request("GET", item["image"]).body)) as picture:
                    known = self._truth.get(_key(np.asarray(picture.convert("L"))))
                if known is None:
                    _parsed(page, "POST", f"/api/v1/items/{item['id']}/skip")
                    continue
                body = {"is_poisoned": known[1], "true_label": known[0]}
                _parsed(page, "POST", f"/api/v1/items/{item['id']}/decision", body)
                answered += 1
        return answered

    def ask_for_retraining(self, model: str) -> None:
        """Press the button."""
        with Client(self._url, token=self._token) as page:
            _parsed(page, "POST", "/api/v1/retrain", {"model": model})


def _key(pixels: Any) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()


def _parsed(page: Client, method: str, path: str, body: Any = None) -> dict[str, Any]:
    text = json.dumps(body) if body is not None else ""
    reply = page.request(method, path, text, headers={"Content-Type": "application/json"} if text else None)
    if reply.status != 200:
        raise RuntimeError(
            f"{method} {path}: the review page answered {reply.status} {reply.error} {reply.body[:200]!r}"
        )
    parsed: dict[str, Any] = json.loads(reply.body)
    return parsed
