"""Two families that no transformers has yet, on the whole way: a new place of norms, and a new layout of experts.

They are made known as a new release would make them: a config and a class of their own, and no row of llmqat's.
"""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmqat.models.architectures import ARCHITECTURES
from llmqat.models.patcher import quantized_layers
from tests.families.check import run

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.15}
EXPERTS, CHOSEN = 4, 2


class InnerNorm(nn.Module):
    """An MLP with its norm in the middle: nothing but the down projection reads it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.wide = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.norm = LlamaRMSNorm(config.intermediate_size)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.wide(x).chunk(2, -1)
        return self.narrow(self.norm(one.sigmoid() * other))


class InnerNormBlock(nn.Module):
    """Attention and MLP side by side on hidden states without a norm; what they add together has one."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, config: LlamaConfig) -> None:
        super().__init__()
        self.mix, self.mlp, self.behind = attention, mlp, LlamaRMSNorm(config.hidden_size)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        mixed, _ = self.mix(hidden_states=hidden_states, **arguments)
        return hidden_states + self.behind(mixed + self.mlp(hidden_states))


class ChosenExperts(nn.Module):
    """Fused experts as no family has them: transposed and interleaved, and no decorator says so."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, config.hidden_size, 2 * config.intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, config.intermediate_size, config.hidden_size))
        self.act_fn = nn.GELU()

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        both = torch.einsum("th,ehi->tei", tokens, self.gate_up_proj)
        outputs = torch.einsum("tei,eih->teh", self.act_fn(both[..., ::2]) * both[..., 1::2], self.down_proj)
        return (outputs.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1])) * weights[..., None]).sum(1)


class ChosenMLP(nn.Module):
    """A router that is a Parameter, and experts."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.choice = nn.Parameter(torch.empty(config.hidden_size, EXPERTS))
        self.experts = ChosenExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = (tokens @ self.choice).sigmoid().topk(CHOSEN, -1)
        return self.experts(tokens, chosen, weights).view_as(x)


class InnerNormConfig(LlamaConfig):
    model_type = "inner_norm"


class ChosenConfig(LlamaConfig):
    model_type = "chosen"


class InnerNormForCausalLM(LlamaForCausalLM):
    config_class = InnerNormConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        blocks = (InnerNormBlock(old.self_attn, InnerNorm(config), config) for old in self.model.layers)
        self.model.layers = nn.ModuleList(blocks)
        self.post_init()


class ChosenForCausalLM(LlamaForCausalLM):
    config_class = ChosenConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for block in self.model.layers:
            block.mlp = ChosenMLP(config)
        self.post_init()


@pytest.mark.parametrize(
    ("kind", "layers", "exported"),
    [(InnerNormForCausalLM, 2 * 6, False), (ChosenForCausalLM, 2 * (4 + 3 * EXPERTS), True)],
)
def test_a_family_of_tomorrow_needs_no_change(kind, layers, exported, tmp_path, monkeypatch):
    config = kind.config_class
    assert config.model_type not in ARCHITECTURES
    AutoConfig.register(config.model_type, config, exist_ok=True)
    monkeypatch.setattr(transformers, kind.__name__, kind, raising=False)
    torch.manual_seed(0)
    model = kind(config(**SIZES, **TOKENS)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1)
    assert run(model, tmp_path / "packed") == exported
    assert len(quantized_layers(model)) == layers
