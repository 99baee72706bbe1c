"""``python -m llmqat``, and so ``accelerate launch -m llmqat``."""

import sys

from llmqat.cli import main

if __name__ == "__main__":
    sys.exit(main())
