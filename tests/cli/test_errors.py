"""Bad input: one line that says what, which limit, and what to do; and nothing is harmed."""

import re
import shutil

import pytest

from llmqat.cli import main
from llmqat.cli.commands import COMMANDS
from llmqat.pipeline.output import check_output


def listing(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


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


def short_text(model_dir, text_file, tmp_path):
    (tmp_path / "short.txt").write_text("ten bytes\n" * 20)
    return ["--model", model_dir, "--dataset", tmp_path / "short.txt"]


def typo(model_dir, text_file, tmp_path):
    (tmp_path / "r.yaml").write_text("train:\n  lr: 2e-4\n")
    return ["--model", model_dir, "--dataset", text_file, "--recipe", tmp_path / "r.yaml"]


def options(*extra):
    return lambda model_dir, text_file, tmp_path: ["--model", model_dir, "--dataset", text_file, *extra]


BAD = {
    "missing dataset": (options("--dataset", "none.txt"), "dataset none.txt does not exist; give an existing file"),
    "empty dataset": (empty_text, "holds no text to train on; check the file, or --text-field"),
    "short dataset": (
        short_text,
        "evaluation text has 11 tokens, fewer than one window of 32; give more text or a",
    ),
    "kind of dataset": (options("--dataset", __file__), r"cannot read .*\.py: llmqat knows \.txt"),
    "missing model": (
        options("--model", "./none"),
        "model directory ./none does not exist; give a directory, a GGUF file, a Hub id",
    ),
    "unknown model type": (unknown_type, "cannot use model .*`foo`"),
    "truncated model": (truncated, "cannot load the weights of .*; copy or download the model again"),
    "bits": (options("--bits", "5"), "--bits: invalid choice: 5"),
    "no number": (options("--max-steps", "many"), "--max-steps: invalid int value: 'many'"),
    "unknown flag": (options("--bitz", "4"), "unrecognized arguments: --bitz 4"),
    "abbreviation": (options("--max-step", "4"), "unrecognized arguments: --max-step 4"),
    "max steps": (options("--max-steps", "-1"), "train.max_steps must be at least 1, got -1"),
    "group size 0": (options("--group-size", "0"), "group_size must be positive, or -1 for one group per row; got 0"),
    "group size -2": (
        options("--group-size", "-2"),
        "group_size must be positive, or -1 for one group per row; got -2",
    ),
    "indivisible": (
        options("--group-size", "48"),
        r"group_size 48 does not divide 12 layers: model\.layers\.0\.self_attn\.q_proj \(in_features 64\), .*; give "
        r"those one group per row with .*--override 'q_proj\$:group_size=-1'.* or choose a --group-size that",
    ),
    "smooth": (options("--smooth", "2"), "(alpha must lie between 0 and 1|init.smooth must be at most 1), got 2"),
    "smooth word": (options("--smooth", "much"), "argument --smooth: expected a number or auto, got 'much'"),
    "YAML number": (typo, "r.yaml: train.lr must be a number, got '2e-4' .text, to YAML.; write 2.0e-4"),
    "recipe": (options("--recipe", "none"), "no recipe none: neither a file nor one of the bundled ones"),
    "override": (options("--override", "down_proj"), "cannot read --override 'down_proj'; write 'PATTERN:float' or"),
    "override field": (
        options("--override", "down_proj$:bitz=8"),
        "override 'down_proj.': write float, or any of bits,",
    ),
    "override bits": (options("--override", "down_proj$:bits=5"), "bits must be one of 2, 3, 4, 8, got 5"),
    "override regex": (options("--override", "(:bits=8"), r"'\(' is no regular expression"),
    "engines": (
        options("--group-size", "32", "--serve-with", "vllm,gguf,mlx", "--act-bits", "8"),
        "vllm and mlx cannot run the int8 activations of --act-bits as they were trained; train without it",
    ),
    "cache of engines": (
        options("--group-size", "32", "--serve-with", "vllm-cpu,awq", "--kv-bits", "8"),
        "vllm-cpu and awq cannot run the int8 cache of --kv-bits 8, only a float one; train without it",
    ),
    "override nothing": (options("--override", "attn.c_proj:bits=8"), "override 'attn.c_proj' matches no linear layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_harms_nothing(
    name, model_dir, text_file, finished, tmp_path, capsys, call, small_flags
):
    arguments, message = BAD[name]
    output = shutil.copytree(finished, tmp_path / "output")  # --overwrite must not damage it before the run can start
    before = listing(output)
    work = tmp_path / "work"
    work.mkdir()
    argv = ["finetune", *small_flags, *arguments(model_dir, text_file, work)]
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


def test_output_below_a_file(model_dir, text_file, tmp_path, capsys, call):
    (tmp_path / "file").write_text("mine")
    argv = ["finetune", "--model", model_dir, "--dataset", text_file, "--output", tmp_path / "file" / "below"]
    assert call(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"llmqat: cannot write to .*: Not a directory; choose another --output", line)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["finetune", "--bits"], ["verify"], ["generate", "x"]])
def test_wrong_arguments_exit_with_2(argv, capsys, call):
    assert call(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmqat")
    assert line.endswith("--help")


def test_unexpected_errors(monkeypatch, capsys, call):
    def fail(args):
        raise ValueError("two\nlines")

    monkeypatch.setitem(COMMANDS, "verify", fail)
    assert call(["verify", "x"]) == 1
    assert capsys.readouterr().err == "llmqat: unexpected ValueError: two lines; --debug shows where\n"
    with pytest.raises(ValueError, match="two"):
        main(["verify", "x", "--debug"])


def test_errors_of_another_process_say_so(monkeypatch, capsys, call):
    monkeypatch.setenv("RANK", "3")
    assert call(["verify", "./none"]) == 1
    assert capsys.readouterr().err.startswith("llmqat: process 3: model ./none is neither a local directory")


@pytest.mark.parametrize(
    ("argv", "advice"),
    [(["verify", "x"], ""), (["finetune"], "; the same command with --resume goes on from there")],
)
def test_interrupted(argv, advice, monkeypatch, capsys, call):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, argv[0], stop)
    assert call(argv) == 1
    assert capsys.readouterr().err == f"llmqat: interrupted{advice}\n"


@pytest.mark.parametrize("flags", [["--max-steps", "4"], ["--clip-mask"], ["--control"], ["--tracker", "wandb"]])
def test_quantize_refuses_what_it_cannot_honour(flags, capsys, call):
    assert call(["quantize", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llmqat quantize: {flags[0]} has no meaning here: quantize does not train; llmqat finetune")
    call(["quantize", "--help"])
    assert flags[0] not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "abc", "RANK must be a whole number, got 'abc'; unset it, or launch by accelerate or torchrun"),
        ("WORLD_SIZE", "-1", "WORLD_SIZE must be a whole number, got '-1'"),
        ("LOCAL_RANK", "", "LOCAL_RANK must be a whole number, got ''"),
        ("MASTER_PORT", "9" * 5000, "MASTER_PORT must be a whole number, got '9999"),
    ],
)
def test_an_environment_that_no_launcher_made(name, value, message, monkeypatch, capsys, call):
    monkeypatch.setenv(name, value)
    assert call(["recipes"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert len(line) < 300


def test_a_process_beyond_their_number(monkeypatch, capsys, call):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call(["recipes"]) == 2
    assert "this process has index 2 of 2, by the environment; launch by accelerate" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["abc", "", "-5", "9" * 5000, "0", "١٢"])
def test_any_width_of_the_terminal(columns, monkeypatch, capsys, call):
    monkeypatch.setenv("COLUMNS", columns)
    assert call(["quantize", "--help"]) == 0
    assert "--bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "--override", "x:bits=" + "9" * 5000], "cannot read --override"),
        (["generate", "llama", "--prompt", "x", "--temperature", "nan"], "--temperature must be at least 0, got nan"),
        (["generate", "llama", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["generate", "llama", "--prompt", "\udcff"], "--prompt must be UTF-8 text"),
        (["eval", "llama", "--max-rows", "0"], "--max-rows must be at least 1, got 0"),
        (["inspect", "--seed", "9" * 30], "seed must be at most"),
        (["inspect", "--model", "a\0b"], "model must not hold control characters"),
        (["inspect", "--seed", "9" * 5000], "--seed: invalid int value"),
    ],
)
def test_values_beyond_their_limits(argv, message, capsys, call):
    assert call(argv) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert len(line) < 700
