"""The command line."""

from llmqat.cli.entry import main

__all__ = ["main"]
