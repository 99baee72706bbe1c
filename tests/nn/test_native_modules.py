"""Modules of transformers by the compiled kernels: which are found, what they compute, and that they come back."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from llmqat.kernels import training
from llmqat.nn.native_modules import native_modules
from llmqat.nn.native_trials import convention_of, gating_of, rotary_features

pytestmark = pytest.mark.skipif(training.library() is None, reason="needs the compiled kernels")

FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3")


def step(model, ids):
    """The loss, and the gradients of all parameters as one vector."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


def native(model):
    """Names of classes whose forwards are replaced."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_torch(family, tiny):
    model = tiny(family).to(torch.bfloat16)
    ids = torch.randint(3, model.config.vocab_size, (2, 19))
    exact_loss, exact = step(copy.deepcopy(model).double(), ids)
    loss, gradient = step(model, ids)
    with native_modules(model):
        found = native(model)
        native_loss, native_gradient = step(model, ids)
        with torch.no_grad():
            evaluated = model(input_ids=ids).logits
    assert {name[-3:] for name in found} == {"orm", "MLP"}
    assert not native(model)
    assert abs(native_loss - exact_loss) <= 1.5 * abs(loss - exact_loss) + 1e-3
    assert (native_gradient - exact).norm() <= 1.5 * (gradient - exact).norm()
    assert not torch.equal(native_gradient, gradient)
    assert torch.allclose(evaluated, model(input_ids=ids).logits, atol=0.05, rtol=0.05)


def test_gradient_checkpointing_changes_nothing(tiny):
    model, ids = tiny("llama").train(), torch.randint(3, 60, (2, 19))
    with native_modules(model):
        plain = step(model, ids)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        again = step(model, ids)
    assert plain[0] == again[0]
    assert torch.equal(plain[1], again[1])


def test_everything_comes_back_after_an_error(tiny):
    model, own = tiny("llama"), modeling_llama.apply_rotary_pos_emb

    def fail():
        with native_modules(model, model):
            with native_modules(model):
                pass
            assert native(model) == {"LlamaRMSNorm", "LlamaMLP"}
            assert modeling_llama.apply_rotary_pos_emb is not own
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not native(model)
    assert modeling_llama.apply_rotary_pos_emb is own


def test_calls_that_the_kernels_do_not_take_run_as_before(tiny):
    model, ids = tiny("llama").double(), torch.randint(3, 60, (2, 9))
    expected = model(input_ids=ids).logits
    with native_modules(model):
        assert native(model)
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_switch_leaves_modules_to_torch(tiny, monkeypatch):
    model = tiny("llama")
    monkeypatch.setenv(training.SWITCH, "torch")
    with native_modules(model):
        assert not native(model)


def test_random_state_stays(tiny):
    before = torch.get_rng_state()
    with native_modules(tiny("llama")):
        torch.manual_seed(0)  # `tiny` draws too
    torch.set_rng_state(before)
    model = tiny("llama")
    before = torch.get_rng_state()
    with native_modules(model):
        assert torch.equal(torch.get_rng_state(), before)


class OtherRMSNorm(LlamaRMSNorm):
    """Divides by more than it should."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) * 1.01


class BiasedRMSNorm(LlamaRMSNorm):
    """Adds a parameter of its own."""

    def __init__(self, count):
        super().__init__(count)
        self.bias = nn.Parameter(torch.zeros(count))

    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.bias


def test_other_norms_are_left():
    assert convention_of(LlamaRMSNorm(24, 1e-5)) == (1e-5, 0.0, False)
    assert convention_of(OtherRMSNorm(24)) is None
    assert convention_of(BiasedRMSNorm(24)) is None
    assert convention_of(nn.LayerNorm(24)) is None


class ClampedMLP(LlamaMLP):
    """Limits its gate."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.5) * self.up_proj(x))


class SwappedMLP(LlamaMLP):
    """Activates the other projection."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class DroppedMLP(LlamaMLP):
    """Drops values in training."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


def test_other_gates_are_left(tiny):
    config = tiny("llama").config
    assert gating_of(LlamaMLP(config)) == ("silu", "act_fn", False)
    for kind in (ClampedMLP, SwappedMLP, DroppedMLP):
        assert gating_of(kind(config).eval()) is None, kind
    relu = LlamaMLP(config)
    relu.act_fn = nn.ReLU()
    assert gating_of(relu) is None


def neighbours(q, k, cosine, sine):
    """Rotates pairs of neighbours, as GLM does."""
    cosine, sine = cosine[:, None], sine[:, None]

    def turned(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    return q * cosine + turned(q) * sine, k * cosine + turned(k) * sine


def test_other_rotations_are_left():
    assert rotary_features(modeling_llama.apply_rotary_pos_emb) == "all"
    assert not rotary_features(neighbours)
    assert not rotary_features(lambda x, cosine, sine: x)
