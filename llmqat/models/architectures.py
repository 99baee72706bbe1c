"""Everything that llmqat knows about model families, as data. A new family is a row.

Every `PreTrainedModel` with `nn.Linear` layers can be prepared with round-to-nearest; a row is needed where order and
neighbourhood matter: GPTQ (block by block) and SmoothQuant (which norm feeds which layers).
"""

from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from llmqat.errors import LlmqatError
from llmqat.models import smooth_sites
from llmqat.models.smooth_sites import Site


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        blocks: path of the ModuleList of transformer blocks in a model with a head. Linear layers elsewhere (heads,
            poolers, projections of embeddings) stay float.
        smooth_sites: where SmoothQuant is exact, paths relative to a block.
        router: path, in a block, of what picks the experts: it stays float. None for a family without experts.
        file_names: parts of module names and what they are in files, in this order. Nothing else may hold them.
    """

    blocks: str
    smooth_sites: tuple[Site, ...] = ()
    router: str | None = None
    file_names: tuple[tuple[str, str], ...] = ()


LLAMA = Architecture("model.layers", smooth_sites.LLAMA)

MOE = Architecture("model.layers", smooth_sites.MOE, router="mlp.gate")
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


def architecture_of(model: PreTrainedModel, purpose: str, remedy: str) -> Architecture:
    """The row of `model`.

    Raises:
        LlmqatError: if its family has none; the message says what `purpose` needs it for, and `remedy`.
    """
    model_type = model.config.model_type
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise LlmqatError(f"{purpose} does not know the model type {model_type!r} (known: {known}); {remedy}")
    return ARCHITECTURES[model_type]


def blocks_path(model: PreTrainedModel, architecture: Architecture) -> str:
    """Path of the blocks of `model`, which may also be a bare model without a head."""
    return architecture.blocks if model.base_model is not model else architecture.blocks.split(".", 1)[1]


def blocks_of(model: PreTrainedModel, architecture: Architecture) -> nn.ModuleList:
    """The blocks of `model`, in order."""
    blocks = model.get_submodule(blocks_path(model, architecture))
    assert isinstance(blocks, nn.ModuleList)
    return blocks
