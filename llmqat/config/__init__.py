"""Recipes: every choice of a run, as dataclasses read from YAML, from flags, or from Python.

A recipe file holds differences from the defaults; the resolved recipe is written beside the weights, without the
folders of the machine.
"""

from llmqat.config.context import fit_context, log_cut, speed_lengths
from llmqat.config.files import from_yaml, to_yaml
from llmqat.config.recipe import (
    DEFAULT_BOS,
    DEFAULT_LR,
    DEFAULT_LR_SCALE,
    Recipe,
    Resolved,
    ResolvedEval,
    ResolvedQuant,
    ResolvedTrain,
    check_pattern,
    from_dict,
    resolve,
)
from llmqat.config.sections import (
    BASELINES,
    BOS_RULES,
    INITS,
    LOSSES,
    MODES,
    OBSERVERS,
    OPTIMIZERS,
    PRECISIONS,
    ROWS,
    DataConfig,
    EvalConfig,
    InitConfig,
    QuantConfig,
    TrainConfig,
)

__all__ = [
    "BASELINES",
    "BOS_RULES",
    "DEFAULT_BOS",
    "DEFAULT_LR",
    "DEFAULT_LR_SCALE",
    "INITS",
    "LOSSES",
    "MODES",
    "OBSERVERS",
    "OPTIMIZERS",
    "PRECISIONS",
    "ROWS",
    "DataConfig",
    "EvalConfig",
    "InitConfig",
    "QuantConfig",
    "Recipe",
    "Resolved",
    "ResolvedEval",
    "ResolvedQuant",
    "ResolvedTrain",
    "TrainConfig",
    "check_pattern",
    "fit_context",
    "from_dict",
    "from_yaml",
    "log_cut",
    "resolve",
    "speed_lengths",
    "to_yaml",
]
