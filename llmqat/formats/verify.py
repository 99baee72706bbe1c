"""Prove that a packed directory holds what was trained, and that it runs as what was trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.formats import fingerprint
from llmqat.formats.contents import Contents, contents_of
from llmqat.formats.decoding import Continued, as_stored, continued, differences, judged
from llmqat.formats.dense import dense_copy, nudge, quantizes_inputs
from llmqat.formats.directory import unlisted_files
from llmqat.formats.reader import load_packed
from llmqat.formats.weights import read_mapped
from llmqat.models.foreign import local_directory
from llmqat.models.patcher import transformers_model
from llmqat.nn.experts import follow_routes, record_routes
from llmqat.nn.kv_cache import kv_bits_of
from llmqat.nn.packed_linear import packed_layers
from llmqat.nn.quantizers import disable_quantizers
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
        judges: whether decoding is compared with that, which computes in float32, or with the dequantized weights.
    """

    layers: fingerprint.Layers
    tensors: dict[str, str]
    files: dict[str, str] | None
    trained: nn.Module | None = None
    judges: bool = False


def expected_in(directory: Path, against: Contents | None) -> Expected:
    """The contents that `directory` should have: those of a trained model, else those in its fingerprint.

    Raises:
        LlmqatError: if the fingerprint is damaged, or there is none and nothing else to compare with.
    """
    if against is None:
        written = fingerprint.read(directory)
        return Expected(written.layers, written.tensors, written.files)
    files = fingerprint.read(directory).files if fingerprint.exists(directory) else None
    judges = dtype_of_hidden_states(against.model) == torch.float32
    return Expected(against.hashes, against.tensor_hashes, files, against.model, judges)


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


class Checked(NamedTuple):
    """All that is found about a packed model while it is in memory; the trained model may be elsewhere.

    Attributes:
        verification: but for decoding, where the trained model is to judge that.
        continued: what the trained model judges; nothing where it does not.
    """

    verification: Verification
    continued: Sequence[Continued] = ()

    @full_float32()
    def judged_by(self, trained: nn.Module | None) -> Verification:
        """All of the verification, by the trained model where it judges."""
        if trained is None or not self.continued:
            return self.verification
        with as_stored(trained) as reference:
            return with_decoding(self.verification, self.continued, reference)


def with_decoding(verification: Verification, found: Sequence[Continued], reference: nn.Module) -> Verification:
    """A verification with what `reference` says about decoding."""
    decoded = judged(found, reference)
    if decoded is None:
        return verification
    return replace(verification, decode_error=decoded.error, decode_bound=decoded.bound, greedy_equal=decoded.greedy)


def verify_loaded(directory: Path, model: PreTrainedModel, expected: Expected, logits: bool = True) -> Verification:
    """Compare `directory`, and the float32 `model` that was loaded from it, with what is expected; see `verify`."""
    return check_loaded(directory, model, expected, logits).judged_by(expected.trained)


@full_float32()
def check_loaded(directory: Path, model: PreTrainedModel, expected: Expected, logits: bool = True) -> Checked:
    """Compare as `verify_loaded` does, but leave what the trained model has to judge for later: it does not run."""
    changed = set(changed_tensors(directory, expected.tensors))
    if expected.files is not None:
        changed |= set(changed_files(directory, expected.files))
    codes_wrong, scales_wrong, count = compare_layers(model, expected.layers)
    mismatched = tuple(sorted(codes_wrong | scales_wrong))
    found = Verification(
        count, not codes_wrong, not scales_wrong, mismatched, None, None, changed=tuple(sorted(changed))
    )
    if not logits:
        return Checked(found)
    if model.device.type == "mps":  # which has no float64
        model.to("cpu")  # type: ignore[arg-type]
    plain, exact = dense_copy(model, torch.float32), dense_copy(model, torch.float64)
    error, bound = logit_error(model, plain, exact)
    found = replace(found, max_logit_error=error, bound=bound)
    if kv_bits_of(model) or quantizes_inputs(model):
        nudge(plain)  # what it loses on the way is the bound of decoding
    decoded = continued(model, (plain, exact))
    return Checked(found, decoded) if expected.judges else Checked(with_decoding(found, decoded, exact))


@torch.no_grad()
def dtype_of_hidden_states(model: nn.Module) -> torch.dtype:
    """The dtype in which a model computes, whatever that of its weights: that of a row of its input embedding."""
    device = next(model.parameters()).device
    row: Tensor = transformers_model(model).get_input_embeddings()(torch.zeros(1, dtype=torch.int64, device=device))
    return row.dtype


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
