import json
import random
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmqat.errors import LlmqatError
from llmqat.formats import fingerprint
from llmqat.formats.contents import contents_of
from llmqat.formats.verify import Verification, verify
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.nn.packed_linear import PackedLinear
from llmqat.scheme import QuantScheme
from tests.covering import every
from tests.narrow_products import narrow_products

LAYER = "model.layers.0.mlp.down_proj"


def edit(directory, name, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors[name])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype", "act_bits"),
    every(2, (2, 3, 4, 8), (True, False), (torch.bfloat16, torch.float32), (8, None)),
    ids=str,
)
def test_what_was_packed_verifies(trained, tmp_path, bits, symmetric, dtype, act_bits):
    model = trained(QuantScheme(bits, 16, symmetric, act_bits), dtype, "lora")
    directory = save_packed(model, tmp_path)
    for against in (None, model):
        check = verify(directory, against)
        assert (check.ok, check.layers, check.mismatched) == (True, 7, ())
        assert 0 < check.max_logit_error <= check.bound < 1e-3


def test_verifying_again_finds_the_very_numbers(trained, tmp_path):
    directory = save_packed(trained(QuantScheme(4, 16), torch.bfloat16), tmp_path)
    assert verify(directory) == verify(str(directory))


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
        written = fingerprint.read(directory)
        del written.layers[LAYER]
        fingerprint.write(directory, written.layers, written.tensors)
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


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"format": 2}', '{"format": 2, "layers": {}, "tensors": {}, "files": {}}']
)
def test_damaged_fingerprint(packed, content):
    (packed[1] / fingerprint.NAME).write_text(content)
    with pytest.raises(LlmqatError, match=r"fingerprint\.json is damaged"):
        verify(packed[1])


def test_fingerprint_is_of_bytes(packed):
    model, directory = packed
    layers = json.loads((directory / fingerprint.NAME).read_text())["layers"]
    assert layers == contents_of(model).hashes == fingerprint.read(directory).layers
    assert fingerprint.sha256(None) is None
    assert fingerprint.sha256(torch.tensor([1.0])) != fingerprint.sha256(torch.tensor([1]))
    assert fingerprint.sha256(torch.tensor([0.0])) != fingerprint.sha256(torch.tensor([-0.0]))
    assert fingerprint.sha256(torch.eye(3)[:, :2]) == fingerprint.sha256(torch.eye(3)[:, :2].contiguous())


def test_a_wrong_kernel_is_found(packed, monkeypatch):
    """Codes and scales right, arithmetic wrong: only logits tell."""
    monkeypatch.setattr("llmqat.serve.attach.accelerate_forward", lambda model: False)
    original = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: original(self, x) * 1.001)
    check = verify(packed[1])
    assert check.codes_equal
    assert check.scales_equal
    assert check.max_logit_error > check.bound
    assert not check.ok


def test_a_fingerprint_of_an_earlier_version(packed):
    """It proves codes and scales alone; the trained model still proves the rest."""
    model, directory = packed
    (directory / fingerprint.NAME).write_text(json.dumps({"format": 1, "layers": {}}, indent=1))
    with pytest.raises(LlmqatError, match=r"is of an earlier llmqat, which left out embeddings, norms and configs"):
        verify(directory)
    assert verify(directory, against=model, logits=False).ok


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_the_smallest_change_of_a_float_part_is_found(packed, name):
    model, directory = packed
    edit(directory, name, lambda tensor: tensor.view(torch.int16).flatten()[3:4].add_(1))
    for against in (None, model):
        check = verify(directory, against, logits=False)
        assert not check.ok
        assert check.codes_equal
        assert check.scales_equal
        assert set(check.changed) == {"model.safetensors", name}


def test_every_byte_counts(trained, tmp_path, tokenizer):
    """One bit anywhere in any file that was written: `ok` is False, or the damage is named."""
    generator = random.Random(0)
    directory = save_packed(trained(QuantScheme(4, 16), torch.bfloat16), tmp_path, tokenizer)
    for path in sorted(directory.iterdir()):
        raw = path.read_bytes()
        for place in [0, len(raw) - 1, *(generator.randrange(len(raw)) for _ in range(4))]:
            changed = bytearray(raw)
            changed[place] ^= 1 << generator.randrange(8)
            path.write_bytes(changed)
            with suppress(LlmqatError):  # which names the damage, in place of a result
                assert not verify(directory, logits=False).ok, (path.name, place)
        path.write_bytes(raw)
    assert verify(directory, logits=False).ok


def test_a_file_that_was_added_or_is_missing(trained, tmp_path, tokenizer):
    directory = save_packed(trained(QuantScheme(4, 16), torch.bfloat16), tmp_path, tokenizer)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "notes.txt").write_text("mine")
    (directory / "tokenizer_config.json").unlink()
    check = verify(directory, logits=False)
    assert (check.ok, check.changed) == (False, ("chat_template.jinja", "tokenizer_config.json"))


def test_bounds_are_those_of_float32(trained, tmp_path):
    directory = save_packed(trained(QuantScheme(4, 16), torch.bfloat16), tmp_path)
    expected = verify(directory)
    with narrow_products():
        assert verify(directory) == expected
