"""Everything that llmqat knows about model families, as data, and the blocks of those that it does not know.

Where blocks are, looking at a model finds. A row has what looking cannot tell: where SmoothQuant is exact, and what
files call modules where transformers does not say it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import zip_longest

from torch import nn
from transformers import PreTrainedModel

from llmqat.models import smooth_sites
from llmqat.models.looking import NotInARow, confirm_blocks, find_blocks
from llmqat.models.smooth_sites import Site


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        blocks: path of the ModuleList of transformer blocks in a model with a head. Linear layers elsewhere (heads,
            poolers, projections of embeddings) stay float.
        smooth_sites: where SmoothQuant is exact, paths relative to a block.
        file_names: parts of module names and what they are in files, in this order. Nothing else may hold them.
    """

    blocks: str
    smooth_sites: tuple[Site, ...] = ()
    file_names: tuple[tuple[str, str], ...] = ()


LLAMA = Architecture("model.layers", smooth_sites.LLAMA)

MOE = Architecture("model.layers", smooth_sites.MOE)
MIXTRAL_FILES = (
    (".mlp.", ".block_sparse_moe."),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
)

# config.model_type -> row. Qwen2.5 is qwen2. Qwen3's and Gemma 3's q_norm and k_norm sit behind the projections: inputs
# may be scaled, outputs not.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mixtral": replace(MOE, file_names=MIXTRAL_FILES),
    "qwen3_moe": MOE,
    "gemma": Architecture("model.layers", smooth_sites.GEMMA),
    "gemma2": Architecture("model.layers", smooth_sites.GEMMA2),
    "gemma3_text": Architecture("model.layers", smooth_sites.GEMMA2),
    "phi3": Architecture("model.layers", smooth_sites.PHI3),
    "opt": Architecture("model.decoder.layers", smooth_sites.OPT),
    "gpt2": Architecture("transformer.h", smooth_sites.GPT2),
    "bert": Architecture("bert.encoder.layer", smooth_sites.BERT),
    "roberta": Architecture("roberta.encoder.layer", smooth_sites.BERT),
    "distilbert": Architecture("distilbert.transformer.layer", smooth_sites.DISTILBERT),
}


# Families that do badly in sequences that no BOS opens: Gemma 3 270M has perplexities of 118 on WikiText-2 and 47 on C4
# in windows of 512 of which the first alone has it, and of 55 and 21 where all do (2,048 tokens each, bfloat16).
OPENED_BY_BOS = "gemma"


def needed_bos(model: PreTrainedModel) -> str | None:
    """The BOS rule (`llmqat.windows`) that a model does badly without; None if its family has none."""
    return "window" if model.config.model_type.startswith(OPENED_BY_BOS) else None


def known_architecture(model: PreTrainedModel) -> Architecture | None:
    """The architecture of `model`; None if llmqat has no row for it."""
    return ARCHITECTURES.get(model.config.model_type)


def block_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the lists of blocks of `model`, which may also be a bare model without a head; found by looking if its
    family has no row.

    Raises:
        LlmqatError: see `find_blocks`.
    """
    row = known_architecture(model)
    if row is None:
        return find_blocks(model)
    return [row.blocks if model.base_model is not model else row.blocks.split(".", 1)[1]]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of `model`, in order; those of several lists take turns.

    Raises:
        LlmqatError: see `find_blocks`.
    """
    lists = [model.get_submodule(path) for path in block_paths(model)]
    if len(lists) == 1:
        assert isinstance(lists[0], nn.ModuleList)
        return lists[0]
    turns = zip_longest(*lists)  # type: ignore[call-overload]
    return nn.ModuleList(block for turn in turns for block in turn if block is not None)


def check_blocks(model: PreTrainedModel) -> bool:
    """Refuse a model that nothing can walk through block by block; whether that it can is certain.

    Raises:
        LlmqatError: see `find_blocks` and `confirm_blocks`.
    """
    return known_architecture(model) is not None or confirm_blocks(model, find_blocks(model))


def whole_runs(model: PreTrainedModel) -> str:
    """Why nothing can walk through a model block by block, so that GPTQ runs the whole of it for each block; empty if
    something can.

    Raises:
        LlmqatError: see `find_blocks`.
    """
    try:
        check_blocks(model)
    except NotInARow as error:
        return error.problem
    return ""


def check_init(model: PreTrainedModel, init: str) -> str:
    """Refuse an initialization whose way through the blocks of a model is not there; returns what is unusual about it.

    Raises:
        LlmqatError: see `check_blocks`; GPTQ needs no row of blocks.
    """
    if init not in ("gptq", "blockwise"):
        return ""
    try:
        return "" if check_blocks(model) else f"blocks {blocks_in_words(model)}"
    except NotInARow as error:
        if init != "gptq":
            raise
        return f"{error.problem}: GPTQ runs the whole model for each of them"


def blocks_in_words(model: PreTrainedModel) -> str:
    """How the blocks of a model without a row were found, and how sure that is.

    Raises:
        LlmqatError: see `check_blocks`.
    """
    certain = check_blocks(model)
    kinds = Counter(type(block).__name__ for block in blocks_of(model))
    counted = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
    sure = "confirmed by a probe pass" if certain else "not confirmed: it cannot run without values"
    return f"found by looking: {counted} in {block_paths(model)[0]}, {sure}"
