import copy
import pickle

import pytest

from llmqat.data.messages import Conversation, checked, is_chat, message_of, messages_of, without_none
from llmqat.data.rows import BadRow, Unreadable
from llmqat.errors import LlmqatError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"town": "Ulm"}}}


def assistant(**keys):
    return {"role": "assistant", "content": "a", **keys}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"from": "gpt", "value": "a"}, assistant()),
        (assistant(weight=0), assistant(weight=0)),
        (assistant(weight=0.0), assistant(weight=0)),
        (assistant(train=False), assistant(weight=0)),
        (assistant(training=False), assistant(weight=0)),
        (assistant(loss=False, weight=1), assistant(weight=0)),
        ({"from": "gpt", "value": "a", "weight": 0}, assistant(weight=0)),
        (assistant(weight=1, train=True), assistant()),
        (assistant(weight=None), assistant()),
        ({"role": "user", "content": "q", "weight": 0}, {"role": "user", "content": "q"}),
        ({"role": "user", "content": "q", "train": True}, {"role": "user", "content": "q", "weight": 1}),
        (assistant(content=[{"type": "text", "text": "a", "image": None}]), assistant()),
        (assistant(content=["a", {"type": "output_text", "text": "b"}]), assistant(content="ab")),
        (assistant(reasoning_content="r", name=None), assistant(reasoning_content="r")),
        # tool calls: of OpenAI, with arguments as text; of its first form; of ShareGPT; with what Arrow adds
        (assistant(content=None, tool_calls=[CALL]), assistant(content="", tool_calls=[CALL])),
        (
            assistant(tool_calls=[{"function": {"name": "f", "arguments": '{"town": null}'}}]),
            assistant(tool_calls=[{"function": {"name": "f", "arguments": {"town": None}}}]),
        ),
        (
            assistant(tool_calls=[{"function": {"name": "f", "arguments": "not an object"}}]),
            assistant(tool_calls=[{"function": {"name": "f", "arguments": "not an object"}}]),
        ),
        (
            assistant(tool_calls=[{"function": {"name": "f", "arguments": "7"}}]),
            assistant(tool_calls=[{"function": {"name": "f", "arguments": "7"}}]),
        ),
        (assistant(content=None, function_call=CALL["function"]), assistant(content="", tool_calls=[CALL])),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"town": "Ulm"}}'},
            assistant(content="", tool_calls=[CALL]),
        ),
        (
            assistant(content=None, tool_calls=[{**CALL, "id": None, "function": {**CALL["function"], "x": None}}]),
            assistant(content="", tool_calls=[CALL]),
        ),
    ],
)
def test_messages(message, expected):
    before = copy.deepcopy(message)
    assert message_of(message, "messages") == expected
    assert message == before  # what was given stays as it is


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (assistant(weight=0.5), "a message of messages has weight 0.5; llmqat takes 1 .learned. and 0 .only shown"),
        (assistant(weight="0"), "has weight '0'"),
        (assistant(loss=float("nan")), "has loss nan"),
        (assistant(train=[1]), r"has train \[1\]"),
        ({"role": ["assistant"], "content": "a"}, r"has role \['assistant'\]; known: system"),
        ({"content": "a"}, "has role None"),
        (assistant(content=[{"type": "text", "text": None}]), "a part of the content .* is missing, not text"),
        (assistant(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "has a part of type 'image_url'; llm"),
        (assistant(content=[{"type": "text", "text": "a", "image": "x"}]), "has a part of type 'image'"),
        (assistant(content=[{"type": "thinking", "text": "a"}]), "has a part of type 'thinking'"),
        (assistant(content=[7]), "a part of the content of a message of messages is int, not text"),
        (assistant(content="a\0b"), "holds a NUL character"),
        (assistant(content="\ud83d"), "holds half a character .a lone surrogate, at 0"),
        (assistant(content=Unreadable("year 60000 is out of range")), "is unreadable .year 60000 is out of range."),
        (assistant(tool_calls=["f"]), "a tool call beside or in the content .* is not an object"),
        (assistant(tool_calls="f("), "the tool calls beside the content .* is not JSON"),
        ({"from": "function_call", "value": "f()"}, "the content of a message of messages is not JSON"),
    ],
)
def test_messages_that_cannot_be_used(message, reason):
    with pytest.raises(BadRow, match=reason):
        message_of(message, "messages")


def test_lists_of_messages_may_be_json():
    assert messages_of('[{"from": "human", "value": "q"}]', "messages") == [{"role": "user", "content": "q"}]
    with pytest.raises(BadRow, match=r"messages is not JSON \(Expecting"):
        messages_of("[{", "messages")
    with pytest.raises(BadRow, match="messages is str, not a list of messages"):
        messages_of("{}", "messages")


def test_empty_keys_go_at_any_depth():
    value = {"a": None, "b": [{"c": None, "d": 0}, None], "e": {"f": {"g": None}}}
    assert without_none(value) == {"b": [{"d": 0}, None], "e": {"f": {}}}


@pytest.mark.parametrize(
    ("messages", "arguments", "reason"),
    [
        ([assistant(weight=0)], {}, "every answer has weight 0"),
        ([assistant(content=" "), assistant(weight=0)], {}, "the answer is empty"),
        ([assistant()], {"n": float("nan")}, "what stands beside its messages cannot be written .Out of range"),
        ([assistant(name="\udc00")], {}, "what stands beside its messages holds half a character"),
        ([assistant()], {(1, 2): 3}, "what stands beside its messages cannot be written .keys must be"),
    ],
)
def test_conversations_that_cannot_be_used(messages, arguments, reason):
    with pytest.raises(BadRow, match=reason):
        checked(Conversation(messages, arguments))


def test_a_conversation_keeps_its_arguments():
    conversation = Conversation([assistant()], {"tools": [1]})
    for same in (copy.copy(conversation), copy.deepcopy(conversation), pickle.loads(pickle.dumps(conversation))):
        assert (list(same), same.template_arguments) == ([assistant()], {"tools": [1]})
    assert Conversation([assistant()]).template_arguments == {}


def test_documents_are_texts_or_conversations():
    assert is_chat([[assistant()]])
    assert not is_chat(["text"])
    assert not is_chat([])
    with pytest.raises(LlmqatError, match="must be a list of texts or conversations; got one text: put it into a list"):
        is_chat("text")
    with pytest.raises(LlmqatError, match="must be all texts or all conversations; got both: tokenize them apart"):
        is_chat(["text", [assistant()]])
    with pytest.raises(LlmqatError, match=r"must be texts or lists of messages; got dict: use .* llmqat\.load_corpus"):
        is_chat([assistant()])
