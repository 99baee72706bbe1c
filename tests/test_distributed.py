"""Two processes do what one does: the same losses, one checkpoint, one packed file of equal codes."""

import json
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from llmqat.cli.commands import COMMANDS
from llmqat.cli.parser import build_parser
from llmqat.config import to_yaml
from llmqat.formats.verify import verify

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
ALONE, DDP = {}, {"ACCELERATE_USE_CPU": "true"}
FSDP2 = {**DDP, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LIMIT_SECONDS = 120


def member(environment, rank, log, arguments, stop):
    """One process of a run, in the environment that a launcher gives it; `stop`: after which step, by which signal."""
    os.environ.update(environment)
    descriptor = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from llmqat.algorithms import blocks, gptq_model
    from llmqat.algorithms.activation_ranges import static_layers
    from llmqat.cli import main
    from llmqat.metrics import perplexity
    from llmqat.pipeline import inputs
    from llmqat.train.loop import Trainer

    original, finish, ranges = Trainer.step, Trainer.finish, []

    def step(self, batches):
        loss = original(self, batches)
        if rank == 1 and stop is not None and self.result.steps == stop[0]:
            os.kill(os.getpid(), stop[1])
        layers = static_layers(self.unwrapped_model)
        ranges.append([(layer.act_state.clone(), layer.act_scale.clone()) for layer in layers])
        if layers:
            torch.save(ranges, f"{log}.{rank}.ranges")
        return loss

    def recorded_finish(self, everywhere):
        result = finish(self, everywhere)
        models = [self.unwrapped_model, *(sharded.model for sharded in self.sharded)]
        here = {not parameter.is_meta for model in models for parameter in model.parameters()}
        Path(f"{log}.{rank}.whole").write_text(" ".join(map(str, here)))
        return result

    quantize = gptq_model._quantize_layer

    def counted_quantize(layer, *args):
        with Path(f"{log}.{rank}.quantized").open("a") as file:
            file.write(f"{args[-1]}\n")
        return quantize(layer, *args)

    Trainer.step, Trainer.finish = step, recorded_finish
    gptq_model._quantize_layer = counted_quantize
    perplexity.BATCH_TOKENS = 192  # three batches of windows: two for the first process, one for the other
    inputs.CALIBRATION_BATCH, blocks.LEAST_STRIPE = 2, 24  # four batches, and Hessians in three or four pieces
    os._exit(main(["finetune", *arguments]))


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Launcher:
    """Runs of one recipe, each with its processes and their environment."""

    def __init__(self, folder, recipe_of):
        self.folder, self.recipe_of = folder, recipe_of

    def __call__(self, name, changes, environment, resume=False, stop=None):
        count = 2 if environment else 1
        directory = self.folder / name
        batch_size = {"train.batch_size": 4 // count}  # the global batch stays the same
        recipe = directory.with_suffix(".yaml")
        recipe.write_text(to_yaml(self.recipe_of("unused", {**changes, **batch_size})))
        arguments = ["--recipe", str(recipe), "--output", str(directory), *(["--resume"] if resume else [])]
        common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
        processes = []
        for rank in range(count):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if environment else {}
            log = directory.with_suffix(".log")
            processes.append(CONTEXT.Process(target=member, args=(own, rank, log, arguments, stop)))
            processes[-1].start()
        for process in processes:
            process.join(LIMIT_SECONDS)
            process.kill()
        self.logs = [Path(f"{log}.{rank}").read_text() for rank in range(count)]
        self.codes = [process.exitcode for process in processes]
        assert stop is not None or self.codes == [0] * count, "\n".join(self.logs)
        return directory


@pytest.fixture(scope="module")
def launch(tmp_path_factory, small_recipe):
    """``launch(name, changes, environment)``: the directory of a finished run of two processes, or of one alone."""
    return Launcher(tmp_path_factory.mktemp("launched"), small_recipe)


@pytest.fixture(scope="module")
def alone(launch):
    """``alone(mode)``: the directory of a run of one process."""
    known = {}

    def get(mode):
        if mode not in known:
            known[mode] = launch(f"alone-{mode}", changes_of(mode), ALONE)
        return known[mode]

    return get


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """60 conversations of very different lengths: the processes of a step have different numbers of answer tokens."""
    rows = [{"prompt": f"add {i}", "completion": "x" * (1 + 7 * i % 23)} for i in range(60)]
    path = tmp_path_factory.mktemp("chat") / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def changes_of(mode):
    return {"train.mode": mode, "train.precision": "fp32", "train.max_steps": 6}


def result_of(directory):
    return torch.load(directory / "checkpoint" / "checkpoint.pt")["result"]


def codes_differ(one, other):
    """Share of differing codes of two packed directories; everything else that is whole numbers must agree."""
    a, b = (load_file(directory / "model.safetensors") for directory in (one, other))
    assert a.keys() == b.keys()
    packed = [name for name in a if name.endswith("weight_packed")]
    assert packed
    words = [(a[name] != b[name]).float().mean().item() for name in packed]
    return sum(words) / len(words)


def check_same_run(one, other):
    """Two runs that may differ by the order in which gradients are summed."""
    first, second = result_of(one), result_of(other)
    assert second["losses"] == pytest.approx(first["losses"], rel=1e-4)
    assert second["held_out"] == pytest.approx(first["held_out"], rel=1e-4)
    assert (second["steps"], second["tokens"], second["best_step"]) == (
        first["steps"],
        first["tokens"],
        first["best_step"],
    )
    assert codes_differ(one, other) < 1e-2
    reports = [json.loads((directory / "report.json").read_text()) for directory in (one, other)]
    for row in ("float", "rtn", "gptq"):
        assert reports[0]["perplexity"].get(row) == reports[1]["perplexity"].get(row)
    assert reports[1]["perplexity"]["packed"] == pytest.approx(reports[0]["perplexity"]["packed"], rel=1e-4)
    assert verify(other).ok


@pytest.mark.parametrize(
    ("mode", "environment"),
    [("full", DDP), ("lora", DDP), ("full", FSDP2), ("lora", FSDP2), ("scales", FSDP2)],
    ids=["full-ddp", "lora-ddp", "full-fsdp2", "lora-fsdp2", "scales-fsdp2"],
)
def test_two_processes_train_what_one_does(launch, alone, mode, environment):
    name = f"{'fsdp' if environment is FSDP2 else 'ddp'}-{mode}"
    control = {"eval.control": environment is FSDP2 and mode == "full"}  # gathers its teacher, which teaches twice
    directory = launch(name, changes_of(mode) | control, environment)
    first, second = launch.logs
    check_same_run(alone(mode), directory)
    assert "perplexity" in first
    assert second == "", "only the first process speaks"
    quantized = [Path(f"{directory}.log.{rank}.quantized").read_text().splitlines() for rank in (0, 1)]
    assert [len(layers) for layers in quantized] == [8, 6]
    assert not set(quantized[0]) & set(quantized[1])
    whole = [Path(f"{directory}.log.{rank}.whole").read_text() for rank in (0, 1)]
    assert whole == (["True", "False"] if environment is FSDP2 else ["True", "True"]), "FSDP2 gathers on the first"
    assert {path.name for path in directory.iterdir()} == {path.name for path in alone(mode).iterdir()}
    kept = {path.name for path in (directory / "checkpoint").iterdir()}
    assert kept == {"checkpoint.pt", "inputs.json", "measured.json"}


@pytest.mark.parametrize("environment", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_static_ranges_are_one_grid(launch, environment):
    """While they follow the inputs, and those differ from process to process; and once they are frozen."""
    changes = changes_of("full") | {"quant.act_bits": 8, "quant.act_static": True, "init.method": "rtn"}
    changes |= {"quant.observer": "moving_average", "train.freeze_observers": 4}
    directory = launch(f"static-{'fsdp' if environment is FSDP2 else 'ddp'}", changes, environment)
    first, second = (torch.load(f"{directory}.log.{rank}.ranges") for rank in (0, 1))
    assert len(first) == len(second) == 6
    for ours, theirs in zip(first, second, strict=True):
        assert len(ours) == 2 * 7
        assert all(torch.equal(a, b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True))
    states = [[float(state) for state, _ in layers] for layers in first]
    assert states[0] != states[1] != states[2] != states[3] == states[4] == states[5]
    assert verify(directory).ok
    packed = load_file(directory / "model.safetensors")
    scales = [float(packed[name]) for name in packed if name.endswith("input_scale")]
    at_best = first[max(result_of(directory)["best_step"], 1) - 1]
    assert sorted(scales) == sorted(float(scale.bfloat16()) for _, scale in at_best)


def test_frozen_static_ranges_train_what_one_process_does(launch):
    changes = changes_of("full") | {"quant.act_bits": 8, "quant.act_static": True, "train.freeze_observers": 0}
    check_same_run(launch("static-alone", changes, ALONE), launch("static-frozen", changes, DDP))


@pytest.mark.parametrize("environment", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_conversations(launch, talks, environment):
    """The loss is the mean over all answer tokens of a step, however they fall on the processes."""
    changes = changes_of("full") | {"data.dataset": talks, "data.length": 64, "eval.window": 64, "init.method": "rtn"}
    if not (one := launch.folder / "chat-alone").exists():
        launch("chat-alone", changes, ALONE)
    check_same_run(one, launch(f"chat-{'fsdp' if environment is FSDP2 else 'ddp'}", changes, environment))


def test_8_bit_optimizer(launch):
    changes = changes_of("full") | {"train.optimizer": "adamw8bit", "init.method": "rtn"}
    check_same_run(launch("8bit-alone", changes, ALONE), launch("8bit-ddp", changes, DDP))
    state = torch.load(launch.folder / "8bit-ddp" / "checkpoint" / "checkpoint.pt")["optimizer"]["state"]
    assert torch.uint8 in {leaf.dtype for leaf in tree_leaves(state) if torch.is_tensor(leaf)}


@pytest.mark.parametrize("environment", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_resume(launch, alone, environment):
    """One of them is killed; both go on from the one checkpoint, which a single process may do as well."""
    changes, name = changes_of("full"), f"killed-{'fsdp' if environment is FSDP2 else 'ddp'}"
    launch(name, changes, environment, stop=(5, signal.SIGKILL))
    assert launch.codes[1] == -signal.SIGKILL
    saved = torch.load(launch.folder / name / "checkpoint" / "checkpoint.pt")
    assert saved["result"]["steps"] == 4
    launch(name, changes, environment, resume=True)
    check_same_run(alone("full"), launch.folder / name)


def test_a_signal_to_one_stops_all_after_the_same_step(launch, alone):
    changes, name = changes_of("full"), "interrupted"
    launch(name, changes, DDP, stop=(3, signal.SIGTERM))
    assert launch.codes == [1, 1]
    assert "interrupted after step 3; the same command with --resume goes on from there" in launch.logs[0]
    assert torch.load(launch.folder / name / "checkpoint" / "checkpoint.pt")["result"]["steps"] == 3
    launch(name, changes, ALONE, resume=True)
    check_same_run(alone("full"), launch.folder / name)


def documented_commands():
    text = (ROOT / "docs" / "distributed.md").read_text().replace("\\\n", "")
    return [line.strip() for line in text.splitlines() if "accelerate launch --config" in line and "-m llmqat" in line]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_understood(command):
    command = re.sub(r"\$\(.*?\)|\$\w+", "1", command)  # what the shell fills in
    words = shlex.split(command.partition("accelerate launch ")[2].rstrip("'"))
    split = words.index("-m")
    launcher = launch_command_parser().parse_args([*words[:split], "script.py"])
    config = load_config_from_file(str(ROOT / launcher.config_file))
    assert config.num_processes > 1
    build_parser(COMMANDS).parse_args(words[split + 2 :])


def test_every_launcher_configuration_loads():
    paths = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
    kinds = {path.stem: str(load_config_from_file(str(path)).distributed_type).rpartition(".")[2] for path in paths}
    assert kinds == {"ddp": "MULTI_GPU", "deepspeed": "DEEPSPEED", "fsdp2": "FSDP"}


def test_accelerate_launch(tmp_path, small_recipe):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(small_recipe(tmp_path / "out", {"train.batch_size": 2})))
    config = ROOT / "recipes" / "accelerate" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    command += ["--main_process_port", str(free_port()), "-m", "llmqat", "finetune", "--recipe", recipe]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("packed file, kernel op") == 1
    assert verify(tmp_path / "out").ok
