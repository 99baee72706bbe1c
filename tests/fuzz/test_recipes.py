"""Recipe files of any content end in a recipe or in one line, soon."""

import tempfile
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmqat.config import Recipe, from_yaml, to_yaml
from llmqat.config.sections import DataConfig, EvalConfig, InitConfig, QuantConfig, TrainConfig
from llmqat.errors import LlmqatError
from tests.fuzz.conftest import time_limit

SECTIONS = {"quant": QuantConfig, "init": InitConfig, "train": TrainConfig, "data": DataConfig, "eval": EvalConfig}
KEYS = [*Recipe.__dataclass_fields__, *(f for section in SECTIONS.values() for f in section.__dataclass_fields__)]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**400), max_value=10**400),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
    st.binary(max_size=8),
    st.sampled_from(["auto", "float", "lora", "2e-4", "(", "a{99999999}", ".*", "llama"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=12,
)
# Pieces of YAML, put together without sense.
PIECES = st.lists(
    st.sampled_from(
        [
            "&a ",
            "*a",
            "[",
            "]",
            "{",
            "}",
            ": ",
            "- ",
            "? ",
            "!!int ",
            "!!set ",
            "!x ",
            "<<: ",
            "'",
            '"',
            "|\n",
            "\n",
            "\n  ",
        ]
        + ["---\n", "...\n", "%YAML 9.9\n", "0x" + "f" * 5000, "1" * 5000, ".nan", "2020-13-45", "\x00", "\t", "#", "~"]
        + [f"{key}: " for key in KEYS]
    ),
    max_size=60,
).map("".join)


def end(data: bytes) -> None:
    """Read `data` as a recipe: a recipe that can be written and read again, or one line."""
    with tempfile.TemporaryDirectory() as folder, time_limit():
        path = Path(folder) / "r.yaml"
        path.write_bytes(data)
        recipe, refusal = None, ""
        try:
            recipe = from_yaml(path)
        except LlmqatError as error:
            refusal = str(error)
        assert "\n" not in refusal
        assert len(refusal) < 1000
        if recipe is not None:
            path.write_text(to_yaml(recipe), "utf-8")
            assert from_yaml(path) == recipe


@given(st.binary(max_size=300))
def test_bytes(data):
    end(data)


@given(st.dictionaries(st.one_of(st.sampled_from(KEYS), SCALARS), VALUES, max_size=5))
def test_values(values):
    try:
        text = yaml.dump(values, allow_unicode=True)
    except ValueError:  # integers beyond the digits that Python writes
        return
    end(text.encode("utf-8", errors="surrogatepass"))


@given(PIECES)
def test_pieces_of_yaml(text):
    end(text.encode())


@given(st.data())
def test_a_changed_recipe(data):
    """One line of a complete recipe, replaced."""
    lines = to_yaml(Recipe()).splitlines()
    index = data.draw(st.integers(0, len(lines) - 1))
    key = lines[index].split(":")[0]
    value = data.draw(VALUES)
    try:
        lines[index] = (
            f"{key}: {yaml.dump(value, default_flow_style=True, width=10**6).removesuffix('...' + chr(10)).strip()}"
        )
    except ValueError:
        return
    end("\n".join(lines).encode("utf-8", errors="surrogatepass"))
