"""A peer in a process of its own: ``python -m _peers.worker NAME THREADS DIRECTORY`` answers calls, a JSON line each.

Between calls it sleeps in a read from stdin, so that it takes no time from the peer that is measured. What libraries
print goes to stderr.
"""

import json
import os
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .catalog import PEERS


def start(name: str, threads: int, directory: Path) -> tuple[Any, dict[str, Any]]:
    """The worker object of a peer, and what the report says about it."""
    peer = PEERS[name]
    kind = getattr(import_module(f"{__package__}.{peer.module}"), peer.worker)
    worker = kind(threads=threads, directory=directory, **peer.options)
    try:
        found = version(peer.package)
    except PackageNotFoundError:  # llmqat run from its source tree
        found = import_module(peer.package).__version__
    return worker, {"package": peer.package, "version": found, **worker.describe()}


def serve(name: str, threads: int, directory: Path) -> None:
    """Answer calls until stdin ends: ``{"call": ..., "args": {...}}`` by ``{"value": ...}`` or ``{"error": ...}``."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        print(time.strftime("%H:%M:%S"), line.strip(), flush=True)
        try:
            if request["call"] == "start":
                worker, value = start(name, threads, directory)
            else:
                value = getattr(worker, request["call"])(**request["args"])
            reply = {"value": value}
        except Exception as error:  # whatever a peer raises is a line of the report, not the end of the run
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
