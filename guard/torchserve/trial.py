"""One unpacked archive driven as a worker of TorchServe drives it: `python -m guard.torchserve.trial FOLDER`.

A process of its own, so that nothing of the archive is left in the one that asks, and nothing of that one is there to
help the archive. `FOLDER/model` is the archive, `FOLDER/batches.json` what to send (see `guard.torchserve.check`);
`FOLDER/answers.json` is written, or `FOLDER/failure.txt` with one line if the archive does not start.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import yaml

from guard.torchserve.archives.manifest import MANIFEST
from guard.torchserve.worker import handler_class, new_context, probe_context

MODEL, BATCHES, ANSWERS, FAILURE = "model", "batches.json", "answers.json", "failure.txt"


def main(folder: Path) -> int:
    """Start the archive, let it answer every batch, and write down what it answered."""
    logging.disable(logging.CRITICAL)  # they would quote what is sent
    model = folder / MODEL
    manifest = json.loads((model / MANIFEST).read_bytes())
    config = manifest["model"].get("configFile")
    settings = yaml.safe_load((model / config).read_text(encoding="utf-8")) if config else {}
    sys.path.insert(0, str(model))
    batches = [[_body(entry) for entry in batch] for batch in json.loads((folder / BATCHES).read_text())]
    with contextlib.redirect_stdout(sys.stderr):
        context = new_context(model, None, settings or {})
        try:
            handler = handler_class(manifest["model"]["handler"], "handle")()
            handler.initialize(context)
        except Exception as error:  # it runs the user's code
            (folder / FAILURE).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            return 1
        answers = [_answers(handler, context, batch) for batch in batches]
    (folder / ANSWERS).write_text(json.dumps(answers), encoding="utf-8")
    return 0


def _body(entry: dict[str, Any]) -> Any:
    return bytearray(base64.b64decode(entry["bytes"])) if "bytes" in entry else entry["parsed"]


def _answers(handler: Any, context: Any, bodies: list[Any]) -> list[dict[str, Any]]:
    made = probe_context(context, len(bodies))
    result = handler.handle([{"body": body} for body in bodies], made)
    found = []
    for index in range(len(bodies)):
        status = made.get_response_status(index)[0]
        message = str(result[index])[:300] if status >= 400 else ""
        found.append({"status": status, "headers": dict(made.get_response_headers(index)), "message": message})
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
