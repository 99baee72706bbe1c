"""A grid that all engines hold is chosen before training, or what conflicts is said."""

import pytest

from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.formats.serve_with import plan_to_serve, resolve_to_serve
from llmqat.report.plan import inspect


def planned(model, served, **quant):
    values = {f"quant.{key}": value for key, value in quant.items()} | {"quant.serve_with": served}
    recipe = resolve_to_serve(model, Recipe().with_values({"quant.group_size": 32} | values))
    return recipe, plan_to_serve(model, recipe)


def test_the_dtype_of_scales_is_chosen(tiny_llama):
    recipe, coverage = planned(tiny_llama(), "vllm, gguf,gptq")
    assert recipe.quant.scale_dtype == "float16"
    assert {layer.scheme.scale_dtype for layer in coverage.quantized} == {"float16"}
    assert planned(tiny_llama(), "vllm,dense,mlx")[0].quant.scale_dtype is None
    planned(tiny_llama(), "vllm-cpu", group_size=-1)
    assert planned(tiny_llama(), None)[0].quant.scale_dtype is None


CONFLICTS = {
    "width": (
        "vllm,awq",
        {"bits": 8},
        r"awq cannot hold model\.layers\.0\.self_attn\.q_proj without loss: it is .*; train with --bits 4 --group-size",
    ),
    "width on CPUs": ("vllm-cpu", {"bits": 8}, "vllm-cpu cannot hold .*; train with --bits 4 --group-size 32"),
    "zero points": (
        "mlx",
        {"symmetric": False},
        "mlx cannot hold .* asymmetric.*; train with --bits 4 --group-size 32",
    ),
    "group": ("gguf", {"group_size": 16}, "gguf cannot hold .*; train with --bits 4 --group-size 32"),
    "head": ("vllm", {"lm_head_bits": 4}, "vllm cannot hold lm_head .*; train without --lm-head-bits"),
    "several grids": (
        "awq",
        {"overrides": {"up_proj$": {"group_size": 16}}},
        "awq cannot hold several grids, and",
    ),
    "float layer": (
        "gptq",
        {"overrides": {"up_proj$": "float"}},
        r"gptq cannot hold float linear layers of the blocks, and model\.layers\.0\.mlp\.up",
    ),
    "fused": (
        "vllm",
        {"overrides": {"up_proj$": "float"}},
        r"vllm cannot run .*gate_proj and .*up_proj, one layer there, as W4A16 .* and float; override both alike",
    ),
    "several formats": (
        "vllm-cpu,gguf,awq,mlx",
        {"bits": 8, "group_size": 16, "symmetric": False},
        r"^vllm-cpu, gguf, awq and mlx cannot hold .* it is W8A16 g16 .*; train with --bits 4 --group-size 32$",
    ),
    "several reasons": (
        "vllm,awq",
        {"bits": 8, "lm_head_bits": 8, "overrides": {"_proj$": {"bits": 4}}},
        "^vllm cannot hold lm_head without loss: .*; awq cannot hold several grids",
    ),
    "activations": (
        "vllm,gguf,mlx,vllm-cpu",
        {"act_bits": 8},
        "^vllm, mlx and vllm-cpu cannot run the int8 activations of --act-bits as they were trained; train without it$",
    ),
    "cache": (
        "vllm,dense",
        {"kv_bits": 8},
        "^vllm and dense cannot run the int8 cache of --kv-bits 8, only a float one; train without it$",
    ),
    "name": (
        "vllm,exl3",
        {},
        "--serve-with does not know 'exl3'; choose of dense, gguf, gptq, awq, mlx, onnx, vllm, vllm-cpu",
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_what_conflicts(tiny_llama, case):
    served, quant, message = CONFLICTS[case]
    with pytest.raises(LlmqatError, match=message):
        planned(tiny_llama(), served, **quant)


def test_models_that_a_format_does_not_know(tiny):
    with pytest.raises(LlmqatError, match="gguf export does not know the model type 'opt'"):
        planned(tiny("opt"), "gguf")
    with pytest.raises(
        LlmqatError, match=r"gptq cannot hold .*c_attn.*: its weight is \(in, out\), as in Conv1D; llmqat"
    ):
        planned(tiny("gpt2"), "gptq")


def test_inspect_refuses_it_too(model_dir):
    recipe = Recipe().with_values({"model": str(model_dir), "quant.serve_with": "mlx", "quant.symmetric": False})
    with pytest.raises(LlmqatError, match="mlx cannot hold"):
        inspect(recipe)
