"""Messages in one line."""

from llmqat.errors import error_text, shortened_list


def test_messages_stay_short():
    assert error_text(ValueError("a\n  b")) == "a b"
    assert error_text(ValueError()) == "ValueError"
    assert len(error_text(ValueError("x" * 500))) == 200


def test_long_lists_are_shortened():
    assert shortened_list(["a", "b"]) == "a, b"
    assert shortened_list(list("abcdefg")) == "a, b, c, d, e and 2 more"
