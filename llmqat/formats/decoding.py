"""Prove that a packed model decodes: behind its cache, token by token, it says what was trained says without one.

Weights can be right to the last bit and text wrong: a library renames the argument that holds the cache, and every
token starts without a past. So each way in which a packed model runs (native sampling, native blocks under the loop of
transformers, that loop alone) continues a few prompts, and every logit on the way is compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from llmqat.models.patcher import float_parameters, quantized_layers, transformers_model
from llmqat.serve.forward import through_transformers

PROMPT, NEW_TOKENS, PROBES = 8, 24, 3
NUDGE = 2.0**-12  # relative: a code of eight bits is 2^-7 of the largest value


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


def prompts_for(model: PreTrainedModel) -> list[Tensor]:
    """Random prompts ``(1, length)`` that leave room for `NEW_TOKENS`; none for a model that does not generate."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT + NEW_TOKENS
    if not model.can_generate() or context < 2 or model.config.is_encoder_decoder:
        return []
    length = min(PROMPT, context // 2)
    vocabulary = model.config.get_text_config().vocab_size
    prompts = torch.randint(vocabulary, (PROBES, 1, length), generator=torch.Generator().manual_seed(1))
    return list(prompts.to(model.device))


@torch.no_grad()
def greedy_continuations(model: PreTrainedModel, prompts: list[Tensor], logits: bool) -> list[tuple[Tensor, Tensor]]:
    """Each prompt with its greedy continuation, and the logits of that, ``(1, new, vocabulary)``; without `logits`,
    which keep a model from its native loop, none."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT + NEW_TOKENS
    results = []
    own, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    try:
        for ids in prompts:
            new = min(NEW_TOKENS, context - ids.shape[1])
            options: dict[str, Any] = {
                "max_new_tokens": new,
                "do_sample": False,
                "attention_mask": torch.ones_like(ids),
            }
            generate: Any = model.generate
            out = generate(ids, output_logits=logits, return_dict_in_generate=logits, **options)
            results.append((out.sequences, torch.stack(out.logits, 1)) if logits else (out, torch.empty(0)))
    finally:
        model.generation_config = own
    return results


@torch.no_grad()
def without_cache(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits ``(1, length, vocabulary)`` of a whole sequence at once, in float64 on the CPU."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits.cpu().double()


def decoding(model: PreTrainedModel, reference: nn.Module, plain: tuple[nn.Module, nn.Module]) -> Decoding | None:
    """Compare what a packed model decodes, natively and by transformers, with what `reference` says without a cache.

    Args:
        model: the packed model as it is loaded.
        reference: the trained model, its float parts rounded as the file has them; or a dense copy of the file.
        plain: dense copies of the file in float32 and float64, for the bound.

    Returns:
        the worst of all ways to run; None for a model that does not generate.
    """
    prompts = prompts_for(model)
    if not prompts:
        return None
    errors, bounds, gaps = [], [], []
    for way in (nullcontext(), through_transformers(model)):
        with way:
            for ids, logits in greedy_continuations(model, prompts, logits=True):
                right = without_cache(reference, ids)
                new = right[:, -logits.shape[1] - 1 : -1]
                behind_cache = float((logits.cpu().double() - new).abs().max())
                errors.append(max(behind_cache, float((without_cache(model, ids) - right).abs().max())))
                bounds.append(4 * float((without_cache(plain[0], ids) - without_cache(plain[1], ids)).abs().max()))
    for ids, _ in greedy_continuations(model, prompts, logits=False):
        new = without_cache(reference, ids)[:, prompts[0].shape[1] - 1 : -1]
        chosen = new.gather(-1, ids[:, prompts[0].shape[1] :, None].cpu())
        gaps.append(float((new.amax(-1, keepdim=True) - chosen).max()))
    error = max(sorted(errors[:PROBES])[PROBES // 2], sorted(errors[PROBES:])[PROBES // 2])
    return Decoding(error, max(bounds), max(gaps) <= 2 * max(bounds))


@torch.no_grad()
def nudge(plain: PreTrainedModel) -> None:
    """Move the embeddings of a dense copy by less than a code of eight bits, in place.

    Whether an activation or a cached value lies on a rounding tie is a matter of chance: a bound from a model where it
    happens to move no code says nothing about one where it moves some.
    """
    weight = plain.get_input_embeddings().get_parameter("weight")
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    weight.mul_(1 + NUDGE * noise.to(weight.device))


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
