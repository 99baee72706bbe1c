"""Every family from the float model to the packed file, and the table of it in docs/support.md."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.quant.affine import dequantize
from llmqat.scheme import QuantScheme
from tests.conftest import FAMILIES
from tests.models.conftest import CELLS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
TABLE = re.compile(r"(?<=<!-- support: begin -->\n).*?(?=<!-- support: end -->)", re.DOTALL)
# Linear layers in a block: q, k, v, o, gate, up, down unless some are fused, or there is no gate.
LAYERS = {"phi3": 4, "gpt2": 4, "opt": 6, "bert": 6, "roberta": 6, "distilbert": 6}
ENCODERS = ("bert", "roberta", "distilbert")


@pytest.mark.parametrize(("init", "mode"), CELLS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_family(outcome, model_type, init, mode):
    """Prepare, one step, pack: transformers and llmqat load equal weights, with logits within the bound. Families with
    experts: test_experts.py."""
    result = outcome(model_type, init, mode)
    assert result.layers == 2 * LAYERS.get(model_type, 7)
    assert len(result.errors) == (result.layers if init == "gptq" else 0)
    assert all(gptq < rtn for rtn, gptq in result.errors.values())
    assert result.trained
    assert result.equal
    assert result.transformers
    assert result.within_bound


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scales_alone_train(scales_train, model_type):
    assert scales_train(model_type)


def test_the_support_table_is_what_the_tests_gave(support_table, request):
    """``pytest tests/models/test_families.py --write-support`` brings it up to date."""
    text, table = PAGE.read_text(encoding="utf-8"), support_table()
    if request.config.getoption("--write-support"):
        text = TABLE.sub(lambda _: table, text)
        PAGE.write_text(text, encoding="utf-8")
    assert TABLE.findall(text) == [table]


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_is_fine_tuned_on_labels_and_shipped(tiny, tmp_path, model_type):
    """A user's own loop: cross-entropy on labels with a padding mask; the head trains along and stays float."""
    model = tiny(model_type)
    report = prepare(model, QuantScheme(4, 16), storage_dtype=torch.bfloat16)
    heads = {layer.name for layer in report.skipped}
    assert {layer.reason for layer in report.skipped} == {"outside the blocks"}
    assert any(name.startswith("classifier") for name in heads)
    ids, labels = torch.randint(3, 128, (6, 10)), torch.arange(6) % 3
    mask = torch.arange(10) < torch.tensor([[10], [7], [5], [10], [3], [8]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    directory = save_packed(model, tmp_path)
    with torch.no_grad():
        ours = load_packed(directory)(input_ids=ids, attention_mask=mask.long()).logits
        theirs = AutoModelForSequenceClassification.from_pretrained(directory)(ids, attention_mask=mask.long()).logits
        trained = model(input_ids=ids, attention_mask=mask.long()).logits
    assert ours.shape == (6, 3)
    assert torch.equal(ours.argmax(-1), trained.argmax(-1))
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("scheme", [QuantScheme(4, 16), QuantScheme(3, -1), QuantScheme(8, 32), QuantScheme(2, 16)])
def test_conv1d_in_every_grid(tiny, tmp_path, scheme, symmetric):
    """GPT-2's rows of 64 and of 256 weights, packed as (in, out), load in transformers as they are."""
    model = tiny("gpt2")
    scheme = QuantScheme(scheme.bits, scheme.group_size, symmetric)
    prepare(model, scheme, storage_dtype=torch.bfloat16)
    directory = save_packed(model, tmp_path)
    theirs, ours = type(model).from_pretrained(directory), load_packed(directory)
    layers = list(quantized_layers(model))
    assert len(layers) == 8
    for name, layer, _ in layers:
        packed, conv = ours.get_submodule(name), theirs.get_submodule(name)
        assert packed.scheme == scheme
        assert torch.equal(packed.unpack()[0], layer.codes())
        assert isinstance(conv, Conv1D)
        assert torch.equal(conv.weight.T, layer.quantized_weight())
        assert torch.equal(conv.weight.T, dequantize(*packed.unpack(), scheme))


def test_conv1d_keeps_its_parameters(tiny):
    model = tiny("gpt2")
    convs = {name: m for name, m in model.named_modules() if isinstance(m, Conv1D)}
    before = {name: (m.weight, m.weight.detach().clone(), m.bias) for name, m in convs.items()}
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        prepare(model, QuantScheme(8, -1))
        for name, layer, _ in quantized_layers(model):
            weight, value, bias = before[name]
            assert layer.weight is weight
            assert layer.bias is bias
            assert torch.equal(layer.weight, value.T)
            layer.enabled = False
        torch.testing.assert_close(model(input_ids=ids).logits, logits)


def test_a_bare_model_without_a_head(tiny):
    """Blocks of `LlamaModel` and `GPT2Model` lie at another path than in the model with a head."""
    for model_type, layers in (("llama", 14), ("gpt2", 8), ("opt", 12), ("bert", 12)):
        bare = tiny(model_type).base_model
        report = prepare(bare, QuantScheme(4, 16), init="gptq", calibration=[torch.arange(48).view(2, 24)])
        assert len(report.quantized) == len(report.errors) == layers
        assert not any(isinstance(m, nn.Linear) for name, m in bare.named_modules() if "layer" in name)


def test_transformers_dequantizes_a_linear_model_too(tiny, tmp_path):
    model = tiny("phi3")
    prepare(model, QuantScheme(4, 16, False), storage_dtype=torch.bfloat16)
    directory = save_packed(model, tmp_path)
    theirs = type(model).from_pretrained(directory)
    for name, layer, _ in quantized_layers(model):
        assert torch.equal(theirs.get_submodule(name).weight, layer.quantized_weight())
