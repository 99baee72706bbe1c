"""The `quantization_config` of compressed-tensors ``pack-quantized``: from schemes by layer, and back.

https://github.com/vllm-project/compressed-tensors. transformers reads it, and vLLM serves models of this format; llmqat
writes nothing of its own.
"""

from collections.abc import Collection, Mapping
from typing import Any

from llmqat.errors import LlmqatError
from llmqat.formats.targets import CONV1D, LINEAR, is_target, target_of
from llmqat.models.coverage import TIED_HEAD, CoverageReport
from llmqat.scheme import QuantScheme

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
# Where config.json says that the cache is int8, beside `quantization_config`: readers that do not know it use a float
# cache. The `kv_cache_scheme` of compressed-tensors knows no scale per token and head, and vLLM takes per-tensor ones.
OWN_KEY, KV_BITS_KEY = "llmqat", "kv_bits"


def weight_args(scheme: QuantScheme) -> dict[str, Any]:
    """How the weights of a scheme are described."""
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
    }


def block_args(scheme: QuantScheme, longest: int) -> dict[str, Any]:
    """How the weights of a scheme are described where they lie as ``(in, out)``, see `llmqat.formats.conv1d`.

    Args:
        scheme: the grid.
        longest: the largest `in_features`: a block as high holds a whole column, whatever its length.
    """
    height = longest if scheme.group_size == -1 else scheme.group_size
    args = {**weight_args(scheme), "strategy": "block", "block_structure": [height, 1]}
    del args["group_size"]
    return args


def activation_args(scheme: QuantScheme) -> dict[str, Any] | None:
    """How the inputs are described: dynamic and per token, or static with one scale per layer (`input_scale`)."""
    if scheme.inputs == "float":
        return None
    dynamic = scheme.inputs == "dynamic"
    how = {"strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    return {"num_bits": scheme.act_bits, "type": "int", "symmetric": True, **how}


def scheme_from_args(group: Mapping[str, Any]) -> QuantScheme:
    """Inverse of the three above; where weights lie as ``(in, out)``, one group per row has the longest row's length.

    Raises:
        LlmqatError: for anything llmqat cannot run.
    """
    weights, acts = group["weights"], group.get("input_activations")
    by_block = weights["strategy"] == "block" and group["targets"] == [CONV1D]
    if weights["type"] != "int" or not (by_block or weights["strategy"] in ("group", "channel")):
        raise LlmqatError(
            f"cannot run {weights['type']} weights of strategy {weights['strategy']!r}; llmqat reads int weights by "
            "group or channel"
        )
    known = acts is None or (
        acts["type"] == "int"
        and acts["symmetric"]
        and (acts["strategy"], acts["dynamic"]) in (("token", True), ("tensor", False))
    )
    if not known:
        raise LlmqatError(
            "cannot run these activations; llmqat reads symmetric int8, dynamic per token or static per tensor, or none"
        )
    group_size = -1 if weights["strategy"] == "channel" else weights.get("group_size")
    if by_block:
        group_size = weights["block_structure"][0]
    if type(group_size) is not int or type(weights["num_bits"]) is not int or type(weights["symmetric"]) is not bool:
        raise ValueError(f"num_bits, group_size or symmetric of {weights}")
    return QuantScheme(
        weights["num_bits"],
        group_size,
        weights["symmetric"],
        None if acts is None else acts["num_bits"],
        acts is not None and not acts["dynamic"],
    )


def config_of(
    schemes: Mapping[str, QuantScheme],
    ignored: list[str],
    embeddings: Collection[str] = (),
    transposed: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """`quantization_config` for layers with their schemes.

    One scheme for all gives the single group every reader knows, targets ``Linear``; several give one group each, its
    layers by name, and experts, which all have the same, by pattern: so readers find the experts' group. `embeddings`:
    which of the layers are no Linear. Layers that keep their weight as ``(in, out)`` (`transposed`: their names and
    `in_features`) all have the same. Where transformers has to dequantize on loading, the config itself asks it to.
    """
    distinct = list(dict.fromkeys(schemes.values()))
    groups = {}
    for index, scheme in enumerate(distinct):
        targets = dict.fromkeys(target_of(name) for name, own in schemes.items() if own == scheme)
        groups[f"group_{index}"] = {
            "targets": [CONV1D if transposed else LINEAR, *embeddings] if len(distinct) == 1 else list(targets),
            "format": FORMAT,
            "weights": block_args(scheme, max(transposed.values())) if transposed else weight_args(scheme),
            "input_activations": activation_args(scheme),
            "output_activations": None,
        }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": groups,
        **({"dequantize": True} if transposed or _asks_to_dequantize(schemes, bool(embeddings)) else {}),
    }


def _asks_to_dequantize(schemes: Mapping[str, QuantScheme], packed_embedding: bool) -> bool:
    """Whether `quantization_config` itself asks transformers to dequantize on loading: it reads the model only so, and
    as it is, without activations that this route drops."""
    needed, whole = _dequantized_alone(schemes, packed_embedding)
    return needed and whole and all(scheme.act_bits is None for scheme in schemes.values())


def _dequantized_alone(schemes: Mapping[str, QuantScheme], packed_embedding: bool) -> tuple[bool, bool]:
    """Whether transformers (5.23, 5.24) has to dequantize a model on loading, and whether it does so right.

    Its default route loads neither packed zero points nor a packed embedding. ``dequantize=True`` does, but decodes
    every layer as the first group says, and knows no zero points of experts.
    """
    asymmetric = not all(scheme.symmetric for scheme in schemes.values())
    experts = any(".experts." in name for name in schemes)
    return asymmetric or packed_embedding, len(set(schemes.values())) == 1 and not (asymmetric and experts)


def transformers_route(coverage: CoverageReport) -> dict[str, bool] | None:
    """Arguments of `CompressedTensorsConfig` with which transformers reads a packed directory, beside those in its
    config.json; None: it cannot. Experts that the files of a family hold together it knows as float alone."""
    embedding = any(layer.role == TIED_HEAD for layer in coverage.quantized)
    needed, whole = _dequantized_alone(coverage.schemes, embedding)
    if not coverage.experts_apart or (needed and not whole):
        return None
    return {"dequantize": True} if needed and not _asks_to_dequantize(coverage.schemes, embedding) else {}


def readers(coverage: CoverageReport) -> str:
    """Who reads the packed directory, in a few words."""
    route = transformers_route(coverage)
    if not coverage.experts_apart:
        return "llmqat reads it; transformers reads experts of this family as float alone: llmqat export --to dense"
    if route is None:
        return (
            "llmqat reads it; transformers does not, since zero points or a packed embedding come with several grids "
            "or experts: llmqat export --to dense"
        )
    if route:
        return "transformers reads it with CompressedTensorsConfig(dequantize=True), which leaves activations float"
    return "transformers reads it"


def schemes_of(config: Mapping[str, Any], packed_layers: list[str]) -> dict[str, QuantScheme]:
    """The scheme of every packed layer of a checkpoint.

    Raises:
        LlmqatError: if the file is of another method or format, or a layer matches no group.
    """
    if config.get("quant_method") != METHOD or config.get("format") != FORMAT:
        raise LlmqatError(
            f"quantization {config.get('quant_method')!r} in format {config.get('format')!r} is not {METHOD} {FORMAT}; "
            "load this directory with transformers"
        )
    try:
        groups = [(list(group["targets"]), scheme_from_args(group)) for group in config["config_groups"].values()]
    except LlmqatError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise LlmqatError(f"quantization_config in config.json is damaged: {lacks}; write the model again") from error
    result = {}
    for name in packed_layers:
        matching = [scheme for targets, scheme in groups if any(is_target(str(target), name) for target in targets)]
        if not matching:
            raise LlmqatError(
                f"layer {name} is packed but no config group targets it; config.json and weights do not belong together"
            )
        result[name] = matching[0]
    return result
