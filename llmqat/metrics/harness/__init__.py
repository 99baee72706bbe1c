"""Tasks of lm-evaluation-harness; `tasks` needs the package lm_eval, and is imported where they are run."""
