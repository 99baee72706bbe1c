"""Quantizing block by block: the bytes of the ordinary way, in a fraction of the memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmqat.errors import LlmqatError
from llmqat.formats import fingerprint
from llmqat.formats.partial import PartialModel
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.pipeline.low_memory import quantize_by_block
from llmqat.pipeline.run import run

SIZES = {"llama": {"num_hidden_layers": 12}, "gemma3_text": {"layer_types": None}}


def tensors(directory):
    return {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.fixture
def saved(tiny, tokenizer, tmp_path):
    """``saved(model_type)``: a float model on disk in bfloat16, in shards of a few layers."""

    def make(model_type, **overrides):
        directory = tmp_path / model_type
        model = tiny(model_type, vocab_size=258, **overrides).to(torch.bfloat16)
        model.save_pretrained(directory, max_shard_size="60KB")
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.mark.parametrize("init", ["rtn", "gptq"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "opt"])
def test_same_bytes_as_the_ordinary_way(saved, small_recipe, tmp_path, model_type, init):
    """Also with more than ten blocks, shards that split a block, tied embeddings, and Conv1D."""
    changes = {"model": str(saved(model_type, **SIZES.get(model_type, {})))}
    changes |= {"init.method": init, "quant.group_size": 16, "init.samples": 4}
    run(small_recipe(tmp_path / "ordinary", changes), train=False)
    report = quantize_by_block(small_recipe(tmp_path / "streamed", changes))
    assert len(report.errors) == (len(report.quantized) if init == "gptq" else 0)
    expected, got = tensors(tmp_path / "ordinary"), tensors(tmp_path / "streamed")
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    for name in ("config.json", "recipe.yaml", "generation_config.json", "tokenizer.json"):
        ordinary, streamed = ((tmp_path / side / name).read_text() for side in ("ordinary", "streamed"))
        assert streamed == ordinary.replace("output: ordinary", "output: streamed"), name
    one, other = (fingerprint.read(tmp_path / side) for side in ("ordinary", "streamed"))
    assert (one.layers, one.tensors) == (other.layers, other.tensors)
    shards = 13 if model_type == "llama" else 3
    assert len(list((tmp_path / "streamed").glob(f"model-*-of-{shards:05}.safetensors"))) == shards
    assert verify(tmp_path / "streamed").ok
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / side) for side in ("ordinary", "streamed"))
        assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


# In a process of its own, which quantizes one block first: what libraries and their buffers take is not counted.
LIMITED = """
import json, resource, sys
from llmqat.algorithms import gptq
from llmqat.cli.entry import quiet_libraries
from llmqat.config import Recipe
from llmqat.pipeline.run import run
from llmqat.pipeline.low_memory import quantize_by_block
quiet_libraries()
gptq.SHRINK_GRID = gptq.SHRINK_GRID[:1]  # one scale instead of 24: less time, the same memory
values = json.loads(sys.argv[1])
small, large, allowed = (values.pop(key) for key in ("small", "large", "allowed"))
quantize_by_block(Recipe().with_values({**values, "model": small}))
data = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + allowed,) * 2)
recipe = Recipe().with_values({**values, "model": large})
run(recipe, train=False, overwrite=True) if sys.argv[2] == "ordinary" else quantize_by_block(recipe, overwrite=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer):
    """Directories of a model of one block and of 24 such blocks, and the bytes of the latter's float32 weights."""
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 3}
    directories = []
    for blocks in (1, 24):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=blocks, vocab_size=258))
        directories.append(tmp_path_factory.mktemp("large"))
        model.save_pretrained(directories[-1], max_shard_size="5MB")
        tokenizer.save_pretrained(directories[-1])
    return *directories, 4 * model.num_parameters()


@pytest.mark.parametrize("way", ["low memory", "ordinary"])
def test_a_model_of_three_times_the_memory(tmp_path, text_file, large, way):
    """A third of the float model's bytes is all that the process may take beyond what it has; the ordinary way fails.

    The limit is RLIMIT_DATA: every private writable page, the safetensors' mappings included, whether it was touched or
    not. RLIMIT_AS would count torch's libraries as well, which depend on the machine. glibc gives tensors of 32 MB and
    more back to the system once they are freed; the variable makes it so for the small ones of this model too.
    """
    small_directory, large_directory, size = large
    values = {"small": str(small_directory), "large": str(large_directory), "allowed": size // 3}
    values |= {"output": str(tmp_path / "out"), "data.dataset": str(text_file), "init.samples": 8, "data.length": 32}
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(values), way],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    if way == "ordinary":
        assert process.returncode != 0
        assert re.search("allocate memory|Cannot allocate", process.stderr), process.stderr
    else:
        assert process.returncode == 0, process.stderr
        assert verify(tmp_path / "out", logits=False).layers == 24 * 7


def test_lost_and_damaged_weights(saved):
    directory = saved("llama")
    source = PartialModel(str(directory), torch.device("cpu"))
    index = directory / "model.safetensors.index.json"
    weights = json.loads(index.read_text())
    first = directory / weights["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    tensors = load_file(first)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, first)
    source = PartialModel(str(directory), torch.device("cpu"))
    source.read("model.layers.0.")
    with pytest.raises(
        LlmqatError, match=r"they lack model\.layers\.1\.mlp\.up_proj\.weight; copy or download it again"
    ):
        source.read("model.layers.1.")
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(LlmqatError, match=rf"{first.name}: .*; copy or download the model again"):
        PartialModel(str(directory), torch.device("cpu"))


def test_weights_damaged_after_they_were_opened(saved):
    directory = saved("llama")
    source = PartialModel(str(directory), torch.device("cpu"))
    path = source.file_of["model.layers.1.mlp.up_proj.weight"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LlmqatError, match=rf"{path.name} is damaged \(.*\); copy or download the model again"):
        source.read("model.layers.1.")


def test_weights_of_another_format(saved):
    directory = saved("llama")
    for path in directory.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(LlmqatError, match=r"has no safetensors, .* write it again with save_pretrained"):
        PartialModel(str(directory), torch.device("cpu"))


def test_smoothing_needs_the_whole_model(small_recipe, tmp_path):
    with pytest.raises(LlmqatError, match="leave out --smooth, or --low-memory"):
        quantize_by_block(small_recipe(tmp_path / "out", {"init.smooth": 0.5}))


def test_static_activations_need_the_whole_model(small_recipe, tmp_path):
    with pytest.raises(LlmqatError, match="leave out --act-static, or --low-memory"):
        quantize_by_block(small_recipe(tmp_path / "out", {"quant.act_bits": 8, "quant.act_static": True}))


@pytest.mark.parametrize("change", [{"quant.lm_head_bits": 8}, {"quant.kv_bits": 8}])
def test_more_than_the_blocks(small_recipe, tmp_path, change):
    with pytest.raises(LlmqatError, match="quantizes the blocks alone: leave it out, or --lm-head-bits and --kv-bits"):
        quantize_by_block(small_recipe(tmp_path / "out", change))


def test_fused_experts(tiny_moe, small_recipe, tmp_path):
    tiny_moe("mixtral").save_pretrained(tmp_path / "moe")
    with pytest.raises(LlmqatError, match="does not know how to split fused experts yet: leave it out"):
        quantize_by_block(small_recipe(tmp_path / "out", {"model": str(tmp_path / "moe")}))


def test_low_memory_on_the_command_line(call, model_dir, text_file, quantize_flags, tmp_path, capsys):
    flags = ["quantize", "--model", model_dir, "--dataset", text_file, *quantize_flags, "--low-memory"]
    assert call([*flags, "--output", tmp_path / "out", "--group-size", "32"]) == 0
    assert "GPTQ: output error" in capsys.readouterr().err
    assert call(["verify", tmp_path / "out"]) == 0
    assert call([*flags, "--output", tmp_path / "out"]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_nothing_of_an_earlier_model_stays(saved, small_recipe, tmp_path):
    """transformers takes model.safetensors where there is one, llmqat the index: both must load the same model."""
    changes = {"model": str(saved("llama")), "quant.group_size": 16, "init.method": "rtn"}
    out = tmp_path / "out"
    run(small_recipe(out, {**changes, "train.mode": "lora"}))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(LlmqatError, match="is not empty"):
        quantize_by_block(small_recipe(out, changes))
    quantize_by_block(small_recipe(out, {**changes, "quant.bits": 8}), overwrite=True)
    names = {path.name for path in out.iterdir()}
    assert not names & {"model.safetensors", "report.json", "report.html", "details.json", "README.md", "checkpoint"}
    assert "adapter" not in names
    assert (out / "notes.txt").read_text() == "mine"
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        ours = load_packed(out, torch.float32)(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 0.05 * ours.abs().max()  # transformers dequantizes in bfloat16


def test_the_same_calibration_data(saved, small_recipe, text_file, tmp_path):
    """Also from a dataset of its own, and for a recipe that trains on more text than calibration looks at."""
    calibration = tmp_path / "other.txt"
    calibration.write_text(text_file.read_text()[::-1])
    changes = {"model": str(saved("llama")), "quant.group_size": 16, "init.samples": 4}
    changes |= {"data.calibration": str(calibration), "train.max_steps": 1_000_000}
    run(small_recipe(tmp_path / "ordinary", changes), train=False)
    quantize_by_block(small_recipe(tmp_path / "streamed", changes))
    expected, got = tensors(tmp_path / "ordinary"), tensors(tmp_path / "streamed")
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_one_process(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        LlmqatError, match="--low-memory runs in one process, and there are 2; start it without launcher"
    ):
        quantize_by_block(small_recipe(tmp_path / "out"))
