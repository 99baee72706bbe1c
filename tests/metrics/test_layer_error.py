import pytest
import torch

from llmqat.metrics.layer_error import STRIDE, LayerErrors, Room, sampled_outputs
from llmqat.metrics.perplexity import Windows, evaluate
from llmqat.models.float_view import FloatCopy, FloatView
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.scheme import QuantScheme
from llmqat.train.modes import add_lora

DATA = Windows(torch.randint(0, 128, (6, 48), generator=torch.Generator().manual_seed(2)), "none")


def names_of(model):
    return [name for name, _, _ in quantized_layers(model)]


def captured(model, name, ids):
    """The layer's output for every token, by a hook of our own."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("lora", [False, True])
def test_errors_are_those_of_sampled_outputs(tiny_llama, lora):
    model, original = tiny_llama(), tiny_llama()
    prepare(model, QuantScheme(3, 16))
    names = names_of(model)
    watched = add_lora(model, 2) if lora else model
    result = evaluate(watched, DATA, FloatCopy(original), layers=names)
    assert list(result.layer_errors) == names
    for name in (names[0], names[-1]):
        y, target = captured(model, name, DATA.ids)[::STRIDE], captured(original, name, DATA.ids)[::STRIDE]
        expected = float((y - target).square().sum() / target.square().sum())
        assert result.layer_errors[name] == pytest.approx(expected, rel=1e-4)
        assert expected > 1e-4


def test_a_view_of_the_float_model_compares_a_model_with_itself(tiny_llama):
    model = tiny_llama()
    prepare(model, QuantScheme(3, 16))
    names = names_of(model)
    with_copy = evaluate(model, DATA, FloatCopy(tiny_llama()), layers=names).layer_errors
    assert evaluate(model, DATA, FloatView(model), layers=names).layer_errors == pytest.approx(with_copy, rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_watched_unless_asked(tiny_llama):
    assert evaluate(tiny_llama(), DATA, FloatCopy(tiny_llama())).layer_errors is None


def test_layers_that_cannot_be_compared_are_left_out(tiny_llama, monkeypatch):
    """An expert sees the tokens its router chose, and a fused one of the float model has no module of its own."""
    model, original = tiny_llama(), tiny_llama()
    prepare(model, QuantScheme(3, 16))
    expert = model.get_submodule("model.layers.0.mlp.down_proj")
    whole = expert.forward
    monkeypatch.setattr(expert, "forward", lambda x: whole(x[:, ::2]).repeat_interleave(2, 1)[:, :-1])
    monkeypatch.setattr(model.model.layers[0].mlp, "forward", lambda x: (expert(x.new_zeros(6, 48, 96)), x)[1])
    del original.model.layers[1].mlp.down_proj
    original.model.layers[1].mlp.forward = lambda x: x
    found = evaluate(model, DATA, FloatCopy(original), layers=names_of(model)).layer_errors
    assert "model.layers.0.mlp.down_proj" not in found
    assert "model.layers.1.mlp.down_proj" not in found
    assert "model.layers.1.self_attn.o_proj" in found


def test_experts_take_no_room(tiny_moe):
    """Also where all tokens go to all of them."""
    model = tiny_moe("mixtral", num_local_experts=2, num_hidden_layers=1)
    prepare(model, QuantScheme(3, 16))
    with torch.no_grad(), sampled_outputs(model, names_of(model), 20) as found:
        model(input_ids=DATA.ids[:1, :20])
    assert set(found) == {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}


def test_errors_add_up_over_batches():
    errors = LayerErrors(["a", "b"])
    errors.add({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([1.0, 1.0])})
    errors.add({"a": torch.tensor([2.0]), "b": torch.ones(1)}, {"a": torch.tensor([2.0]), "c": torch.ones(1)})
    assert errors.result() == {"a": pytest.approx(1 / 6)}


def test_a_head_on_the_grid_is_compared_too(tiny_llama):
    model, original = tiny_llama(), tiny_llama()
    prepare(model, QuantScheme(3, 16), lm_head_bits=4)
    names = names_of(model)
    errors = evaluate(model, DATA, FloatCopy(original), layers=names).layer_errors
    assert list(errors) == names
    y, target = captured(model, "lm_head", DATA.ids)[::STRIDE], captured(original, "lm_head", DATA.ids)[::STRIDE]
    assert errors["lm_head"] == pytest.approx(float((y - target).square().sum() / target.square().sum()), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_samples_lie_in_one_piece_of_memory(tiny_llama, lora):
    """Small ones in the gaps between activations would keep those from being used again."""
    model = tiny_llama()
    prepare(model, QuantScheme(3, 16))
    names = names_of(model)
    watched = add_lora(model, 2) if lora else model
    with torch.no_grad(), sampled_outputs(watched, names, DATA.ids.numel()) as outputs:
        watched(input_ids=DATA.ids)
    assert list(outputs) == names
    (storage,) = {rows.untyped_storage().data_ptr(): rows.untyped_storage() for rows in outputs.values()}.values()
    assert storage.nbytes() == sum(rows.nbytes for rows in outputs.values())


def test_what_has_no_room_is_copied_all_the_same():
    room, values = Room(10), torch.arange(6.0)
    copies = [room.copy(values), room.copy(values), room.copy(values.bfloat16())]
    values.zero_()
    assert all(torch.equal(copy.float(), torch.arange(6.0)) for copy in copies)
    assert copies[0].data_ptr() == room.memory.data_ptr()
