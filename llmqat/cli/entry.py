"""Entry point of the command line: parse, run one command, and turn errors into one line and an exit code."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from llmqat.cli.commands import COMMANDS
from llmqat.cli.flags import recipe_from
from llmqat.cli.parser import build_parser
from llmqat.errors import LlmqatError
from llmqat.processes import is_first, process_index


def quiet_libraries() -> None:
    """Progress bars and advice of libraries drown our own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate|torch)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports
    import datasets
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 wrong arguments."""
    args = build_parser(COMMANDS).parse_args(argv)
    try:
        if hasattr(args, "recipe"):  # wrong values are found before anything heavy is imported
            args.resolved = recipe_from(args)
    except LlmqatError as error:
        print(f"llmqat {args.command}: {error}", file=sys.stderr)
        return 2
    try:
        if args.command != "recipes":
            quiet_libraries()
        args.run(args)
    except KeyboardInterrupt:
        advice = "; the same command with --resume goes on from there" if hasattr(args, "resume") else ""
        print(f"llmqat: interrupted{advice}", file=sys.stderr)
        return 1
    except Exception as error:
        if args.debug:
            raise
        known = isinstance(error, LlmqatError)
        text = " ".join(str(error).split())
        speaker = "" if is_first() else f"process {process_index()}: "
        advice = "" if known else f"unexpected {type(error).__name__}: "
        print(f"llmqat: {speaker}{advice}{text}{'' if known else '; --debug shows where'}", file=sys.stderr)
        return 1
    return 0
