"""The command line of lm-evaluation-harness, which knows the model `llmqat` here."""

from llmqat.metrics.harness.tasks import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
