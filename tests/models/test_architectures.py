import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from llmqat.algorithms.fold import TOLERANCE
from llmqat.errors import LlmqatError
from llmqat.models.architectures import ARCHITECTURES, LLAMA, Architecture, blocks_of
from llmqat.models.patcher import prepare, smooth
from llmqat.scheme import QuantScheme


@pytest.fixture
def gpt_neox():
    config = GPTNeoXConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    return GPTNeoXForCausalLM(config).eval()


# Families with experts: test_experts.py. Other layouts: test_smooth_sites.py.
@pytest.mark.parametrize("model_type", [name for name, row in ARCHITECTURES.items() if row is LLAMA])
def test_smooth_sites_are_exact(tiny, model_type, tokens):
    """Paths exist, and every reader of a norm is listed (or smoothing changes the logits)."""
    model, architecture = tiny(model_type), ARCHITECTURES[model_type]
    blocks = blocks_of(model)
    assert len(blocks) == 2
    for block in blocks:
        for site in architecture.smooth_sites:
            block.get_submodule(site.source).weight.data[5] *= 30
    changes = smooth(model, tokens, 0.5)
    assert len(changes) == 8
    assert max(site.change for site in changes.values()) <= TOLERANCE


def test_a_family_without_a_row_is_smoothed_where_a_trial_says_so(gpt_neox, tokens, capsys):
    """Its norms; the values lie between the keys of the heads."""
    changes = smooth(gpt_neox, tokens)
    assert [name.removeprefix("gpt_neox.layers.") for name in changes] == [
        f"{block}.{norm}" for block in range(2) for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    assert max(site.change for site in changes.values()) <= TOLERANCE
    assert (
        "SmoothQuant in GPTNeoXLayer, found by trying: input_layernorm -> attention.query_key_value, "
        "post_attention_layernorm -> mlp.dense_h_to_4h; inputs of attention.dense, mlp.dense_4h_to_h stay as they are"
    ) in capsys.readouterr().err


def test_a_family_without_sites_is_not_smoothed_silently(gpt_neox, tokens, monkeypatch):
    no_site = r"SmoothQuant has no exact site in model type 'gpt_neox'; leave --smooth out"
    monkeypatch.setattr("llmqat.models.patcher.find_sites", lambda model, _: [()] * len(blocks_of(model)))
    with pytest.raises(LlmqatError, match=no_site):
        smooth(gpt_neox, tokens)
    monkeypatch.setitem(ARCHITECTURES, "gpt_neox", Architecture("gpt_neox.layers"))
    with pytest.raises(LlmqatError, match=no_site):
        smooth(gpt_neox, tokens)


def test_a_family_without_a_row_is_calibrated(gpt_neox, tokens):
    report = prepare(gpt_neox, QuantScheme(4, 16), init="gptq", calibration=tokens)
    assert len(report.quantized) == len(report.errors) == 8
    assert all(gptq < rtn for rtn, gptq in report.errors.values())
    assert gpt_neox(input_ids=tokens[0]).logits.isfinite().all()
