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


class Judge:
    """Says what is right, without a cache, and how much plain torch errs there; once for the same sequences.

    Args:
        reference: the trained model, its float parts rounded as the file has them; or a dense copy of the file.
        plain: dense copies of the file in float32 and float64.
    """

    def __init__(self, reference: nn.Module, plain: tuple[nn.Module, nn.Module]) -> None:
        self.reference, self.plain = reference, plain
        self.judged: tuple[Tensor, Tensor, float] | None = None

    def __call__(self, ids: Tensor) -> tuple[Tensor, float]:
        """Logits ``(sequences, length, vocabulary)``, and four times the largest error of plain torch."""
        if self.judged is None or not torch.equal(self.judged[0], ids):
            plain, exact = (without_cache(model, ids) for model in self.plain)
            error = float(differences(plain, exact).max())
            self.judged = ids, without_cache(self.reference, ids), 4 * error
        return self.judged[1:]


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
    if prompts is None:
        return None
    judge, errors, bounds = Judge(reference, plain), [], []
    # Native blocks take one sequence at a time.
    for way, at_once in ((nullcontext(), 1), (through_transformers(model), PROBES)):
        with way:
            ids, logits = greedy_continuations(model, prompts, at_once, logits=True)
            whole = without_cache(model, ids, at_once)
        right, bound = judge(ids)
        assert logits is not None
        behind_cache = differences(logits, right[:, -logits.shape[1] - 1 : -1])
        errors.append(float(torch.maximum(behind_cache, differences(whole, right)).median()))
        bounds.append(bound)
    ids, _ = greedy_continuations(model, prompts, 1, logits=False)
    start = prompts.shape[1]
    new = judge(ids)[0][:, start - 1 : -1].double()
    chosen = new.gather(-1, ids[:, start:, None].cpu())
    gap = float((new.amax(-1, keepdim=True) - chosen).max())
    return Decoding(max(errors), max(bounds), gap <= 2 * max(bounds))


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
