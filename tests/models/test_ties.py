"""The tensors say what is tied; the flag of the config follows them."""

from torch import nn

from llmqat.models.ties import correct_flag, possible_ties, set_tied, shared_ties

HEAD = {"lm_head.weight": "model.embed_tokens.weight"}


def test_what_a_family_may_tie_and_what_a_model_does(tiny_llama):
    tied, apart = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=False)
    assert possible_ties(tied) == possible_ties(apart) == HEAD
    assert (shared_ties(tied), shared_ties(apart)) == (HEAD, {})
    assert (tied.config.tie_word_embeddings, apart.config.tie_word_embeddings) == (True, False)


def test_the_flag_follows_the_tensors(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    correct_flag(model)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    assert shared_ties(model) == {}
    model.lm_head.weight = model.model.embed_tokens.weight
    correct_flag(model)
    assert model.config.tie_word_embeddings is True


def test_a_text_model_inside_another_has_a_flag_too():
    class Config:
        tie_word_embeddings = True

        def get_text_config(self):
            return inner

    inner, outer = Config(), Config()
    set_tied(outer, False)
    assert (outer.tie_word_embeddings, inner.tie_word_embeddings) == (False, False)
