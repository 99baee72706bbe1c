"""Where SmoothQuant is exact, by family, as data: who writes some channels, and all that reads them.

A site belongs here only if the float model stays the same: a norm whose output feeds nothing but the readers (not so
in BERT, where it is the residual stream too), ``v -> o`` (attention averages values over tokens), ``up -> down`` of a
gated MLP or of an expert (linear in ``up``; never scale ``gate``), ``fc1 -> fc2`` through ReLU (not through GELU).
Queries and keys, and the norms on them, are never scaled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmqat.algorithms.fold import Fold
from llmqat.scheme import QuantScheme


@dataclass(frozen=True)
class Site:
    """One tensor between layers of a block; paths are relative to the block, and ``*`` stands for each of its experts.

    Attributes:
        source: the norm or linear that writes the channels. Of a fused linear its last rows are meant: the value part
            of ``[q, k, v]``, the up part of ``[gate, up]``. With ``*`` each expert has such a site of its own.
        readers: the layers whose columns multiply the channels.
        routers: further readers, which stay float.
        heads: `source` writes key/value heads, each read by one or several query heads.
        offset: the norm multiplies by ``offset + weight``.
        only_if: values in the model's config on which exactness depends; elsewhere the site does not exist.
        only_with: a path that tells the blocks which have this site, where not all do.
    """

    source: str
    readers: tuple[str, ...]
    routers: tuple[str, ...] = ()
    heads: bool = False
    offset: float = 0.0
    only_if: tuple[tuple[str, Any], ...] = ()
    only_with: str = ""


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

ATTENTION = Site("input_layernorm", QKV)
VALUE = Site("self_attn.v_proj", ("self_attn.o_proj",), heads=True)
MLP = Site("post_attention_layernorm", GATE_UP, only_with="mlp.up_proj")
UP = Site("mlp.up_proj", ("mlp.down_proj",), only_with="mlp.up_proj")
EXPERTS = Site(
    "post_attention_layernorm",
    ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    routers=("mlp.gate",),
    only_with="mlp.experts",
)
EXPERT_UP = Site("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",), only_with="mlp.experts")
OFFSET_ATTENTION = Site("input_layernorm", QKV, offset=1.0)

LLAMA = (ATTENTION, VALUE, MLP, UP)
# Qwen3-MoE may have dense blocks among the others.
MOE = (ATTENTION, VALUE, MLP, UP, EXPERTS, EXPERT_UP)
GEMMA = (OFFSET_ATTENTION, VALUE, Site("post_attention_layernorm", GATE_UP, offset=1.0), UP)
# post_attention_layernorm and post_feedforward_layernorm end a branch here: what they write is added to the residual.
GEMMA2 = (OFFSET_ATTENTION, VALUE, Site("pre_feedforward_layernorm", GATE_UP, offset=1.0), UP)
PHI3 = (
    Site("input_layernorm", ("self_attn.qkv_proj",)),
    Site("self_attn.qkv_proj", ("self_attn.o_proj",), heads=True),
    Site("post_attention_layernorm", ("mlp.gate_up_proj",)),
    Site("mlp.gate_up_proj", ("mlp.down_proj",)),
)
PRE_NORM = (("do_layer_norm_before", True), ("layer_norm_elementwise_affine", True))
OPT = (
    Site("self_attn_layer_norm", QKV, only_if=PRE_NORM),
    Site("self_attn.v_proj", ("self_attn.out_proj",), heads=True),
    Site("final_layer_norm", ("fc1",), only_if=PRE_NORM),
    Site("fc1", ("fc2",), only_if=(("activation_function", "relu"),)),
)
GPT2 = (
    Site("ln_1", ("attn.c_attn",)),
    Site("attn.c_attn", ("attn.c_proj",), heads=True),
    Site("ln_2", ("mlp.c_fc",)),
)
BERT = (Site("attention.self.value", ("attention.output.dense",), heads=True),)
DISTILBERT = (Site("attention.v_lin", ("attention.out_lin",), heads=True),)


def folds_of(
    block: nn.Module, prefix: str, sites: tuple[Site, ...], config: Any, scheme_of: Callable[[str], QuantScheme | None]
) -> Iterator[Fold]:
    """The sites of one block, found in it.

    Args:
        block: a decoder block, its experts apart.
        prefix: its path with a dot at the end, for names.
        sites: its family's.
        config: of the model: heads, and what `Site.only_if` asks.
        scheme_of: path of a layer -> its grid, None for float.
    """
    for site in sites:
        if all(getattr(config, key) == value for key, value in site.only_if) and _has(block, site.only_with):
            for own in _by_expert(block, site):
                yield fold_of(block, prefix, own, config, scheme_of)


def _by_expert(block: nn.Module, site: Site) -> Iterator[Site]:
    """`site` with expert numbers for ``*``: a site for each of the block's experts, or one that all of them read."""

    def numbered(path: str) -> list[str]:
        parent, star, leaf = path.partition(".*")
        return [f"{parent}.{e}{leaf}" for e, _ in block.get_submodule(parent).named_children()] if star else [path]

    readers = [numbered(path) for path in site.readers]
    if "*" not in site.source:
        yield replace(site, readers=tuple(path for paths in readers for path in paths))
    else:
        for source, *own in zip(numbered(site.source), *readers, strict=True):
            yield replace(site, source=source, readers=tuple(own))


def fold_of(
    block: nn.Module, prefix: str, site: Site, config: Any, scheme_of: Callable[[str], QuantScheme | None]
) -> Fold:
    """One site of a block without ``*``, found in it; arguments as of `folds_of`."""
    read = [_matrix(block, path) for path in (*site.readers, *site.routers)]
    queries = 1
    if site.heads:
        queries = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
    channels = read[0].shape[-1] // queries
    head_dim = read[0].shape[-1] // config.num_attention_heads if site.heads else channels
    source = block.get_submodule(site.source)
    written = [_matrix(block, site.source)]
    bias = getattr(source, "bias", None)
    if bias is not None:
        written.append(bias.data)
    return Fold(
        prefix + site.source,
        tuple(tensor[-channels:] for tensor in written),
        tuple(read),
        tuple([scheme_of(prefix + path) for path in site.readers] + [None] * len(site.routers)),
        block.get_submodule((*site.routers, *site.readers)[0]),  # a router sees all tokens, an expert its own
        queries,
        head_dim,
        site.offset,
    )


def _has(block: nn.Module, path: str) -> bool:
    """Whether `path` leads somewhere; the empty path always does."""
    for name in path.split(".") if path else ():
        if not hasattr(block, name):
            return False
        block = getattr(block, name)
    return True


def _matrix(block: nn.Module, path: str) -> Tensor:
    """The weight at `path`, ``(out, in)``; ``(channels,)`` of a norm. A view."""
    module = block.get_submodule(path)
    weight = module.get_parameter("weight").data
    return weight.T if isinstance(module, Conv1D) else weight
