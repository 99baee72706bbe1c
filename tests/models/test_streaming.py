"""One block of a model in memory at a time: which, in a forward and in a backward, and on which device."""

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.formats.mapped_model import load_mapped
from llmqat.mapped import Disk, is_mapped
from llmqat.models import streaming
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.models.streaming import BlockStream
from llmqat.scheme import QuantScheme
from llmqat.train.modes import add_lora
from tests.pretended_device import CPU, PRETENDED

IDS = torch.arange(12).view(1, -1)


@pytest.fixture
def mapped(tiny_llama, tmp_path):
    """A float model of four blocks, its matrices in files."""
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path)
    return load_mapped(str(tmp_path), Disk(tmp_path))


@pytest.fixture
def advice(monkeypatch):
    """What is let go of, and what begins to be read: (word, sizes of the matrices)."""
    given = []
    monkeypatch.setattr(streaming, "release", lambda *tensors: given.append(("release", len(tensors))))
    monkeypatch.setattr(streaming, "will_need", lambda *tensors: given.append(("read", len(tensors))))
    return given


def blocks_entered(stream):
    """The order in which blocks are entered from now on."""
    seen = []
    for index, block in enumerate(stream.blocks):
        block.self_attn.register_forward_pre_hook(lambda *_, index=index: seen.append(index))
    return seen


def test_forward_and_backward(mapped, advice):
    """Gradient checkpointing computes the blocks again from the last on, each while it is here."""
    stream = BlockStream(mapped, CPU)
    prepare(mapped, QuantScheme(4, 16))
    model = add_lora(mapped, r=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = blocks_entered(stream)
    loss = model.train()(input_ids=IDS).logits.square().mean()
    assert (seen, stream.here) == ([0, 1, 2, 3], 3)
    advice.clear()
    loss.backward()
    assert (seen, stream.here) == ([0, 1, 2, 3, 3, 2, 1, 0], 0)
    assert [word for word, _ in advice].count("read") == 2  # the block before 2, and the one before 1
    assert {size for word, size in advice if word == "read"} == {7}


def test_the_block_that_is_here_is_not_read_again(mapped, advice):
    stream = BlockStream(mapped, CPU)
    for _ in range(2):
        stream.blocks[1](torch.zeros(1, 3, 64), position_embeddings=(torch.zeros(1, 3, 16), torch.zeros(1, 3, 16)))
    assert [word for word, _ in advice] == ["read"]


def test_one_block_is_on_the_device(pretended, mapped):
    stream = BlockStream(mapped, PRETENDED)
    stream.place(mapped)
    expected = mapped(input_ids=IDS.to(PRETENDED)).logits
    here = [{p.device for p in block.parameters() if p.ndim == 2} for block in stream.blocks]
    assert here == [{CPU}, {CPU}, {CPU}, {PRETENDED}]
    stream.place(mapped)
    assert here == [{p.device for p in block.parameters() if p.ndim == 2} for block in stream.blocks]
    assert mapped.device == expected.device == PRETENDED
    mapped.model.layers[0](expected[..., :64], position_embeddings=[torch.zeros(1, 12, 16, device=PRETENDED)] * 2)
    assert all(is_mapped(p) for p in stream.blocks[3].parameters() if p.ndim == 2)


def test_a_layer_fetches_its_weight_where_no_forward_does(pretended, mapped):
    prepare(mapped, QuantScheme(4, 16))
    expected = [on_grid.codes() for on_grid in quantized_layers(mapped)]
    BlockStream(mapped, PRETENDED).place(mapped)
    for on_grid, codes in zip(quantized_layers(mapped), expected, strict=True):
        found = on_grid.codes()
        assert found.device == PRETENDED
        assert torch.equal(found.cpu(), codes)


def test_a_family_without_a_row(mapped):
    mapped.config.model_type = "unheard-of"
    assert len(BlockStream(mapped, CPU).blocks) == 4
    del mapped.model.layers
    with pytest.raises(LlmqatError, match="LlamaForCausalLM has no list of blocks"):
        BlockStream(mapped, CPU)
