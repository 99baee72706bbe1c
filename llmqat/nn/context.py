"""The limits of a model's tables: token ids and positions beyond them are refused in one line, not by an IndexError."""

from typing import Any

import torch
from torch import Tensor, nn

from llmqat.compat.caches import CACHE_NAMES, cache_of
from llmqat.errors import LlmqatError

# Names of modules that look up learned positions: GPT-2 and its kin, OPT, BERT, XGLM, ...
POSITION_TABLES = ("wpe", "position", "pos_emb")


def position_limit(model: nn.Module) -> int | None:
    """How many positions the table of `model` holds; None if it computes them (rotary embeddings, ALiBi).

    Towers have tables of their own, for the patches of an image: what counts is the one of the decoder.
    """
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    for name, module in decoder.named_modules():
        own = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) and "rel" not in own and any(known in own for known in POSITION_TABLES):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - int(getattr(module, "offset", first))
    return None


def check_context(limit: int | None, tokens: int) -> None:
    """Refuse sequences that are longer than a table of `limit` positions; see `position_limit`.

    Raises:
        LlmqatError: if `tokens` tokens do not fit.
    """
    if limit is not None and tokens > limit:
        raise LlmqatError(
            f"{tokens} tokens exceed the {limit} positions of the model; shorten the prompt, or lower --window or "
            "--max-new-tokens"
        )


def check_token_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse token ids that the embedding has no row for.

    Raises:
        LlmqatError: if an id is negative, or not below `vocabulary`.
    """
    if ids.numel() and ids.device.type == "cpu" and not ids.is_floating_point() and not torch.compiler.is_compiling():
        least, most = (int(end) for end in torch.aminmax(ids))
        if least < 0 or most >= vocabulary:
            raise LlmqatError(
                f"token id {least if least < 0 else most} is out of range: the model's vocabulary has the ids 0 to "
                f"{vocabulary - 1}; use the tokenizer of this model"
            )


def check_sequence(model: Any, ids: Tensor, new_tokens: int = 0) -> None:
    """Refuse token ids ``(batch, n)`` that `model` cannot run, or cannot follow by so many new ones.

    Raises:
        LlmqatError: see `check_token_ids` and `check_context`.
    """
    rows = embedding_rows(model)
    if rows is not None:
        check_token_ids(ids, rows)
    check_context(position_limit(model), ids.shape[-1] + new_tokens)


def embedding_rows(model: Any) -> int | None:
    """How many token ids the input embedding of `model` has rows for; None if it has no table of its own."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def check_inputs(limit: int | None, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model with a language head: `check_token_ids` and `check_context` of what it is given.

    Raises:
        LlmqatError: see these; and for inputs without values, of which torch would compute what lies in new memory.
    """
    ids: Any = args[0] if args else kwargs.get("input_ids")
    given: Any = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
    if isinstance(given, Tensor) and given.is_meta and model.device.type != "meta":
        raise LlmqatError(f"the inputs are on meta, where they have no values; give them on {model.device}")
    if not isinstance(given, Tensor) or given.ndim < 2:
        return
    rows = embedding_rows(model)
    if given is ids and rows is not None:
        check_token_ids(given, rows)
    if limit is None:
        return
    cache = cache_of({name: kwargs.get(name) for name in CACHE_NAMES})
    past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    positions: Any = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.numel() and positions.device.type == "cpu":
        check_context(limit, int(positions.max()) + 1)
    else:
        check_context(limit, int(past) + given.shape[1])
