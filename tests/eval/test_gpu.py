"""eval/gpu.py runs to its end; here on the CPU, where torch stands in for the kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

EVAL = Path(__file__).resolve().parents[2] / "eval"


def test_every_section_has_results(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "gpu.py", "--tiny", "--device", "cpu", "--output", str(output)]
    path = os.pathsep.join([str(EVAL.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, cwd=EVAL, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True)
    sections = json.loads(output.read_text())["sections"]
    assert set(sections) == {"copy", "bits", "fake_quant", "packed", "step", "gptq", "losses", "demo"}
    assert not [name for name, found in sections.items() if "error" in found]
    grids = [found for found in sections["bits"].values() if isinstance(found, dict)]
    assert len(grids) == 5
    assert all(found["codes"] == found["w_hat"] == 0 < found["of"] for found in grids)
