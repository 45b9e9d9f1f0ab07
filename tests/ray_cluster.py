"""A Ray cluster of two raylets on loopback, in a process of its own: tells where it is, ends with its standard input.

    python tests/ray_cluster.py FOLDER

FOLDER is short, as paths of sockets are. One node has the head's processes and a CPU, the other one another CPU.
"""

from __future__ import annotations

import json
import select
import sys
from typing import Any

import ray._private.utils
from ray.cluster_utils import Cluster


def main(folder: str) -> None:
    ray._private.utils.write_ray_address = lambda *_: None  # which would be in /tmp/ray, and be everybody's
    each: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False, "temp_dir": folder})
    nodes = [cluster.head_node, cluster.add_node(**each)]
    raylets = [node.all_processes["raylet"][0].process for node in nodes]
    print(json.dumps({"address": cluster.address, "raylets": [raylet.pid for raylet in raylets]}), flush=True)
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        for raylet in raylets:
            raylet.poll()  # one that was killed is gone, then: its workers look whether it is there
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
