"""Messages of other libraries, in one line."""

from llmqat.errors import error_text


def test_messages_stay_short():
    assert error_text(ValueError("a\n  b")) == "a b"
    assert error_text(ValueError()) == "ValueError"
    assert len(error_text(ValueError("x" * 500))) == 200
