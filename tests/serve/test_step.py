"""Greedy decoding in one call a token: the tokens and the cache of the general loop, which keeps everything else."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import CacheLayerMixin
from transformers.generation import stopping_criteria

from llmqat.nn.embedding import PackedEmbedding
from llmqat.scheme import QuantScheme
from llmqat.serve.families import FAMILIES
from llmqat.serve.generate import accelerate_generate
from tests.covering import every
from tests.serve.helpers import PROMPT, generate, native_blocks, rope_options

PROMPT_LENGTH = PROMPT.shape[1]


def greedy_model(family="llama", tied=True, **options):
    """A model whose blocks and ends are native, and whose sampling is not yet."""
    return native_blocks(family, lm_head_bits=8, tie_word_embeddings=tied, **options)


class Same(LogitsProcessor):
    """Changes nothing, but has to be called."""

    def __call__(self, input_ids, scores):
        return scores


class Streamer:
    def __init__(self, most=None):
        self.most, self.seen, self.ended = most, [], False

    def put(self, tokens):
        self.seen.append(tokens)
        if self.most is not None and len(self.seen) > self.most:
            raise KeyboardInterrupt

    def end(self):
        self.ended = True


def generally(model, **options):
    return generate(model, logits_processor=LogitsProcessorList([Same()]), **options)


@pytest.mark.parametrize(
    ("tied", "act_bits", "dtype"),
    every(2, (True, False), (None, 8), (torch.float32, torch.bfloat16, torch.float16)),
    ids=str,
)
def test_the_tokens_of_the_general_loop(tied, act_bits, dtype, isa, steps, greedy_steps):
    model = greedy_model(tied=tied, dtype=dtype, scheme=QuantScheme(4, 32, act_bits=act_bits))
    assert isinstance(model.model.embed_tokens, PackedEmbedding) == tied
    expected = generate(model)
    accelerate_generate(model)
    assert torch.equal(generally(model), expected)
    assert (len(steps), greedy_steps) == (19, [])
    tokens = generate(model)
    assert torch.equal(tokens, expected)
    assert tokens.dtype == torch.int64
    assert (len(steps), greedy_steps) == (19, tokens[0, PROMPT_LENGTH:-1].tolist())
    assert len(set(greedy_steps)) > 3, "a model that repeats itself shows little"


@pytest.mark.parametrize(
    ("family", "kv_bits"),
    [(family, None) for family in FAMILIES if "gemma" not in family] + [("llama", 8), ("mistral", 8), ("olmo3", 8)],
)
@pytest.mark.usefixtures("small_buffers")
def test_the_cache_over_grown_buffers(family, kv_bits, steps, greedy_steps):
    """Mistral with a window that forgets."""
    window = {"sliding_window": 16} if family == "mistral" else {}
    model = greedy_model(family, kv_bits=kv_bits, scheme=QuantScheme(4, 32, act_bits=8), **window)
    accelerate_generate(model)
    runs = []
    for run in (generally, generate):
        caches = []
        model.register_forward_hook(lambda *call, kept=caches: kept.append(call[-1].past_key_values))
        tokens = run(model, max_new_tokens=30)
        runs.append((tokens, caches[0]))
    (expected, known), (tokens, cache) = runs
    assert torch.equal(tokens, expected)
    assert len(steps) == len(greedy_steps) == 29
    assert cache.get_seq_length() == known.get_seq_length() == PROMPT_LENGTH + 29
    attention = [pair for pair in zip(cache.layers, known.layers, strict=True) if isinstance(pair[0], CacheLayerMixin)]
    for layer, other in attention:
        for held, truth in zip(*((x.codes, x.scales) if kv_bits else (x,) for x in (layer, other)), strict=True):
            assert torch.equal(held.keys, truth.keys)
            assert torch.equal(held.values, truth.values)


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "dynamic"])
def test_rotary_embeddings(rope_type, steps, greedy_steps):
    """A dynamic one changes with the length, and stays with the general loop."""
    model = greedy_model(**rope_options(rope_type))
    expected = generate(model, max_new_tokens=40)
    accelerate_generate(model)
    assert torch.equal(generate(model, max_new_tokens=40), expected)
    assert (len(steps), len(greedy_steps)) == ((39, 0) if rope_type == "dynamic" else (0, 39))


@pytest.mark.parametrize("run", [generate, generally])
def test_a_mixer_that_fails(run, monkeypatch):
    """It runs inside a call of the library, and its error comes out as it is."""
    model = greedy_model("qwen3_5_text")
    accelerate_generate(model)
    mixer, calls = model.model.layers[2].linear_attn, []
    plain = mixer.forward

    def fail(hidden, cache):
        calls.append(hidden.shape[1])
        if len(calls) == 3:
            raise KeyboardInterrupt("enough")
        return plain(hidden, cache)

    monkeypatch.setattr(mixer, "forward", fail)
    with pytest.raises(KeyboardInterrupt, match="enough"):
        run(model)
    assert calls == [PROMPT_LENGTH, 1, 1]


def test_an_end_token_stops(greedy_steps):
    model = greedy_model()
    accelerate_generate(model)
    free = generate(model)[0, PROMPT_LENGTH:].tolist()
    greedy_steps.clear()
    for ends in (free[4], [free[7], free[4]], [-1]):
        stopped = generate(model, eos_token_id=ends)[0, PROMPT_LENGTH:].tolist()
        assert stopped == (free if ends == [-1] else free[: free.index(free[4]) + 1])
    assert greedy_steps
    assert generate(model, max_new_tokens=1)[0, PROMPT_LENGTH:].tolist() == free[:1]


def test_a_length_beyond_the_trained_one_warns(monkeypatch, greedy_steps):
    """As in transformers: not at the length that stops, nor before."""
    warnings = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", warnings.append)
    model = greedy_model(max_position_embeddings=16)
    accelerate_generate(model)
    generate(model, max_new_tokens=16 - PROMPT_LENGTH + 1)
    assert warnings == []
    tokens = generate(model, max_new_tokens=16 - PROMPT_LENGTH + 3)
    assert ["predefined maximum length (16)" in warning for warning in warnings] == [True, True]
    assert torch.equal(generally(model, max_new_tokens=16 - PROMPT_LENGTH + 3), tokens)
    assert len(warnings) == 4
    assert len(greedy_steps) == 9 + 11


def test_a_streamer_gets_what_it_always_got(steps, greedy_steps):
    model = greedy_model()
    accelerate_generate(model)
    general, streamer = Streamer(), Streamer()
    expected = generally(model, streamer=general)
    assert torch.equal(generate(model, streamer=streamer), expected)
    assert len(steps) == len(greedy_steps) == 19
    for given, known in zip(streamer.seen, general.seen, strict=True):
        assert torch.equal(given, known)
        assert given.dtype == known.dtype
    assert streamer.ended


@pytest.mark.parametrize("run", [generate, generally])
def test_an_interruption_leaves_the_cache_whole(run):
    """The prompt, and eight tokens more: of the last one only the number is known yet."""
    model = greedy_model()
    accelerate_generate(model)
    cache, streamer = DynamicCache(config=model.config), Streamer(most=8)
    with pytest.raises(KeyboardInterrupt):
        run(model, streamer=streamer, past_key_values=cache)
    assert cache.get_seq_length() == cache.layers[0].keys.shape[2] == PROMPT_LENGTH + 7
    tokens = torch.cat([tokens.flatten() for tokens in streamer.seen])[None]
    assert torch.equal(generate(model, tokens, max_new_tokens=12, past_key_values=cache), generate(model))


class AtTwelve(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)


class Shorter(stopping_criteria.MaxLengthCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return super().__call__(input_ids[:, 3:], scores, **kwargs)


GENERAL = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "sampled": {"do_sample": True, "top_k": 20},
    "criterion": {"stopping_criteria": StoppingCriteriaList([AtTwelve()])},
    "subclass": {"stopping_criteria": StoppingCriteriaList([Shorter(14)])},
}


@pytest.mark.parametrize("options", GENERAL.values(), ids=GENERAL)
def test_what_the_general_loop_keeps(options, steps, greedy_steps):
    model = greedy_model()
    plain, expected = generate(model), generate(model, **options)
    accelerate_generate(model)
    tokens = generate(model, **options)
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, plain)
    assert greedy_steps == []
    assert len(steps) == tokens.shape[1] - PROMPT_LENGTH - 1


def cap_logits():
    model = greedy_model("gemma2", tied=False, final_logit_softcapping=1.5)
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(model.model.embed_tokens.weight.detach())
    return model


def scale_embeddings():
    return greedy_model("gemma")


def scale_logits():
    return greedy_model("granite", logits_scaling=3.0)


def keep_the_head():
    return native_blocks()


def norm_the_embedding():
    model = greedy_model(tied=False)
    model.model.embed_tokens.max_norm = 1.0
    return model


@pytest.mark.parametrize("build", [cap_logits, scale_embeddings, scale_logits, keep_the_head, norm_the_embedding])
def test_models_that_the_general_loop_keeps(build, steps, greedy_steps):
    model = build()
    accelerate_generate(model)
    generate(model)
    assert (len(steps), greedy_steps) == (19, [])


def test_a_token_that_the_embedding_lacks(steps, greedy_steps):
    """It is an error of torch's, not a read beyond the rows."""
    model = greedy_model(tied=False)
    accelerate_generate(model)
    token = generate(model)[0, PROMPT_LENGTH]
    greedy_steps.clear()
    embedding = model.model.embed_tokens
    embedding.weight = torch.nn.Parameter(embedding.weight[:token])
    with pytest.raises(IndexError, match="out of range"):
        generate(model, PROMPT % int(token))
    assert (len(steps), greedy_steps) == (1, [])
