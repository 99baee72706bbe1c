import pytest
import torch
from torch import nn

from llmqat.algorithms.block_calls import Arguments
from llmqat.algorithms.blocks import BlockInputs, layers_of, passes_of
from llmqat.algorithms.gptq_model import GptqSettings, gptq_block
from llmqat.algorithms.stand_ins import Part, StandIns, finding_parts, replaced_forward
from llmqat.models.patcher import prepare
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.scheme import QuantScheme
from tests.algorithms.helpers import prepared


def parts_of(block, inputs):
    with finding_parts(block) as parts:
        passes = passes_of(block, inputs, layers_of(block))
    return parts, passes


def quantized(block, inputs, kept_bytes=1 << 30):
    """How often each layer ran, the codes and the outputs after GPTQ of one block."""
    runs = dict.fromkeys(layers_of(block), 0)
    with pytest.MonkeyPatch.context() as patch:
        for name, layer in layers_of(block).items():

            def forward(x, name=name, original=layer.forward):
                runs[name] += 1
                return original(x)

            patch.setattr(layer, "forward", forward)
        gptq_block(block, inputs, GptqSettings(kept_bytes=kept_bytes))
    return runs, [layer.codes() for layer in layers_of(block).values()], inputs.hidden


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_forward_that_stood_on_a_block_comes_back():
    """Libraries wrap a module by an attribute of that name; a failure on the way leaves it there too."""
    block, wrapper = nn.Linear(2, 2), lambda x: "wrapped"
    with pytest.raises(ZeroDivisionError), replaced_forward(block, lambda x: 1 / x):
        block(0)
    assert "forward" not in vars(block)
    block.forward = wrapper
    with replaced_forward(block, lambda x: "ours"):
        assert block(1) == "ours"
    assert block.forward is wrapper


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_each_product_is_made_once_and_no_bit_changes(tiny_llama, tiny_moe, tokens, family):
    def block_of():
        model = tiny_llama() if family == "llama" else tiny_moe(family)
        prepare(model, QuantScheme(4, 16, act_bits=8))
        return model.model.layers[0], BlockInputs.capture(model, list(model.model.layers), tokens)

    runs, codes, hidden = quantized(*block_of())
    again, same_codes, same_hidden = quantized(*block_of(), kept_bytes=0)
    some, some_codes, some_hidden = quantized(*block_of(), kept_bytes=20_000)
    assert same(codes, same_codes)
    assert same(codes, some_codes)
    assert same(hidden, same_hidden)
    assert same(hidden, some_hidden)
    once = len(tokens) + 1  # one batch runs twice: it shows the order of the layers
    assert {runs[name] for name in runs if "expert" not in name} == {once}
    assert again["self_attn.q_proj"] >= 3 * len(tokens)
    assert once < some["self_attn.o_proj"] < again["self_attn.o_proj"]
    assert sum(runs.values()) < 0.7 * sum(again.values())


def test_parts_are_the_widest_modules_that_return_a_layers_output(tiny_llama, tokens):
    model, _ = prepared(tiny_llama())
    block = model.model.layers[0]
    parts, _ = parts_of(block, BlockInputs.capture(model, [block], tokens))
    assert parts == [Part("self_attn", "self_attn.o_proj", 2), Part("mlp", "mlp.down_proj", None)]
    model.config._attn_implementation = "eager"  # returns its weights, too
    parts, _ = parts_of(block, BlockInputs.capture(model, [block], tokens))
    assert [part.path for part in parts if "attn" in part.path] == [f"self_attn.{x}_proj" for x in "qkvo"]


def layer(columns=16, rows=16):
    return FakeQuantLinear.from_linear(nn.Linear(columns, rows, bias=False), QuantScheme(4, 16), torch.float32)


class Odd(nn.Module):
    """Runs `twice` two times, adds to the output of `first` in place, and ends with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = layer(), layer(), layer()

    def forward(self, x):
        y = self.first(x)
        y += x
        return self.last(self.twice(torch.relu(self.twice(y)))) + x


def test_layers_that_run_twice_and_tensors_written_in_place_stay_right():
    found = []
    for kept_bytes in (0, 1 << 30):
        torch.manual_seed(1)
        found.append(quantized(Odd(), BlockInputs(list(torch.randn(3, 2, 8, 16)), [[Arguments()]], 3), kept_bytes))
    assert same(found[0][1], found[1][1])
    assert same(found[0][2], found[1][2])
    inputs = BlockInputs([torch.randn(2, 8, 16)], [[Arguments()]], 1)
    assert [part.path for part in parts_of(Odd(), inputs)[0]] == ["first", "last"]


def test_no_more_is_kept_than_the_limit_and_nothing_of_a_finished_batch():
    part, block = Part("0", "0", None), nn.Sequential(layer(16, 32))
    stand_ins = StandIns(block, [part], [[["0"]]], 4 * (64 + 128 + 64))
    for batch in range(4):
        stand_ins.keep("0", batch, torch.ones(4, 16))
    assert sorted(batch for _, batch in stand_ins.kept) == [0, 1, 2, 3]
    for batch in (0, 1):
        with torch.no_grad(), stand_ins.standing_in(batch):
            block(None)  # the input of the layer gives way to the output, twice as large
    assert sorted(batch for _, batch in stand_ins.kept) == [1, 2, 3]
    stand_ins.forget(2)
    assert sorted(batch for _, batch in stand_ins.kept) == [1, 3]
    assert stand_ins.bytes == 4 * (128 + 64)
