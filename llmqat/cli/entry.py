"""Entry point of the command line: parse, run one command, and turn errors into one line and an exit code."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llmqat.cli.commands import COMMANDS
from llmqat.cli.failures import line_of
from llmqat.cli.flags import recipe_from
from llmqat.cli.parser import build_parser
from llmqat.errors import LlmqatDeprecationWarning, LlmqatError
from llmqat.processes import check_environment, is_first, process_index

DONE, FAILED, WRONG_ARGUMENTS = 0, 1, 2


def quiet_libraries() -> None:
    """Silence the progress bars and advice of libraries, which would drown our own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate|torch)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports
    logging.getLogger("gguf").setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@contextmanager
def plain_deprecations() -> Iterator[None]:
    """Print each deprecated spelling used inside the ``with`` in one line, without the place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LlmqatDeprecationWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"llmqat: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 wrong arguments."""
    args = build_parser(COMMANDS).parse_args(argv)
    try:
        check_environment()
        if hasattr(args, "recipe"):  # wrong values are found before anything heavy is imported
            with plain_deprecations():
                args.parsed_recipe = recipe_from(args)
    except LlmqatError as error:
        print(f"llmqat {args.command}: {error}", file=sys.stderr)
        return WRONG_ARGUMENTS
    try:
        if args.command != "recipes":
            quiet_libraries()
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        advice = "; the same command with --resume goes on from there" if hasattr(args, "resume") else ""
        print(f"llmqat: interrupted{advice}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the output has left: say nothing
        return FAILED
    except Exception as error:
        return failed(error, args)
    return DONE


def failed(error: Exception, args: argparse.Namespace) -> int:
    """Print in one line what went wrong, or raise it with ``--debug``; returns the exit code."""
    if args.debug:
        raise error
    speaker = "" if is_first() else f"process {process_index()}: "
    print(f"llmqat: {speaker}{line_of(error)}", file=sys.stderr)
    return FAILED
