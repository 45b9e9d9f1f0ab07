"""What a Ray Serve application of ours is told: the arguments of its builder, as a Serve config file has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from guard.errors import ServerError
from guard.torchserve.keys import inference_key

#: Names of the application and its deployments in Ray Serve.
APPLICATION, GUARDED, COUNTS = "guard", "Guarded", "Counts"
#: How they run unless a Serve config file says something else.
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    GUARDED: {
        "max_ongoing_requests": 64,  # per replica; the others wait in the proxy
        "max_queued_requests": 1024,  # per proxy; what comes beyond gets status 503
        "max_constructor_retry_count": 2,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": 10,
        "ray_actor_options": {"num_cpus": 1},
    },
    COUNTS: {
        "num_replicas": 1,
        "max_ongoing_requests": 1000,
        "graceful_shutdown_wait_loop_s": 0.5,
        # beside Ray's own state: what takes that node away takes everything away
        "ray_actor_options": {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    },
}
#: The variable that has the key where no other is named.
KEY_VARIABLE = "BACKDOOR_GUARD_KEY"


class Settings(BaseModel):
    """Archives to serve, and how. The key itself is never among these: everybody who sees the cluster sees them.

    Attributes
    ----------
    archives : dict of str to str
        Path of the archive by the name of its model, the same on every node.
    batch_size : int
        The most rows of one forward pass.
    max_batch_delay_ms : int
        How long the first request of a batch waits for others.
    max_open_models : int
        How many models a replica holds in memory; with more archives, the one that was not asked for longest is
        closed when another is needed.
    ask_key : bool
        Whether callers must send a key.
    key_file : str or None
        Where the key is kept, in a file as `guard serve --key-file` makes it, on every node.
    key_variable : str
        The environment variable that has the key where there is no file.
    scratch : str or None
        Folder of every node where archives are unpacked to; None = the system's temporary one.
    """

    model_config = ConfigDict(extra="forbid")

    archives: dict[str, str] = Field(min_length=1)
    batch_size: int = Field(default=8, ge=1)
    max_batch_delay_ms: int = Field(default=1, ge=1)
    max_open_models: int = Field(default=8, ge=1)
    ask_key: bool = True
    key_file: str | None = None
    key_variable: str = KEY_VARIABLE
    scratch: str | None = None

    @model_validator(mode="after")
    def _asks_or_not(self) -> Self:
        if not self.ask_key and self.key_file is not None:
            raise ValueError("ask_key is false, and key_file names a key. Leave one of them out.")
        return self

    def key(self) -> str | None:
        """Return the key that callers must send; None if they need none.

        Raises
        ------
        ServerError
            If a key is asked for and there is none.
        """
        if not self.ask_key:
            return None
        if self.key_file is not None:
            return inference_key(Path(self.key_file))
        key = os.environ.get(self.key_variable, "")
        if len(key) < 16:
            raise ServerError(
                f"there is no key of 16 characters or more in ${self.key_variable}. Set it where the nodes start, name "
                "a key_file, or ask for none with ask_key: false."
            )
        return key
