import pytest

import llmqat


@pytest.fixture
def sweep(script):
    return script("perplexity.py", "--group-size 16 --samples 16 --max-steps 2 --window 32 --eval-tokens 512")


def test_points_are_measured_once_and_packed(sweep, monkeypatch):
    result, _ = sweep("--bits", "2", "4", "--methods", "rtn")
    assert [(p["bits"], p["method"], p["symmetric"]) for p in result["points"]] == [(2, "rtn", True), (4, "rtn", True)]
    assert result["points"][0]["perplexity"] != result["points"][1]["perplexity"]
    assert (result["tokens"]["eval"], result["tokens"]["calibration"]) == (512, 16 * 64)
    assert result["protocol"] == "windows of 32 without overlap, BOS stream"
    more, printed = sweep("--bits", "4", "--methods", "rtn", "gptq", "qat")
    assert more["points"][:2] == result["points"]
    assert [(p["method"], p["max_steps"]) for p in more["points"][2:]] == [("gptq", 0), ("qat", 2)]
    assert [line.split()[3] for line in printed.splitlines() if " sym " in line] == ["rtn", "gptq", "qat"]
    monkeypatch.setattr(llmqat, "prepare", None)  # nothing is measured again
    assert sweep("--bits", "4", "--methods", "gptq", "qat")[0] == more
    with pytest.raises(TypeError):
        sweep("--bits", "4", "--methods", "gptq", "--asym")
