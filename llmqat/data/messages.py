"""Messages of conversations: their role, their content, and whether a model learns them.

A message becomes ``{"role", "content"}`` as chat templates take it, with what else stands in it (tool calls, reasoning)
and without the empty keys that Arrow fills in. A ``"weight": 0`` says that an answer is shown but not learned.
"""

import json
from collections.abc import Sequence
from typing import Any, TypeGuard

from llmqat.data.rows import BadRow, Unreadable
from llmqat.data.sources import parse_json
from llmqat.errors import LlmqatError


class Conversation(list[dict[str, Any]]):
    """Messages, and `template_arguments`: what the chat template gets beside them, such as ``tools``."""

    def __init__(
        self, messages: Sequence[dict[str, Any]] = (), template_arguments: dict[str, Any] | None = None
    ) -> None:
        super().__init__(messages)
        self.template_arguments = template_arguments or {}


Document = str | Conversation

ROLES = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "bot", "model")},
    **{name: "tool" for name in ("tool", "function", "observation", "function_response", "tool_response")},
}
CALL_ROLES = ("function_call", "tool_call")  # of the assistant; the content is the call, as JSON
# Keys of role and content: of OpenAI, and of ShareGPT.
MESSAGE_KEYS = (("role", "content"), ("from", "value"))
# Keys by which data sets say whether an answer is learned: of OpenAI and Mistral, Axolotl, ms-swift.
WEIGHT_KEYS = ("weight", "train", "training", "loss")
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA_KEYS = ("image", "images", "image_url", "audio", "input_audio", "video", "video_url", "file")


def is_chat(documents: Sequence[Document]) -> TypeGuard[Sequence[Conversation]]:
    """Whether documents are conversations; none are not.

    Raises:
        LlmqatError: if they are neither all texts nor all conversations.
    """
    if isinstance(documents, str):
        raise LlmqatError("documents must be a list of texts or conversations; got one text: put it into a list")
    kinds = {isinstance(document, str) for document in documents}
    if len(kinds) > 1:
        raise LlmqatError("documents must be all texts or all conversations; got both: tokenize them apart")
    for document in documents:
        if not isinstance(document, str | list | tuple):
            raise LlmqatError(
                f"documents must be texts or lists of messages; got {type(document).__name__}: use the splits of "
                "llmqat.load_corpus, or put the messages of a conversation into a list of their own"
            )
    return kinds == {False}


def without_none(value: Any) -> Any:
    """A value without the keys of its objects that hold nothing, at any depth: Arrow gives each the keys of all."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def kind_of(value: Any) -> str:
    """The kind of a value in words, for a reason why a row cannot be used."""
    if isinstance(value, Unreadable):
        return f"unreadable ({value.reason})"
    return "missing" if value is None else type(value).__name__


def checked_text(value: Any, what: str) -> str:
    """A text that can be tokenized.

    Raises:
        BadRow: if it is none, or holds half a character or a NUL.
    """
    if not isinstance(value, str):
        raise BadRow(f"{what} is {kind_of(value)}, not text")
    _check_characters(value, what)
    return value


def _check_characters(text: str, what: str) -> None:
    if "\0" in text:
        raise BadRow(f"{what} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} holds half a character (a lone surrogate, at {error.start})") from error


def from_json(value: Any, what: str) -> Any:
    """A value that tables hold as JSON text.

    Raises:
        BadRow: if the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ValueError as error:
        raise BadRow(f"{what} is {error}") from error


def messages_of(value: Any, column: str) -> list[dict[str, Any]]:
    """Messages of a column: a list of objects, or that as JSON text.

    Raises:
        BadRow: if it holds something else.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = from_json(value, column)
    if not isinstance(value, list | tuple):
        raise BadRow(f"{column} is {kind_of(value)}, not a list of messages")
    return [message_of(message, column) for message in value]


def message_of(message: Any, column: str) -> dict[str, Any]:
    """A message of any of the known forms, as chat templates take it.

    Raises:
        BadRow: if its role, content, weight or calls are not what they should be.
    """
    if not isinstance(message, dict):
        raise BadRow(f"a message of {column} is {kind_of(message)}, not an object")
    rest = without_none(message)
    role_key, content_key = next((keys for keys in MESSAGE_KEYS if keys[0] in rest), MESSAGE_KEYS[0])
    role, content = rest.pop(role_key, None), rest.pop(content_key, None)
    if not isinstance(role, str) or role not in (*ROLES, *CALL_ROLES):
        raise BadRow(f"a message of {column} has role {role!r}; known: {', '.join((*ROLES, *CALL_ROLES))}")
    where = f"the content of a message of {column}"
    calls = _calls(rest, where)
    if role in CALL_ROLES:
        role, calls, content = "assistant", [*calls, *_as_calls(from_json(content, where), where)], None
    if content is None and calls:
        content = ""
    result: dict[str, Any] = {"role": ROLES[role], "content": _content(content, where)}
    if calls:
        result["tool_calls"] = calls
    weight = _weight(rest, column)
    if weight == (0 if result["role"] == "assistant" else 1):  # what differs from the rule: answers are learned
        result["weight"] = weight
    return {**rest, **result}


def _content(content: Any, where: str) -> str:
    """The text of a message; parts of text are joined."""
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    return checked_text(content, where)


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict):
        kind = part.get("type", "text")
        media = next((key for key in (kind, *part) if key in MEDIA_KEYS), None)
        if media is not None or kind not in TEXT_PARTS:
            raise BadRow(f"{where} has a part of type {media or kind!r}; llmqat reads parts of text only")
        part = part.get("text")
    return checked_text(part, f"a part of {where}")


def _weight(message: dict[str, Any], column: str) -> int | None:
    """The weight of a message in the loss, taken out of it: 1 to count, 0 not to, None if it does not say."""
    weights = {key: message.pop(key) for key in WEIGHT_KEYS if key in message}
    for key, weight in weights.items():
        if not isinstance(weight, int | float) or weight not in (0, 1):
            raise BadRow(f"a message of {column} has {key} {weight!r}; llmqat takes 1 (learned) and 0 (only shown)")
    return int(min(weights.values())) if weights else None


def _calls(message: dict[str, Any], where: str) -> list[Any]:
    """Tool calls of a message, those of OpenAI's first form included; takes them out of it."""
    calls = from_json(message.pop("tool_calls", None), f"the tool calls beside {where}")
    older = from_json(message.pop("function_call", None), f"the function call beside {where}")
    return [*_as_calls(calls or [], where), *_as_calls(older or [], where)]


def _as_calls(calls: Any, where: str) -> list[Any]:
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"a tool call beside or in {where} is not an object")
    return [_as_call(call) for call in calls]


def _as_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call as chat templates take it: in a ``function``, with arguments as an object rather than its JSON text."""
    if "function" not in call and "arguments" in call:
        return _as_call({"type": "function", "function": call})
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = parse_json(function["arguments"])
        except ValueError:
            return call
        if isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def checked(conversation: Conversation) -> Conversation:
    """A conversation with an answer to learn, of which a template can write every part.

    Raises:
        BadRow: if it has none, or holds what cannot be written.
    """
    answers = [message for message in conversation if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no message of the assistant")
    learned = [message for message in answers if message.get("weight", 1)]
    if not learned:
        raise BadRow("every answer has weight 0")
    if not any(message["content"].strip() or message.get("tool_calls") for message in learned):
        raise BadRow("the answer is empty")
    parts = [*conversation, conversation.template_arguments]
    try:
        written = json.dumps(parts, ensure_ascii=False, allow_nan=False, default=str)
    except (ValueError, TypeError) as error:
        raise BadRow(f"what stands beside its messages cannot be written ({error})") from error
    _check_characters(written, "what stands beside its messages")
    return conversation
