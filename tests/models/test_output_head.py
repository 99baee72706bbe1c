import math

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import llmqat
from llmqat.compat.torch import watching_operators
from llmqat.models import output_head
from llmqat.models.float_view import FloatCopy
from llmqat.models.output_head import OutputHead, ReferenceHead
from llmqat.scheme import QuantScheme
from llmqat.train.losses import ce_loss, kd_loss

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
AFTER = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64},
}
IDS = torch.arange(24).view(2, 12) * 5 % 128


def model_of(model_type, **changes):
    config = CONFIG_MAPPING[model_type](**SIZES | AFTER[model_type] | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def run_whole(model):
    return OutputHead(model, apart=False)


@torch.no_grad()
@pytest.mark.parametrize("model_type", AFTER)
def test_the_head_alone_gives_the_logits_of_the_model(model_type, capsys):
    model = model_of(model_type)
    below = OutputHead(model).below(model, input_ids=IDS, use_cache=False)
    assert below.hidden.shape == (2, 12, 64)
    assert below.outputs.logits.shape == (2, 1, 128)
    torch.testing.assert_close(below.logits(below.hidden), model(input_ids=IDS).logits, rtol=1e-6, atol=1e-6)
    assert not capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("fault", ["changed", "not called", "called twice"])
def test_a_head_that_is_not_the_last_step_runs_with_its_model(monkeypatch, capsys, fault):
    model = model_of("llama")
    original = model.forward

    def forward(**inputs):
        outputs = model.model(**inputs) if fault == "not called" else original(**inputs)
        if fault == "called twice":
            original(**inputs)
        logits = outputs.last_hidden_state if fault == "not called" else outputs.logits
        outputs["logits"] = logits * 2 if fault == "changed" else logits
        return outputs

    expected = forward(input_ids=IDS, use_cache=False).logits
    head = OutputHead(model)
    below = head.below(forward, input_ids=IDS, use_cache=False)
    assert torch.equal(below.logits(below.hidden), expected)
    assert "the logits of this model are made for all tokens at once" in capsys.readouterr().err
    head.below(forward, input_ids=IDS, use_cache=False)
    assert not capsys.readouterr().err  # said once
    assert not model.lm_head._forward_pre_hooks


def test_models_without_a_head_give_their_logits():
    model = torch.nn.Linear(4, 8)
    below = OutputHead(model).below(lambda x: type("Out", (), {"logits": model(x)}), x=torch.ones(1, 3, 4))
    assert torch.equal(below.logits(below.hidden), model(torch.ones(1, 3, 4)))


@pytest.mark.parametrize(("vocabulary", "tokens"), [(128, 10), (262_144, 200), (2**25, 3)])
def test_the_logits_of_a_chunk_are_few(vocabulary, tokens):
    below = output_head.BelowHead(None, torch.ones(1), lambda x: x, vocabulary)
    lengths = [len(range(tokens)[chunk]) for chunk in below.chunks(tokens)]
    assert sum(lengths) == tokens
    assert max(lengths) == 1 or max(lengths) * vocabulary <= output_head.CHUNK_LOGITS


@pytest.mark.parametrize("tokens", [342, 1024, 2048, 4096])
def test_no_chunk_is_of_a_few_tokens_left_over(tokens):
    below = output_head.BelowHead(None, torch.ones(1), lambda x: x, 49_152)
    lengths = [len(range(tokens)[chunk]) for chunk in below.chunks(tokens)]
    assert len(lengths) == math.ceil(tokens / (output_head.CHUNK_LOGITS // 49_152))
    assert min(lengths) >= 4 * output_head.TILE_ROWS


def gradients(model, head, teacher, targets):
    model.zero_grad()
    student = head.below(model, input_ids=IDS, use_cache=False)
    loss = (
        ce_loss(student, IDS)
        if targets == "ids"
        else kd_loss(student, teacher.below(teacher.reference.model, input_ids=IDS))
    )
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", ["teacher", "ids"])
@pytest.mark.parametrize(("tied", "head_bits"), [(False, None), (True, None), (False, 8)])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch, model_type, tied, head_bits, targets):
    """All that trains counts: what is below, the head itself (also where it is the embedding), its grid."""
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", 5 * 128)
    teacher = FloatCopy(model_of(model_type, tie_word_embeddings=tied))
    model = model_of(model_type, tie_word_embeddings=tied)
    llmqat.prepare(model, QuantScheme(4, 32), init="rtn", lm_head_bits=head_bits)
    model.requires_grad_(True)
    found = gradients(model, OutputHead(model), ReferenceHead(teacher), targets)
    expected = gradients(model, run_whole(model), ReferenceHead(teacher, apart=False), targets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert len(found[1]) > 8


def test_a_head_that_follows_its_inputs_sees_all_of_them():
    model = model_of("llama")
    llmqat.prepare(model, QuantScheme(8, 32, act_bits=8, act_static=True), init="rtn", lm_head_bits=8)
    llmqat.observe_activations(model, [IDS])
    assert OutputHead(model).layer is None


@pytest.mark.parametrize("trains", [False, True])
def test_the_weight_of_a_head_is_cast_once_a_forward(tiny_llama, monkeypatch, trains):
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", 8 * 128)
    model, ids = tiny_llama(), torch.randint(0, 128, (2, 24))
    model.lm_head.weight.requires_grad_(trains)
    head, casts = OutputHead(model), []

    def seen(operator, args, kwargs, result):
        if operator.overloadpacket is torch.ops.aten._to_copy and args[0].shape == model.lm_head.weight.shape:
            casts.append(result.dtype)

    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        below = head.below(model, input_ids=ids)
        hidden = below.hidden.flatten(0, 1)
        with watching_operators(seen), torch.no_grad():
            logits = torch.cat([below.logits(hidden[chunk]) for chunk in below.chunks(len(hidden))])
    assert torch.equal(logits, expected.flatten(0, 1))
    assert casts == [], "the comparison of the first forward cast it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", ["teacher", "ids"])
def test_gradients_by_products_are_as_exact_as_by_autograd(monkeypatch, targets, bias, dtype):
    """Of a head that trains, in bfloat16; several chunks, the last one smaller than a tile."""
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", 32 * 96)
    layer = torch.nn.Linear(48, 96, bias).to(dtype)
    head, hidden = OutputHead(model_of("llama")), torch.randn(1, 75, 48).to(dtype).requires_grad_()
    head.layer = layer
    other, ids = torch.randn(1, 75, 96), torch.randint(96, (1, 75))
    teacher = output_head.BelowHead(None, other.bfloat16(), lambda logits: logits, 96)

    def found(dtype, weights):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
            student = output_head.BelowHead(None, hidden.to(dtype), head.logits, 96, tuple(layer.parameters()), weights)
            loss = kd_loss(student, teacher) if targets == "teacher" else ce_loss(student, ids, torch.arange(75))
            return loss.detach(), *torch.autograd.grad(2 * loss, [hidden, *layer.parameters()])

    products, autograd = found(dtype, head.weights), found(dtype, None)
    assert [part.dtype for part in products] == [part.dtype for part in autograd]
    layer.double()
    hidden = hidden.detach().double().requires_grad_()
    for ours, theirs, exact in zip(products, autograd, found(torch.float64, None), strict=True):
        assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-6 * exact.norm()
