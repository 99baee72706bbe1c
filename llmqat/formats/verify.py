"""Prove that a packed directory holds what was trained, and that it runs as what was trained."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from llmqat.formats import fingerprint
from llmqat.formats.contents import Contents, contents_of
from llmqat.formats.decoding import Decoding, as_stored, decoding, differences, nudge
from llmqat.formats.directory import unlisted_files
from llmqat.formats.reader import load_packed
from llmqat.formats.weights import read_mapped
from llmqat.models.foreign import local_directory
from llmqat.models.patcher import transformers_model
from llmqat.nn.embedding import PackedEmbedding
from llmqat.nn.experts import follow_routes, record_routes
from llmqat.nn.kv_cache import kv_bits_of
from llmqat.nn.packed_linear import PackedLinear, packed_layers
from llmqat.nn.quantizers import disable_quantizers
from llmqat.quant.affine import dequantize, fake_quantize_input
from llmqat.quant.full_float32 import full_float32

# The largest of some errors is a matter of chance: the median of this many probes ``(probes, tokens)`` is compared.
PROBES = 5, 128
# Which activations lie on a rounding tie is chance too, and one code that falls the other way hides all else in its
# probe. In short probes few have such a code, and the median has none.
PROBES_OF_INT8_INPUTS = 15, 16


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`.

    Attributes:
        layers: layers compared.
        codes_equal: all codes and zero points of the file are those of training.
        scales_equal: all scales are, bit for bit.
        mismatched: layers where one of the two does not hold.
        max_logit_error: largest difference of the packed model's float32 logits from a float64 run of the same grid.
        bound: twice that of plain torch in float32 on the dequantized weights. None, like the error, if not measured.
        changed: names of tensors that are not those of training, and of files that are not as they were written, are
            missing, or were added where a model's files are read.
        decode_error: largest difference of a float32 logit behind a cache, token by token, from that of the trained
            model without one, or of the dequantized weights; None for models that do not generate.
        decode_bound: what plain torch in float32 loses on the same tokens, four times.
        greedy_equal: whether the native loop chose the tokens that the trained model would have chosen.
    """

    layers: int
    codes_equal: bool
    scales_equal: bool
    mismatched: tuple[str, ...]
    max_logit_error: float | None
    bound: float | None
    changed: tuple[str, ...] = ()
    decode_error: float | None = None
    decode_bound: float | None = None
    greedy_equal: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether everything that was checked holds."""
        logits = self.max_logit_error is None or self.bound is None or self.max_logit_error <= self.bound
        behind = self.decode_error is None or self.decode_bound is None or self.decode_error <= self.decode_bound
        decodes = behind and self.greedy_equal is not False
        return self.codes_equal and self.scales_equal and logits and decodes and not self.changed


class Expected(NamedTuple):
    """Hashes of all that a packed directory should hold.

    Attributes:
        layers: hashes of codes and scales, by layer.
        tensors: hashes of the tensors, by name.
        files: hashes of the files, by name; None where there is no fingerprint of them.
        trained: the model that was trained, if it is at hand.
    """

    layers: fingerprint.Layers
    tensors: dict[str, str]
    files: dict[str, str] | None
    trained: nn.Module | None


def expected_in(directory: Path, against: Contents | None) -> Expected:
    """The contents that `directory` should have: those of a trained model, else those in its fingerprint.

    Raises:
        LlmqatError: if the fingerprint is damaged, or there is none and nothing else to compare with.
    """
    if against is None:
        written = fingerprint.read(directory)
        return Expected(written.layers, written.tensors, written.files, None)
    files = fingerprint.read(directory).files if fingerprint.exists(directory) else None
    return Expected(against.hashes, against.tensor_hashes, files, against.model)


def verify(
    directory: str | Path,
    against: nn.Module | None = None,
    logits: bool = True,
    device: torch.device | str = "cpu",
) -> Verification:
    """Compare a packed directory with the trained model, or with the fingerprint that training left.

    Every tensor counts, with its name, dtype and shape, and every byte of every file that was written with the model.

    Args:
        directory: packed model.
        against: the trained model itself; without it, the hashes in ``fingerprint.json``.
        logits: also run the model; takes memory for its float parts in float64, and for one layer.
        device: where it runs.

    Returns:
        what was compared; ``ok`` is whether all of it holds.

    Raises:
        LlmqatError: if the directory is damaged, or holds no fingerprint and `against` is not given.
    """
    directory = local_directory(directory)
    expected = expected_in(directory, None if against is None else contents_of(against))
    return verify_loaded(directory, load_packed(directory, torch.float32, device), expected, logits)


@full_float32()
def verify_loaded(directory: Path, model: PreTrainedModel, expected: Expected, logits: bool = True) -> Verification:
    """Compare `directory`, and the float32 `model` that was loaded from it, with what is expected; see `verify`."""
    changed = set(changed_tensors(directory, expected.tensors))
    if expected.files is not None:
        changed |= set(changed_files(directory, expected.files))
    codes_wrong, scales_wrong, count = compare_layers(model, expected.layers)
    error = bound = decoded = None
    if logits:
        if model.device.type == "mps":  # which has no float64
            model.to("cpu")  # type: ignore[arg-type]
        plain, exact = dense_copy(model, torch.float32), dense_copy(model, torch.float64)
        error, bound = logit_error(model, plain, exact)
        decoded = decode_error(model, plain, exact, expected.trained)
    mismatched = tuple(sorted(codes_wrong | scales_wrong))
    equal = count, not codes_wrong, not scales_wrong, mismatched
    return Verification(*equal, error, bound, tuple(sorted(changed)), *(decoded or ()))


def decode_error(
    model: PreTrainedModel, plain: PreTrainedModel, exact: PreTrainedModel, trained: nn.Module | None
) -> Decoding | None:
    """The error of decoding with the packed `model` behind a cache.

    Compared with the trained model where that computes in float32, else with the dequantized weights: `exact`. What
    `plain` loses on the way is the bound, for which its embeddings are moved where inputs or the cache are int8.
    """
    if kv_bits_of(model) or quantizes_inputs(model):
        nudge(plain)
    if trained is None or dtype_of_hidden_states(trained) != torch.float32:
        return decoding(model, exact, (plain, exact))
    with as_stored(trained) as reference:
        return decoding(model, reference, (plain, exact))


@torch.no_grad()
def dtype_of_hidden_states(model: nn.Module) -> torch.dtype:
    """The dtype in which a model computes, whatever that of its weights: that of a row of its input embedding."""
    device = next(model.parameters()).device
    row: Tensor = transformers_model(model).get_input_embeddings()(torch.zeros(1, dtype=torch.int64, device=device))
    return row.dtype


def quantizes_inputs(model: nn.Module) -> bool:
    """Whether a packed layer of `model` rounds its input to int8: rounding ties then fall as chance has it."""
    return any(m.scheme.inputs != "float" for m in model.modules() if isinstance(m, PackedLinear))


def compare_layers(model: PreTrainedModel, expected: fingerprint.Layers) -> tuple[set[str], set[str], int]:
    """Layers of a packed `model` whose codes, and those whose scales are not the `expected` ones; how many it has."""
    layers = packed_layers(model)
    codes_wrong, scales_wrong = set(expected) ^ set(layers), set(expected) ^ set(layers)
    for name in set(expected) & set(layers):
        found, wanted = fingerprint.layer_hashes(*layers[name].unpack(), layers[name].input_scale), expected[name]
        if any(found.get(part) != wanted.get(part) for part in ("codes", "zero_point")):
            codes_wrong.add(name)
        if any(found.get(part) != wanted.get(part) for part in ("scale", "input_scale")):
            scales_wrong.add(name)
    return codes_wrong, scales_wrong, len(layers)


def changed_tensors(directory: Path, expected: dict[str, str]) -> Iterator[str]:
    """Names of tensors that are missing, that were added, or whose dtype, shape or bytes are not as `expected`."""
    missing = set(expected)
    for name, tensor in read_mapped(directory):
        missing.discard(name)
        if fingerprint.tensor_hashes({name: tensor})[name] != expected.get(name):
            yield name
    yield from missing


def changed_files(directory: Path, expected: dict[str, str]) -> Iterator[str]:
    """Names of files that are missing or not as they were written, and of others that would be read with the model."""
    for name, digest in expected.items():
        path = directory / name
        if not path.is_file() or fingerprint.sha256_of_file(path) != digest:
            yield name
    yield from unlisted_files(directory, expected)


class Dequantized(nn.Module):
    """Linear layer on the dequantized weights of a packed one, made anew in each forward: one layer's live at a time.

    Args:
        packed: whose codes are shared.
        dtype: to compute in.
    """

    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        # In a tuple, or it would be a part of the model, and be cast and counted with it.
        self.packed, self.dtype = (packed,), dtype
        self.bias = None if packed.bias is None else packed.bias.to(dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized weights ``(out, in)``."""
        (packed,) = self.packed
        return dequantize(*packed.unpack(), packed.scheme).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        (packed,) = self.packed
        with as_written():
            if packed.scheme.inputs != "float":
                # In float32 always, as the layer does it: x / scale of bfloat16 values often is a tie (63.5 where x is
                # half of absmax), and float64 would break it differently.
                x = fake_quantize_input(x.float(), packed.scheme, packed.input_scale).to(x.dtype)
            return nn.functional.linear(x, self.weight, self.bias)


class InFloat64(TorchFunctionMode):
    """Computes in float64 what a family casts to float32, whatever it is given; but inside `as_written`."""

    paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if InFloat64.paused:
            return func(*args, **(kwargs or {}))
        func = Tensor.double if func is Tensor.float else func
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*wide, **named)


@contextmanager
def as_written() -> Iterator[None]:
    """Let functions inside the ``with`` round to float32 as they say, also where `InFloat64` runs."""
    before, InFloat64.paused = InFloat64.paused, True
    try:
        yield
    finally:
        InFloat64.paused = before


def in_float64(forward: Callable[..., Any], ties: bool, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a model that was cast to float64, all of it.

    What a family rounds to float32 on the way would be rounded alike in the float32 copy, whose error it then hides;
    and would meet weights of float64, which is an error. With `ties`, of inputs that are rounded to int8, only the
    latter counts: rounded alike, they fall on the same side.
    """
    if ties:
        with suppress(RuntimeError):
            return forward(*args, **kwargs)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of constants
    try:
        with InFloat64():
            return forward(*args, **kwargs)
    finally:
        torch.set_default_dtype(default)


def dense_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The packed model computed by plain torch on the dequantized weights, in `dtype`.

    Only float parts are copied, and a packed embedding, which is looked up in a matrix.
    """
    packed = packed_layers(model)
    dense = copy.deepcopy(model, {id(module): module for module in packed.values()})
    for name, module in packed.items():
        dense.set_submodule(name, Dequantized(module, dtype))
    embedding, head = dense.get_input_embeddings(), dense.get_output_embeddings()
    if isinstance(embedding, PackedEmbedding):
        assert isinstance(head, Dequantized)
        lookup = nn.Embedding.from_pretrained(head.weight)
        lookup.register_forward_hook(lambda _, args, rows: embedding.scaled(rows))
        dense.set_input_embeddings(lookup)
    dense.to(dtype)  # type: ignore[arg-type]
    if dtype == torch.float64:
        dense.forward = partial(in_float64, dense.forward, quantizes_inputs(model))
    return dense


@torch.no_grad()
def logit_error(model: PreTrainedModel, plain: PreTrainedModel, exact: PreTrainedModel) -> tuple[float, float]:
    """Error of the packed float32 model's logits against those of `exact`, and the bound: twice the error of `plain`.

    Both are of the median of some probes, by their ratio. Routers choose experts in the exact run; the others follow.
    The cache is left float: rounding moves a few of its codes in each of the three, which says nothing about weights.

    Args:
        model: the packed model.
        plain: its dense copy in float32.
        exact: its dense copy in float64.
    """
    generator = torch.Generator().manual_seed(0)
    count, length = PROBES_OF_INT8_INPUTS if quantizes_inputs(model) else PROBES
    text = model.config.get_text_config()
    length = min(length, getattr(text, "max_position_embeddings", length))
    probes = torch.randint(text.vocab_size, (count, 1, length), generator=generator).to(model.device)

    def logits(candidate: nn.Module, ids: Tensor) -> Tensor:
        with disable_quantizers(candidate):
            found: Tensor = candidate(input_ids=ids, use_cache=False).logits[0]
        return found

    errors = []
    for ids in probes:  # one after the other: float64 logits of a large vocabulary take memory
        with record_routes(exact) as routes:
            right = logits(exact, ids)
        with follow_routes(plain, routes):
            lost = 2 * float(differences(logits(plain, ids), right).max())
        with follow_routes(model, routes):
            errors.append((float(differences(logits(model, ids), right).max()), lost))
    return sorted(errors, key=lambda pair: pair[0] / max(pair[1], 1e-30))[len(errors) // 2]
