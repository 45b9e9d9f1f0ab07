"""The process of a local engine: `python -m guard.local JOB.json`; `guard serve --engine local` starts it."""

from __future__ import annotations

import logging
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from guard.errors import GuardError
from guard.files import make_private_folder
from guard.local.archived_model import open_archived_model
from guard.local.job import Job
from guard.local.totals import Totals
from guard.observing.exporting import exporting
from guard.processes.ports import LOOPBACK, listening_socket
from guard.v2.models import ServedModel
from guard.v2.process import Stopping
from guard.v2.rest import create_app


def main(job: Job) -> int:
    """Serve until SIGTERM; return the exit status."""
    stopping = Stopping()
    with ExitStack() as opened:
        scratch = Path(job.folder)
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        make_private_folder(scratch)
        served = {}
        for number, (name, archive) in enumerate(job.archives.items()):
            try:
                model = opened.enter_context(open_archived_model(Path(archive), scratch / str(number), name))
            except GuardError as error:
                print(f"model {name}: {error}", file=sys.stderr)
                return 1
            served[name] = ServedModel(model, batch_size=job.batch_size, max_delay_s=job.max_delay_s)
            opened.callback(served[name].close)
        opened.enter_context(
            exporting(job.metrics_port, Totals(model.model.runtime.metrics for model in served.values()))
        )
        if job.grpc_port is not None:
            from guard.v2.grpc_service import serving_grpc  # a package of its own

            opened.enter_context(serving_grpc(served, f"{LOOPBACK}:{job.grpc_port}", key=job.key))
        listening = opened.enter_context(listening_socket(LOOPBACK, job.port))
        listening.listen()
        stopping.serve(create_app(served, key=job.key), listening)
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    sys.exit(main(Job.read(Path(sys.argv[1]))))
