"""The Serve config file that people edit, and that `serve run` and `serve deploy` take."""

from __future__ import annotations

from typing import Any

import yaml

from guard.ray.settings import APPLICATION, COUNTS, DEPLOYMENTS, GUARDED, Settings

_HEAD = """\
# Ray Serve, for `serve run FILE` or `serve deploy FILE`; https://docs.ray.io/en/latest/serve/production-guide/config.html
# Archives, key file and bundles must lie under the same paths on every node. The key is in no file of Serve's: it is in
# key_file, or in the environment variable key_variable of every node. GUARD_QUEUE_URL, for flagged inputs, likewise.
"""
_AUTOSCALING = """\
    # Instead of num_replicas, so that Serve adds and removes replicas:
    # autoscaling_config:
    #   min_replicas: 1
    #   max_replicas: 8
    #   target_ongoing_requests: 16
"""


def serve_config(settings: Settings, *, replicas: int, host: str, port: int) -> str:
    """Return the text of a Serve config file.

    Parameters
    ----------
    settings : Settings
    replicas : int
    host : str
        Where the proxies listen.
    port : int
    """
    deployments = [
        {"name": GUARDED, "num_replicas": replicas, **DEPLOYMENTS[GUARDED]},
        {"name": COUNTS, **DEPLOYMENTS[COUNTS]},
    ]
    document: dict[str, Any] = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "import_path": "guard.ray.app:build",
                "route_prefix": "/",
                "args": settings.model_dump(exclude_none=True),
                "deployments": deployments,
            }
        ],
    }
    text = yaml.safe_dump(document, sort_keys=False, width=1000)
    line = f"    num_replicas: {replicas}\n"
    before, found, after = text.partition(line)
    return _HEAD + before + found + _AUTOSCALING * bool(found) + after
