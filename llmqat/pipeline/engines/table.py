"""Engines, the formats that each of them runs, and the modules that it needs for them: one table."""

from dataclasses import dataclass

from llmqat.formats.export.holds import PACKED


@dataclass(frozen=True)
class Engine:
    """An engine as `llmqat verify --runtime` starts it.

    Attributes:
        formats: format that it runs -> modules that it needs for it beside its own.
        in_bfloat16: formats that it computes in bfloat16; the others in float32.
        rounds: whether it rounds products of codes and scales to the dtype of the scales, as training does.
        int8: whether it rounds the activations of layers on a grid to int8, whatever the model was trained with.
    """

    formats: dict[str, tuple[str, ...]]
    in_bfloat16: tuple[str, ...] = ()
    rounds: bool = False
    int8: bool = False

    def dtype(self, held_as: str) -> str:
        """The dtype in which it computes a format; that of the packed model with which it is compared."""
        return "bfloat16" if held_as in self.in_bfloat16 else "float32"

    def modules(self, own: str, held_as: str) -> list[str]:
        """The modules that the engine of the name `own` needs for a format, its own first."""
        return [OWN_MODULES.get(own, own), *self.formats[held_as]]


OWN_MODULES = {"llama.cpp": "llama_cpp", "mlx": "mlx_lm", "onnxruntime": "onnxruntime_genai"}
GPTQMODEL = ("gptqmodel", "optimum")
ENGINES = {
    "transformers": Engine(
        {PACKED: ("compressed_tensors",), "dense": (), "gguf": ("gguf",), "gptq": GPTQMODEL, "awq": GPTQMODEL}
    ),
    "vllm": Engine(dict.fromkeys((PACKED, "dense", "gptq", "awq"), ()), in_bfloat16=(PACKED, "gptq", "awq")),
    "llama.cpp": Engine({"gguf": ()}, int8=True),
    "gptqmodel": Engine(dict.fromkeys(("gptq", "awq"), ()), in_bfloat16=("gptq", "awq")),  # whose kernels have 16 bits
    "mlx": Engine({"mlx": ()}),
    "onnxruntime": Engine({"onnx": ()}),
    "openvino": Engine({"onnx": ("transformers",)}),
    "llmqat": Engine({PACKED: (), "dense": ()}, rounds=True),
}
