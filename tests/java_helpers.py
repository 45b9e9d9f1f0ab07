"""The classes of a TorchServe in one file, from which Java starts with half of the work: made once for a run's servers.

The Java of the wheel comes without such a file. One that does not fit is left alone by Java.
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from guard.processes.ports import choose_ports
from guard.torchserve.launch import format_properties, java_command, server_environment, server_settings

#: Java compiles little, as no server of a test lives for long: its start costs half of the time.
QUICK_START = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")


def archive_classes(folder: Path, archive: Path) -> None:
    """Start a TorchServe without models, note which classes it loads, and write `archive`, all of it or nothing."""
    ports = choose_ports(0, 0, 0)
    settings = server_settings(
        ports, model_store=folder, archives={}, token_authorization=True, metrics_config=None, per_model={}
    )
    (folder / "config.properties").write_text(format_properties(settings))
    classes = folder / "classes"
    environment = server_environment(folder, folder, {})
    server = subprocess.Popen(
        java_command(
            [*QUICK_START, f"-XX:DumpLoadedClassList={classes}", f"-Djava.io.tmpdir={folder}"],
            ["-f", str(folder / "config.properties"), "-s", str(folder), "-ncs"],
        ),
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(f"http://127.0.0.1:{ports.inference}/ping", server)
    finally:
        server.terminate()
        server.wait()
    unfinished = folder / "unfinished.jsa"
    options = [
        *QUICK_START,
        "-Xshare:dump",
        f"-XX:SharedClassListFile={classes}",
        f"-XX:SharedArchiveFile={unfinished}",
    ]
    subprocess.run(java_command(options, []), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    unfinished.rename(archive)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url).close()
            return
        except urllib.error.HTTPError:  # an answer: no model, not healthy
            return
        except OSError:
            if server.poll() is not None:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    archive_classes(Path(sys.argv[1]), Path(sys.argv[2]))
