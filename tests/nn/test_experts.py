import copy

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, Llama4TextConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from llmqat.kernels import ops
from llmqat.nn.expert_layout import Layout, is_fused
from llmqat.nn.experts import SplitExperts, follow_routes, layout_of, record_routes
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.packed_linear import PackedLinear
from llmqat.scheme import QuantScheme

EXPERTS, HIDDEN, INTERMEDIATE, TOP = 5, 32, 48, 2


def fused(dtype=torch.float32):
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    config._experts_implementation = "grouped_mm"
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.to(dtype).eval()


@pytest.fixture
def routed():
    """Nine tokens, none of them for expert 3."""
    weights = torch.rand(9, TOP)
    index = torch.tensor([[0, 1], [1, 2], [4, 0], [2, 1], [0, 4], [1, 0], [4, 2], [2, 4], [0, 2]])
    return torch.randn(9, HIDDEN), index, weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_experts_compute_what_the_fused_ones_do(routed, dtype):
    """No farther from float64 than twice transformers' own default implementation."""
    hidden, index, weights = routed
    hidden, module = hidden.to(dtype), fused(dtype=dtype)
    double = copy.deepcopy(module).double()
    double.config._experts_implementation = "eager"
    exact = double(hidden.double(), index, weights)
    expected, y = module(hidden, index, weights), SplitExperts.from_fused(module)(hidden, index, weights)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert (y - exact).abs().max() <= 2 * (expected - exact).abs().max()


def test_only_routed_experts_run_and_only_on_their_tokens(routed):
    hidden, index, weights = routed
    split, seen = SplitExperts.from_fused(fused()), {}
    for number, expert in enumerate(split):
        expert.register_forward_pre_hook(lambda _, args, number=number: seen.update({number: args[0]}))
    split(hidden, index, weights)
    assert set(seen) == {0, 1, 2, 4}
    for number, x in seen.items():
        assert torch.equal(x, hidden[(index == number).any(1)])


def test_tokens_that_skip_the_experts(routed):
    """Zaya's router has a number for them beyond those of the experts."""
    hidden, index, weights = routed
    index = index.masked_fill(index == 4, EXPERTS)
    module = fused()
    module.config._experts_implementation = "eager"
    split = SplitExperts.from_fused(module).train()
    y = split(hidden, index, weights)
    torch.testing.assert_close(y, module(hidden, index, weights), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert split[4].up_proj.weight.grad.eq(0).all()


def test_gradients_are_those_of_the_fused_module(routed):
    """Also zeros for the expert without a token, in training; and none of them where nothing trains."""
    hidden, index, weights = routed
    module = fused().train()
    split = SplitExperts.from_fused(module)
    x, y = (hidden.clone().requires_grad_() for _ in range(2))
    module(x, index, weights).square().sum().backward()
    split(y, index, weights).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    for number, expert in enumerate(split):
        up = torch.cat([expert.gate_proj.weight.grad, expert.up_proj.weight.grad])
        assert torch.allclose(up, module.gate_up_proj.grad[number], rtol=1e-4, atol=1e-4)
        assert torch.allclose(expert.down_proj.weight.grad, module.down_proj.grad[number], rtol=1e-4, atol=1e-4)
    assert split[3].up_proj.weight.grad.eq(0).all()
    frozen = SplitExperts.from_fused(module).requires_grad_(False)
    assert not frozen(hidden, index, weights).requires_grad


def test_evaluation_leaves_idle_experts_alone(routed):
    split = SplitExperts.from_fused(fused())
    split(*routed).sum().backward()
    assert split[3].up_proj.weight.grad is None
    assert split[0].up_proj.weight.grad is not None


def test_routes_are_recorded_and_followed(routed):
    hidden, index, weights = routed
    first, second = (nn.ModuleList([SplitExperts.from_fused(fused())]) for _ in range(2))
    second.load_state_dict(first.state_dict())
    with record_routes(first) as routes:
        expected = first[0](hidden, index, weights)
    assert len(routes) == 1
    other = index.roll(1, 0)
    with follow_routes(second, routes):
        assert torch.equal(second[0](hidden, other, weights.roll(1, 0)), expected)
    assert not torch.equal(second[0](hidden, other, weights), expected), "no longer than asked"


def test_weights_are_copies_or_views_mode_is_kept_and_meta_works():
    module = fused()
    split = SplitExperts.from_fused(module)
    assert not split.training
    assert SplitExperts.from_fused(module.train()).training
    module.down_proj.data.zero_()
    assert split[0].down_proj.weight.ne(0).all()
    assert split[0].down_proj.weight.is_contiguous()
    views = SplitExperts.from_fused(module, copy=False)
    views[2].up_proj.weight.data.fill_(3)
    assert module.gate_up_proj[2, INTERMEDIATE:].eq(3).all()
    assert module.gate_up_proj.eq(3).sum() == INTERMEDIATE * HIDDEN
    with torch.device("meta"):
        meta = SplitExperts.from_fused(fused())
    assert meta[4].gate_proj.weight.is_meta
    assert meta[4].gate_proj.weight.shape == (INTERMEDIATE, HIDDEN)


def test_no_tensor_as_large_as_a_weight_is_saved_for_the_backward(routed):
    """Experts on a grid keep their inputs and their own parameters, like any quantized layer."""
    hidden, index, weights = routed
    split = SplitExperts.from_fused(fused()).train()
    for expert in split:
        for name in ("gate_proj", "up_proj", "down_proj"):
            scheme = QuantScheme(4, 16)
            setattr(expert, name, FakeQuantLinear.from_linear(getattr(expert, name), scheme, torch.bfloat16))
    own, saved = {p.data_ptr() for p in split.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        split(hidden.requires_grad_(), index, weights).sum().backward()
    assert saved
    assert max(t.numel() for t in saved if t.data_ptr() not in own) < HIDDEN * INTERMEDIATE


def test_packed_experts_run_the_operator_once_per_routed_expert(routed, monkeypatch):
    split, calls = SplitExperts.from_fused(fused()), []
    for expert in split:
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer = FakeQuantLinear.from_linear(getattr(expert, name), QuantScheme(4, 16), torch.float32)
            setattr(expert, name, PackedLinear.from_fake_quant(layer, layer.codes()))
    original = ops.packed_linear
    monkeypatch.setattr(ops, "packed_linear", lambda *a: calls.append(len(a[0])) or original(*a))
    split(*routed)
    assert len(calls) == 3 * 4
    assert sum(calls) == 3 * 9 * TOP


def test_fused_experts_are_recognised():
    assert is_fused(fused())
    assert not is_fused(SplitExperts.from_fused(fused()))
    assert not is_fused(nn.Conv1d(3, 4, 2))
    assert not is_fused(nn.Linear(3, 4))


SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS}
OWN_SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS}
LAYOUTS = {
    GptOssExperts: (GptOssConfig(**SIZES), Layout(True, True, True, True, own_gate=True, sorted=False)),
    Llama4TextExperts: (Llama4TextConfig(**SIZES), Layout(True, True, False, False, False, sorted=True, swapped=True)),
    NemotronHExperts: (NemotronHConfig(**OWN_SIZES), Layout(False, False, False, False, own_gate=False, sorted=False)),
}


def other_experts(kind):
    config, layout = LAYOUTS[kind]
    module = kind(copy.deepcopy(config)).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module, layout


@pytest.mark.parametrize("kind", LAYOUTS)
def test_other_layouts_are_found_split_and_put_together_again(kind, routed):
    """Transposed, interleaved, with biases, without a gate, and given tokens by expert: bit for bit there and back."""
    module, layout = other_experts(kind)
    assert layout_of(module) == layout
    split = SplitExperts.from_fused(module)
    for name, tensor in split.fused(lambda linear: linear.weight).items():
        assert torch.equal(tensor, module.get_parameter(name))
    if layout.sorted:
        hidden = torch.randn(EXPERTS * 4, HIDDEN)
        hidden[1::3] = 0
        routed = [hidden]
    else:
        module.config._experts_implementation = "eager"
    torch.testing.assert_close(copy.deepcopy(split)(*routed), module(*routed), rtol=1e-4, atol=1e-4)


def test_experts_that_were_not_chosen_have_gradients_of_zero_in_any_layout():
    module, _ = other_experts(Llama4TextExperts)
    split = SplitExperts.from_fused(module).train()
    split(torch.zeros(EXPERTS * 2, HIDDEN)).sum().backward()
    assert all(not parameter.grad.any() for parameter in split.parameters())


def test_a_forward_of_another_kind_is_not_split():
    """The Parameters fit, and a trial says that they are used in another way, or that tokens are."""

    class Scaled(MixtralExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)

    class Wanting(MixtralExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights, more):
            return super().forward(hidden_states, top_k_index, top_k_weights)

    config = MixtralConfig(**SIZES)
    config._experts_implementation = "eager"
    assert layout_of(MixtralExperts(config)) is not None
    assert layout_of(Scaled(config)) is layout_of(Wanting(config)) is None
    assert layout_of(nn.Linear(2, 3)) is None
