"""The command that guards a model which another server runs: `guard proxy`."""

from __future__ import annotations

import re
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.options import (
    Bundles,
    QueueUrl,
    ServedAction,
    ServedAuditRate,
    ServedFailureMode,
    ServedRate,
    ServedRateScope,
    Settings,
)
from guard.cli.output import say, tell
from guard.errors import ConfigError
from guard.extras import require

#: What the routes of a model are written with, as they are.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_MIB = 1 << 20


def proxy(
    upstream: Annotated[str, typer.Option(help="Address of the server, such as http://127.0.0.1:8000.")],
    model: Annotated[str, typer.Option(help="Name of the model there.")],
    exported: Annotated[Path, typer.Option(help="Folder that `guard export` wrote, or its guard_export.json.")],
    bundles: Bundles = "bundles",
    model_version: Annotated[
        str | None, typer.Option(show_default="the server's choice", help="Version of the model there.")
    ] = None,
    port: Annotated[
        int, typer.Option(help="Port of the proxy, metrics take the next but one; 0 = any free ones.")
    ] = 8080,
    binary: Annotated[
        bool | None,
        typer.Option(
            "--binary/--no-binary",
            show_default="as the server says",
            help="Whether tensors go to the server and back as binary data.",
        ),
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Pass on nothing but health, the server's metadata, and this model.")
    ] = False,
    token: Annotated[bool, typer.Option("--token/--no-token", help="Ask callers for a key.")] = True,
    key_file: Annotated[
        Path | None,
        typer.Option(help="File, for you alone, that keeps the key for the next start; default: a new one each time."),
    ] = None,
    rotate_keys: Annotated[bool, typer.Option("--rotate-keys", help="Make a new key; the kept one is void.")] = False,
    action: ServedAction = None,
    false_positive_rate: ServedRate = None,
    audit_rate: ServedAuditRate = None,
    false_positive_rate_scope: ServedRateScope = None,
    failure_mode: ServedFailureMode = None,
    connect_timeout: Annotated[float, typer.Option(help="Seconds until there is a connection to the server.")] = 5.0,
    timeout: Annotated[
        float, typer.Option(help="Seconds without a word of the server, or of a client, until a request is given up.")
    ] = 30.0,
    ready_timeout: Annotated[float, typer.Option(help="Seconds until the server must have the model.")] = 60.0,
    probe_seconds: Annotated[
        float,
        typer.Option(help="Seconds between two looks at whether the server still has that model; 0 = never."),
    ] = 60.0,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at once; others get status 503.")] = 64,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest inference request, and answer, in MiB.")] = 64,
    max_held_mib: Annotated[
        int, typer.Option(min=1, help="MiB of all inference requests at once, and again of all answers.")
    ] = 256,
    queue: QueueUrl = None,
    settings: Settings = None,
) -> None:
    """Guard a model that another server runs, until Ctrl-C.

    Stands on loopback before Triton, KServe, MLServer or any server of the open inference protocol (V2) that serves
    what `guard export` wrote. It asks for the watched layers with every request, judges each row, and gives the answer
    without them and with a verdict. Other routes go through untouched; other ways to the model are closed.
    """
    from guard.config import load_settings
    from guard.export.record import ExportRecord
    from guard.relabel.address import queue_url

    require("proxy")
    from guard.proxy.serving import ProxySettings, serve_proxy

    for name, text in (("--model", model), ("--model-version", model_version)):
        if text is not None and not _NAME.fullmatch(text):
            raise ConfigError(f"{name} has letters, digits, dots, - and _ only, got {text!r}.")
    for name, seconds in (("--connect-timeout", connect_timeout), ("--timeout", timeout)):
        if not 0 < seconds <= 86400:
            raise ConfigError(f"{name} must be in (0, 86400] seconds, got {seconds}.")
    if rotate_keys and key_file is None:
        raise ConfigError("--rotate-keys needs a key that is kept. Name its --key-file.")
    chosen = load_settings(
        settings,
        action=action,
        false_positive_rate=false_positive_rate,
        audit_rate=audit_rate,
        false_positive_rate_scope=false_positive_rate_scope,
        failure_mode=failure_mode,
        queue_url=queue_url(queue) if queue else None,
    )
    key = _key(key_file, rotate_keys) if token else None
    proxied = ProxySettings(
        upstream=upstream,
        model=model,
        version=model_version,
        binary=binary,
        only=only,
        key=key,
        port=port,
        metrics_port=port and port + 2,
        connect_timeout_s=connect_timeout,
        timeout_s=timeout,
        ready_timeout_s=ready_timeout,
        probe_s=probe_seconds,
        max_requests=max_requests,
        max_body_bytes=max_body_mib * _MIB,
        max_held_bytes=max_held_mib * _MIB,
    )

    def ready(address: str, metrics: str) -> None:
        say(f"ready on {address}; metrics on {metrics}")
        header = f' -H "Authorization: Bearer {key}"' if key is not None else ""
        say(f"curl{header} {address}/v2/models/{model}")
        say("Ctrl-C stops it.")
        sys.stdout.flush()

    serve_proxy(ExportRecord.read(exported), bundles, proxied, chosen, ready)
    tell("stopped")


def _key(file: Path | None, rotate: bool) -> str:
    """Return what callers must send."""
    from guard.torchserve.keys import kept_keys

    return kept_keys(file, rotate=rotate)["inference"] if file is not None else secrets.token_urlsafe(24)
