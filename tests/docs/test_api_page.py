"""docs/api.md is what the public names say of themselves, and their docstrings say all of it."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import llmqat

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
TABLES = re.compile(r"(?<=<!-- names: begin -->\n).*?(?=<!-- names: end -->)", re.DOTALL)
GROUPS = {
    "Quantize and train": "QuantScheme prepare prepare_from PrepareOptions choose_bits smooth add_lora finetune "
    "observe_activations follow_activations training_kernels convert",
    "Ship": "pack load verify export import_checkpoint inspect write_page",
    "Models and data": "load_float load_tokenizer load_corpus encode split_stream sequences FloatCopy FloatView",
    "Results": "CoverageReport Smoothed TrainResult Verification Exported Imported Inspection Perplexity Throughput",
    "Errors": "LlmqatError",
    "Measure": "windows scored_windows Windows evaluate perplexity quantized_by Baseline scoreboard throughput "
    "peak_memory environment",
}


def callables():
    return [name for name in llmqat.__all__ if not isinstance(getattr(llmqat, name), type)]


def section(doc, name):
    """Lines below ``name:`` of a docstring."""
    found = re.search(rf"^{name}:\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    return found[1] if found else ""


def first_sentence(name):
    text = " ".join(inspect.getdoc(getattr(llmqat, name)).split("\n\n")[0].split())
    return re.split(r"(?<=[^.]\.)\s", text)[0].replace("``", "`").replace("|", "\\|")


def call_of(name):
    """``name(required, optional=, ...)`` as one writes it."""
    target = getattr(llmqat, name)
    if isinstance(target, type) and issubclass(target, Exception):
        return name
    shown = []
    for parameter in inspect.signature(target).parameters.values():
        required = parameter.default is parameter.empty
        star = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        shown.append(star + parameter.name if required else f"{parameter.name}=")
    return f"{name}({', '.join(shown)})"


def tables():
    lines = []
    for group, names in GROUPS.items():
        lines += [f"## {group}", "", "| | |", "|---|---|"]
        lines += [f"| `{call_of(name)}` | {first_sentence(name)} |" for name in names.split()]
        lines.append("")
    return "\n".join(lines)


def test_every_public_name_is_on_the_page(request):
    """``pytest tests/docs --write-api`` brings it up to date."""
    assert sorted(" ".join(GROUPS.values()).split()) == llmqat.__all__
    text = PAGE.read_text(encoding="utf-8")
    if request.config.getoption("--write-api"):
        text = TABLES.sub(lambda _: tables(), text)
        PAGE.write_text(text, encoding="utf-8")
    assert TABLES.findall(text) == [tables()]


@pytest.mark.parametrize("name", callables())
def test_a_function_documents_arguments_and_result(name):
    target = getattr(llmqat, name)
    doc, signature = inspect.getdoc(target), inspect.signature(target)
    documented = re.findall(r"^    (\w+):", section(doc, "Args"), re.MULTILINE)
    assert documented == list(signature.parameters)
    if signature.return_annotation not in (None, "None"):
        assert section(doc, "Returns").strip()
    if "raise LlmqatError" in inspect.getsource(target):
        assert "LlmqatError" in section(doc, "Raises")


@pytest.mark.parametrize("name", sorted(set(llmqat.__all__) - set(callables()) - {"LlmqatError"}))
def test_a_class_documents_its_fields(name):
    target = getattr(llmqat, name)
    doc = inspect.getdoc(target)
    if dataclasses.is_dataclass(target) or hasattr(target, "_fields"):
        names = getattr(target, "_fields", None) or [field.name for field in dataclasses.fields(target)]
        names = list(names)
        documented = re.findall(r"^    (\w+):", section(doc, "Attributes"), re.MULTILINE)
    else:
        names = list(inspect.signature(target).parameters)
        documented = re.findall(r"^    (\w+):", section(doc, "Args"), re.MULTILINE)
    assert documented == names
