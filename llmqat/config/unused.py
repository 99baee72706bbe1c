"""Refuse options that the other choices of a recipe leave without effect."""

from collections.abc import Mapping
from dataclasses import fields

from llmqat.config.sections import InitConfig, QuantConfig, TrainConfig
from llmqat.errors import LlmqatError


def check_used(quant: QuantConfig, init: InitConfig, train: TrainConfig, mode: str) -> None:
    """Every option that is not at its default must change something in a run that trains in `mode`.

    Raises:
        LlmqatError: naming the first that does not, why, and the remedy.
    """
    changes = [change for change in quant.overrides.values() if isinstance(change, Mapping)]
    static = quant.act_static or any(change.get("act_static") for change in changes)
    this = f"--train {mode}"
    for section, name, used, why in (
        (train, "lora_r", mode == "lora", f"{this} has no adapters; leave it out, or add --train lora"),
        (
            train,
            "lr_scale",
            mode != "scales" or not train.lr_scale,
            f"{this} trains them at --lr; give that instead",
        ),
        (
            init,
            "block_steps",
            init.method == "blockwise" and init.by_blocks,
            "no block is trained; leave it out, or add --init blockwise",
        ),
        (init, "method", init.codes_from is None, "codes are those of --codes-from; leave one of the two out"),
        (quant, "clip_mask", mode != "scales", f"{this} moves no weight; leave it out, or train full or lora"),
        (train, "hidden_weight", train.loss == "kd", "--loss ce has no teacher; leave it out, or add --loss kd"),
        (train, "freeze_observers", static, "no activations are static; leave it out, or add --act-static"),
    ):
        option = next(field for field in fields(section) if field.name == name)
        if not used and getattr(section, name) != option.default:
            raise LlmqatError(f"{option.metadata['flag']} changes nothing: {why}")
