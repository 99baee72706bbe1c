"""The script's end of a worker process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from . import environments
from .catalog import PEERS

EVAL = Path(__file__).resolve().parents[1]


class PeerError(Exception):
    """A peer that is absent, or failed: the message is what the report says."""


class Client:
    """A running worker.

    Args:
        name: key of `catalog.PEERS`.
        threads: that it computes with.
        runs: scratch folder, with model files and logs.
        environments_at: where environments of peers are.

    Raises:
        PeerError: if the peer is not installed.
    """

    def __init__(self, name: str, threads: int, runs: Path, environments_at: Path) -> None:
        self.name = name
        runs.mkdir(parents=True, exist_ok=True)
        self.log = runs / f"{name}.log"
        python = python_of(name, environments_at)
        inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        # Other environments are not to see the packages of this one.
        paths = [EVAL] if PEERS[name].environment else [EVAL, *inherited]
        variables = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": str(threads)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", "_peers.worker", name, str(threads), str(runs.resolve())],
                env={**os.environ, **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self.about: dict[str, Any] = self.call("start")
        except PeerError:
            self.close()
            raise

    def call(self, name: str, **args: Any) -> Any:
        """Call a method of the worker.

        Raises:
            PeerError: if it raised, or its process died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"call": name, "args": args}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"its process ended with {self.process.wait()} in {name}; see {self.log}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply["value"]

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def python_of(name: str, environments_at: Path) -> Path:
    """The Python that runs a peer.

    Raises:
        PeerError: if its environment has not been made.
    """
    environment = PEERS[name].environment
    if environment is None:
        return Path(sys.executable)
    directory = environments_at / environment
    if not environments.is_made(directory, environments.RECIPES[environment][0]()):
        raise PeerError(f"no environment {directory} of the present recipe; make it with --install-peers")
    return directory.resolve() / "bin" / "python"
