"""Every site of every family is exact, and what is not exact is no site."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from llmqat.algorithms.fold import TOLERANCE
from llmqat.errors import LlmqatError
from llmqat.models import smooth_sites
from llmqat.models.architectures import ARCHITECTURES
from llmqat.models.experts import experts_as_linears
from llmqat.models.patcher import prepare, smooth
from llmqat.models.smooth_sites import Site, folds_of
from llmqat.scheme import QuantScheme

BERT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "pad_token_id": 0}
BERT |= {"num_attention_heads": 4, "initializer_range": 0.15}
SIZES = BERT | {"num_key_value_heads": 2, "head_dim": 16}
DISTILBERT = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 128, "initializer_range": 0.15}
GPT2 = {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "vocab_size": 128, "initializer_range": 0.15}
OPT = BERT | {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15}
EXPERTS = SIZES | {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2}

LLAMA_SITES = ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
GEMMA2_SITES = ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"]
OPT_SITES = ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"]
MOE_SITES = [*LLAMA_SITES[:3], *(f"mlp.experts.{expert}.up_proj" for expert in range(4))]

# model type, config, sites of a block
CASES = {
    "llama": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}, LLAMA_SITES),
    "mistral": ("mistral", SIZES, LLAMA_SITES),
    "qwen2": ("qwen2", SIZES, LLAMA_SITES),
    "qwen3": ("qwen3", SIZES, LLAMA_SITES),
    "gemma": ("gemma", SIZES, LLAMA_SITES),
    "gemma2": ("gemma2", SIZES, GEMMA2_SITES),
    "gemma3_text": ("gemma3_text", SIZES, GEMMA2_SITES),
    "phi3": ("phi3", SIZES, ["input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"]),
    "opt": ("opt", OPT, OPT_SITES),
    "opt-gelu": ("opt", OPT | {"activation_function": "gelu"}, OPT_SITES[:3]),
    "opt-post-norm": ("opt", OPT | {"do_layer_norm_before": False}, ["self_attn.v_proj", "fc1"]),
    "gpt2": ("gpt2", GPT2, ["ln_1", "attn.c_attn", "ln_2"]),
    "bert": ("bert", BERT, ["attention.self.value"]),
    "roberta": ("roberta", BERT, ["attention.self.value"]),
    "distilbert": ("distilbert", DISTILBERT, ["attention.v_lin"]),
    "mixtral": ("mixtral", EXPERTS, MOE_SITES),
    "qwen3_moe": ("qwen3_moe", EXPERTS, MOE_SITES),
    "qwen3_moe-dense": ("qwen3_moe", EXPERTS | {"mlp_only_layers": [0, 1]}, LLAMA_SITES),
}


def build(model_type, config):
    """A random model, its norms and biases random too: zeros and ones would hide a factor forgotten."""
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if "bert" in model_type else AutoModelForCausalLM
    model = auto.from_config(CONFIG_MAPPING[model_type](**config)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def folds(model, sites=None):
    row = ARCHITECTURES[model.config.model_type]
    blocks = model.get_submodule(row.blocks)
    scheme = lambda _: QuantScheme()  # noqa: E731
    with experts_as_linears(model):
        return [
            fold
            for i, block in enumerate(blocks)
            for fold in folds_of(block, f"{row.blocks}.{i}.", sites or row.smooth_sites, model.config, scheme)
        ]


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[0]).logits


def test_every_family_with_sites_has_a_case():
    assert {case[0] for case in CASES.values()} == {name for name, row in ARCHITECTURES.items() if row.smooth_sites}


@pytest.mark.parametrize("case", CASES)
def test_any_scale_leaves_the_logits(case, tokens):
    model_type, config, names = CASES[case]
    model = build(model_type, config)
    before = logits(model, tokens)
    found = folds(model)
    path = ARCHITECTURES[model_type].blocks
    assert [fold.name for fold in found] == [f"{path}.{i}.{name}" for i in range(2) for name in names]
    for fold in found:
        s = 2.0 ** torch.randint(-3, 8, (len(fold.written[0]),))
        plain = [tensor.clone() for tensor in (*fold.written, *fold.read)]
        fold.apply(fold.representable(s, torch.float32))
        moved = [not torch.equal(old, new) for old, new in zip(plain, (*fold.written, *fold.read), strict=True)]
        assert all(moved), f"{fold.name}: a tensor was not scaled"
        torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=TOLERANCE * before.abs().max().item())


@pytest.mark.parametrize(
    ("case", "alpha"), [*((case, "auto") for case in CASES), ("llama", 0.5), ("opt", 0.5), ("mixtral", 0.5)]
)
def test_smoothing_takes_outliers_out_of_every_family(case, alpha, tokens):
    """Outliers injected at every site by the inverse fold: int8 activations fail on them, and come back."""
    model_type, config, names = CASES[case]
    model = build(model_type, config)
    before = logits(model, tokens)
    for fold in folds(model):
        s = torch.ones(len(fold.written[0]))
        s[[3, 11]] = 2.0**-9
        fold.apply(fold.representable(s, torch.float32))
    scheme = QuantScheme(8, 16, act_bits=8)

    def error():
        prepare(model, scheme)
        return float((logits(model, tokens) - before).norm() / before.norm())

    state = [parameter.clone() for parameter in model.parameters()]
    done = smooth(model, tokens, alpha, scheme=scheme)
    assert len(done) == 2 * len(names)
    assert max(site.change for site in done.values()) <= TOLERANCE
    if alpha == "auto":
        gains = [site.errors[0] / max(site.errors[1], 1e-9) for site in done.values()]
        assert min(gains) > 2, dict(zip(done, gains, strict=True))
    smoothed = error()
    model = build(model_type, config)
    for parameter, value in zip(model.parameters(), state, strict=True):
        parameter.data = value
    assert smoothed < (0.5 if "moe" in model_type or model_type == "mixtral" else 0.25) * error()


@pytest.mark.parametrize(
    ("case", "site"),
    [
        ("gpt2", Site("mlp.c_fc", ("mlp.c_proj",))),
        ("gemma2", Site("post_attention_layernorm", smooth_sites.GATE_UP, offset=1.0)),
        ("gemma2", Site("input_layernorm", smooth_sites.QKV)),
        ("llama", Site("mlp.gate_proj", ("mlp.down_proj",))),
        ("llama", Site("input_layernorm", smooth_sites.QKV[:2])),
        ("mixtral", Site("post_attention_layernorm", ("mlp.gate",))),
        ("qwen3_moe", Site("mlp.experts.*.gate_proj", ("mlp.experts.*.down_proj",))),
        ("bert", Site("attention.output.LayerNorm", ("intermediate.dense",))),
        ("opt-gelu", Site("fc1", ("fc2",))),
        ("opt-post-norm", Site("self_attn_layer_norm", smooth_sites.QKV)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.source,
)
def test_what_is_not_exact_changes_the_logits(case, site, tokens):
    """The tolerance is tight enough to see each of the mistakes that the table avoids."""
    model_type, config, _ = CASES[case]
    model = build(model_type, config)
    before = logits(model, tokens)
    fold = folds(model, (site,))[0]
    fold.apply(torch.full((len(fold.written[0]),), 4.0))
    assert (logits(model, tokens) - before).abs().max() > 100 * TOLERANCE * before.abs().max()


def test_query_heads_of_a_kv_head_share_a_scale(tokens):
    fold = folds(build("llama", SIZES))[1]
    s = torch.arange(32.0)
    inputs = fold.spread(s).view(4, 16)
    assert torch.equal(inputs, s.view(2, 16)[[0, 0, 1, 1]])
    assert torch.equal(fold.largest(fold.spread(s)), s)
    x = torch.rand(64)
    assert torch.equal(fold.largest(x).view(2, 16), x.view(2, 2, 16).amax(1))


def test_offset_norms_round_in_their_storage_dtype_and_stay_exact(tokens):
    """Gemma stores w of 1 + w: after smoothing it holds in bfloat16, though (1 + w) / 2^k - 1 would not."""
    model = build("gemma2", SIZES)
    before = logits(model, tokens)
    norm = model.model.layers[0].input_layernorm.weight
    norm.data[5] += 40
    model.model.layers[0].input_layernorm.weight.data = norm.data.bfloat16().float()
    before = logits(model, tokens)
    smooth(model, tokens, 0.5, storage_dtype=torch.bfloat16)
    rounded = norm.data.bfloat16().float()
    torch.testing.assert_close(norm.data, rounded, rtol=0, atol=1e-6)
    norm.data = rounded
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=TOLERANCE * before.abs().max().item())


def test_offset_norms_in_low_precision_are_refused(tokens):
    model = build("gemma2", SIZES).bfloat16()
    message = r"layers\.0\.input_layernorm multiplies by 1 \+ weight: .* not in bfloat16; load the model with dtype="
    with pytest.raises(LlmqatError, match=message):
        smooth(model, tokens)
