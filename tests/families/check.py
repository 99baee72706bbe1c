"""A tiny model of a family on its whole way: calibrated, trained for a step, packed, loaded twice, and decoding."""

import copy
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import CompressedTensorsConfig, PreTrainedModel

from llmqat.formats.decoding import continued, judged
from llmqat.formats.dense import dense_copy, in_float64
from llmqat.formats.export.dense import dense_weight
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import Verification, verify
from llmqat.formats.writer import save_packed
from llmqat.models.experts import reads_experts
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.nn.expert_layout import is_fused
from llmqat.nn.experts import SplitExperts
from llmqat.nn.linear_like import is_transposed
from llmqat.nn.packed_linear import PackedLinear
from llmqat.pipeline.export import export
from llmqat.scheme import QuantScheme
from llmqat.train.modes import select_trainable

SCHEME = QuantScheme(4, 16)
# A norm or a convolution of a tiny model is a larger part of it than of a real one.
LEAST_COVERAGE = 0.75
NEW_TOKENS = 8


class Failed(Exception):
    """What did not hold."""


class Foreign(Failed):
    """What does not hold of the float model either, in transformers alone."""


def check(condition: object, what: str) -> None:
    if not condition:
        raise Failed(what)


def run(model: PreTrainedModel, directory: Path) -> bool:
    """The whole way.

    Returns:
        whether transformers reads the model as `llmqat export` writes it, and not packed.

    Raises:
        LlmqatError: if llmqat refuses the model.
        Failed: if something does not hold; `Foreign`, if it does not of the float model either.
    """
    original = copy.deepcopy(model)
    ids = torch.randint(2, 128, (4, 4, 24), generator=torch.Generator().manual_seed(1))
    report = prepare(
        model,
        SCHEME,
        init="gptq",
        calibration=list(ids),
        storage_dtype=torch.float32,
        min_coverage=LEAST_COVERAGE,
    )
    check(len(report.errors) == len(report.quantized), "GPTQ left layers out")
    errors = [(rtn, gptq) for rtn, gptq in report.errors.values() if gptq is not None]
    check(len(errors) >= len(report.errors) / 4, "GPTQ found no codes")
    check(sum(gptq for _, gptq in errors) < sum(rtn for rtn, _ in errors), "GPTQ is no better than round-to-nearest")
    train(model, ids[0])
    save_packed(model.eval(), directory)
    try:
        found = verify(directory, against=model)
        check(found.codes_equal and found.scales_equal, "packed codes are not those of training")
        check(found.ok, f"logits beyond the bounds of verify: {errors_of(found)}")
        packed = load_packed(directory)
        decodes(packed)
    except Exception:
        decodes_like_itself(original)
        raise
    apart = reads_experts(packed) or not any(isinstance(module, SplitExperts) for module in packed.modules())
    agrees_with_transformers(
        packed, directory if apart else export(directory, "dense", directory.with_name("dense")).output
    )
    return not apart


def errors_of(found: Verification) -> str:
    """The errors of logits, each with its bound, and whether greedy decoding chooses the same tokens."""
    pairs = (found.max_logit_error, found.bound), (found.decode_error, found.decode_bound)
    named = " and ".join(f"{error:.1e} of {bound:.1e}" for error, bound in pairs if error is not None)
    return f"{named} behind a cache, where the same tokens are chosen: {found.greedy_equal}"


def train(model: PreTrainedModel, ids: Tensor) -> None:
    """A step of full training: every layer that runs has to move."""
    select_trainable(model, "full")
    ran: set[int] = set()
    layers = quantized_layers(model)
    hooks = [o.layer.register_forward_hook(lambda layer, *_: ran.add(id(layer))) for o in layers]
    before = {o.name: o.layer.weight.detach().clone() for o in layers}
    logits = model(input_ids=ids, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    for hook in hooks:
        hook.remove()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02).step()
    check(loss.isfinite(), "the loss is not finite")
    taught = [o for o in layers if id(o.layer) in ran and o.layer.weight.grad is not None]
    check(taught, "no layer gets a gradient")
    still = [o.name for o in taught if torch.equal(o.layer.weight, before[o.name])]
    check(not still, f"training leaves {', '.join(still[:3])} as it was")


@torch.no_grad()
def agrees_with_transformers(packed: PreTrainedModel, directory: Path) -> None:
    """Plain transformers loads equal weights, and its logits err by at most twice what plain torch does."""
    kind = getattr(transformers, packed.config.architectures[0])
    try:
        theirs, info = kind.from_pretrained(directory, output_loading_info=True)
    except AttributeError:  # a family reads weights while it loads, which a packed layer has not
        whole = CompressedTensorsConfig(dequantize=True)
        theirs, info = kind.from_pretrained(directory, output_loading_info=True, quantization_config=whole)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        check(not info[key], f"transformers: {key} {sorted(map(str, info[key]))[:3]}")
    ids = torch.arange(2, 26).view(1, -1)
    logits = theirs(input_ids=ids, use_cache=False).logits  # decompresses at the first forward
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLinear) and ".experts." not in name:
            linear = theirs.get_submodule(name)
            weight = linear.weight.T if is_transposed(linear) else linear.weight
            check(torch.equal(weight, dense_weight(layer)), f"transformers: another {name}")
        if isinstance(layer, SplitExperts) and is_fused(theirs.get_submodule(name)):
            own = theirs.get_submodule(name).state_dict()
            for part, tensor in layer.fused(dense_weight).items():
                check(torch.equal(own[part], tensor), f"transformers: another {name}.{part}")
    plain, exact = (
        dense_copy(packed, dtype)(input_ids=ids, use_cache=False).logits for dtype in (torch.float32, torch.float64)
    )
    bound = 2 * (plain - exact).abs().max() + 1e-6
    check((logits - exact).abs().max() <= bound, f"transformers: logits off by {(logits - exact).abs().max():.1e}")


@torch.no_grad()
def decodes(packed: PreTrainedModel) -> None:
    """Greedy tokens behind a cache are those of whole forwards."""
    prompt = torch.tensor([[5, 17, 40, 8, 23, 90, 61, 7]])
    options = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "forced_eos_token_id": None,
        "eos_token_id": 0,
    }
    cached = packed.generate(prompt, use_cache=True, **options)
    ids = prompt
    for _ in range(NEW_TOKENS):
        logits = packed(input_ids=ids, use_cache=False).logits[:, -1]
        logits[:, 0] = -torch.inf  # the end, which min_new_tokens forbids
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    check(torch.equal(cached, ids), f"cache: {cached[0, 8:].tolist()} for {ids[0, 8:].tolist()}")


def decodes_like_itself(model: PreTrainedModel) -> None:
    """The float model says behind its cache what it says without one, as far as float32 goes."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    exact.forward = partial(in_float64, exact.forward, False)
    try:
        own = judged(continued(model, (model, exact)), model)
    except Exception as error:
        raise Foreign(f"its float model cannot generate: {error}") from error
    if own is not None and (own.error > own.bound or not own.greedy):
        raise Foreign(f"logits of its float model behind a cache are off by {own.error:.0e}")
