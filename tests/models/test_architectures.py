import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from llmqat.algorithms.fold import TOLERANCE
from llmqat.errors import LlmqatError
from llmqat.models.architectures import ARCHITECTURES, LLAMA, Architecture, architecture_of, blocks_of
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
    blocks = blocks_of(model, architecture)
    assert len(blocks) == 2
    for block in blocks:
        for site in architecture.smooth_sites:
            block.get_submodule(site.source).weight.data[5] *= 30
    changes = smooth(model, tokens, 0.5)
    assert len(changes) == 8
    assert max(site.change for site in changes.values()) <= TOLERANCE


def test_unknown_family_names_purpose_known_ones_and_remedy(gpt_neox, tokens):
    with pytest.raises(LlmqatError, match=r"Testing does not know .* 'gpt_neox' \(known: llama, .*\); mend it"):
        architecture_of(gpt_neox, "Testing", "mend it")
    with pytest.raises(LlmqatError, match=r"SmoothQuant does not know .*'gpt_neox'.* leave --smooth out, or add a row"):
        smooth(gpt_neox, tokens)


def test_a_family_without_sites_is_not_smoothed_silently(gpt_neox, tokens, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "gpt_neox", Architecture("gpt_neox.layers"))
    with pytest.raises(LlmqatError, match=r"no exact site in model type 'gpt_neox'; leave --smooth out, or add its"):
        smooth(gpt_neox, tokens)


def test_unknown_family_can_be_rounded_but_not_calibrated(gpt_neox, tokens):
    linears = [m for m in gpt_neox.modules() if isinstance(m, torch.nn.Linear)]
    with pytest.raises(LlmqatError, match=r"GPTQ does not know .*'gpt_neox'.* use --init rtn, or add a row"):
        prepare(gpt_neox, QuantScheme(4, 16), init="gptq", calibration=tokens)
    assert [m for m in gpt_neox.modules() if isinstance(m, torch.nn.Linear)] == linears, "a refusal changes nothing"
    report = prepare(gpt_neox, QuantScheme(4, 16))
    assert len(report.quantized) == 8
    assert gpt_neox(input_ids=tokens[0]).logits.isfinite().all()
