import json
import re
import shutil

import pytest

from llmqat import __version__, cli
from llmqat.cli import COMMANDS, main
from llmqat.cli_options import bundled_recipes, find_recipe, parse_override
from llmqat.errors import LlmqatError
from llmqat.pipeline import check_output

SMALL = (
    "--calibration-samples 8 --max-steps 4 --length 32 --batch-size 4 --window 32 --eval-tokens 512 "
    "--validation-tokens 256 --repeats 0 --eval-every 2 --save-every 2"
).split()


def listing(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def call(argv):
    """Exit code of a command line."""
    try:
        return main([str(arg) for arg in argv])
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command, capsys):
    assert call([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^  llmqat {command}\b", text, re.MULTILINE)
    assert "--debug" in text
    assert max(map(len, text.splitlines())) <= 120


def test_top_help_and_version(capsys):
    assert call(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert call(["--version"]) == 0
    assert capsys.readouterr().out == f"llmqat {__version__}\n"


def truncated(model_dir, text_file, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return ["--model", folder, "--dataset", text_file]


def unknown_type(model_dir, text_file, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "foo"}')
    return ["--model", tmp_path, "--dataset", text_file]


def empty_text(model_dir, text_file, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    return ["--model", model_dir, "--dataset", tmp_path / "empty.txt"]


def typo(model_dir, text_file, tmp_path):
    (tmp_path / "r.yaml").write_text("train:\n  lr: 2e-4\n")
    return ["--model", model_dir, "--dataset", text_file, "--recipe", tmp_path / "r.yaml"]


def options(*extra):
    return lambda model_dir, text_file, tmp_path: ["--model", model_dir, "--dataset", text_file, *extra]


BAD = {
    "missing dataset": (options("--dataset", "none.txt"), "dataset none.txt does not exist; give an existing file"),
    "empty dataset": (empty_text, "holds no text to train on; check the file, or --text-field"),
    "short dataset": (options("--window", "60", "--length", "64", "--dataset", __file__), "cannot read .*llmqat knows .txt"),
    "missing model": (options("--model", "./none"), "model directory ./none does not exist; give a directory, a Hub id"),
    "unknown model type": (unknown_type, "cannot use model .*`foo`"),
    "truncated model": (truncated, "cannot load the weights of .*; copy or download the model again"),
    "bits": (options("--bits", "5"), "--bits: invalid choice: 5"),
    "no number": (options("--max-steps", "many"), "--max-steps: invalid int value: 'many'"),
    "unknown flag": (options("--bitz", "4"), "unrecognized arguments: --bitz 4"),
    "abbreviation": (options("--max-step", "4"), "unrecognized arguments: --max-step 4"),
    "max steps": (options("--max-steps", "-1"), "train.max_steps must be at least 1, got -1"),
    "group size 0": (options("--group-size", "0"), "group_size must be positive, or -1 for one group per row; got 0"),
    "group size -2": (options("--group-size", "-2"), "group_size must be positive, or -1 for one group per row; got -2"),
    "indivisible": (
        options("--group-size", "48"),
        r"group_size 48 does not divide 12 layers: model\.layers\.0\.self_attn\.q_proj \(in_features 64\), .*; give those one "
        r"group per row with .*--override 'q_proj\$:group_size=-1'.* or choose a --group-size that divides 32",
    ),
    "smooth": (options("--smooth", "2"), "(alpha must lie between 0 and 1|init.smooth must be at most 1), got 2"),
    "YAML number": (typo, "r.yaml: train.lr must be a number, got '2e-4' .text, to YAML.; write 2.0e-4"),
    "recipe": (options("--recipe", "none"), "no recipe none: neither a file nor one of the bundled ones"),
    "override": (options("--override", "down_proj"), "cannot read --override 'down_proj'; write 'PATTERN:float' or"),
    "override field": (options("--override", "down_proj$:bitz=8"), "override 'down_proj.': write float, or any of bits,"),
    "override bits": (options("--override", "down_proj$:bits=5"), "bits must be one of 2, 3, 4, 8, got 5"),
    "override regex": (options("--override", "(:bits=8"), r"'\(' is no regular expression"),
    "override nothing": (options("--override", "attn.c_proj:bits=8"), "override 'attn.c_proj' matches no Linear layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_harms_nothing(name, model_dir, text_file, finished, tmp_path, capsys):
    arguments, message = BAD[name]
    output = shutil.copytree(finished, tmp_path / "output")  # --overwrite must not damage it before the run can start
    before = listing(output)
    work = tmp_path / "work"
    work.mkdir()
    argv = ["finetune", *SMALL, *arguments(model_dir, text_file, work)]
    assert call([*argv, "--output", output, "--overwrite"]) in (1, 2)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("llmqat")]
    assert len(errors) == 1
    assert captured.err.splitlines()[-1] == errors[0]
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in captured.err
    assert "unexpected" not in errors[0]
    assert captured.out == ""
    assert listing(output) == before
    fresh = tmp_path / "fresh"
    assert call([*argv, "--output", fresh]) in (1, 2)
    check_output(fresh, False, False)  # the corrected command is not refused


def test_output_below_a_file(model_dir, text_file, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    argv = ["finetune", "--model", model_dir, "--dataset", text_file, "--output", tmp_path / "file" / "below"]
    assert call(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"llmqat: cannot write to .*: Not a directory; choose another --output", line)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["finetune", "--bits"], ["verify"], ["generate", "x"]])
def test_wrong_arguments_exit_with_2(argv, capsys):
    assert call(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmqat")
    assert line.endswith("--help")


def test_unexpected_errors(monkeypatch, capsys):
    def fail(args):
        raise ValueError("two\nlines")

    monkeypatch.setitem(COMMANDS, "verify", fail)
    assert call(["verify", "x"]) == 1
    assert capsys.readouterr().err == "llmqat: unexpected ValueError: two lines; --debug shows where\n"
    with pytest.raises(ValueError, match="two"):
        main(["verify", "x", "--debug"])


def test_interrupted(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "verify", stop)
    assert call(["verify", "x"]) == 1
    assert capsys.readouterr().err == "llmqat: interrupted\n"


def table(text):
    """``name   value`` lines as a dict."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines())


def test_finetune_with_every_kind_of_flag(model_dir, text_file, tmp_path):
    flags = "--bits 3 --asym --group-size 32 --train scales --loss ce --init rtn --act-bits 8 --smooth 0.5 --seed 3 --clip-mask"
    extra = ["--override", "down_proj$:bits=8,group_size=-1", "--override", "layers.0.*o_proj$:float"]
    argv = ["finetune", "--model", model_dir, "--dataset", text_file, "--output", tmp_path, *SMALL, *flags.split(), *extra]
    assert call(argv) == 0
    recipe = json.loads((tmp_path / "report.json").read_text())["recipe"]
    assert recipe["quant"] == {
        "bits": 3,
        "group_size": 32,
        "symmetric": False,
        "act_bits": 8,
        "overrides": {"down_proj$": {"bits": 8, "group_size": -1}, "layers.0.*o_proj$": "float"},
        "clip_mask": True,
    }
    assert (recipe["train"]["mode"], recipe["train"]["loss"], recipe["init"]["smooth"]) == ("scales", "ce", 0.5)
    assert recipe["seed"] == 3


def test_flags_win_over_the_recipe(model_dir, text_file, tmp_path):
    (tmp_path / "r.yaml").write_text("quant:\n  bits: 8\n  overrides: {o_proj$: float}\ninit:\n  method: rtn\n")
    argv = ["quantize", "--model", model_dir, "--dataset", text_file, "--output", tmp_path / "out", *SMALL]
    assert call([*argv, "--recipe", tmp_path / "r.yaml", "--bits", "4", "--override", "q_proj$:bits=8"]) == 0
    recipe = json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]
    assert (recipe["quant"]["bits"], recipe["init"]["method"]) == (4, "rtn")
    assert recipe["quant"]["overrides"] == {"o_proj$": "float", "q_proj$": {"bits": 8}}


def test_eval(finished, model_dir, text_file, tmp_path, capsys):
    argv = ["eval", finished, "--dataset", text_file, "--window", "32", "--eval-tokens", "512"]
    assert call([*argv, "--against", model_dir, "--throughput", "--json", tmp_path / "e.json"]) == 0
    shown = table(capsys.readouterr().out)
    report = json.loads((finished / "report.json").read_text())
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert numbers["perplexity"] == pytest.approx(report["perplexity"]["packed"], rel=1e-6)
    assert numbers["kl_to_float"] == pytest.approx(report["kl_to_float"]["packed"], rel=1e-3)
    assert numbers["sha256"] == shown["sha256"] == report["tokens"]["eval_sha256"]
    assert float(shown["perplexity"]) == pytest.approx(numbers["perplexity"], rel=1e-5)
    assert min(numbers["prefill_tok_s"], numbers["decode_tok_s"]) > 0
    assert call(["eval", model_dir, *argv[2:]]) == 0
    float_shown = table(capsys.readouterr().out)
    assert float(float_shown["perplexity"]) == pytest.approx(report["perplexity"]["float"], rel=1e-5)
    assert "kl_to_float" not in float_shown
    assert call([*argv[:-1], "1"]) == 1
    assert "--window and --eval-tokens must be at least 2" in capsys.readouterr().err


def test_verify(finished, tmp_path, capsys):
    assert call(["verify", finished]) == 0
    shown = table(capsys.readouterr().out)
    assert (shown["layers"], shown["codes equal"], shown["scales equal"]) == ("14", "True", "True")
    assert float(shown["max logit error"]) <= float(shown["bound"])
    assert call(["verify", finished, "--no-logits"]) == 0
    assert "bound" not in capsys.readouterr().out
    broken = shutil.copytree(finished, tmp_path / "broken")
    weights = bytearray((broken / "model.safetensors").read_bytes())
    header = int.from_bytes(weights[:8], "little")
    start = json.loads(weights[8 : 8 + header])["model.layers.0.mlp.up_proj.weight_packed"]["data_offsets"][0]
    weights[8 + header + start] ^= 1
    (broken / "model.safetensors").write_bytes(weights)
    assert call(["verify", broken, "--no-logits"]) == 1
    message = r"is not what was trained: model\.layers\.0\.mlp\.up_proj; copy it again, or write it again"
    assert re.search(message, capsys.readouterr().err)


def test_generate(finished, model_dir, capsys):
    for model in (finished, model_dir):
        assert call(["generate", model, "--prompt", "def x", "--max-new-tokens", "5"]) == 0
        assert capsys.readouterr().out.startswith("def x")
    outputs = set()
    for _ in range(3):
        assert call(["generate", finished, "--prompt", "def x", "--max-new-tokens", "8", "--temperature", "1.5"]) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) > 1


def test_inspect(model_dir, finished, capsys):
    assert call(["inspect", "--model", model_dir, "--override", "down_proj$:float", "--train", "lora"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"layers\.1\.mlp\.down_proj +64 x 96 +float: override", text)
    assert re.search(r"layers\.1\.self_attn\.q_proj +64 x 64 +W4A16 g32 symmetric", text)
    assert "output head tied to the embedding: no" in text
    assert "model family known" in text
    assert "predicted memory for --train lora" in text
    assert call(["inspect", "--model", model_dir]) == 0
    predicted = float(re.search(r"predicted file: ([\d.]+) MB", capsys.readouterr().out)[1])
    assert predicted == pytest.approx((finished / "model.safetensors").stat().st_size / 1e6, rel=0.1)
    assert call(["inspect", "--model", model_dir, "--group-size", "48"]) == 1
    assert "does not divide 12 layers" in capsys.readouterr().err


def test_recipes(capsys):
    assert call(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(bundled_recipes())
    assert listed
    for name, path in bundled_recipes().items():
        assert call(["recipes", name]) == 0
        assert capsys.readouterr().out == path.read_text()
        assert find_recipe(name) == path
    assert call(["recipes", "none"]) == 1
    assert "no recipe none: neither a file nor one of the bundled ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("o_proj$:float", ("o_proj$", "float")),
        ("a:b:bits=8", ("a:b", {"bits": 8})),
        ("x:bits=3,group_size=-1,symmetric=false", ("x", {"bits": 3, "group_size": -1, "symmetric": False})),
    ],
)
def test_override(text, parsed):
    assert parse_override(text) == parsed


@pytest.mark.parametrize("text", ["", "x", "x:", "x:8", "x:bits", "x:bits=", "x:bits=four", "x:bits=8,", "x:Float"])
def test_malformed_override(text):
    with pytest.raises(LlmqatError, match=f"cannot read --override {re.escape(repr(text))}; write 'PATTERN:float' or"):
        parse_override(text)


def test_every_command_has_a_function():
    assert {f"run_{name}" for name in COMMANDS} == {name for name in vars(cli) if name.startswith("run_")}
