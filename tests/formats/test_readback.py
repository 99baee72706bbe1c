"""A model that could not be loaded again is not written."""

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme

INT4 = QuantScheme(4, 16)


def test_modules_that_the_config_does_not_know(small_llama, tmp_path):
    model = small_llama()
    model.model.extra = nn.Linear(48, 48)
    prepare(model, INT4, overrides={"extra": "float"}, min_coverage=0)
    with pytest.raises(
        LlmqatError, match=r"cannot be packed, since it could not be loaded again: .*model\.extra\.weight"
    ):
        save_packed(model, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_adapters_of_peft_are_refused_before_any_work(small_llama):
    model = get_peft_model(small_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for prepared in (model, model.get_base_model()):
        with pytest.raises(
            LlmqatError, match=r"adapters of peft that are not merged \(.*q_proj.*\); call merge_and_unload"
        ):
            prepare(prepared, INT4)


@pytest.mark.parametrize("bits", [None, 8], ids=["float head", "packed head"])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_the_tensors_say_whether_the_head_is_tied(small_llama, tmp_path, shared, flag, bits):
    """Whatever the config says."""
    model = small_llama(tie_word_embeddings=shared)
    model.config.tie_word_embeddings = flag
    prepare(model, INT4, lm_head_bits=bits)
    directory = save_packed(model, tmp_path)
    loaded = load_packed(directory)
    assert loaded.config.tie_word_embeddings is shared
    loaded.tie_weights()
    assert verify(directory, against=model).ok
