"""What other people wrote, read by other people's code: one line for whatever goes wrong."""

import pytest

from llmqat.errors import LlmqatError
from llmqat.models.foreign import ForeignError, from_pretrained


def reader(error):
    """A class of transformers whose reading raises, and that says what it was asked for."""

    class Reader:
        @staticmethod
        def from_pretrained(name, **options):
            if error is not None:
                raise error
            return name, options

    return Reader


def test_code_of_a_directory_is_never_trusted():
    assert from_pretrained(reader(None), "x", dtype=1) == ("x", {"trust_remote_code": False, "dtype": 1})
    with pytest.raises(
        LlmqatError, match=r"model x comes with Python code of its own \(auto_map\), which llmqat never"
    ):
        from_pretrained(reader(ValueError("pass trust_remote_code=True")), "x")


@pytest.mark.parametrize("kind", [ValueError, KeyError, RecursionError, ImportError, AssertionError])
def test_whatever_is_raised_becomes_one_line(kind):
    error = kind("what\n happened")
    with pytest.raises(ForeignError, match="happened") as caught:
        from_pretrained(reader(error), "x")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
