import re

import pytest

from llmqat.cli.recipes import bundled_recipes
from llmqat.config import DEFAULT_LR, DEFAULT_LR_SCALE, Recipe, from_dict, from_yaml, resolve, to_yaml
from llmqat.errors import LlmqatError

RECIPES = sorted(bundled_recipes().values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # unknown keys
        ({"modle": "x"}, "unknown key modle; did you mean model?"),
        ({"quant": {"bit": 4}}, "unknown key quant.bit; did you mean quant.bits?"),
        ({"zzz": 1}, "unknown key zzz; known: model, output, device, low_memory, seed, quant, init, train, data, eval"),
        # wrong types
        ({"quant": {"bits": "4"}}, "quant.bits must be a whole number, got '4'"),
        ({"quant": {"bits": 4.0}}, "quant.bits must be a whole number, got 4.0"),
        ({"quant": {"bits": True}}, "quant.bits must be a whole number, got True"),
        ({"quant": {"symmetric": 1}}, "quant.symmetric must be true or false, got 1"),
        ({"quant": {"overrides": "float"}}, "quant.overrides must be a mapping, got 'float'"),
        ({"train": {"lr": True}}, "train.lr must be a number, got True"),
        ({"train": {"lr": "fast"}}, "train.lr must be a number, got 'fast'"),
        ({"init": {"smooth": "some"}}, "init.smooth must be a number or auto, got 'some'"),
        ({"train": {"warmup": None}}, "train.warmup must be a number, got None"),
        ({"model": 7}, "model must be text, got 7"),
        # choices
        ({"quant": {"bits": 5}}, "quant.bits must be one of 2, 3, 4, 8; got 5"),
        ({"quant": {"act_bits": 4}}, "quant.act_bits must be one of 8; got 4"),
        ({"train": {"mode": "qlora"}}, "train.mode must be one of full, lora, scales; got 'qlora'"),
        ({"eval": {"bos": "both"}}, "eval.bos must be one of stream, window, tokenizer, none; got 'both'"),
        # ranges
        ({"train": {"max_steps": -1}}, "train.max_steps must be at least 1, got -1"),
        ({"train": {"lr": -0.1}}, "train.lr must be at least 0, got -0.1"),
        ({"train": {"lr": float("nan")}}, "train.lr must be at least 0, got nan"),
        ({"eval": {"window": 1}}, "eval.window must be at least 2, got 1"),
        ({"quant": {"group_size": 0}}, "group_size must be positive, or -1 for one group per row; got 0"),
        ({"quant": {"group_size": -2}}, "group_size must be positive, or -1 for one group per row; got -2"),
        # sections
        ({"train": 3}, "train is a section: write its keys below it, indented; got 3"),
        ({"train": None}, "train is a section: write its keys below it, indented; got None"),
    ],
)
def test_bad_values_name_the_key_and_the_remedy(values, message):
    with pytest.raises(LlmqatError, match=f"^{re.escape(message)}$"):
        from_dict(values)


def test_defaults_and_differences():
    assert from_dict({}) == Recipe()
    recipe = from_dict({"train": {"lr": 1, "mode": None}, "init": {"smooth": 0}})
    assert recipe.train.lr == 1.0
    assert isinstance(recipe.train.lr, float)
    assert recipe.init.smooth == 0.0
    assert from_dict({"init": {"smooth": "auto"}}).init.smooth == "auto"
    assert recipe.train.mode is None
    assert recipe.quant == Recipe().quant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lr: 2e-4\n", "train.lr must be a number, got '2e-4' (text, to YAML); write 2.0e-4"),
        ("train:\n  lr: 1e3\n", "train.lr must be a number, got '1e3' (text, to YAML); write 1.0e+3"),
        ("train: [", "is not YAML: "),
        ("- model: llama\n", "must hold `key: value` lines, got list"),
        ("train:\n", "train is a section"),
        ("quant:\n  bitz: 4\n", "unknown key quant.bitz; did you mean quant.bits?"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(LlmqatError, match=re.escape(message)) as caught:
        from_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_accepts_what_the_message_says(tmp_path):
    (tmp_path / "r.yaml").write_text("train:\n  lr: 2.0e-4\n")
    assert from_yaml(tmp_path / "r.yaml").train.lr == 2e-4
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert from_yaml(tmp_path / "empty.yaml") == Recipe()


def test_missing_recipe(tmp_path):
    with pytest.raises(LlmqatError, match=r"cannot read recipe .*none\.yaml: No such file"):
        from_yaml(tmp_path / "none.yaml")


def test_with_values_is_checked_like_yaml():
    recipe = Recipe().with_values({"quant.bits": 3, "model": "m", "quant.overrides": {"o_proj$": "float"}})
    assert (recipe.quant.bits, recipe.model, recipe.quant.overrides) == (3, "m", {"o_proj$": "float"})
    assert Recipe().quant.bits == 4
    with pytest.raises(LlmqatError, match=r"quant\.bits must be one of"):
        Recipe().with_values({"quant.bits": 5})
    with pytest.raises(LlmqatError, match=re.escape("unknown key quant.bit; did you mean quant.bits?")):
        Recipe().with_values({"quant.bit": 4})


@pytest.mark.parametrize(
    ("parameters", "group_size", "mode"), [(1e6, 32, "full"), (0.999e9, 128, "full"), (1e9, 64, "lora")]
)
def test_resolve_leaves_nothing_open(parameters, group_size, mode):
    recipe = resolve(Recipe(), int(parameters), group_size)
    assert (recipe.quant.group_size, recipe.train.mode, recipe.train.lr) == (group_size, mode, DEFAULT_LR[mode])
    assert recipe.scheme().group_size == group_size


def test_resolve_keeps_what_was_chosen():
    asked = from_dict({"quant": {"group_size": -1}, "train": {"mode": "scales", "lr": 0.5}})
    chosen = asked.with_values({"train.lr_scale": 0.0, "eval.bos": "stream"})
    assert resolve(asked, int(7e9)).to_dict() == resolve(chosen, int(7e9)).to_dict() == chosen.to_dict()
    assert resolve(Recipe(), int(7e9)).train.lr_scale == DEFAULT_LR_SCALE["lora"]
    defaulted = from_dict({"train": {"mode": "scales"}})
    assert resolve(defaulted, 10).train.lr == DEFAULT_LR["scales"]


def test_yaml_round_trip(tmp_path):
    recipe = resolve(
        from_dict(
            {
                "seed": 3,
                "quant": {"bits": 3, "symmetric": False, "overrides": {"down_proj$": {"bits": 8}, "o_proj$": "float"}},
                "init": {"smooth": 0.5},
                "train": {"lr": 2e-5},
            }
        ),
        10,
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    assert from_yaml(path).to_dict() == recipe.to_dict()


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_bundled_recipe(path):
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= 25
    comment = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert re.search(rf"llmqat \w+ .*--recipe {re.escape(path.stem)}\b", comment), "open with the command that runs it"
    assert from_yaml(path) != Recipe(), "a recipe holds differences from the defaults"


@pytest.mark.parametrize("also", ["", "a,,b", "a, b ,a"])
def test_other_texts_are_named_once_each(also):
    with pytest.raises(LlmqatError, match="also"):
        from_dict({"eval": {"also": also}})
    assert from_dict({"eval": {"also": "wikitext2, my.txt"}}).eval.other_texts == ("wikitext2", "my.txt")
