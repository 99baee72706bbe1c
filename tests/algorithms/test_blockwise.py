import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.algorithms import blockwise
from llmqat.algorithms import gptq_model as driver
from llmqat.algorithms.blocks import BlockInputs, layers_of
from llmqat.algorithms.blockwise import Blockwise, Pairs, Target, reconstruct, regrouped
from llmqat.algorithms.gptq_model import GptqSettings, gptq_model
from llmqat.kernels import norms, training
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.nn.quantizers import disable_quantizers
from llmqat.scheme import QuantScheme
from llmqat.team import ALONE, Team
from llmqat.train.checkpoint import Checkpoints, SavedBlocks
from tests.conftest import TINY
from tests.two_processes import run_in_two

FEW = Blockwise(steps=4, lr=2e-2, sequences=4, dtype=torch.float32)


@pytest.fixture
def tokens():
    return list(torch.randint(0, 128, (16, 2, 24)))


def quantized(model, tokens, settings=FEW, keep_float=False, saved=None, team=ALONE, **options):
    prepare(model, QuantScheme(3, 16), **options)
    model.requires_grad_(False)
    settings = GptqSettings(0.01, keep_float, blockwise=settings)
    gptq_model(model, model.model.layers, tokens, settings, saved, team=team)
    return model


@torch.no_grad()
def logits(model, tokens):
    return torch.cat([model(input_ids=batch).logits for batch in tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_comes_nearer_to_the_float_model(tiny_llama, tokens, dtype):
    calibration, other = list(torch.randint(0, 128, (96, 2, 24))), tokens
    exact = logits(tiny_llama(), other)
    settings = Blockwise(steps=40, lr=1e-2, dtype=dtype)
    errors = [
        (logits(quantized(tiny_llama(), calibration, chosen), other) - exact).norm() for chosen in (None, settings)
    ]
    assert errors[1] < 0.99 * errors[0]


def test_a_block_learns_the_float_output_from_what_it_reads_on_the_quantized_prefix(tiny_llama, tokens, monkeypatch):
    seen, original = [], blockwise.reconstruct

    def spy(block, inputs, target, *rest):
        seen.append(([x.clone() for x in inputs.hidden], [y.clone() for y in target.outputs]))
        return original(block, inputs, target, *rest)

    monkeypatch.setattr(driver, "reconstruct", spy)
    model = quantized(tiny_llama(), tokens)
    batches = regrouped(tokens, FEW.sequences)
    read = BlockInputs.capture(model, list(model.model.layers), batches)
    float_model = tiny_llama()
    plain = BlockInputs.capture(float_model, list(float_model.model.layers), batches)
    for block, float_block, (hidden, targets) in zip(model.model.layers, float_model.model.layers, seen, strict=True):
        assert all(map(torch.equal, hidden, read.hidden))
        plain.advance(float_block)
        for found, expected in zip(targets, plain.hidden, strict=True):
            torch.testing.assert_close(found, expected)
        read.advance(block)


def test_the_float_model_is_kept_beside_the_same_codes(tiny_llama, tokens):
    exact = logits(tiny_llama(), tokens)
    plain, kept = (
        quantized(tiny_llama(), tokens, keep_float=keep, storage_dtype=torch.bfloat16) for keep in (False, True)
    )
    for a, b in zip(quantized_layers(plain), quantized_layers(kept), strict=True):
        assert torch.equal(a.layer.codes(), b.layer.codes())
        assert torch.equal(a.layer.stored_scale(), b.layer.stored_scale())
    with disable_quantizers(kept):
        assert torch.equal(logits(kept, tokens), exact)


def test_what_made_a_block_worse_is_taken_back(tiny_llama, tokens):
    start = quantized(tiny_llama(), tokens, None)
    wild = quantized(tiny_llama(), tokens, Blockwise(steps=4, lr=50.0, lr_scale=0.0, dtype=torch.float32))
    for a, b in zip(quantized_layers(start), quantized_layers(wild), strict=True):
        assert torch.equal(a.layer.codes(), b.layer.codes()), a.name


def test_nothing_but_codes_and_scales_changes(tiny_llama, tokens):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.named_parameters() if "norm" in name}
    quantized(model, tokens)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_parameters_that_are_to_train_later_get_no_gradient(tiny_llama, tokens):
    model = tiny_llama()
    prepare(model, QuantScheme(3, 16), init="blockwise", calibration=tokens, block_steps=2)
    assert all(p.grad is None for p in model.parameters())
    assert model.model.norm.weight.requires_grad


def test_experts_that_no_token_reaches_stay(tiny_moe):
    """Two tokens, each of which reaches two of six experts."""
    start, trained = (
        quantized(tiny_moe("mixtral"), [torch.tensor([[1, 2]])] * 2, settings) for settings in (None, FEW)
    )
    changed = [
        not torch.equal(a.layer.scale, b.layer.scale)
        for a, b in zip(quantized_layers(start), quantized_layers(trained), strict=True)
        if ".experts." in a.name
    ]
    assert 0 < sum(changed) < len(changed)


@pytest.mark.parametrize("keep_float", [True, False])
@pytest.mark.parametrize("finished", [0, 1])
def test_resumed_from_any_block(tiny_llama, tokens, tmp_path, monkeypatch, keep_float, finished):
    expected = quantized(tiny_llama(), tokens, keep_float=keep_float)
    original, calls = driver.reconstruct, []

    def cut(*args):
        calls.append(1)
        if len(calls) > finished:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "reconstruct", cut)
        with pytest.raises(KeyboardInterrupt):
            quantized(tiny_llama(), tokens, keep_float=keep_float, saved=SavedBlocks(Checkpoints(tmp_path)))
    resumed = quantized(tiny_llama(), tokens, keep_float=keep_float, saved=SavedBlocks(Checkpoints(tmp_path)))
    states = expected.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_all_blocks_saved_are_restored_without_data(tiny_llama, tokens, tmp_path, capsys):
    saved = SavedBlocks(Checkpoints(tmp_path))
    first = quantized(tiny_llama(), tokens, saved=saved)
    again = quantized(tiny_llama(), [], saved=saved)
    assert all(torch.equal(first.state_dict()[name], value) for name, value in again.state_dict().items())
    said = [line for line in capsys.readouterr().err.splitlines() if "of GPTQ's on average" in line]
    assert len(said) == 2
    assert said[0] == said[1]


def member(rank):
    torch.manual_seed(0)
    model, tokens = LlamaForCausalLM(LlamaConfig(**TINY)).eval(), list(torch.randint(0, 128, (4, 2, 24)))
    alone = quantized(copy.deepcopy(model), tokens)
    # What the second finds does not count, as on a device whose sums differ.
    found = quantized(model, tokens, FEW._replace(lr=[FEW.lr, 1.0][rank]), team=Team(rank, 2))
    assert all(torch.equal(found.state_dict()[name], value) for name, value in alone.state_dict().items())


def test_processes_take_over_what_the_first_has_found(tmp_path):
    run_in_two(member, tmp_path)


@pytest.mark.parametrize("counts", [(1, 4, 1), (6, 4, 4), (8, 4, 4), (3, 8, 3)])
def test_regrouped_into_batches_of_one_size(counts):
    rows, sequences, size = counts
    batches = regrouped(list(torch.arange(rows * 5).view(rows, 1, 5)), sequences)
    assert {tuple(batch.shape) for batch in batches} == {(size, 5)}
    assert torch.equal(torch.cat(batches), torch.arange(rows * 5).view(rows, 5)[: len(batches) * size])


def test_every_batch_trains_or_is_held_out(tiny_llama, tokens):
    model = tiny_llama()
    prepare(model, QuantScheme(3, 16))
    inputs = BlockInputs.capture(model, list(model.model.layers), tokens)
    pairs = Pairs(model.model.layers[0], inputs, Target([h + 1 for h in inputs.hidden], torch.ones(64)), torch.float32)
    assert pairs.held_out == [0, 8]
    assert sorted(pairs.held_out + pairs.training) == list(range(16))
    drawn = list(pairs.draw(28))
    assert sorted(drawn[:14]) == sorted(drawn[14:]) == pairs.training
    assert drawn[:14] != drawn[14:]
    assert drawn == list(pairs.draw(28))


def test_errors_count_as_the_norm_behind_the_block_sees_them(tiny_llama, tokens):
    model = tiny_llama()
    inputs = BlockInputs.capture(model, list(model.model.layers), tokens[:1])
    exact = inputs.run(model.model.layers[0], 0)
    large = exact * torch.logspace(0, 3, 24)[:, None]  # each token another size
    gain = torch.rand(exact.shape[-1])
    found = Pairs(model.model.layers[0], inputs, Target([large], gain), torch.float32).error(0).detach()
    torch.testing.assert_close(found, (1 - torch.logspace(0, -3, 24)).square().mean(), rtol=1e-4, atol=0)
    large[..., 3] = 1e4 * exact[..., 3]  # holds nearly all of each output
    gain[3] = 0  # and is not read
    found = Pairs(model.model.layers[0], inputs, Target([large], gain), torch.float32).error(0).detach()
    torch.testing.assert_close(found, (1 - torch.logspace(0, -3, 24)).square().mean(), rtol=1e-4, atol=0)


def test_too_few_batches_to_hold_any_out(tiny_llama, tokens):
    model = tiny_llama()
    prepare(model, QuantScheme(3, 16))
    inputs = BlockInputs.capture(model, list(model.model.layers), tokens[:4])
    weights = [layer.weight.detach() for layer in layers_of(model.model.layers[0]).values()]
    error = reconstruct(
        model.model.layers[0], inputs, Target([h + 1 for h in inputs.hidden], torch.ones(64)), weights, FEW
    )
    assert error.blockwise <= 1.1 * error.gptq


@pytest.mark.skipif(training.library() is None, reason="no compiled kernels")
def test_calibration_runs_by_the_kernels_of_training(tiny_llama, tokens, monkeypatch):
    seen, original = [], norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", lambda *args: (seen.append(1), original(*args))[1])
    model = tiny_llama()
    prepare(model, QuantScheme(3, 16), init="gptq", calibration=tokens)
    assert seen
    assert not any("forward" in vars(module) for module in model.modules())
