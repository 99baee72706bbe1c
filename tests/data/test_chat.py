import copy
from types import SimpleNamespace

import pytest
import torch

from llmqat.data.chat import IGNORED, chat_rows, chat_stream, positions, token_count, unstack
from llmqat.data.messages import Conversation
from llmqat.data.template import PLAIN_TEMPLATE, answer_spans, as_question, ensure_template
from llmqat.data.tokens import encode, sequences
from llmqat.errors import LlmqatError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Answers open with a tag of reasoning that a finished turn lacks; the last turn keeps an empty one (Qwen3).
REASONING = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
REWRITING = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '(thought)' }}{% endif %}{{ m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ENDING = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
ALTERNATING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)


def conversation(*contents, system=None):
    roles = ("user", "assistant")
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


TALK = conversation("one", "first", "two", "second", system="be brief")


@pytest.fixture
def chatty(tokenizer):
    """``chatty(template)``: the byte tokenizer with a chat template, or without one."""

    def make(template=None):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        return own

    return make


def answers(tokenizer, talk):
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    return [text[start:end] for start, end in answer_spans(tokenizer, talk, text)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["first<|im_end|>\n", "second<|im_end|>\n"]),
        (REASONING, ["first<|im_end|>\n", "second<|im_end|>\n"]),
        (ENDING, ["first<|im_end|>\n", "second<|im_end|>\n</s>"]),
        (REWRITING, ["(thought)second\n"]),  # the first turn reads otherwise in the whole
        (PLAIN_TEMPLATE, ["first</s>", "second</s>"]),
    ],
    ids=["chatml", "reasoning", "ending", "rewriting", "plain"],
)
def test_answers_are_what_the_template_adds(chatty, template, expected):
    assert answers(chatty(template), TALK) == expected


def test_a_template_without_an_opening_for_answers(chatty):
    assert answers(chatty(ALTERNATING), TALK[1:]) == [" first</s>", " second</s>"]


def test_the_plain_template_is_given_once_and_said(chatty, capsys):
    own = chatty()
    ensure_template(own)
    assert "the tokenizer has no chat template: using a plain one" in capsys.readouterr().err
    ensure_template(own)
    assert capsys.readouterr().err == ""
    assert own.apply_chat_template(TALK, tokenize=False) == (
        "<s>### System:\nbe brief\n\n### User:\none\n\n### Assistant:\nfirst</s>\n\n### User:\ntwo\n\n"
        "### Assistant:\nsecond</s>"
    )
    own.bos_token = own.eos_token = None
    assert own.apply_chat_template(TALK[1:2], tokenize=False, add_generation_prompt=True) == (
        "### User:\none\n\n### Assistant:\n"
    )
    assert as_question(chatty(), "q") == "<s>### User:\nq\n\n### Assistant:\n"
    kept = chatty(CHATML)
    ensure_template(kept)
    assert kept.chat_template == CHATML


@pytest.mark.parametrize("template", [CHATML, PLAIN_TEMPLATE, ALTERNATING], ids=["chatml", "plain", "alternating"])
def test_labels_are_the_answers_and_nothing_else(chatty, template):
    own, talk = chatty(template), TALK[1:]
    rows = chat_rows(own, [talk, talk[:2]], 500)
    text = own.apply_chat_template(talk, tokenize=False)
    assert own.decode(rows[0, 0]) == text
    labels = [row[1][row[1] != IGNORED] for row in rows]
    assert own.decode(labels[0]) == "".join(answers(own, talk))
    assert own.decode(labels[1]) == answers(own, talk[:2])[0]
    assert torch.equal(labels[0], rows[0, 0][rows[0, 1] != IGNORED])  # where they stand, too
    padding = rows[1, 0][
        len(own.apply_chat_template(talk[:2], tokenize=False).replace("</s>", "<").replace("<s>", "<")) :
    ]
    assert set(padding.tolist()) <= {own.eos_token_id}
    assert (rows[1, 1, -len(padding) :] == IGNORED).all()


def test_a_token_across_the_border_belongs_to_the_question(chatty):
    """Byte-level merges may join the end of the question with the answer: such a token has no loss."""
    own = chatty("{% for m in messages %}{{ m.content }}{% endfor %}")
    own.add_tokens(["ab"])
    rows = chat_rows(own, [conversation("xa", "bc")], 50)
    assert own.convert_ids_to_tokens(rows[0, 0]) == ["x", "ab", "c"]
    assert own.decode(rows[0, 1][rows[0, 1] != IGNORED]) == "c"


def test_white_space_before_an_answer_belongs_to_its_first_token(chatty):
    """A template may end an opening with a space, which tokenizers join with the word behind it."""
    own = chatty(
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    own.add_tokens([" yes"])
    rows = chat_rows(own, [conversation("q", "yes")], 50)
    assert own.decode(rows[0, 1][rows[0, 1] != IGNORED]) == " yes"


def learned(tokenizer, talk):
    rows = chat_rows(tokenizer, [talk], 500)
    return tokenizer.decode(rows[0, 1][rows[0, 1] != IGNORED])


@pytest.mark.parametrize("template", [CHATML, PLAIN_TEMPLATE], ids=["chatml", "plain"])
def test_answers_before_any_question(chatty, template):
    own, end = chatty(template), "</s>" if template == PLAIN_TEMPLATE else "<|im_end|>\n"
    greeting, talk = {"role": "assistant", "content": "hello"}, TALK[1:]
    assert learned(own, [greeting, *talk]) == f"hello{end}first{end}second{end}"
    assert learned(own, [TALK[0], greeting, *talk]) == f"hello{end}first{end}second{end}"
    assert learned(own, [greeting]) == f"hello{end}"
    assert learned(own, [greeting, {**greeting, "content": "again"}]) == f"hello{end}again{end}"


def test_answers_that_a_template_does_not_render_alone(chatty, capsys):
    """Qwen3 refuses conversations without a user, also where they are the beginning of one."""
    own = chatty(
        "{% if messages | selectattr('role', 'eq', 'user') | list | length == 0 %}"
        "{{ raise_exception('No user query found') }}{% endif %}" + CHATML
    )
    talk = [{"role": "assistant", "content": "hello"}, *TALK[1:]]
    assert learned(own, talk) == "first<|im_end|>\nsecond<|im_end|>\n"
    assert "1 earlier answers do not count" in capsys.readouterr().err


def test_an_answer_without_an_opening_is_found_by_its_words(chatty):
    own = chatty("{% for m in messages %}{{ m.role + '|' + m.content + '\n' }}{% endfor %}")
    assert learned(own, [{"role": "assistant", "content": "hello"}]) == "hello\n"


def test_answers_of_weight_0_are_shown_and_not_learned(chatty, capsys):
    own = chatty(CHATML)
    talk = [{**message, "weight": 0} if message["content"] == "first" else message for message in TALK]
    assert learned(own, talk) == "second<|im_end|>\n"
    assert "first" in own.decode(chat_rows(own, [talk], 500)[0, 0])
    talk = [{**message, "weight": 0} if message["content"] == "second" else message for message in TALK]
    assert learned(own, talk) == "first<|im_end|>\n"
    assert "do not count" not in capsys.readouterr().err
    learned(own, [{**TALK[1], "train": True}, TALK[2]])
    told = "training conversations: 1 messages of other roles have weight 1; only answers are learned"
    assert told in capsys.readouterr().err


WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "m.content +", "m.content + (m.tool_calls | tojson if m.tool_calls else '') +"
)


def test_a_template_gets_what_stands_beside_the_messages(chatty, capsys):
    talk = Conversation(conversation("q", "a"), {"tools": [{"name": "f"}], "effort": "low"})
    text = chatty().decode(chat_rows(chatty("{{ effort }}" + WITH_TOOLS), [talk], 500)[0, 0])
    assert text.startswith('low[{"name": "f"}]<|im_start|>user')
    assert "no use" not in capsys.readouterr().err
    chat_rows(chatty(CHATML), [talk, Conversation([{**talk[0], "name": "Ann"}, talk[1]])], 500)
    told = "training conversations: the chat template has no use for effort (1), name (1), tools (1)"
    assert told in capsys.readouterr().err
    chat_rows(
        chatty("{% for m in messages %}<{{ m | tojson }}>{% endfor %}"),
        [Conversation([{**talk[0], "name": "Ann"}, talk[1]])],
        500,
    )
    assert "no use" not in capsys.readouterr().err  # written with all the rest


def test_tool_calls_are_answers(chatty, capsys):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert learned(chatty(WITH_TOOLS), [TALK[1], call]) == '[{"function": {"name": "f"}}]<|im_end|>\n'
    assert len(chat_rows(chatty(CHATML), [[TALK[1], call], TALK], 500)) == 1
    told = "conversation 1: the chat template has no use for its tool_calls, which are an answer"
    assert told in capsys.readouterr().err


def test_a_tokenizer_may_have_another_template_for_tools(chatty, capsys):
    own = chatty({"default": CHATML, "tool_use": WITH_TOOLS})
    talk = Conversation(conversation("q", "a"), {"tools": [{"name": "f"}]})
    assert own.decode(chat_rows(own, [talk], 500)[0, 0]).startswith('[{"name": "f"}]')
    assert "no use" not in capsys.readouterr().err


def test_messages_by_hand_are_brought_into_form(chatty, capsys):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1, "name": None}]
    assert learned(chatty(CHATML), talk) == "a<|im_end|>\n"
    assert len(chat_rows(chatty(CHATML), [talk[:1], talk], 500)) == 1
    assert "conversation 1: no message of the assistant" in capsys.readouterr().err
    with pytest.raises(LlmqatError, match="none of 1 conversations can be used; the first one, conversation 1"):
        chat_stream(chatty(CHATML), [talk[:1]])


def test_long_conversations_are_cut_and_counted(chatty, capsys):
    own = chatty(ALTERNATING)  # "[INST] q [/INST] answer</s>": 16 characters before the answer
    rows = chat_rows(own, [conversation("q", "a" * 50), conversation("q", "b"), conversation("q" * 30, "c")], 20)
    assert rows.shape == (2, 2, 20)
    told = capsys.readouterr().err
    assert "training conversations: 1 of 2 are longer than 20 tokens, and were cut" in told
    reason = "1 of 3 rows left out; the first one, conversation 3: its first answer begins at token 46, beyond 20"
    assert reason in told


def test_nothing_left_is_an_error_with_the_remedy(chatty):
    own = chatty(ALTERNATING)
    message = (
        r"no answer token of the my\.jsonl conversations is left within 16 tokens \(the first one, conversation 1: its "
        r"first answer begins at token 17, beyond 16\); the median prompt has 16 tokens; raise --length or --window"
    )
    with pytest.raises(LlmqatError, match=message):
        chat_rows(own, [conversation("q", "a")], 16, what="my.jsonl")
    with pytest.raises(LlmqatError, match=r"conversation 1: the chat template refuses it \(System role not supported"):
        chat_rows(own, [TALK], 99)


def test_rows_that_the_template_refuses_are_left_out(chatty, capsys):
    rows = chat_rows(chatty(ALTERNATING), [TALK, TALK[1:]], 99)
    assert len(rows) == 1
    told = "training conversations: 1 of 2 rows left out; the first one, conversation 1: the chat template refuses it"
    assert told in capsys.readouterr().err


def test_answers_that_a_template_rewrites_are_counted(chatty, capsys):
    rows = chat_rows(chatty(REWRITING), [TALK, TALK], 500)
    assert "training conversations: 2 earlier answers do not count" in capsys.readouterr().err
    assert chatty().decode(rows[0, 1][rows[0, 1] != IGNORED]) == "(thought)second\n"


def test_answers_that_a_template_hides(chatty, capsys):
    own = chatty(
        "{% for m in messages %}{% if m.role == 'user' or m.content == 'a' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert len(chat_rows(own, [conversation("q", "hidden"), conversation("q", "a")], 99)) == 1
    assert "conversation 1: the chat template shows no answer" in capsys.readouterr().err


def test_an_answer_without_a_token_of_its_own(chatty, capsys):
    own = chatty("{% for m in messages %}{{ m.content }}{% endfor %}")
    own.add_tokens(["ab"])
    assert len(chat_rows(own, [conversation("a", "b"), conversation("q", "r")], 99)) == 1
    assert "conversation 1: no token begins inside its answer" in capsys.readouterr().err


def test_slow_tokenizers():
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(
        LlmqatError, match=r"SimpleNamespace cannot tell where in a text its tokens stand, .*tokenizer\.js"
    ):
        chat_rows(slow, [TALK], 99)


def test_a_limit_stops_early(chatty):
    own = chatty(CHATML)
    assert len(chat_rows(own, [TALK] * 10, 500, limit=300)) < 10
    assert len(chat_rows(own, [TALK] * 10, 500, limit=1)) == 1


def test_the_stream_for_calibration_holds_questions_and_answers(chatty):
    own = chatty(CHATML)
    stream = encode(own, [TALK, TALK[1:]])
    assert own.decode(stream) == "".join(own.apply_chat_template(talk, tokenize=False) for talk in (TALK, TALK[1:]))
    assert torch.equal(chat_stream(own, [TALK] * 9, 11), stream[:11])


def test_sequences_takes_texts_and_conversations(chatty):
    own = chatty(CHATML)
    assert [own.decode(row) for row in sequences(own, ["abcdefghi"], 4)] == ["abcd", "efgh"]
    assert torch.equal(sequences(own, [TALK], 500), chat_rows(own, [TALK], 500))


def test_unstack_keeps_what_predicts_an_answer():
    ids = torch.arange(12).view(2, 6)
    labels = torch.full((2, 6), IGNORED)
    labels[0, 2:4], labels[1, 1] = ids[0, 2:4], ids[1, 1]
    batch = torch.stack([ids, labels], 1)
    kept, counts = unstack(batch)
    assert torch.equal(kept, ids[:, :4])  # nothing behind the last answer
    assert counts.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert (positions(batch), token_count(batch)) == (3, 4 + 2)
    assert unstack(ids)[0] is ids
    assert unstack(ids)[1] is None
    assert positions(ids) == token_count(ids) == 12
