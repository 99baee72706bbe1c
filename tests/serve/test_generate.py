"""`generate` on the native decoder: the tokens of transformers' own loop, by the same processors and criteria."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

import llmqat
from llmqat.kernels import native
from llmqat.nn.embedding import PackedEmbedding
from llmqat.scheme import QuantScheme
from llmqat.serve.families import FAMILIES
from llmqat.serve.generate import accelerate_generate
from tests.serve.helpers import OPTIONS, PROMPT, generate, native_blocks, rope_options


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_tokens_of_transformers(options, steps):
    model = native_blocks()
    expected = generate(model, **options)
    assert steps == []
    accelerate_generate(model)
    tokens = generate(model, **options)
    assert torch.equal(tokens, expected)
    assert steps == tokens[0, PROMPT.shape[1] : -1].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("small_buffers")
def test_families_over_grown_buffers(family, steps):
    model = native_blocks(family, scheme=QuantScheme(4, 32, act_bits=8))
    expected = generate(model, max_new_tokens=30)
    accelerate_generate(model)
    assert torch.equal(generate(model, max_new_tokens=30), expected)
    assert len(steps) == 29


@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "yarn"])
def test_rotary_embeddings(rope_type, steps):
    """A dynamic one changes while the sequence outgrows the length that the model was trained for."""
    model = native_blocks(**rope_options(rope_type))
    expected = generate(model, max_new_tokens=40)
    accelerate_generate(model)
    assert torch.equal(generate(model, max_new_tokens=40), expected)
    assert len(steps) == 39


@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_part_of_a_head_turns(factor, steps):
    model = native_blocks("phi3", rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": factor})
    expected = generate(model)
    accelerate_generate(model)
    assert torch.equal(generate(model), expected)
    assert len(steps) == 19


@pytest.mark.parametrize(("new", "made"), [(9, 8), (10, 0)])
def test_a_longrope_that_may_change_stays_with_transformers(new, made, steps):
    """It is trained for 16 tokens with the short factors, and the prompt has 7; from 17 on the long ones hold."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0} | factors
    model = native_blocks("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    expected = generate(model, max_new_tokens=new)
    accelerate_generate(model)
    assert torch.equal(generate(model, max_new_tokens=new), expected)
    assert len(steps) == made
    long = PROMPT.repeat(1, 3)
    steps.clear()
    assert generate(model, long, max_new_tokens=9).shape == (1, 30)
    assert len(steps) == 8


def test_capped_logits(steps):
    """A cap leaves the best token alone, but not the odds of the others."""
    sampled = {"do_sample": True, "top_k": 0, "max_new_tokens": 40}
    free = generate(native_blocks("gemma2", final_logit_softcapping=None), **sampled)
    model = native_blocks("gemma2", final_logit_softcapping=1.5)
    expected = generate(model, **sampled)
    accelerate_generate(model)
    assert torch.equal(generate(model, **sampled), expected)
    assert not torch.equal(free, expected)
    assert len(steps) == 39


def test_windows(steps):
    model = native_blocks("mistral", sliding_window=8)
    expected = generate(model, max_new_tokens=60)
    accelerate_generate(model)
    assert torch.equal(generate(model, max_new_tokens=60), expected)
    assert len(steps) == 59


def test_an_end_token_stops(steps):
    model = native_blocks()
    accelerate_generate(model)
    free = generate(model)[0, PROMPT.shape[1] :].tolist()
    stopped = generate(model, eos_token_id=free[4])[0, PROMPT.shape[1] :].tolist()
    assert stopped == free[: free.index(free[4]) + 1]


def test_a_criterion_of_ones_own(steps):
    class AtTwelve(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)

    model = native_blocks()
    accelerate_generate(model)
    assert generate(model, stopping_criteria=StoppingCriteriaList([AtTwelve()])).shape == (1, 12)


def test_a_streamer_gets_every_token():
    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, tokens):
            self.seen.extend(tokens.flatten().tolist())

        def end(self):
            self.ended = True

    model, streamer = native_blocks(), Streamer()
    accelerate_generate(model)
    tokens = generate(model, streamer=streamer)
    assert streamer.seen == tokens[0].tolist()
    assert streamer.ended


def test_the_cache_goes_on(steps):
    """The caller's cache holds what was generated: a second call goes on where the first ended."""
    model = native_blocks()
    expected = generate(model, max_new_tokens=20)
    accelerate_generate(model)
    cache = DynamicCache(config=model.config)
    first = generate(model, max_new_tokens=8, past_key_values=cache)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert torch.equal(generate(model, first, max_new_tokens=12, past_key_values=cache), expected)
    assert len(steps) == 7, "a filled cache goes through transformers"


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt": PROMPT.repeat(2, 1)},
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=20, eos_token_id=-1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_transformers_keeps(options, steps):
    model = native_blocks()
    accelerate_generate(model)
    generate(model, **options)
    assert steps == []


def test_a_packed_directory_generates_so(tiny_llama, tmp_path, greedy_steps):
    model = tiny_llama()
    llmqat.prepare(model, QuantScheme(4, 32), lm_head_bits=8)
    llmqat.pack(model, tmp_path / "out")
    packed = llmqat.load(tmp_path / "out")
    tokens = generate(packed)
    assert len(greedy_steps) == 19
    assert tokens.shape == (1, 27)


def test_threads_come_back():
    total = torch.get_num_threads()
    with native.own_threads():
        assert (torch.get_num_threads(), native.threads()) == (1, total)
    assert (torch.get_num_threads(), native.threads()) == (total, total)
    with pytest.raises(RuntimeError, match="interrupted"), native.own_threads():
        raise RuntimeError("interrupted")
    assert torch.get_num_threads() == total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_head_and_embedding(dtype, steps):
    model = native_blocks(dtype=dtype, lm_head_bits=8, tie_word_embeddings=True)
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    expected = generate(model, **OPTIONS["penalized"])
    accelerate_generate(model)
    assert torch.equal(generate(model, **OPTIONS["penalized"]), expected)
    assert len(steps) == 19


@pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens"])
def test_hooks_are_called(path, steps):
    """Steps call what is packed directly, unless somebody listens."""
    model, calls = native_blocks(lm_head_bits=8, tie_word_embeddings=True), []
    accelerate_generate(model)
    model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    generate(model, max_new_tokens=5)
    assert len(calls) == 5
    assert len(steps) == 4
