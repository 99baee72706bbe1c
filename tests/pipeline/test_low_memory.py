"""Runs with one block of the model in memory at a time: the bytes of the ordinary way, in a fraction of the memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.errors import LlmqatError
from llmqat.files import PARTIAL
from llmqat.formats import fingerprint
from llmqat.mapped import is_mapped
from llmqat.pipeline import run as run_module
from llmqat.pipeline.run import run
from llmqat.train.loop import Trainer

# Few tokens to decode in the proof.
EXPERTS = {"qwen3_moe": {"num_experts": 3}, "gpt_oss": {"num_local_experts": 3}}
FEW, SHORT = {"max_position_embeddings": 12}, {"data.length": 8, "eval.window": 8}
ALL = {"quant.lm_head_bits": 4, "quant.kv_bits": 8, "quant.act_bits": 8, "quant.act_static": True}


def tensors(directory):
    return {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}


def check_same_bytes(ordinary, streamed):
    expected, got = tensors(ordinary), tensors(streamed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    one, other = fingerprint.read(ordinary), fingerprint.read(streamed)
    assert (one.layers, one.tensors) == (other.layers, other.tensors)
    assert not list(streamed.rglob(f"{PARTIAL}*"))


@pytest.fixture
def saved(tiny, tiny_moe, tokenizer, tmp_path):
    """``saved(model_type)``: a float model on disk in bfloat16, in shards of a few layers."""

    def make(model_type):
        directory = tmp_path / model_type
        make_tiny = tiny_moe if model_type in EXPERTS else tiny
        model = make_tiny(model_type, vocab_size=258, **FEW, **EXPERTS.get(model_type, {}))
        model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="60KB")
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.mark.parametrize(
    ("model_type", "changes", "train"),
    [
        ("llama", {"train.mode": "lora", "init.method": "gptq", **ALL}, True),
        ("gemma3_text", {"train.mode": "scales", "init.method": "rtn"}, True),
        ("gpt2", {"train.mode": "lora", "init.method": "blockwise", "init.block_steps": 2}, True),
        ("gpt_oss", {"init.method": "gptq"}, False),
        ("qwen3_moe", {"train.mode": "lora", "init.method": "gptq"}, True),
    ],
)
def test_same_bytes_as_the_ordinary_way(saved, small_recipe, tmp_path, model_type, changes, train):
    """Also with shards that split a block, tied embeddings, Conv1D, and experts that files hold apart or together, with
    biases; and the same scores and losses."""
    changes = {"model": str(saved(model_type)), "quant.group_size": 16, "init.samples": 4, **SHORT, **changes}
    expected = run(small_recipe(tmp_path / "ordinary", changes), train=train)
    streamed = run(small_recipe(tmp_path / "streamed", {**changes, "low_memory": True}), train=train)
    check_same_bytes(tmp_path / "ordinary", tmp_path / "streamed")
    assert streamed.verification.ok
    assert streamed.coverage.errors == expected.coverage.errors
    for variant, score in expected.perplexity.items():
        assert streamed.perplexity[variant].perplexity == score.perplexity, variant
    if train:
        assert streamed.training.losses == expected.training.losses
        assert streamed.training.flipped == expected.training.flipped


def test_what_a_run_adds_for_each_weight_is_on_the_disk(saved, small_recipe, tmp_path, monkeypatch):
    changes = {"model": str(saved("llama")), "quant.group_size": 16, "init.samples": 4, **SHORT, "low_memory": True}
    found = {}

    def look(contents, *arguments, write=run_module.write_contents):
        layers = [layer for layer in contents.model.modules() if hasattr(layer, "compensation_multiples")]
        found["weights"] = [layer.weight for layer in layers]
        found["changes"] = [layer.compensation_multiples for layer in layers]
        found["packed"] = [layer.weight_packed for layer in contents.layers.values()]
        write(contents, *arguments)

    monkeypatch.setattr(run_module, "write_contents", look)
    monkeypatch.setattr(
        Trainer, "save", lambda self, save=Trainer.save: found.update(first=self.first_codes.packed) or save(self)
    )
    run(small_recipe(tmp_path / "out", changes))
    found["first"] = list(found["first"].values())
    assert [len(values) for values in found.values()] == [14] * 4
    assert all(is_mapped(tensor) for values in found.values() for tensor in values)


def test_an_ordinary_run_goes_on_with_less_memory(saved, small_recipe, tmp_path, monkeypatch):
    """Where it ran out of memory in training, from GPTQ's blocks and the last checkpoint; to the same bytes."""
    changes = {"model": str(saved("llama")), "quant.group_size": 16, "init.samples": 4, **SHORT, "train.mode": "lora"}
    run(small_recipe(tmp_path / "ordinary", changes))

    def stop(self, batches, step=Trainer.step):
        if self.result.steps == 3:
            raise MemoryError
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop)
        with pytest.raises(MemoryError):
            run(small_recipe(tmp_path / "out", changes))
    monkeypatch.setattr(run_module, "observe_activations", lambda *_: None)  # nothing is calibrated again
    run(small_recipe(tmp_path / "out", {**changes, "low_memory": True}), resume=True)
    check_same_bytes(tmp_path / "ordinary", tmp_path / "out")


# In a process of its own, which runs one block first: what libraries and their buffers take is not counted.
LIMITED = """
import json, resource, sys
from llmqat.cli.entry import quiet_libraries
from llmqat.config import Recipe
from llmqat.pipeline.run import run
quiet_libraries()
values = json.loads(sys.argv[1])
small, large, allowed = (values.pop(key) for key in ("small", "large", "allowed"))
run(Recipe().with_values({**values, "model": small, "low_memory": True}))
data = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + allowed,) * 2)
run(Recipe().with_values({**values, "model": large}), overwrite=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer):
    """Directories of a model of one block and of 12 such blocks, and the bytes of the latter's float32 weights."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes["max_position_embeddings"] = 8  # few tokens to decode in the proof
    directories = []
    for blocks in (1, 12):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=blocks, vocab_size=258))
        directories.append(tmp_path_factory.mktemp("large"))
        model.save_pretrained(directories[-1])
        tokenizer.save_pretrained(directories[-1])
    return *directories, 4 * model.num_parameters()


@pytest.mark.parametrize("way", ["low memory", "ordinary"])
def test_a_model_of_three_times_the_memory(tmp_path, text_file, large, way):
    """A third of the float model's bytes is all that the process may take beyond what it has; the ordinary way fails.

    The limit is RLIMIT_DATA: every private writable page, whether it was touched or not; weights that stay in their
    files are mapped read-only. RLIMIT_AS would count torch's libraries as well, which depend on the machine. glibc
    gives tensors of 32 MB and more back to the system once they are freed; the variable makes it so for small ones.
    """
    small_directory, large_directory, size = large
    values = {"small": str(small_directory), "large": str(large_directory), "allowed": size // 3}
    values |= {"output": str(tmp_path / "out"), "data.dataset": str(text_file), "init.method": "rtn"}
    values |= {"train.mode": "lora", "train.lora_r": 2, "train.max_steps": 1, "train.batch_size": 1, "data.length": 8}
    values |= {"eval.window": 8, "eval.tokens": 16, "eval.validation_tokens": 8, "low_memory": way == "low memory"}
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(values)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    if way == "ordinary":
        assert process.returncode != 0
        assert re.search("allocate memory|Cannot allocate|MemoryError", process.stderr), process.stderr
    else:
        assert process.returncode == 0, process.stderr
        verified = json.loads((tmp_path / "out" / "report.json").read_text())["verify"]
        assert verified["codes_equal"] is verified["scales_equal"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.mode": "full"}, "leaves the weights in their files: train --train lora or scales, not full"),
        ({"quant.average_bits": 4.5}, "--average-bits takes gradients through all of the float model: leave out --low"),
        ({"init.smooth": 0.5}, "SmoothQuant changes all weights of the float model: leave out --smooth, or --low-mem"),
        ({"eval.control": True}, "--control trains a copy of the float model in memory: leave it out, or --low-memory"),
    ],
)
def test_what_needs_all_weights_in_memory_is_refused_first(small_recipe, tmp_path, changes, message):
    changes = {"model": "no/such-model", "low_memory": True, **changes}
    with pytest.raises(LlmqatError, match=message):
        run(small_recipe(tmp_path / "out", changes))


def test_one_process(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("llmqat.pipeline.refusals.process_count", lambda: 2)
    with pytest.raises(
        LlmqatError, match="--low-memory runs in one process, and there are 2; start it without launcher"
    ):
        run(small_recipe(tmp_path / "out", {"low_memory": True}))


def test_low_memory_on_the_command_line(call, model_dir, text_file, quantize_flags, tmp_path, capsys):
    flags = ["quantize", "--model", model_dir, "--dataset", text_file, *quantize_flags, "--low-memory"]
    assert call([*flags, "--output", tmp_path / "out", "--group-size", "32"]) == 0
    assert "GPTQ: output error" in capsys.readouterr().err
    assert call(["verify", tmp_path / "out"]) == 0
    assert call([*flags, "--output", tmp_path / "out"]) == 1
    assert "is not empty" in capsys.readouterr().err
