import pytest

from llmqat.config import MODES, from_dict, resolve
from llmqat.errors import LlmqatError

STATIC = {"quant.act_bits": 8, "quant.act_static": True}


def resolved(mode, **changes):
    return resolve(from_dict({"train": {"mode": mode}}).with_values(changes), 1)


@pytest.mark.parametrize(
    ("option", "value", "used_by", "message"),
    [
        (
            "train.lora_r",
            16,
            {"lora"},
            "--lora-r changes nothing: --train {mode} has no adapters; leave it out",
        ),
        (
            "train.lr_scale",
            0.1,
            {"full", "lora"},
            "--lr-scale changes nothing: --train scales trains them at --lr",
        ),
        (
            "quant.clip_mask",
            True,
            {"full", "lora"},
            "--clip-mask changes nothing: --train {mode} moves no weight",
        ),
        ("train.lr_scale", 0.0, set(MODES), ""),
        ("train.lr", 0.1, set(MODES), ""),
        ("train.lr_float", 0.1, set(MODES), ""),
    ],
)
def test_an_option_that_a_mode_has_no_use_for_is_refused(option, value, used_by, message):
    for mode in MODES:
        if mode in used_by:
            assert resolved(mode, **{option: value}).train.mode == mode
        else:
            with pytest.raises(LlmqatError, match=message.format(mode=mode)):
                resolved(mode, **{option: value})


def test_the_size_of_a_model_chooses_what_is_refused():
    asked = from_dict({"train": {"lora_r": 16}})
    assert resolve(asked, int(7e9)).train.lora_r == 16
    with pytest.raises(LlmqatError, match="--train full has no adapters; leave it out, or add --train lora"):
        resolve(asked, 10)


def test_options_of_a_start_of_a_teacher_and_of_static_activations():
    with pytest.raises(LlmqatError, match="--block-steps changes nothing: no block is trained; leave it out, or add"):
        resolved("full", **{"init.block_steps": 5})
    assert resolved("full", **{"init.block_steps": 5, "init.method": "blockwise"}).init.block_steps == 5
    with pytest.raises(LlmqatError, match="--hidden-weight changes nothing: --loss ce has no teacher; leave it"):
        resolved("full", **{"train.loss": "ce", "train.hidden_weight": 1.0})
    static = {"train.freeze_observers": 5}
    with pytest.raises(LlmqatError, match="--freeze-observers changes nothing: no activations are static"):
        resolved("full", **static)
    assert resolved("full", **static, **STATIC).train.freeze_observers == 5
    change = {"down_proj$": {"act_bits": 8, "act_static": True}, "o_proj$": "float"}
    assert resolved("full", **static, **{"quant.overrides": change}).train.freeze_observers == 5
