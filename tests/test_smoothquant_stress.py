"""A real model with outliers that do not change it: int8 activations lose it, smoothing brings it back."""

import argparse
import copy
import importlib.util
import inspect
import textwrap
from pathlib import Path

import pytest
import torch

import llmqat
from llmqat import QuantScheme

SCRIPT = Path(__file__).parents[1] / "eval/smoothquant_stress.py"
SCHEMES = {"W8A8": QuantScheme(8, -1, act_bits=8), "W4A8": QuantScheme(4, 32, act_bits=8)}


@pytest.fixture(scope="module")
def stress():
    spec = importlib.util.spec_from_file_location("smoothquant_stress", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def real():
    """The bundled Llama, 1024 test tokens and 1024 calibration tokens of Python source."""
    model = llmqat.load_float("llama", torch.float32)
    tokenizer = llmqat.load_tokenizer("llama")
    test, calibration = (
        llmqat.split_stream(llmqat.encode(tokenizer, [inspect.getsource(module)]), 256, "test")[:4]
        for module in (argparse, textwrap)
    )
    return model, test.flatten(), [calibration]


def perplexity(model, tokens):
    return llmqat.perplexity(model, tokens, window=256)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_outliers_break_int8_activations_and_smoothing_mends_them(real, stress, scheme):
    model, tokens, calibration = real
    stressed = copy.deepcopy(model)
    stress.inject(stressed, 256.0)
    base = perplexity(stressed, tokens)
    assert base == pytest.approx(perplexity(model, tokens), rel=1e-4), "the float model is the same"

    def quantized(source, alpha=None):
        result = copy.deepcopy(source)
        if alpha is not None:
            llmqat.smooth(result, calibration, alpha, scheme=scheme)
        llmqat.prepare(result, scheme)
        return perplexity(result, tokens)

    plain = quantized(model)
    assert quantized(stressed) > 2 * plain, "the stress is real"
    for alpha in (0.5, "auto"):
        assert quantized(stressed, alpha) < base + 2 * (plain - base) + 0.02 * base, alpha
