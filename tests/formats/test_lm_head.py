"""A quantized output head, tied to the embedding or not: packed, loaded, verified, and read by transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PhiConfig, PhiForCausalLM

from llmqat.errors import LlmqatError
from llmqat.formats.compressed_tensors import readers, transformers_route
from llmqat.formats.dense import dense_copy
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed
from llmqat.metrics.throughput import weight_bytes
from llmqat.models.patcher import prepare, quantized_layers, round_float_parts
from llmqat.models.planning import plan
from llmqat.nn.embedding import PackedEmbedding
from llmqat.nn.packed_linear import PackedLinear
from llmqat.scheme import QuantScheme
from llmqat.train.modes import add_lora, select_trainable
from tests.covering import every
from tests.formats.conftest import rate

IDS = torch.arange(24).view(2, 12)
EMBEDDING = "model.embed_tokens"


@pytest.fixture(scope="session")
def head_trained(small_llama):
    """``head_trained(scheme, head_bits, tied)``: prepared with a quantized head, trained for two steps."""

    def make(scheme, head_bits, tied, mode="full", dtype=torch.bfloat16):
        model = small_llama(tie_word_embeddings=tied)
        prepare(model, scheme, storage_dtype=dtype, lm_head_bits=head_bits)
        if mode == "lora":
            model = add_lora(model, 4)
        select_trainable(model, mode)
        trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam({"params": [p], "lr": rate(name, p)} for name, p in trains.items())
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        round_float_parts(model)
        return model.eval()

    return make


@pytest.mark.parametrize(
    ("mode", "head_bits", "tied", "symmetric"),
    every(3, ("full", "lora", "scales"), (4, 8), (True, False), (True, False)),
)
def test_round_trip(head_trained, tmp_path, tied, head_bits, symmetric, mode):
    model = head_trained(QuantScheme(4, 16, symmetric), head_bits, tied, mode)
    layers = {name: (layer, adapters) for name, layer, adapters in quantized_layers(model)}
    head, adapters = layers["lm_head"]
    assert head.scheme == QuantScheme(head_bits, 16, symmetric)
    directory = save_packed(model, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    home, other = (EMBEDDING, "lm_head") if tied else ("lm_head", EMBEDDING)
    parts = {"weight_packed", "weight_scale", "weight_shape"} | (set() if symmetric else {"weight_zero_point"})
    assert {key for key in tensors if key.startswith(home)} == {f"{home}.{part}" for part in parts}, "once on disk"
    assert {key for key in tensors if key.startswith(other)} == (set() if tied else {f"{EMBEDDING}.weight"})
    loaded = load_packed(directory, torch.float32)
    assert isinstance(loaded.lm_head, PackedLinear)
    assert isinstance(loaded.model.embed_tokens, PackedEmbedding if tied else nn.Embedding)
    codes, scale, zero_point = loaded.lm_head.unpack()
    assert torch.equal(codes, head.codes(adapters))
    assert torch.equal(scale, head.stored_scale())
    assert symmetric or torch.equal(zero_point, head.stored_zero_point())
    with torch.no_grad():
        embedding = model.get_input_embeddings()
        if tied:
            assert torch.equal(loaded.model.embed_tokens(IDS), embedding(IDS))
            assert torch.equal(embedding(IDS).bfloat16(), head_rows(head, adapters)[IDS])
        dense = dense_copy(loaded, torch.float32)
        expected = dense(input_ids=IDS).logits
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    check = verify(directory, against=model)
    assert check.ok
    assert check.layers == 8
    assert verify(directory, logits=False).ok


def head_rows(head, adapters):
    return head(torch.eye(head.in_features, dtype=torch.bfloat16), adapters).T


def test_verify_finds_a_changed_head(head_trained, tmp_path):
    from safetensors.torch import save_file

    directory = save_packed(head_trained(QuantScheme(4, 16), 8, True), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{EMBEDDING}.weight_packed"][0, 0] ^= 1
    save_file(tensors, directory / "model.safetensors")
    check = verify(directory, logits=False)
    assert check.mismatched == ("lm_head",)
    assert not check.codes_equal


def test_loaded_again_with_adapters_off_the_embedding_is_float(head_trained):
    """The teacher of distillation runs the float head and the float embedding."""
    from llmqat.nn.quantizers import disable_quantizers

    model = head_trained(QuantScheme(4, 16), 8, True, "lora")
    weight = model.get_base_model().lm_head.base_layer.weight
    with torch.no_grad(), disable_quantizers(model):
        assert torch.equal(model.get_input_embeddings()(IDS), weight[IDS])
        hidden = torch.randn(3, 48)
        assert torch.equal(model.get_output_embeddings()(hidden), nn.functional.linear(hidden, weight))
    assert not torch.equal(model.get_input_embeddings()(IDS), weight[IDS])


ROUTES = [
    (QuantScheme(4, 16), 8, False, {}),
    (QuantScheme(4, 16), 4, False, {}),
    (QuantScheme(4, 16, False), 4, False, {}),
    (QuantScheme(4, 16), 4, True, {}),
    (QuantScheme(8, 16, False), 8, True, {}),
    (QuantScheme(4, 16, False, 8), 4, False, {"dequantize": True}),
    (QuantScheme(4, 16), 8, True, None),
    (QuantScheme(4, 16, False), 8, False, None),
]


@pytest.mark.parametrize(("scheme", "head_bits", "tied", "route"), ROUTES)
def test_what_transformers_reads(head_trained, small_llama, tmp_path, scheme, head_bits, tied, route):
    """Equal weights by the route that is printed; where none is, both of theirs fail, or are wrong: if that ends, so
    should the exception."""
    model = head_trained(scheme, head_bits, tied)
    coverage = plan(small_llama(tie_word_embeddings=tied), scheme, lm_head_bits=head_bits)
    assert transformers_route(coverage) == route
    directory = save_packed(model, tmp_path)
    ours = dense_copy(load_packed(directory), torch.bfloat16)

    def theirs(options):
        arguments = {"quantization_config": CompressedTensorsConfig(**options)} if options else {}
        loaded = AutoModelForCausalLM.from_pretrained(directory, **arguments)
        with torch.no_grad():
            loaded(input_ids=IDS)  # the default route decompresses at the first forward
        return loaded.lm_head.weight, loaded.get_input_embeddings().weight

    expected = ours.lm_head.weight, ours.get_input_embeddings().weight
    if route is not None:
        for got, wanted in zip(theirs(route), expected, strict=True):
            assert torch.equal(got, wanted)
        return
    for options in ({}, {"dequantize": True}):
        try:
            got = theirs(options)
        except (AttributeError, RuntimeError, ValueError):
            continue
        assert not all(torch.equal(g, w) for g, w in zip(got, expected, strict=True))


def test_readers_are_named(small_llama):
    def text(head_bits, **scheme):
        model = small_llama(tie_word_embeddings=True)
        return readers(plan(model, QuantScheme(4, 16, **scheme), lm_head_bits=head_bits))

    assert text(None) == text(4) == text(None, symmetric=False) == "transformers reads it"
    assert text(4, act_bits=8) == text(None, symmetric=False, act_bits=8)
    assert text(4, act_bits=8).endswith("CompressedTensorsConfig(dequantize=True), which leaves activations float")
    assert text(8).startswith("llmqat reads it; transformers does not")


def test_config_names_the_embedding(head_trained, tmp_path):
    save_packed(head_trained(QuantScheme(4, 16), 4, True), tmp_path)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["ignore"] == ["lm_head"]
    assert [group["targets"] for group in quantization["config_groups"].values()] == [["Linear", EMBEDDING]]


def test_generates_and_counts_its_bytes(head_trained, tmp_path):
    loaded = load_packed(save_packed(head_trained(QuantScheme(4, 16), 8, True), tmp_path))
    assert loaded.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 16)
    head = loaded.lm_head
    packed = [m for m in loaded.modules() if isinstance(m, PackedLinear)]
    assert head in packed
    sizes = sum(m.weight_packed.nbytes + m.weight_scale.nbytes for m in packed)
    assert weight_bytes(loaded) == sizes + sum(p.nbytes for p in loaded.parameters())
    assert head.weight_packed.nbytes == 64 * 48


def test_a_packed_embedding_of_an_untied_model_is_refused(head_trained, tmp_path):
    directory = save_packed(head_trained(QuantScheme(4, 16), 4, True), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlmqatError, match=r"packs model\.embed_tokens, which is no linear layer"):
        load_packed(directory)


def tiny_phi():
    """Tied, with a bias in its output head."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=64, tie_word_embeddings=True, **sizes)).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_all_parts_of_a_tied_head_come_back(small_llama, tmp_path, family):
    """The file has them under the name of the embedding, also those that are no part of the weight."""
    model = small_llama(tie_word_embeddings=True) if family == "llama" else tiny_phi()
    scheme = QuantScheme(4, 16, act_bits=8, act_static=True)
    prepare(model, scheme, storage_dtype=torch.float32, lm_head_bits=4, calibration=[IDS])
    loaded = load_packed(save_packed(model, tmp_path), torch.float32)
    assert torch.equal(loaded.lm_head.input_scale, model.lm_head.stored_act_scale())
    assert family == "llama" or torch.equal(loaded.lm_head.bias, model.lm_head.bias)
    assert verify(tmp_path, model).ok
