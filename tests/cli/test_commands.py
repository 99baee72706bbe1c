import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from llmqat import __version__
from llmqat.cli import commands
from llmqat.cli.commands import COMMANDS
from llmqat.cli.recipes import bundled_recipes, bundled_scripts, find_recipe
from llmqat.config import Recipe
from llmqat.kernels import native
from llmqat.report.plan import inspect


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command, capsys, call):
    assert call([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^  llmqat {command}\b", text, re.MULTILINE)
    assert "--debug" in text
    assert max(map(len, text.splitlines())) <= 120


def test_top_help_and_version(capsys, call):
    assert call(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert call(["--version"]) == 0
    assert capsys.readouterr().out == f"llmqat {__version__}\n"


def table(text):
    """``name   value`` lines as a dict."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines())


def test_finetune_with_every_kind_of_flag(model_dir, text_file, tmp_path, call, small_flags):
    flags = "--bits 3 --asym --group-size 32 --act-bits 8 --clip-mask --train lora --loss ce --init rtn --smooth 0.5"
    flags += " --act-static --scale-dtype float16 --observer percentile --freeze-observers 1 --lr-scale 0.01 --lora-r 2"
    extra = ["--override", "down_proj$:bits=8,group_size=-1", "--override", "layers.0.*o_proj$:float"]
    argv = [
        "finetune",
        "--model",
        model_dir,
        "--dataset",
        text_file,
        "--output",
        tmp_path,
        *small_flags,
        *flags.split(),
        *extra,
    ]
    assert call(argv) == 0
    recipe = json.loads((tmp_path / "report.json").read_text())["recipe"]
    chosen = {
        "bits": 3,
        "group_size": 32,
        "symmetric": False,
        "act_bits": 8,
        "act_static": True,
        "observer": "percentile",
        "scale_dtype": "float16",
        "lm_head_bits": None,
        "kv_bits": None,
        "overrides": {"down_proj$": {"bits": 8, "group_size": -1}, "layers.0.*o_proj$": "float"},
        "clip_mask": True,
    }
    assert {key: recipe["quant"][key] for key in chosen} == chosen
    assert (recipe["train"]["mode"], recipe["train"]["loss"], recipe["init"]["smooth"]) == ("lora", "ce", 0.5)


def test_flags_win_over_the_recipe(model_dir, text_file, tmp_path, call, quantize_flags):
    (tmp_path / "r.yaml").write_text("quant:\n  bits: 8\n  overrides: {o_proj$: float}\ninit:\n  method: rtn\n")
    argv = ["quantize", "--model", model_dir, "--dataset", text_file, "--output", tmp_path / "out", *quantize_flags]
    assert call([*argv, "--recipe", tmp_path / "r.yaml", "--bits", "4", "--override", "q_proj$:bits=8"]) == 0
    recipe = json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]
    assert (recipe["quant"]["bits"], recipe["init"]["method"]) == (4, "rtn")
    assert recipe["quant"]["overrides"] == {"o_proj$": "float", "q_proj$": {"bits": 8}}


def test_quantize_says_what_of_a_recipe_it_does_not_do(tmp_path, call, capsys):
    (tmp_path / "r.yaml").write_text("train: {lr: 0.1}\n")
    assert call(["quantize", "--recipe", tmp_path / "r.yaml", "--dataset", "none.txt", "--output", tmp_path / "o"]) == 1
    assert (
        f"quantize does not train: the train section of {tmp_path / 'r.yaml'} says nothing" in capsys.readouterr().err
    )


def test_eval(finished, model_dir, text_file, tmp_path, capsys, call):
    argv = ["eval", finished, "--dataset", text_file, "--window", "32", "--eval-tokens", "512"]
    assert call([*argv, "--against", model_dir, "--throughput", "--json", tmp_path / "e.json"]) == 0
    shown = table(capsys.readouterr().out)
    report = json.loads((finished / "report.json").read_text())
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert numbers["perplexity"] == pytest.approx(report["perplexity"]["packed"], rel=1e-6)
    assert numbers["kl_to_float"] == pytest.approx(report["kl_to_float"]["packed"], rel=1e-3)
    assert numbers["sha256"] == shown["sha256"] == report["tokens"]["eval_sha256"]
    assert float(shown["perplexity"]) == pytest.approx(numbers["perplexity"], rel=1e-5)
    assert min(numbers["prefill_tok_s"], numbers["decode_tok_s"]) > 0
    assert call(["eval", model_dir, *argv[2:]]) == 0
    float_shown = table(capsys.readouterr().out)
    assert float(float_shown["perplexity"]) == pytest.approx(report["perplexity"]["float"], rel=1e-5)
    assert "kl_to_float" not in float_shown
    assert call([*argv, "--activations", "int8"]) == 0
    chosen = table(capsys.readouterr().out)
    assert chosen["activations"] == "int8, not as trained"
    assert 0 < float(chosen["kl_to_trained"]) < 0.1
    assert call(["eval", model_dir, *argv[2:], "--activations", "int8"]) == 1
    assert "--activations int8 is for packed models" in capsys.readouterr().err
    assert call([*argv[:-1], "1"]) == 1
    assert "--eval-tokens must be at least 2, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(("bos", "rule"), [([], "window"), (["--bos", "stream"], "stream")])
def test_eval_opens_every_window_of_a_gemma(tiny, tokenizer, text_file, tmp_path, call, bos, rule):
    tiny("gemma3_text", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    flags = ["--dataset", text_file, "--window", 16, "--eval-tokens", 64, "--json", tmp_path / "e.json", *bos]
    assert call(["eval", tmp_path / "gemma", *flags]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["bos"] == rule


def test_verify(finished, tmp_path, capsys, call):
    assert call(["verify", finished]) == 0
    shown = table(capsys.readouterr().out)
    assert (shown["layers"], shown["codes equal"], shown["scales equal"]) == ("14", "True", "True")
    assert float(shown["max logit error"]) <= float(shown["bound"])
    assert call(["verify", finished, "--no-logits"]) == 0
    assert "bound" not in capsys.readouterr().out
    broken = shutil.copytree(finished, tmp_path / "broken")
    weights = bytearray((broken / "model.safetensors").read_bytes())
    header = int.from_bytes(weights[:8], "little")
    start = json.loads(weights[8 : 8 + header])["model.layers.0.mlp.up_proj.weight_packed"]["data_offsets"][0]
    weights[8 + header + start] ^= 1
    (broken / "model.safetensors").write_bytes(weights)
    assert call(["verify", broken, "--no-logits"]) == 1
    message = r"is not what was trained: model\.layers\.0\.mlp\.up_proj, .*model\.safetensors; copy it again, or write"
    assert re.search(message, capsys.readouterr().err)


def test_generate(finished, model_dir, capsys, call):
    for model in (finished, model_dir):
        assert call(["generate", model, "--prompt", "def x", "--max-new-tokens", "5"]) == 0
        assert capsys.readouterr().out.startswith("def x")
    alone = {}
    for prompt in ("def x", "import os, sys"):
        options = ["--prompt", prompt, "--max-new-tokens", "5", "--dtype", "float32"]
        assert call(["generate", finished, *options]) == 0
        alone[prompt] = capsys.readouterr().out
    options = [word for prompt in alone for word in ("--prompt", prompt)]
    assert call(["generate", finished, *options, "--max-new-tokens", "5", "--dtype", "float32"]) == 0
    first, second = alone.values()
    assert capsys.readouterr().out == f"--- 1 of 2\n{first}--- 2 of 2\n{second}"
    outputs = set()
    for _ in range(3):
        assert call(["generate", finished, "--prompt", "def x", "--max-new-tokens", "8", "--temperature", "1.5"]) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) > 1


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_generate_computes_in_the_dtype_asked_for(dtype, finished, model_dir, call, monkeypatch):
    seen, plain = [], LlamaForCausalLM.generate

    def generate(self, *args, **options):
        seen.append(self.dtype)
        return plain(self, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    for model in (finished, model_dir):
        assert call(["generate", model, "--prompt", "def x", "--max-new-tokens", "2", "--dtype", dtype]) == 0
    assert seen == [torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)] * 2


def test_generate_in_float32_is_that_of_the_reference(finished, call, capsys, monkeypatch):
    texts = []
    for kernels in ("", "reference"):
        monkeypatch.setenv("LLMQAT_KERNELS", kernels)
        native.library.cache_clear()
        assert call(["generate", finished, "--prompt", "def x", "--max-new-tokens", "50", "--dtype", "float32"]) == 0
        texts.append(capsys.readouterr().out)
    native.library.cache_clear()
    assert texts[0] == texts[1]


def test_inspect(model_dir, finished, capsys, call):
    assert call(["inspect", "--model", model_dir, "--override", "down_proj$:float", "--train", "lora"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"layers\.1\.mlp\.down_proj +64 x 96 +float: override", text)
    assert re.search(r"layers\.1\.self_attn\.q_proj +64 x 64 +W4A16 g\d+ symmetric", text)
    assert "output head tied to the embedding: no" in text
    assert "model family known" in text
    assert "predicted memory for --train lora" in text
    assert call(["inspect", "--model", model_dir]) == 0
    predicted = float(re.search(r"predicted file: ([\d.]+) MB", capsys.readouterr().out)[1])
    assert predicted == pytest.approx((finished / "model.safetensors").stat().st_size / 1e6, rel=0.1)
    assert call(["inspect", "--model", model_dir, "--group-size", "48"]) == 1
    assert "does not divide 12 layers" in capsys.readouterr().err


def test_head_and_cache(tied_dir, text_file, tmp_path, capsys, call, quantize_flags):
    """Planned by inspect, done by quantize, run by generate."""
    grid = ["--model", tied_dir, "--lm-head-bits", "8", "--kv-bits", "8"]
    assert call(["inspect", *grid]) == 0
    text = capsys.readouterr().out
    assert re.search(r"lm_head +258 x 64 +W8A16 g32 symmetric", text)
    assert "of these, lm_head: W8A16 g32 symmetric (output head, tied to the embedding)" in text
    assert "key-value cache: int8, a scale per token and head" in text
    assert "packed as compressed-tensors: llmqat reads it; transformers does not" in text
    plan = inspect(Recipe().with_values({"model": str(tied_dir), "quant.lm_head_bits": 8}))
    out = tmp_path / "out"
    assert call(["quantize", *grid, "--dataset", text_file, *quantize_flags, "--output", out]) == 0
    tensors = load_file(out / "model.safetensors")
    assert plan.packed_bytes == sum(t.nbytes for name, t in tensors.items() if not name.endswith("weight_shape"))
    assert "from_pretrained" not in (out / "README.md").read_text()
    assert call(["verify", out]) == 0
    assert call(["generate", out, "--prompt", "def ", "--max-new-tokens", "4"]) == 0


def test_recipes(capsys, call):
    assert call(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    recipes, scripts = bundled_recipes(), bundled_scripts()
    assert [line.split()[0] for line in listed] == [*recipes, *scripts]
    assert {"llama", "bert_classification", "hf_trainer"} <= {*recipes, *scripts}
    assert not recipes.keys() & scripts.keys()
    for name, path in {**recipes, **scripts}.items():
        assert call(["recipes", name]) == 0
        assert capsys.readouterr().out == path.read_text()
        assert find_recipe(name) == path if name in recipes else path.suffix == ".py"
    assert call(["recipes", "none"]) == 1
    assert "no recipe none: neither a file nor one of the bundled ones" in capsys.readouterr().err


def test_every_command_has_a_function():
    assert {f"run_{name}" for name in COMMANDS} == {name for name in vars(commands) if name.startswith("run_")}


def test_inspect_machine(capsys, call):
    assert call(["inspect", "--machine"]) == 0
    lines = dict(line.strip().split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["kernels"].startswith(native.kernel_name())
    assert lines["torch"] == torch.__version__
