"""A run killed by SIGKILL at any point resumes to the same losses and the same bytes as one that was left alone.

A handful of points by default; ``pytest tests/pipeline/test_kill_points.py --kill-points 0:50`` draws fifty. Each
kills processes for real.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmqat.config import to_yaml
from llmqat.files import PARTIAL

CONTEXT = multiprocessing.get_context("forkserver")
CONFIGS = {
    "full": {"train.mode": "full", "init.method": "blockwise", "init.block_steps": 2},
    "lora": {"train.mode": "lora", "quant.bits": 3, "quant.lm_head_bits": 4, "low_memory": True},
    "scales": {"train.mode": "scales", "init.smooth": 0.5, "quant.symmetric": False},
    "control": {"train.mode": "full", "train.loss": "ce", "eval.control": True, "init.method": "rtn"},
}
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}
# Where a file is about to get its final name: in GPTQ, before training, in training, while packing, at the end.
RENAMES = ("block-00001.pt", "measured.json", "checkpoint.pt", "model.safetensors", "config.json", "report.json")


def finetune(directory, arguments, progress, die_at, die_renaming):
    """In a process of its own: the command, killed before file operation `die_at` or before `die_renaming` appears."""
    count = 0

    def watch(event, args):
        nonlocal count
        if event not in FILE_EVENTS or not args or not isinstance(args[0], str | bytes | os.PathLike):
            return
        relative = event in ("os.remove", "os.rmdir") and args[-1] != -1  # shutil.rmtree names files by descriptor
        if not relative and not os.fsdecode(args[0]).startswith(str(directory)):
            return
        count += 1
        renaming = die_renaming is not None and event == "os.rename" and Path(args[1]).name == die_renaming
        if count == die_at or renaming:
            os.kill(os.getpid(), signal.SIGKILL)

    log = os.open(directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from llmqat.cli import main

    sys.addaudithook(watch)
    progress["started"] = time.monotonic()
    code = main(["finetune", *arguments])
    progress.update(operations=count, seconds=time.monotonic() - progress["started"])
    os._exit(code)


class Killer:
    """Runs of one recipe in one directory, each in a process of its own."""

    def __init__(self, directory, recipe, manager):
        self.directory, self.manager = directory, manager
        recipe_file = directory.with_suffix(".yaml")
        recipe_file.write_text(to_yaml(recipe))
        self.arguments = ["--recipe", str(recipe_file), "--output", str(directory)]

    def run(self, *extra, die_at=None, die_renaming=None, seconds=None):
        """Exit code (negative: the signal), and what the process told about itself."""
        progress = self.manager.dict()
        arguments = (self.directory, [*self.arguments, *extra], progress, die_at, die_renaming)
        process = CONTEXT.Process(target=finetune, args=arguments)
        process.start()
        if seconds is not None:
            while "started" not in progress and process.is_alive():
                time.sleep(0.005)
            process.join(seconds)
            process.kill()
        process.join()
        return process.exitcode, dict(progress)

    def last_words(self):
        """What the process said last before it was killed."""
        log = self.directory.with_suffix(".log")
        return (log.read_text().splitlines() or [""])[-1] if log.exists() else ""

    def finish(self):
        """Resume to the end, and return what must be the same whatever happened before."""
        code, _ = self.run("--resume")
        log = self.directory.with_suffix(".log").read_text()
        assert code == 0, log
        assert not list(self.directory.rglob(f"{PARTIAL}*")), log
        assert not list(self.directory.glob("checkpoint/*/")), "blocks of GPTQ and the control's state have served"
        return outcome(self.directory)


def outcome(directory):
    """Bytes, losses and numbers of a finished run, without clock and place."""
    report = json.loads((directory / "report.json").read_text())
    del report["environment"], report["throughput"], report["recipe"]["output"]
    del report["training"]["seconds"], report["training"]["peak_memory_bytes"]
    result = torch.load(directory / "checkpoint" / "checkpoint.pt")["result"]
    adapter = directory / "adapter" / "adapter_model.safetensors"
    return {
        "bytes": {name: (directory / name).read_bytes() for name in ("model.safetensors", "config.json")},
        "losses": (result["losses"], result["held_out"]),
        "report": report,
        "measured": json.loads((directory / "checkpoint" / "measured.json").read_text()),
        "adapter": {k: v.tolist() for k, v in load_file(adapter).items()} if adapter.exists() else None,
    }


@pytest.fixture(scope="module")
def manager():
    with CONTEXT.Manager() as running:
        yield running


@pytest.fixture(scope="module")
def killer(manager, small_recipe, tmp_path_factory):
    """``killer(config)``: a fresh directory for runs of one of `CONFIGS`."""

    def make(config):
        directory = tmp_path_factory.mktemp("killed") / config
        changes = {"train.max_steps": 6, "train.save_every": 2, **CONFIGS[config]}
        return Killer(directory, small_recipe("unused", changes), manager)

    return make


@pytest.fixture(scope="module")
def undisturbed(killer):
    """``undisturbed(config)``: outcome, file operations and seconds of a run that was left alone."""
    known = {}

    def get(config):
        if config not in known:
            run = killer(config)
            code, progress = run.run()
            assert code == 0, run.directory.with_suffix(".log").read_text()
            known[config] = outcome(run.directory), progress["operations"], progress["seconds"]
        return known[config]

    return get


@pytest.mark.parametrize("name", RENAMES)
def test_killed_before_a_file_appears(killer, undisturbed, name):
    run = killer("full")
    code, _ = run.run(die_renaming=name)
    assert code == -signal.SIGKILL
    assert run.finish() == undisturbed("full")[0]


def test_killed_at_a_random_point(killer, undisturbed, kill_point):
    """Once or twice, at a file operation or after some time; anywhere between the first file and the last."""
    draw = random.Random(kill_point)
    config = draw.choice(list(CONFIGS))
    expected, operations, seconds = undisturbed(config)
    run = killer(config)
    for attempt in range(draw.choice((1, 1, 2))):
        flags = ["--resume"] if attempt else []
        if draw.random() < 0.5:
            run.run(*flags, die_at=draw.randint(1, operations))
        else:
            run.run(*flags, seconds=draw.uniform(0, seconds))
        print(f"{config}, attempt {attempt}: last words {run.last_words()!r}")
    assert run.finish() == expected


def test_resume_before_anything_was_saved_starts(killer, undisturbed):
    run = killer("full")
    code, _ = run.run("--resume", die_at=2)
    assert code == -signal.SIGKILL
    assert not (run.directory / "checkpoint" / "inputs.json").exists()
    assert run.finish() == undisturbed("full")[0]
