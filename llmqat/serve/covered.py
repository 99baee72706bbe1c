"""Which models the native decoder computes: by their config, their plan, and the tensors of their blocks."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from transformers import PreTrainedConfig

from llmqat.models.coverage import CoverageReport
from llmqat.serve.families import ACTIVATIONS, FAMILIES, Family, rotates_always, sees_all
from llmqat.serve.parts import activation_of, linears_of
from llmqat.serve.stacks import has_towers, stack_of, why_not_sampled

MAX_HEAD_DIM = 512
# Options that the decoder follows in any family: read from the config, or found in modules and tables.
FOLLOWED = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "layer_types",
        "rope_parameters",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "attention_bias",
        "attention_out_bias",
        "mlp_bias",
        "use_bias",
        "query_pre_attn_scalar",
        "attention_multiplier",
        "tie_word_embeddings",
    ]
)
# Options that change nothing in a forward without gradients.
WITHOUT_EFFECT = frozenset(
    [
        "initializer_range",
        "attention_dropout",
        "residual_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "pretraining_tp",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "eod_token_id",
    ]
)
# Options that are followed where the row of the family says which layers have a window, and which rotate.
OF_WINDOWS = frozenset(
    ["sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"]
)
OF_ROTATION = frozenset(("no_rope_layers", "no_rope_layer_interval"))


def why_model_not_covered(model: Any, stack: Any) -> str:
    """Why the native decoder computes no model of this config, with this decoder stack or none; empty if it can."""
    if stack is not None:
        return why_config_not_covered(stack.config)
    why_not = why_config_not_covered(model.config.get_text_config())
    return why_not or f"a {type(model).__name__} has no decoder stack below its head"


def why_config_not_covered(config: Any) -> str:
    """Why the native decoder computes no model of this config; empty if it can."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"the family {config.model_type} has no native blocks"
    activation = activation_of(config, family)
    head_dim = _widest_head(config)
    if activation not in ACTIVATIONS:
        return f"the kernels do not compute the activation {activation}"
    if head_dim > MAX_HEAD_DIM:
        return f"heads of {head_dim} features exceed the {MAX_HEAD_DIM} of the kernels"
    unknown = [f"{name}={value!r}" for name, value in _unknown_options(config, family)]
    return f"the native decoder does not know {', '.join(unknown)} of the config" if unknown else ""


def _widest_head(config: Any) -> int:
    """The most features that a head has in any layer."""
    layers = getattr(config, "per_layer_config", None) or [config]
    return max(getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads for one in layers)


def _unknown_options(config: Any, family: Family) -> Iterator[tuple[str, Any]]:
    """Options of the config's class that are not at their default, and that the row of the family does not name."""
    default, of_any_model = type(config)(), PreTrainedConfig().to_dict()
    known = FOLLOWED | WITHOUT_EFFECT | {family.activation, family.attention_cap, family.after_head}
    known |= {family.embedding_scale, family.residual_scale, family.side_size, family.eps} | family.follows
    if family.window is not sees_all:
        known |= OF_WINDOWS
    if family.rotates is not rotates_always:
        known |= OF_ROTATION
    for name in sorted(default.to_dict().keys() - of_any_model.keys() - known):
        if getattr(config, name) not in (getattr(default, name), *family.harmless.get(name, ())):
            yield name, getattr(config, name)


def unknown_tensors(layer: Any, family: Family) -> Iterator[str]:
    """Names of tensors in a block that belong to no layer of the family's row, and are not the weight of a norm."""
    norms = {f"{path}.weight" for path in family.norms.values()}
    for name, _ in chain(layer.named_parameters(), layer.named_buffers()):
        known = name in norms or name == family.scale or name.split(".")[0] == (family.mixer or None)
        if not known and name.rpartition(".")[0] not in family.linears:
            yield name


def decoding_in_words(model: Any, coverage: CoverageReport) -> str:
    """Say what of a packed model of this plan runs natively on a CPU with kernels."""
    stack = stack_of(model)
    why_not = why_model_not_covered(model, stack) or _why_plan_not_covered(model, stack, coverage)
    if why_not:
        return f"packed layers natively, the rest in torch ({why_not})"
    why_not = why_not_sampled(model)
    if why_not:
        return f"blocks natively, sampling in transformers ({why_not})"
    mixer = FAMILIES[stack.config.model_type].mixer
    in_torch = [f"{mixer} in torch"] * bool(mixer) + ["towers in torch"] * has_towers(model)
    return ", ".join(["blocks and sampling natively", *in_torch])


def _why_plan_not_covered(model: Any, stack: Any, coverage: CoverageReport) -> str:
    """Why blocks with these schemes are not computed; empty if they are."""
    layers = {layer.name: layer for layer in coverage.layers}
    place = next(name for name, module in model.named_modules() if module is stack)
    for index, block in enumerate(stack.layers):
        for path in linears_of(block, FAMILIES[stack.config.model_type]):
            name = f"{place}.layers.{index}.{path}"
            planned = layers.get(name)
            if planned is None or planned.scheme is None:
                return f"{name} stays float"
            group, width = planned.scheme.group_length(planned.shape[1]), planned.shape[1]
            if planned.scheme.inputs == "static" or (group % 16 and group != width):
                return f"{name} has static activations, or groups that are no multiple of 16"
    return ""
