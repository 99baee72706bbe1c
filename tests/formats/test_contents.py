import pytest
import torch
from safetensors.torch import load_file

from llmqat.errors import LlmqatError
from llmqat.formats import fingerprint
from llmqat.formats.contents import contents_of, is_inside
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed, write_contents
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.quant.packing import pack_rows
from llmqat.scheme import QuantScheme


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_one_value_for_writer_fingerprint_and_proof(trained, tmp_path, mode):
    model = trained(QuantScheme(3, 16, symmetric=False), torch.bfloat16, mode)
    contents = contents_of(model)
    directory = write_contents(contents, tmp_path)
    written = load_file(directory / "model.safetensors")
    assert written.keys() == contents.state.keys()
    assert all(torch.equal(tensor, contents.state[name]) for name, tensor in written.items())
    assert fingerprint.read(directory).layers == contents.hashes
    assert fingerprint.read(directory).tensors == contents.tensor_hashes
    on_grid = quantized_layers(model)
    assert list(contents.layers) == [own.name for own in on_grid]
    for own in on_grid:
        codes, scale, zero_point = contents.layers[own.name].unpack()
        assert torch.equal(codes, own.codes())
        assert torch.equal(scale, own.layer.stored_scale())
        assert torch.equal(zero_point, own.layer.stored_zero_point())


def test_codes_that_were_packed_wrong_are_found(trained, tmp_path, monkeypatch):
    """Hashes are of the codes before they were packed: a fault of the packing is no fault of the hash."""
    model = trained(QuantScheme(4, 16), torch.bfloat16)
    monkeypatch.setattr("llmqat.nn.packed_linear.pack_rows", lambda codes, bits: pack_rows(codes, bits) ^ 1)
    check = verify(save_packed(model, tmp_path), logits=False)
    assert not check.codes_equal
    assert len(check.mismatched) == check.layers


def test_ranges_are_asked_for_before_anything_is_derived(small_llama):
    model = small_llama()
    prepare(model, QuantScheme(8, 16, act_bits=8, act_static=True))
    with pytest.raises(LlmqatError, match=r"static activations of .*q_proj, .* and 2 more have no range yet: no token"):
        contents_of(model)


def test_names_inside():
    assert is_inside("model.layers.1.weight", {"model.layers.1"})
    assert is_inside("model.layers.1.base_layer.weight", {"model.layers.1"})
    assert not is_inside("model.layers.10.weight", {"model.layers.1"})
    assert not is_inside("model.layers.1", {"model.layers.1"})
