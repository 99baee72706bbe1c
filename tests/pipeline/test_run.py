import copy
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llmqat.algorithms import activation_ranges
from llmqat.algorithms.blocks import BlockInputs
from llmqat.algorithms.gptq_model import GptqSettings
from llmqat.cli import main
from llmqat.config import from_yaml
from llmqat.errors import LlmqatError
from llmqat.formats import reader
from llmqat.formats import verify as verify_module
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import write_contents
from llmqat.metrics import perplexity
from llmqat.metrics.perplexity import evaluate
from llmqat.models.float_view import FloatCopy
from llmqat.models.loading import load_float
from llmqat.models.patcher import round_float_parts
from llmqat.nn.embedding import PackedEmbedding
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.kv_cache import kv_bits_of
from llmqat.nn.packed_linear import PackedLinear
from llmqat.pipeline import bits
from llmqat.pipeline import run as run_module
from llmqat.pipeline.inputs import tokenized
from llmqat.pipeline.output import check_output, saved_recipe
from llmqat.pipeline.run import run
from llmqat.report.names import public_recipe
from llmqat.train.loop import Trainer, fit


@pytest.fixture
def go(small_recipe, tmp_path):
    """``go(changes)``: run a small recipe to the end."""

    def make(changes=None, name="out", **kwargs):
        recipe = small_recipe(tmp_path / name, changes)
        measured = run(recipe, **kwargs)
        directory = tmp_path / name
        return SimpleNamespace(
            measured=measured,
            directory=directory,
            recipe=recipe,
            report=json.loads((directory / "report.json").read_text()),
        )

    return make


def comparable(report):
    """What does not depend on the clock, the machine or the place."""
    report = copy.deepcopy(report)
    for key in ("seconds", "peak_memory_bytes"):
        report["training"].pop(key)
    report["recipe"].pop("output")
    verify = report["verify"]
    for error, bound in [("max_logit_error", "bound"), ("decode_error", "decode_bound")]:
        # Which lanes torch adds in depends on where memory lies: the rounding of two runs differs in the last bits.
        verify[error] = verify[error] <= verify.pop(bound)
    return {key: value for key, value in report.items() if key not in ("environment", "throughput")}


def crash_after(monkeypatch, steps):
    original = Trainer.step

    def step(self, batches):
        if self.result.steps == steps:
            raise RuntimeError("power cut")
        return original(self, batches)

    monkeypatch.setattr(Trainer, "step", step)


def listing(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_codes_are_derived_and_the_file_is_loaded_once(go, monkeypatch):
    """Written, hashed, counted, drawn and proved: the same codes. Scored and proved: the same model."""
    derived, calls = FakeQuantLinear.codes, Counter()
    read, copied, written = reader.read_tensors, verify_module.dense_copy, []

    def codes(self, adapters=None):
        calls[self.name] += 1
        return derived(self, adapters)

    def begin(contents, *args):
        written.append(contents)
        return write_contents(contents, *args)

    monkeypatch.setattr(run_module, "round_float_parts", lambda model: (calls.clear(), round_float_parts(model)))
    monkeypatch.setattr(run_module, "write_contents", begin)
    monkeypatch.setattr(FakeQuantLinear, "codes", codes)
    monkeypatch.setattr(reader, "read_tensors", lambda directory: (calls.update(["load"]), read(directory))[1])
    monkeypatch.setattr(verify_module, "dense_copy", lambda *args: (calls.update([str(args[1])]), copied(*args))[1])
    done = go()
    assert calls == dict.fromkeys([*written[0].layers, "load", "torch.float32", "torch.float64"], 1)
    assert done.measured.verification.ok


def test_the_float_model_scores_the_windows_once(go, finished, tmp_path, monkeypatch):
    """In a whole run, and in one that is resumed."""
    windows, original, forwards = [], LlamaForCausalLM.forward, Counter()

    def forward(self, input_ids=None, **kwargs):
        if any(torch.equal(input_ids, batch) for batch in windows):
            layers = [m for m in self.modules() if isinstance(m, FakeQuantLinear | PackedLinear)]
            on_grid = any(getattr(layer, "enabled", True) for layer in layers)
            forwards["on the grid" if on_grid else "float"] += 1
        return original(self, input_ids, **kwargs)

    def remember(*args):
        inputs = tokenized(*args)
        windows[:] = inputs.test.ids.split(perplexity.BATCH_TOKENS // 32)
        return inputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(run_module, "tokenized", remember)
    go({"train.mode": "lora", "quant.lm_head_bits": 8})
    assert forwards == {"float": 1, "on the grid": 4}  # round to nearest, GPTQ, trained, packed
    forwards.clear()
    directory = shutil.copytree(finished, tmp_path / "copy")
    assert main(["finetune", "--output", str(directory), "--resume"]) == 0
    assert forwards == {"float": 1, "on the grid": 2}


@pytest.mark.parametrize("mode", ["full", "lora", "scales"])
def test_finetune(go, model_dir, mode):
    done = go({"train.mode": mode, "eval.repeats": 1, "eval.prompt": 8, "eval.new_tokens": 4})
    report = done.report
    assert report["verify"]["codes_equal"] is report["verify"]["scales_equal"] is True
    assert 0 < report["verify"]["max_logit_error"] <= report["verify"]["bound"] < 1e-3
    ppl = report["perplexity"]
    assert ppl["packed"] == pytest.approx(ppl["qat"], rel=1e-6)
    assert None not in (ppl["float"], ppl["rtn"], ppl["gptq"])
    assert ppl["float_finetuned"] is None
    assert len({ppl[row] for row in ("float", "rtn", "gptq")}) == 3
    best = min(ppl["rtn"], ppl["gptq"])
    if best > ppl["float"]:
        assert report["gap_recovered"] == pytest.approx((best - ppl["packed"]) / (best - ppl["float"]))
    assert report["tokens"] == {
        "train": 4 * 4 * 32,
        "calibration": 8 * 32,
        "eval": 512,
        "eval_sha256": done.measured.data.sha256,
    }
    assert report["training"]["steps"] == 4
    assert min(report["training"]["seconds"], report["training"]["peak_memory_bytes"]) > 0
    assert report["size"]["bits_per_weight"] == 4 + 16 / 32
    assert report["size"]["packed_bytes"] * 16 == report["size"]["float_bytes"] * 4.5
    assert report["coverage"]["skipped"] == [{"layer": "lm_head", "reason": "output head"}]
    assert report["throughput"]["kernel"]
    speeds = [
        row[key] for row in report["throughput"].values() if isinstance(row, dict) for key in row if key != "path"
    ]
    assert min(speeds) > 0
    assert "native" in report["throughput"]["packed"]["path"]
    saved = saved_recipe(done.directory)
    assert saved is not None
    assert (saved.model, saved.quant.group_size, saved.train.mode) == (str(model_dir), 32, mode)
    published = from_yaml(done.directory / "recipe.yaml")
    assert published == public_recipe(saved)
    assert published.to_dict() == report["recipe"]
    names = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "fingerprint.json", "checkpoint"}
    assert names <= {path.name for path in done.directory.iterdir()}
    assert (done.directory / "adapter" / "adapter_model.safetensors").exists() == (mode == "lora")
    assert verify(done.directory).ok
    # What it was compared with, and taught by, is the float model: nothing that preparing did has moved it.
    original = load_float(str(model_dir), torch.float32)
    assert ppl["float"] == pytest.approx(evaluate(original, done.measured.data).perplexity, rel=1e-6)
    packed = evaluate(load_packed(done.directory, torch.float32), done.measured.data, FloatCopy(original))
    assert report["kl_to_float"]["packed"] == pytest.approx(packed.kl_to_float, rel=1e-4)
    assert report["top1_agreement"]["packed"] == pytest.approx(packed.top1_agreement)


@pytest.mark.parametrize(
    "changes",
    [
        {"train.mode": "lora", "train.precision": "fp32", "init.method": "blockwise", "init.block_steps": 2},
        {"train.mode": "scales", "init.smooth": "auto", "quant.symmetric": False},
        {"train.mode": "full", "train.loss": "ce", "eval.control": True, "init.method": "rtn"},
        {
            "train.mode": "full",
            "quant.act_bits": 8,
            "quant.act_static": True,
            "quant.observer": "moving_average",
            "train.freeze_observers": 4,
        },
    ],
    ids=["lora-fp32-blockwise", "scales-smooth-asym", "ce-control-rtn", "static-activations"],
)
def test_resume_equals_the_uninterrupted_run(go, tmp_path, monkeypatch, changes):
    """Full mode without more to it: test_kill_points.py."""
    changes = {"train.max_steps": 5, **changes}
    whole = go(changes, "whole")
    with monkeypatch.context() as patch:
        # The float control trains first and to its end: it is not checkpointed, but what it measured is kept.
        if "eval.control" in changes:
            patch.setattr("llmqat.pipeline.run.Run.train_control", patched_control(patch))
        else:
            crash_after(patch, 3)
        with pytest.raises(RuntimeError, match="power cut"):
            go(changes, "cut")
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    with monkeypatch.context() as patch:
        if "eval.control" not in changes:  # what calibration found is saved
            patch.setattr(BlockInputs, "capture", None)
            patch.setattr(activation_ranges, "track", None)
        assert main(["finetune", "--output", str(tmp_path / "cut"), "--resume"]) == 0
    resumed = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert comparable(resumed) == comparable(whole.report)
    for name in ("model.safetensors", "config.json", "fingerprint.json", "details.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole.directory / name).read_bytes()
    if changes["train.mode"] == "lora":
        adapters = [load_file(d / "adapter" / "adapter_model.safetensors") for d in (whole.directory, tmp_path / "cut")]
        assert all(torch.equal(adapters[1][name], tensor) for name, tensor in adapters[0].items())


def test_a_state_is_not_put_on_what_another_machine_found(finished, tmp_path, monkeypatch, capsys):
    """The blocks of GPTQ go with the end of the run: a resume finds them again, here with another damping."""
    directory = shutil.copytree(finished, tmp_path / "copy")
    before = listing(directory)
    monkeypatch.setattr(run_module, "settings_of", lambda *args: GptqSettings(1.0, keep_float=args[2]))
    assert main(["finetune", "--output", str(directory), "--resume"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the prepared model is not the one that the training in" in error
    assert error.endswith("go on where it began, or start again with --overwrite")
    after = listing(directory)
    assert all(after[name] == before[name] for name in before if name != "checkpoint/inputs.json")  # where it lies


def patched_control(patch):
    """The real control, then a power cut in the third step of the real training."""
    from llmqat.pipeline.run import Run

    original = Run.train_control

    def train_control(self, train):
        row = original(self, train)
        crash_after(patch, 3)
        return row

    return train_control


def test_resume_continues_the_recipe_it_has(go, finished, tmp_path, capsys):
    directory = shutil.copytree(finished, tmp_path / "copy")
    before = listing(directory)
    assert main(["finetune", "--output", str(directory), "--resume", "--bits", "8"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "but quant.bits is 8 now and was 4; give the same options, or start again with --overwrite" in error
    assert listing(directory) == before


def test_a_step_may_be_cut_otherwise_but_not_grow(finished, tmp_path, capsys):
    directory = shutil.copytree(finished, tmp_path / "copy")
    before = listing(directory)
    assert main(["finetune", "--output", str(directory), "--resume", "--batch-size", "8"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a step took 4 sequences, and would take 8 now; the product of processes, --batch-size" in error
    assert listing(directory) == before
    assert main(["finetune", "--output", str(directory), "--resume", "--batch-size", "2", "--accumulation", "2"]) == 0
    assert (directory / "model.safetensors").read_bytes() == before["model.safetensors"]


def test_resume_of_a_finished_run_repeats_its_numbers(go, finished, tmp_path):
    directory = shutil.copytree(finished, tmp_path / "copy")
    report = json.loads((directory / "report.json").read_text())
    assert main(["finetune", "--output", str(directory), "--resume"]) == 0
    assert comparable(json.loads((directory / "report.json").read_text())) == comparable(report)
    assert (directory / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_published_run_is_not_resumed(finished, tmp_path, capsys):
    """Its recipe names model and dataset by their last parts."""
    directory = shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint"))
    before = listing(directory)
    assert main(["finetune", "--output", str(directory), "--resume"]) == 1
    assert "nothing in checkpoint/ to go on from; choose another" in capsys.readouterr().err.splitlines()[-1]
    assert listing(directory) == before


def test_nothing_to_resume_starts_from_the_beginning(go, capsys):
    done = go(resume=True)
    assert "nothing to resume: starting from the beginning" in capsys.readouterr().err
    assert done.report["training"]["steps"] == 4


@pytest.mark.parametrize("method", ["rtn", "gptq", "blockwise"])
def test_quantize(go, method, monkeypatch, capsys):
    monkeypatch.setattr("llmqat.models.architectures.check_blocks", lambda model: False)
    steps = {"init.block_steps": 2} if method == "blockwise" else {}
    done = go({"init.method": method, **steps, "quant.bits": 3}, train=False)
    ppl = done.report["perplexity"]
    assert ppl["packed"] == pytest.approx(ppl[method], rel=1e-3)  # packing rounds embeddings and norms to bfloat16
    assert ppl["qat"] is ppl["float_finetuned"] is done.report["gap_recovered"] is None
    assert [row for row in ("gptq", "blockwise") if ppl[row] is not None] == ([] if method == "rtn" else [method])
    assert set(done.report["training"].values()) == {None}
    assert done.report["tokens"]["train"] is None
    assert done.report["tokens"]["calibration"] == (0 if method == "rtn" else 8 * 32)
    assert verify(done.directory).ok
    assert not (done.directory / "checkpoint" / "checkpoint.pt").exists()
    # That nobody has seen them run one after the other is said where it matters.
    assert ("blocks found by looking" in capsys.readouterr().err) == (method != "rtn")


def test_quantize_resumes_gptq(go, tmp_path, monkeypatch):
    import llmqat.algorithms.gptq_model as gptq_model

    whole = go({"train.mode": "full"}, "whole", train=False)
    original = gptq_model.gptq_block

    def quantize_block(*args):
        if args[-1] == "block 1":
            raise RuntimeError("power cut")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gptq_model, "gptq_block", quantize_block)
        with pytest.raises(RuntimeError, match="power cut"):
            go({"train.mode": "full"}, "cut", train=False)
    blocks = []
    monkeypatch.setattr(gptq_model, "gptq_block", lambda *args: blocks.append(args[-1]) or original(*args))
    assert main(["quantize", "--output", str(tmp_path / "cut"), "--resume"]) == 0
    assert blocks == ["block 1"]
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (whole.directory / "model.safetensors").read_bytes()
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert comparable(report) == comparable(whole.report)


def test_quantize_does_not_resume_a_training_run(finished, tmp_path, capsys):
    directory = shutil.copytree(finished, tmp_path / "copy")
    before = listing(directory)
    assert main(["quantize", "--output", str(directory), "--resume"]) == 1
    assert "holds a training run; go on with llmqat finetune --resume" in capsys.readouterr().err.splitlines()[-1]
    assert listing(directory) == before


def test_asymmetric_with_integer_activations(go):
    done = go({"quant.symmetric": False, "quant.act_bits": 8, "init.smooth": 0.5, "quant.group_size": -1})
    ppl = done.report["perplexity"]
    assert ppl["packed"] == pytest.approx(ppl["qat"], rel=1e-3)  # a rounding of an activation may fall the other way
    assert done.report["verify"]["codes_equal"] is True
    config = json.loads((done.directory / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert config["input_activations"]["num_bits"] == 8
    assert (config["weights"]["symmetric"], config["weights"]["strategy"]) == (False, "channel")


def test_static_activations(go):
    done = go({"quant.act_bits": 8, "quant.act_static": True, "train.mode": "lora", "train.freeze_observers": 2})
    ppl = done.report["perplexity"]
    assert ppl["packed"] == pytest.approx(ppl["qat"], rel=1e-4)  # a rounding of an activation may fall the other way
    assert done.report["verify"]["max_logit_error"] <= done.report["verify"]["bound"]
    tensors = load_file(done.directory / "model.safetensors")
    scales = [tensor for name, tensor in tensors.items() if name.endswith(".input_scale")]
    assert len(scales) == 14
    assert all(scale.shape == (1,) and scale.dtype == torch.bfloat16 and scale > 0 for scale in scales)


def test_cross_entropy_with_control_and_another_text(go, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    changes = {"train.loss": "ce", "eval.control": True, "eval.also": str(other), "train.lr_float": 0.02}
    done = go({**changes, "train.max_steps": 8})
    ppl, there = done.report["perplexity"], done.report["also"]["other.txt"]
    assert {variant for variant, value in there["perplexity"].items() if value} == {
        *("float", "float_finetuned", "rtn", "gptq", "qat", "packed")
    }
    assert there["perplexity"]["packed"] == done.measured.perplexity["packed"].also[str(other)].perplexity
    assert there["sha256"] != done.report["tokens"]["eval_sha256"]
    assert there["perplexity"]["packed"] != ppl["packed"]
    assert "<h3>On other.txt, " in (done.directory / "report.html").read_text()
    assert ppl["float_finetuned"] < ppl["float"]  # random weights learn the text at once
    assert ppl["packed"] < ppl["gptq"]


def test_overrides(go):
    done = go({"quant.overrides": {"down_proj$": {"bits": 8}, "layers.0.*o_proj$": "float"}})
    skipped = {row["layer"]: row["reason"] for row in done.report["coverage"]["skipped"]}
    assert skipped == {"model.layers.0.self_attn.o_proj": "override", "lm_head": "output head"}
    assert done.report["verify"]["codes_equal"] is True
    assert 4.5 < done.report["size"]["bits_per_weight"] < 8.5
    AutoModelForCausalLM.from_pretrained(done.directory)


def test_bits_by_measurement(go, tmp_path, monkeypatch):
    """What was chosen is in the recipe; a resume measures nothing."""
    done = go({"quant.average_bits": 5.0, "train.mode": "scales", "quant.overrides": {"0.*o_proj$": "float"}})
    quant = done.report["recipe"]["quant"]
    assert (quant["average_bits"], quant["bits"], quant["overrides"].pop("0.*o_proj$")) == (None, 4, "float")
    assert {change["bits"] for change in quant["overrides"].values()} == {8}
    assert 4 < done.report["size"]["bits_per_weight"] - 0.5 <= 5.0  # a scale of 16 bits for 32 weights
    assert verify(done.directory).ok
    assert from_yaml(done.directory / "recipe.yaml").quant.overrides == done.report["recipe"]["quant"]["overrides"] | {
        "0.*o_proj$": "float"
    }
    monkeypatch.setattr(bits, "choose_bits", None)
    assert main(["finetune", "--output", str(done.directory), "--resume"]) == 0


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_quantized_head_and_cache(go, tied_dir, mode):
    """On a model with a tied head: one matrix in the file, trained, and distilled from the float one."""
    done = go(
        {
            "model": str(tied_dir),
            "quant.lm_head_bits": 8,
            "quant.kv_bits": 8,
            "train.mode": mode,
            "eval.repeats": 1,
            "eval.prompt": 8,
            "eval.new_tokens": 4,
        }
    )
    report = done.report
    assert report["verify"]["codes_equal"] is report["verify"]["scales_equal"] is True
    assert report["verify"]["max_logit_error"] <= report["verify"]["bound"]
    ppl = report["perplexity"]
    assert ppl["packed"] == pytest.approx(ppl["qat"], rel=1e-6)
    # Where no step beat the start, the two differ by the order in which the kernel sums.
    assert report["kl_to_float"]["packed"] <= report["kl_to_float"]["gptq"] * (1 + 1e-5) < 0.05
    assert report["coverage"]["skipped"] == []
    assert verify(done.directory).layers == 15
    loaded = load_packed(done.directory)
    assert isinstance(loaded.model.embed_tokens, PackedEmbedding)
    assert kv_bits_of(loaded) == 8
    original = load_float(str(tied_dir), torch.float32)
    assert ppl["float"] == pytest.approx(evaluate(original, done.measured.data).perplexity, rel=1e-6)
    if mode == "lora":
        names = load_file(done.directory / "adapter" / "adapter_model.safetensors")
        assert {name.rsplit(".", 2)[-2] for name in names} == {"lora_A", "lora_B"}


def test_output_guards(go, finished, small_recipe, tmp_path):
    with pytest.raises(
        LlmqatError, match="is not empty; choose another --output, go on with --resume, or add --overwrite"
    ):
        run(small_recipe(finished))
    (tmp_path / "file").write_text("")
    with pytest.raises(LlmqatError, match=r"output .*file is a file; choose a directory"):
        check_output(tmp_path / "file", True, True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", False, False)
    assert not list((tmp_path / "empty").iterdir())


def test_overwrite_starts_afresh(go, finished, tmp_path):
    directory = shutil.copytree(finished, tmp_path / "out")
    (directory / "notes.txt").write_text("mine")
    done = go({"quant.bits": 8, "train.mode": "full"}, overwrite=True)
    assert done.report["recipe"]["quant"]["bits"] == 8
    assert verify(directory).ok
    assert (directory / "notes.txt").read_text() == "mine"
    assert not (directory / "adapter").exists(), "an adapter of the earlier run does not belong to this model"


def changed(directory, name):
    """What a run reads, changed: its dataset, its calibration data, its weights, its tokenizer."""
    if name in ("data.txt", "calibration.txt"):
        path = directory / name
        path.write_text(path.read_text().replace("value", "eulav"))
    elif name == "weights":
        path = directory / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"][3] += 0.5
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path = directory / "model" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages }}"}))


CHANGED = {
    "data.txt": "test tokens",
    "calibration.txt": "calibration tokens",
    "weights": "float weights",
    "tokenizer": "rules of the tokenizer",
}


def test_changed_inputs_are_not_resumed(go, model_dir, text_file, tmp_path):
    """Each of them on its own, the others as the run had them."""

    def put_inputs():
        shutil.copytree(model_dir, tmp_path / "model", dirs_exist_ok=True)
        for text in ("data.txt", "calibration.txt"):
            shutil.copy(text_file, tmp_path / text)

    put_inputs()
    changes = {"model": str(tmp_path / "model"), "data.dataset": str(tmp_path / "data.txt")}
    changes |= {"data.calibration": str(tmp_path / "calibration.txt")}
    done = go(changes, train=False)
    before = listing(done.directory)
    for name, what in CHANGED.items():
        put_inputs()
        changed(tmp_path, name)
        message = f"the {what} are not those that the run in .* began with; give it the same"
        with pytest.raises(LlmqatError, match=message):
            go(changes, train=False, resume=True)
        assert listing(done.directory) == before, name


@pytest.mark.parametrize("name", ["checkpoint.pt", "measured.json", "inputs.json"])
def test_what_a_resume_reads_is_checked(finished, tmp_path, capsys, name):
    """A flipped bit, a truncated and a missing file: one line, and nothing is touched."""
    directory = shutil.copytree(finished, tmp_path / "copy")
    path, whole = directory / "checkpoint" / name, (finished / "checkpoint" / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1 << 2
    for content in (bytes(flipped), whole[: len(whole) // 2], b"", None):
        if content is None:
            path.unlink()
            if name == "checkpoint.pt":
                break  # as a run that was killed before training
        else:
            path.write_bytes(content)
        before = listing(directory)
        assert main(["finetune", "--output", str(directory), "--resume"]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "start again with --overwrite" in error, error
        assert "unexpected" not in error
        assert listing(directory) == before


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_model_stays_in_its_stored_dtype(go, tied_dir, monkeypatch, mode):
    """Half the bytes or less; the same numbers and the same file, to the bit, as of one that is float32 throughout."""
    done, dtypes = {}, {}

    def train(model, teacher=None, **kwargs):
        large = ("_proj.weight", "base_layer.weight", "embed_tokens.weight")
        dtypes[name] = {p.dtype for n, p in teacher.model.named_parameters() if n.endswith(large)}
        return fit(model, teacher=teacher, **kwargs)

    monkeypatch.setattr(run_module, "fit", train)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_as_stored", lambda model: load_float(model, torch.float32))
        patch.setattr(run_module, "compute_in_float32", lambda *_: None)
        name = "before"
        done[name] = go({"model": str(tied_dir), "train.mode": mode, "train.max_steps": 2}, name)
    name = "out"
    done[name] = go({"model": str(tied_dir), "train.mode": mode, "train.max_steps": 2}, name)
    assert dtypes == {"before": {torch.float32}, "out": {torch.bfloat16}}
    before, after = (comparable(done[name].report) for name in done)
    assert before == after
    files = [(done[name].directory / "model.safetensors").read_bytes() for name in done]
    assert files[0] == files[1]
