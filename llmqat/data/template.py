"""The chat template of a tokenizer: a conversation as text, and where in the text its answers stand."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from llmqat.data.messages import Conversation
from llmqat.progress import log

# For tokenizers without a chat template. Written as text would be, since such a model has no special tokens for turns.
PLAIN_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' and eos_token %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
)
# ``render(messages)``, ``render(messages, add_generation_prompt=True)``: the text of some messages.
Render = Callable[..., str]


def ensure_template(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template the plain one, and log that. It is saved with the tokenizer."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        log("the tokenizer has no chat template: using a plain one (### User: ... ### Assistant: ...), saved with it")


def as_question(tokenizer: Any, prompt: str) -> str:
    """A user's message up to where the answer begins, by the chat template."""
    ensure_template(tokenizer)
    message = {"role": "user", "content": prompt}
    text: str = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return text


def renderer(tokenizer: Any, conversation: Conversation) -> Render:
    """How messages of a conversation become text: by the template, with the conversation's arguments for it."""
    return partial(_render, tokenizer, getattr(conversation, "template_arguments", {}))


def _render(tokenizer: Any, arguments: dict[str, Any], messages: list[dict[str, Any]], **options: Any) -> str:
    shown = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    text: str = tokenizer.apply_chat_template(shown, tokenize=False, **arguments, **options)
    return text


def answer_spans(tokenizer: Any, conversation: Conversation, text: str) -> list[tuple[int, int]]:
    """Where the answers stand in `text`, the rendered conversation: characters ``[start, end)``.

    An answer is what the template adds to the messages before it and the opening of the turn. Where a template rewrites
    earlier turns (drops their reasoning, say), answers that differ in the complete text are left out; so are those of
    weight 0.
    """
    render = renderer(tokenizer, conversation)
    spans = []
    reached = 0  # end of the answer before
    for index, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        closing = text if index == len(conversation) - 1 else _attempt(render, conversation[: index + 1])
        if closing is not None and not text.startswith(closing):  # some end the whole by the end-of-text token
            closing = closing.removesuffix(tokenizer.eos_token or "")
        if closing is None or not text.startswith(closing):
            continue
        start = _answer_start(render, conversation, index, closing, reached)
        if start is not None and start < len(closing):
            if message.get("weight", 1):
                spans.append((start, len(closing)))
            reached = len(closing)
    return spans


def _attempt(render: Render, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """The text of messages that may be the beginning of a conversation only; None where the template refuses them."""
    try:
        return render(messages, **options)
    except Exception:  # templates raise errors of their own: no message at all, no user's message yet, ...
        return None


def _answer_start(render: Render, conversation: Conversation, index: int, text: str, reached: int) -> int | None:
    """Where the answer of message `index`, the end of `text`, begins behind its turn's opening; None if unknown."""
    before = conversation[:index]
    opening = _attempt(render, before, add_generation_prompt=True) if before else None
    if opening is None:
        return _start_by_opening(render, conversation[index], text, reached)
    if text.startswith(opening):
        return len(opening)
    # Some open the turn with a tag that a finished answer lacks.
    same = next((i for i, (a, b) in enumerate(zip(opening, text, strict=False)) if a != b), 0)
    asked = _attempt(render, before)
    return same if asked is not None and opening[:same].startswith(asked) else None


def _start_by_opening(render: Render, message: dict[str, Any], text: str, reached: int) -> int | None:
    """Where an answer begins behind `reached`, found by the opening of a turn after some other question.

    For answers that no question stands before: a template does not render an empty conversation, or one without a user.
    """
    question = [{"role": "user", "content": "?"}]
    asked, opened = _attempt(render, question), _attempt(render, question, add_generation_prompt=True)
    if asked is not None and opened is not None and opened.startswith(asked):
        opening = opened[len(asked) :]
        for tag in filter(
            None, (opening, opening.lstrip())
        ):  # what parts it from a turn before is missing at the start
            at = text.find(tag, reached)
            if at >= 0:
                return at + len(tag)
    content = message["content"].strip()
    at = text.find(content, reached) if content else -1
    return at if at >= 0 else None


def unused_names(tokenizer: Any, conversation: Conversation, text: str) -> set[str]:
    """Names of keys and arguments that the template does not use: the text is the same without them."""
    source = _source(tokenizer, conversation)
    arguments = getattr(conversation, "template_arguments", {})
    names = {key for message in conversation for key in message} - {"role", "content", "weight"}
    names = {name for name in (*names, *arguments) if not re.search(rf"\b{re.escape(name)}\b", source)}
    return {name for name in names if _text_without(tokenizer, conversation, name) == text}


def _text_without(tokenizer: Any, conversation: Conversation, name: str) -> str | None:
    arguments = {key: value for key, value in conversation.template_arguments.items() if key != name}
    messages = [{key: value for key, value in message.items() if key != name} for message in conversation]
    return _attempt(renderer(tokenizer, Conversation(messages, arguments)), messages)


def _source(tokenizer: Any, conversation: Conversation) -> str:
    """The template that a conversation is rendered by; some tokenizers have another one for tools."""
    try:
        return str(tokenizer.get_chat_template(tools=conversation.template_arguments.get("tools")))
    except (AttributeError, ValueError):
        return str(tokenizer.chat_template)
