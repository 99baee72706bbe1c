import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval._peers.catalog import A8, BF16, GPTQMODEL, READ
from eval._peers.client import Client, PeerError

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, cwd):
    command = [sys.executable, ROOT / "eval" / "throughput.py", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_everything_on_tiny_shapes(tmp_path):
    done = run("--quick", "--threads", "1", "--peers", A8, BF16, GPTQMODEL, "--foreign", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"absent: {GPTQMODEL}: no environment" in done.stdout
    results = json.loads((tmp_path / "eval/results/throughput.json").read_text())
    assert {row["peer"] for row in results["ops"]["rows"]} == {READ, A8, BF16}
    assert not [row for section in results.values() for row in section["rows"] if "failed" in row]
    tasks = {(row["task"], row["peer"]) for row in results["models"]["rows"]}
    assert tasks == {(task, peer) for task in ("prefill 32", "decode") for peer in (READ, A8, BF16)}
    assert {row["peer"] for row in results["contention"]["rows"]} == {A8}
    assert "W4A8" in results["ops"]["peers"][A8]["scheme"]
    assert {row["target"] for row in results["ops"]["targets"]} == {0.92}
    for text in (f"{A8} / {READ}", f"{A8} / quiet", "M = 16", "tiny decode", "tiny contended"):
        assert text in done.stdout
    picture = (tmp_path / "eval/results/throughput.svg").read_text()
    assert "tiny square 256x256" in picture


def test_repeats_are_checked(tmp_path):
    done = run("--repeats", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert "--repeats must be at least 1, got 0" in done.stderr


def test_a_worker_that_dies_is_an_error_of_that_peer(tmp_path):
    with Client(READ, 1, tmp_path, tmp_path) as client:
        assert client.call("open", buffer_bytes=1 << 21) == {"bytes": 1 << 21}
        with pytest.raises(PeerError, match="TypeError"):
            client.call("open")
        client.process.kill()
        with pytest.raises(PeerError, match=r"its process ended with -9 in gb_s; see .*read\.log"):
            client.call("gb_s", seconds=0.01)


def test_a_peer_without_its_environment_says_how_to_make_it(tmp_path):
    with pytest.raises(PeerError, match=r"no environment .*gptqmodel of the present recipe; make it with --install"):
        Client(GPTQMODEL, 1, tmp_path, tmp_path)
