"""`verify` decodes: a model whose weights are right and whose cache is lost must not pass."""

from contextlib import contextmanager

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from llmqat.compat.caches import cache_name
from llmqat.formats import decoding as decoding_module
from llmqat.formats import verify as verify_module
from llmqat.formats.decoding import as_stored
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme
from llmqat.serve.forward import through_transformers

INT4 = QuantScheme(4, 16)


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_what_was_packed_decodes(small_llama, tmp_path, kv_bits, act_bits):
    model = small_llama()
    prepare(model, QuantScheme(4, 16, act_bits=act_bits), kv_bits=kv_bits, storage_dtype=torch.bfloat16)
    directory = save_packed(model, tmp_path)
    for against in (None, model):
        check = verify(directory, against)
        assert check.ok
        assert 0 < check.decode_error <= check.decode_bound
        assert check.greedy_equal is True


def without_past(module, args, kwargs):
    return args, {**kwargs, cache_name(type(module).forward): None}


def test_a_cache_that_is_lost_is_found(packed, monkeypatch):
    """As where a library renames its argument: each token starts with no past."""

    @contextmanager
    def losing(model):
        with through_transformers(model):
            hook = model.register_forward_pre_hook(without_past, with_kwargs=True)
            yield
            hook.remove()

    monkeypatch.setattr(decoding_module, "through_transformers", losing)
    check = verify(packed[1], against=packed[0])
    assert check.max_logit_error <= check.bound, "nothing is wrong without a cache"
    assert check.decode_error > 100 * check.decode_bound
    assert not check.ok


def test_a_wrong_token_of_the_native_loop_is_found(packed, monkeypatch):
    def load(*arguments, **options):
        model = load_packed(*arguments, **options)
        generate = model.generate

        def wrong(ids, return_dict_in_generate=False, **rest):
            out = generate(ids, return_dict_in_generate=return_dict_in_generate, **rest)
            return out if return_dict_in_generate else torch.cat([out[:, :-1], (out[:, -1:] + 1) % 64], 1)

        model.generate = wrong
        return model

    monkeypatch.setattr(verify_module, "load_packed", load)
    check = verify(packed[1], against=packed[0])
    assert check.decode_error <= check.decode_bound
    assert check.greedy_equal is False
    assert not check.ok


def test_a_model_that_does_not_generate(tmp_path):
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 80}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).eval()
    prepare(model, INT4)
    check = verify(save_packed(model, tmp_path), against=model)
    assert check.ok
    assert (check.decode_error, check.decode_bound, check.greedy_equal) == (None, None, None)


def test_the_trained_model_is_left_alone(trained):
    model = trained(INT4, torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with as_stored(model) as root:
        assert not root.training
        weight = root.lm_head.weight
        assert torch.equal(weight, weight.bfloat16().float())
        assert not torch.equal(weight, before["lm_head.weight"])
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
