import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmqat.errors import LlmqatError
from llmqat.formats import fingerprint
from llmqat.formats import verify as verify_module
from llmqat.formats.verify import Verification, verify
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme

LAYER = "model.layers.0.mlp.down_proj"


def edit(directory, name, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors[name])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_was_packed_verifies(trained, tmp_path, bits, symmetric, dtype, act_bits):
    model = trained(QuantScheme(bits, 16, symmetric, act_bits), dtype, "lora")
    directory = save_packed(model, tmp_path)
    for against in (None, model):
        check = verify(directory, against)
        assert (check.ok, check.layers, check.mismatched) == (True, 7, ())
        assert 0 < check.max_logit_error <= check.bound < 1e-3
        assert check == verify(str(directory), against)


def test_static_activations_verify_with_their_scale(small_llama, tmp_path):
    model = small_llama()
    ids = torch.randint(0, 64, (2, 16))
    prepare(model, QuantScheme(8, 16, act_bits=8, act_static=True), storage_dtype=torch.bfloat16, calibration=[ids])
    directory = save_packed(model, tmp_path)
    for against in (None, model):
        assert verify(directory, against).ok
    edit(directory, f"{LAYER}.input_scale", lambda scale: scale.view(torch.int16).add_(1))
    for against in (None, model):
        check = verify(directory, against)
        assert (check.codes_equal, check.scales_equal, check.mismatched) == (True, False, (LAYER,))


def test_logits_can_be_left_out(packed):
    check = verify(packed[1], logits=False)
    assert check == Verification(7, True, True, (), None, None)
    assert check.ok


def flip_code(packed):
    packed[3, 2] ^= 1 << 20  # one bit of one code


def next_scale(scale):
    scale.view(torch.int16)[3, 2] += 1  # one unit in the last place


def flip_zero_point(packed):
    packed[0, 1] ^= 1 << 5


@pytest.mark.parametrize(
    ("tensor", "change", "codes", "scales"),
    [
        ("weight_packed", flip_code, False, True),
        ("weight_scale", next_scale, True, False),
        ("weight_zero_point", flip_zero_point, False, True),
    ],
)
def test_the_smallest_change_is_found(trained, tmp_path, tensor, change, codes, scales):
    model = trained(QuantScheme(4, 16, symmetric=False), torch.bfloat16)
    directory = save_packed(model, tmp_path)
    edit(directory, f"{LAYER}.{tensor}", change)
    for against in (None, model):
        check = verify(directory, against)
        assert not check.ok
        assert (check.codes_equal, check.scales_equal, check.mismatched) == (codes, scales, (LAYER,))


def test_another_model_does_not_verify(packed, trained):
    check = verify(packed[1], against=trained(QuantScheme(4, 16), torch.bfloat16, seed=5), logits=False)
    assert not check.ok
    assert len(check.mismatched) == 7


@pytest.mark.parametrize("side", ["file", "fingerprint"])
def test_a_missing_layer_is_found(packed, trained, tmp_path, side):
    """A layer that is packed on one side and float, or not there, on the other."""
    model, directory = packed
    fewer = trained(QuantScheme(4, 16), torch.bfloat16, overrides={"down_proj$": "float"})
    if side == "file":
        check = verify(save_packed(fewer, tmp_path / "fewer"), against=model, logits=False)
    else:
        layers = fingerprint.read(directory)
        del layers[LAYER]
        fingerprint.write(directory, layers)
        check = verify(directory, logits=False)
    assert (check.ok, check.codes_equal, check.scales_equal) == (False, False, False)
    assert LAYER in check.mismatched


def test_no_fingerprint(packed):
    model, directory = packed
    (directory / fingerprint.NAME).unlink()
    with pytest.raises(
        LlmqatError, match=r"has no fingerprint\.json: it was not written by llmqat, so there is nothing"
    ):
        verify(directory)
    assert verify(directory, against=model).ok


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_damaged_fingerprint(packed, content):
    (packed[1] / fingerprint.NAME).write_text(content)
    with pytest.raises(LlmqatError, match=r"fingerprint\.json is damaged"):
        verify(packed[1])


def test_fingerprint_is_of_bytes(packed):
    model, directory = packed
    layers = json.loads((directory / fingerprint.NAME).read_text())["layers"]
    assert layers == fingerprint.fingerprint(model) == fingerprint.read(directory)
    assert fingerprint.sha256(None) is None
    assert fingerprint.sha256(torch.tensor([1.0])) != fingerprint.sha256(torch.tensor([1]))
    assert fingerprint.sha256(torch.tensor([0.0])) != fingerprint.sha256(torch.tensor([-0.0]))
    assert fingerprint.sha256(torch.eye(3)[:, :2]) == fingerprint.sha256(torch.eye(3)[:, :2].contiguous())


def test_a_wrong_kernel_is_found(packed, monkeypatch):
    """Codes and scales right, arithmetic wrong: only logits tell."""
    monkeypatch.setattr("llmqat.serve.attach.accelerate_forward", lambda model: False)
    original = verify_module.PackedLinear.forward
    monkeypatch.setattr(verify_module.PackedLinear, "forward", lambda self, x: original(self, x) * 1.001)
    check = verify(packed[1])
    assert check.codes_equal
    assert check.scales_equal
    assert check.max_logit_error > check.bound
    assert not check.ok
