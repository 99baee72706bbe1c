import pytest

import llmqat


@pytest.fixture
def compare(script):
    options = "--group-size 16 --bits 3 --samples 16 --length 32 --steps 2 --window 32 --eval-tokens 512"
    return script("post_training.py", options)


def test_rows_are_measured_once(compare, text_file, monkeypatch):
    first, _ = compare("--methods", "rtn")
    result, printed = compare("--methods", "rtn", "gptq", "blockwise")
    assert result["rows"]["rtn"] == first["rows"]["rtn"]
    kl = {method: row[str(text_file)]["kl"] for method, row in result["rows"].items()}
    assert 0 < max(kl["gptq"], kl["blockwise"]) < kl["rtn"]
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["rtn", "gptq", "blockwise"]
    monkeypatch.setattr(llmqat, "prepare", None)  # nothing is measured again
    assert compare("--methods", "gptq", "blockwise")[0] == result


def test_blocks_behind_the_first_stay_float(compare, text_file):
    (whole, _), (part, _) = compare("--methods", "rtn"), compare("--methods", "rtn", "--blocks", "1")
    kl = [rows["rows"]["rtn"][str(text_file)]["kl"] for rows in (whole, part)]
    assert 0 < kl[1] < kl[0]


def test_bits_are_chosen_by_layer(compare, text_file):
    (whole, _), (chosen, _) = compare("--methods", "rtn"), compare("--methods", "rtn", "--average-bits", "3.5")
    kl = [rows["rows"]["rtn"][str(text_file)]["kl"] for rows in (whole, chosen)]
    assert 0 < kl[1] < kl[0]
