"""Blocks found by looking at models whose family has no row, and those that nobody can walk through."""

import copy

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llmqat.errors import LlmqatError
from llmqat.models.architectures import blocks_of, check_blocks, check_init
from llmqat.models.looking import NotInARow, confirm_blocks, find_blocks
from llmqat.models.patcher import prepare
from llmqat.report.plan import family_in_words
from llmqat.scheme import QuantScheme

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 128,
}


class StrangerConfig(LlamaConfig):
    model_type = "stranger"


class Stranger(LlamaForCausalLM):
    """A Llama by another name, which no row knows; `change` it into what no family is."""

    config_class = StrangerConfig

    @classmethod
    def made(cls, kind: type[LlamaModel] = LlamaModel) -> "Stranger":
        torch.manual_seed(0)
        model = cls(StrangerConfig(**SIZES)).eval()
        model.model.__class__ = kind
        return model


class Twice(LlamaModel):
    def forward(self, input_ids, **options):
        hidden = super().forward(input_ids, **options).last_hidden_state
        return super().forward(**options | {"inputs_embeds": hidden})


class Between(LlamaModel):
    """Does something with the hidden states between the blocks."""

    def forward(self, input_ids, **options):
        self.layers[0].forward = lambda *args, **kwargs: type(self.layers[0]).forward(self.layers[0], *args, **kwargs)
        self.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
        return super().forward(input_ids, **options)


def test_a_list_is_found_and_confirmed():
    model = Stranger.made()
    assert find_blocks(model) == ["model.layers"]
    assert find_blocks(model.base_model) == ["layers"]
    assert confirm_blocks(model, ["model.layers"])


def test_a_model_without_weights_is_confirmed_too():
    model = Stranger.made().to("meta")
    assert confirm_blocks(model, find_blocks(model))


def test_towers_are_no_blocks():
    """A vision tower has a list of blocks too; no token runs through it."""
    vision = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = Gemma3Config(text_config=SIZES, vision_config=vision | {"num_attention_heads": 2, "image_size": 28})
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    assert find_blocks(model) == ["model.language_model.layers"]


def test_a_model_without_a_list():
    model = Stranger.made()
    model.model.layers = nn.Identity()
    with pytest.raises(LlmqatError, match="Stranger has no list of blocks; use --init rtn"):
        find_blocks(model)


def test_blocks_that_run_twice_are_calibrated_but_not_reconstructed():
    model, calibration = Stranger.made(Twice), list(torch.randint(0, 128, (4, 2, 24)))
    with pytest.raises(
        NotInARow, match=r"2 blocks of Stranger at model\.layers run in the order \[0, 1, 0, 1\], and only --init gptq"
    ):
        prepare(model, QuantScheme(4, 16), init="blockwise", calibration=calibration)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear), "a refusal changes nothing"
    said = "run in the order [0, 1, 0, 1]: GPTQ runs the whole model for each of them"
    assert check_init(model, "gptq").endswith(said)
    assert family_in_words(model).endswith(said)
    report = prepare(model, QuantScheme(4, 16), init="gptq", calibration=calibration)
    assert len(report.errors) == len(report.quantized) == 14
    assert all(gptq is not None and gptq < rtn for rtn, gptq in report.errors.values())


def test_something_between_blocks():
    with pytest.raises(NotInARow, match=r"at model\.layers do not each read what the one before returned"):
        confirm_blocks(Stranger.made(Between), ["model.layers"])


def test_two_lists_that_run_take_turns():
    model = Stranger.made()
    model.model.embed_tokens.extra = nn.ModuleList([nn.Sequential(nn.Identity())])
    model.model.embed_tokens.register_forward_hook(lambda module, _, output: module.extra[0](output))
    assert find_blocks(model) == ["model.embed_tokens.extra", "model.layers"]
    assert list(blocks_of(model)) == [model.model.embed_tokens.extra[0], *model.model.layers]
    with pytest.raises(NotInARow, match=r"3 blocks .* at model\.embed_tokens\.extra and model\.layers lie in several"):
        check_blocks(model)


def test_lists_that_no_token_runs_through():
    model = Stranger.made()
    model.model.layers, blocks = nn.Identity(), model.model.layers
    model.one, model.other = blocks, copy.deepcopy(blocks)
    model.model.forward = lambda input_ids, **_: BaseModelOutputWithPast(model.model.embed_tokens(input_ids))
    with pytest.raises(LlmqatError, match=r"several lists .*\(one, other\), and tokens run through none of them; use"):
        find_blocks(model)


def test_a_model_that_cannot_run_without_values():
    model = Stranger.made()
    model.model.register_forward_pre_hook(lambda *_: [][0])
    assert not confirm_blocks(model, ["model.layers"])
    model.model.tower = nn.ModuleList([nn.Sequential(nn.Identity())])
    with pytest.raises(
        LlmqatError, match=r"\(model\.layers, model\.tower\), and cannot run without values; use --init"
    ):
        find_blocks(model)


class NormsBehind(LlamaDecoderLayer):
    """A block that no family has: attention and MLP side by side, a norm behind their sum, and a tuple returned."""

    def forward(self, hidden_states, **options):
        attended, _ = self.self_attn(hidden_states=hidden_states, **options)
        return hidden_states + self.input_layernorm(attended + self.mlp(hidden_states)), attended


class WithNormsBehind(LlamaModel):
    def forward(self, input_ids, **options):
        hidden = self.embed_tokens(input_ids)
        turned = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            hidden, _ = layer(hidden_states=hidden, position_embeddings=turned, attention_mask=None)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def test_an_invented_architecture_is_calibrated():
    model = Stranger.made(WithNormsBehind)
    for layer in model.model.layers:
        layer.__class__ = NormsBehind
    report = prepare(model, QuantScheme(4, 16), init="gptq", calibration=list(torch.randint(0, 128, (4, 2, 24))))
    assert len(report.errors) == len(report.quantized) == 14
    assert all(gptq is not None and gptq < rtn for rtn, gptq in report.errors.values())
