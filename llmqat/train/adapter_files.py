"""Directories of adapters: what trained beside the adapters lies in a file of its own, next to peft's."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmqat.compat.peft import lost_names, reading_targets
from llmqat.errors import LlmqatError
from llmqat.models.patcher import quantized_layers, transformers_model
from llmqat.progress import log
from llmqat.train.expert_adapters import WEIGHTS, store_together, targets_apart, tensors_apart

BESIDE = "scales_and_norms.safetensors"


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer, by the name of its class."""
    return type(module).__name__.endswith(("Norm", "NormBase")) or isinstance(module, nn.LayerNorm)


def trained_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that may train beside adapters, by name: scales that are apart from the codes, and norms."""
    layers = (on_grid for on_grid in quantized_layers(model) if on_grid.layer.code_scale is not None)
    found = {f"{on_grid.name}.scale": on_grid.layer.scale for on_grid in layers}
    for name, module in transformers_model(model).named_modules():
        if is_norm(module):
            found.update(module.named_parameters(prefix=name))
    return found


class _SavesAll(PeftModel):
    """A `PeftModel` whose directories hold what trained beside its adapters, too; plain peft loads them as well."""

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Write adapters as peft does, those of experts by fused Parameter, and scales and norms beside them."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            for adapter in self.peft_config:
                path = Path(save_directory) / ("" if adapter == "default" else adapter) / WEIGHTS
                if path.exists():
                    store_together(self, path.parent)
                    self._say_what_is_lost(path)
            # Copies, since layers may share a norm (Zamba), and a file may not hold one tensor twice.
            tensors = {name: parameter.detach().cpu().clone() for name, parameter in trained_beside(self).items()}
            save_file(tensors, Path(save_directory) / BESIDE, {"format": "pt"})

    def _say_what_is_lost(self, path: Path) -> None:
        layers = sorted({name.partition(".lora_")[0] for name in lost_names(self, load_file(path))})
        if layers:
            log(
                f"peft alone does not find the adapters of {len(layers)} layers in {path}, which it renames, the first "
                f"is {layers[0]}; llmqat.add_lora does"
            )

    def load_adapter(self, model_id: str | PathLike[Any], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load adapters as peft does, and scales and norms beside them; so trainers resume."""
        with reading_targets(targets_apart, tensors_apart):
            loaded = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        load_beside(self, Path(model_id))
        return loaded


class LoraModel(_SavesAll):
    """Adapters on a model of any kind."""


class LoraCausalLM(_SavesAll, PeftModelForCausalLM):
    """Adapters on a language model."""


def saving_all(model: PeftModel) -> PeftModel:
    """A model of peft, made to save what trained beside its adapters, too."""
    model.__class__ = LoraCausalLM if isinstance(model, PeftModelForCausalLM) else LoraModel
    return model


@torch.no_grad()
def load_beside(model: nn.Module, directory: Path) -> None:
    """Put what trained beside the adapters of `directory` into a prepared model, if that holds some.

    Raises:
        LlmqatError: if the model has other layers, or another grid.
    """
    path = directory / BESIDE
    if not path.exists():
        return
    loaded: dict[str, Tensor] = load_file(path)
    for on_grid in quantized_layers(model):
        if f"{on_grid.name}.scale" in loaded:
            on_grid.layer.decouple_scale()
    own = trained_beside(model)
    for name, tensor in loaded.items():
        if name not in own or own[name].shape != tensor.shape:
            found = tuple(own[name].shape) if name in own else "none"
            raise LlmqatError(
                f"{path} holds {name} of shape {tuple(tensor.shape)}, and the model has {found}; prepare it with the "
                "scheme that the adapters were trained with"
            )
        own[name].data = tensor.to(own[name].device, torch.promote_types(tensor.dtype, own[name].dtype))
