"""What a row means: a text, or a conversation. The known column names are a table."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from llmqat.data.sources import BadRows, Row
from llmqat.errors import LlmqatError

# A conversation is a list of messages, each with at least "role" and "content", as chat templates take them.
Conversation = list[dict[str, Any]]
Document = str | Conversation

CHAT_COLUMNS = ("messages", "conversations", "conversation")
PAIR_COLUMNS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
# Columns that add to the question of a pair, and the one that sets the scene.
INPUT_COLUMNS = ("input", "context")
SYSTEM_COLUMN = "system"
ROWS_TO_DECIDE = 100
ROLES = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "bot", "model")},
    **{name: "tool" for name in ("tool", "function", "observation", "function_response")},
}


class BadRow(ValueError):
    """A row that does not hold what its columns promise; its text is the reason."""


@dataclass(frozen=True)
class Layout:
    """How rows are read.

    Attributes:
        columns: what they are read from; shown to the user.
        read: a row to a document; raises `BadRow`.
        chat: whether documents are conversations.
    """

    columns: tuple[str, ...]
    read: Callable[[dict[str, Any]], Document]
    chat: bool


def layout_of(columns: Iterable[str], text_field: str, kind: str, name: str) -> Layout:
    """The layout of rows with these columns: by `kind`, or conversations where they look like one, else text.

    Raises:
        LlmqatError: if they have no column that `kind` needs.
    """
    columns = list(columns)
    chat = _chat_layout(columns) if kind != "text" else None
    if chat is not None:
        return chat
    if kind == "chat":
        known = ", ".join([*CHAT_COLUMNS, *map("+".join, PAIR_COLUMNS)])
        raise LlmqatError(f"{name} has no conversations: its columns are {', '.join(columns)}; llmqat knows {known}")
    if text_field not in columns:
        raise LlmqatError(f"{name} has no column {text_field!r}; choose one of {', '.join(columns)} by --text-field")
    return Layout((text_field,), partial(_text, column=text_field), False)


def _chat_layout(columns: list[str]) -> Layout | None:
    for column in CHAT_COLUMNS:
        if column in columns:
            return Layout((column,), partial(_messages_row, column=column), True)
    for prompt, answer in PAIR_COLUMNS:
        if {prompt, answer} <= set(columns):
            extra = tuple(column for column in INPUT_COLUMNS if column in columns)
            used = (*([SYSTEM_COLUMN] if SYSTEM_COLUMN in columns else []), prompt, *extra, answer)
            return Layout(used, partial(_pair, prompt=prompt, extra=extra, answer=answer), True)
    return None


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise BadRow(f"{column} is {_kind(value)}, not text")
    return value


def _messages_row(row: dict[str, Any], column: str) -> Conversation:
    return _checked(_messages(row, column))


def _messages(row: dict[str, Any], column: str) -> Conversation:
    value = row.get(column)
    if not isinstance(value, list):
        raise BadRow(f"{column} is {_kind(value)}, not a list of messages")
    return [_message(message, column) for message in value]


def _message(message: Any, column: str) -> dict[str, Any]:
    """``{"role", "content"}`` of an OpenAI or ShareGPT message; other keys, such as tool calls, are kept."""
    if not isinstance(message, dict):
        raise BadRow(f"a message of {column} is {_kind(message)}, not an object")
    given = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if role not in ROLES:
        raise BadRow(f"a message of {column} has role {role!r}; known: {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if content is None and given.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"the content of a message of {column} is {_kind(content)}, not text")
    return {**given, "role": ROLES[role], "content": content}


def _pair(row: dict[str, Any], prompt: str, extra: tuple[str, ...], answer: str) -> Conversation:
    """A question, what it is about, and the answer; prompt and completion may be lists of messages, too."""
    if isinstance(row.get(prompt), list) or isinstance(row.get(answer), list):
        return _checked([*_messages(row, prompt), *_messages(row, answer)])
    parts = [_text(row, prompt), *(row.get(column) or "" for column in extra)]
    question = "\n\n".join(str(part) for part in parts if str(part).strip())
    if not question:
        raise BadRow(f"{prompt} is empty")
    system = row.get(SYSTEM_COLUMN)
    conversation = [
        *([{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []),
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row, answer)},
    ]
    return _checked(conversation)


def _checked(conversation: Conversation) -> Conversation:
    answers = [message for message in conversation if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no message of the assistant")
    if not any(message["content"].strip() or message.get("tool_calls") for message in answers):
        raise BadRow("the answer is empty")
    return conversation


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def _columns(row: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(row, str):
        raise BadRow(row)
    return row


def documents_of(
    rows: Iterable[Row], bad: BadRows, text_field: str, kind: str, name: str
) -> tuple[Layout | None, list[Document]]:
    """Documents of some rows, and the layout that the first ones decide; None if there is no row.

    Raises:
        LlmqatError: see `layout_of`.
    """
    remaining: Iterator[Row] = iter(rows)
    first, decisive = [], 0
    while decisive < ROWS_TO_DECIDE and (row := next(remaining, None)) is not None:
        first.append(row)
        decisive += isinstance(row[1], dict)
    columns = dict.fromkeys(column for _, row in first if isinstance(row, dict) for column in row)
    if not columns:
        for place, reason in first:  # a row without columns is no row
            bad.add(place, reason or "no columns")
        return None, []
    layout = layout_of(columns, text_field, kind, name)
    documents: list[Document] = []
    for place, values in chain(first, remaining):
        try:
            documents.append(layout.read(_columns(values)))
        except BadRow as error:
            bad.add(place, error)
    return layout, documents
