"""Prove that a packed model decodes: behind its cache, token by token, it says what was trained says without one.

Weights can be right to the last bit and text wrong: a library renames the argument that holds the cache, and every
token starts without a past. So each way in which a packed model runs (native sampling, native blocks under the loop of
transformers, that loop alone) continues a few prompts, and every logit on the way is compared.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from llmqat.models.patcher import float_parameters, quantized_layers, transformers_model
from llmqat.serve.forward import through_transformers

PROMPT, NEW_TOKENS, PROBES = 8, 24, 3


class Decoding(NamedTuple):
    """The outcome of decoding.

    Attributes:
        error: largest difference of a logit behind a cache from that of the reference without one; of the median probe.
        bound: four times that between plain torch in float32 and in float64, of the worst probe: both sides round.
        greedy: each token that the native loop chose has the largest logit of the reference, but for that bound.
    """

    error: float
    bound: float
    greedy: bool


def prompts_for(model: PreTrainedModel) -> Tensor | None:
    """Random prompts ``(PROBES, length)`` that leave room for new tokens; None for a model that does not generate."""
    context = context_of(model)
    if not model.can_generate() or context < 2 or model.config.is_encoder_decoder:
        return None
    shape = PROBES, min(PROMPT, context // 2)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1)).to(model.device)


def context_of(model: PreTrainedModel) -> int:
    """How many tokens the model takes; one that does not say takes what is asked here."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT + NEW_TOKENS


@torch.no_grad()
def greedy_continuations(
    model: PreTrainedModel, prompts: Tensor, at_once: int, logits: bool
) -> tuple[Tensor, Tensor | None]:
    """Prompts with their greedy continuations, ``(prompts, length + new)``, and the logits of these, ``(prompts, new,
    vocabulary)``, as `generate` finds them for so many prompts at once. Without `logits`, which keep a model from its
    native loop, None."""
    sequences, found = [], []
    own, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    try:
        for ids in prompts.split(at_once):
            options: dict[str, Any] = {
                "max_new_tokens": min(NEW_TOKENS, context_of(model) - ids.shape[1]),
                "do_sample": False,
                "attention_mask": torch.ones_like(ids),
            }
            generate: Any = model.generate
            out = generate(ids, output_logits=logits, return_dict_in_generate=logits, **options)
            sequences.append(out.sequences if logits else out)
            found += [torch.stack(out.logits, 1)] if logits else []
    finally:
        model.generation_config = own
    return torch.cat(sequences), torch.cat(found).cpu() if logits else None


@torch.no_grad()
def without_cache(model: nn.Module, ids: Tensor, at_once: int = PROBES) -> Tensor:
    """Logits ``(sequences, length, vocabulary)`` of whole sequences, so many at once, on the CPU."""
    device = next(model.parameters()).device
    parts = ids.to(device).split(at_once)
    return torch.cat([model(input_ids=part, use_cache=False).logits.cpu() for part in parts])


def differences(some: Tensor, others: Tensor) -> Tensor:
    """Largest difference of a logit in each row of two tensors, in float64; a row at a time, which saves memory."""
    return torch.stack([(a.double() - b).abs().max() for a, b in zip(some, others, strict=True)])


class Continued(NamedTuple):
    """Sequences of a packed model that ran in one way, with its logits on the CPU, until a reference judges them.

    Attributes:
        ids: prompts with their greedy continuations ``(sequences, length)``.
        start: tokens of a prompt.
        logits: of the continuations, behind a cache ``(sequences, new, vocabulary)``; None of the native loop.
        whole: of the sequences, without a cache ``(sequences, length, vocabulary)``; None of the native loop.
        bound: four times the largest error of plain torch on them; 0 of the native loop, which has no logits.
    """

    ids: Tensor
    start: int
    logits: Tensor | None
    whole: Tensor | None
    bound: float


Found = TypeVar("Found")


class OnceInARow(Generic[Found]):
    """Calls a function of sequences, but not for those of the last call: most ways to run continue alike."""

    def __init__(self, function: Callable[[Tensor], Found]) -> None:
        self.function = function
        self.last: tuple[Tensor, Found] | None = None

    def __call__(self, ids: Tensor) -> Found:
        """The result for `ids`."""
        if self.last is None or not torch.equal(self.last[0], ids):
            self.last = None  # before the next one takes its memory
            self.last = ids, self.function(ids)
        return self.last[1]


def continued(model: PreTrainedModel, plain: tuple[nn.Module, nn.Module]) -> list[Continued]:
    """Let a packed model continue prompts, natively and by transformers; nothing of one that does not generate.

    Args:
        model: the packed model as it is loaded.
        plain: dense copies of the file in float32 and float64, for the bound.
    """
    prompts = prompts_for(model)
    if prompts is None:
        return []
    found, start = [], prompts.shape[1]
    bound = OnceInARow(lambda ids: 4 * float(differences(*(without_cache(copy, ids) for copy in plain)).max()))
    # Native blocks take one sequence at a time.
    for way, at_once in ((nullcontext(), 1), (through_transformers(model), PROBES)):
        with way:
            ids, logits = greedy_continuations(model, prompts, at_once, logits=True)
            whole = without_cache(model, ids, at_once)
        found.append(Continued(ids, start, logits, whole, bound(ids)))
    ids, _ = greedy_continuations(model, prompts, 1, logits=False)
    return [*found, Continued(ids, start, None, None, 0.0)]


def judged(found: Sequence[Continued], reference: nn.Module) -> Decoding | None:
    """Compare what a packed model continued with what `reference` says without a cache; None if that is nothing.

    Args:
        found: see `continued`.
        reference: the trained model, its float parts rounded as the file has them; or a dense copy of the file.
    """
    if not found:
        return None
    errors, right = [], OnceInARow(lambda ids: without_cache(reference, ids))
    for one in found:
        if one.logits is not None and one.whole is not None:
            behind_cache = differences(one.logits, right(one.ids)[:, -one.logits.shape[1] - 1 : -1])
            errors.append(float(torch.maximum(behind_cache, differences(one.whole, right(one.ids))).median()))
    native = found[-1]
    new = right(native.ids)[:, native.start - 1 : -1].double()
    chosen = new.gather(-1, native.ids[:, native.start :, None].cpu())
    gap, bound = float((new.amax(-1, keepdim=True) - chosen).max()), max(one.bound for one in found)
    return Decoding(max(errors), bound, gap <= 2 * bound)


@contextmanager
def as_stored(model: nn.Module) -> Iterator[nn.Module]:
    """A trained model in evaluation mode, its float parts rounded to the dtype in which a file has them, and without
    the autocast that accelerate wraps around a forward, until the ``with`` ends."""
    root, training = transformers_model(model), {module: module.training for module in model.modules()}
    forwards = {name: value for name, value in vars(root).items() if name.endswith("forward")}
    dtype = quantized_layers(model)[0].layer.storage_dtype
    before = [(parameter, parameter.data) for parameter in float_parameters(model)]
    try:
        for parameter, data in before:
            parameter.data = data.to(dtype).to(data.dtype)
        root.eval()
        extract_model_from_parallel(root, keep_fp32_wrapper=False)
        yield root
    finally:
        vars(root).pop("forward", None)
        vars(root).update(forwards)
        for parameter, data in before:
            parameter.data = data
        for module, flag in training.items():
            module.training = flag
