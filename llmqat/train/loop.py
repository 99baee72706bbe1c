"""The training loop: one for every mode and loss, on accelerate."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llmqat.algorithms.activation_ranges import follow_activations
from llmqat.config import ResolvedTrain, TrainConfig
from llmqat.data.chat import places, positions, token_count, unstack
from llmqat.data.tokens import EndlessSampler
from llmqat.errors import LlmqatError
from llmqat.machine import return_freed_memory
from llmqat.mapped import Disk, in_files
from llmqat.nn.dtensor import from_shard, sharded_like
from llmqat.nn.training_kernels import training_kernels
from llmqat.processes import is_first
from llmqat.progress import Meter
from llmqat.team import whole_team
from llmqat.train.checkpoint import Background, Checkpoints
from llmqat.train.codes import FirstCodes
from llmqat.train.compiled_blocks import compiled_blocks
from llmqat.train.first_latents import MARGIN, keep_from_ends
from llmqat.train.modes import parameter_groups
from llmqat.train.objective import Objective, Teacher
from llmqat.train.sharding import load_gathered_state, prepare_model
from llmqat.train.state import (
    check_base,
    hash_of_base,
    moving_tensors,
    on_first,
    put_back,
    put_back_random,
    random_states,
    taken_out,
)
from llmqat.train.together import accelerator_for, any_of, host_means, mean, same_ranges
from llmqat.train.tracking import check_tracker


@dataclass
class TrainResult:
    """The outcome of `fit`.

    Attributes:
        steps: optimizer steps taken, those before a resume included.
        tokens: training tokens seen.
        seconds: time spent in the loop, those before a resume included.
        best_step: step whose state was kept; 0 is the state before training.
        held_out: held-out loss by step.
        losses: training loss by step.
        codes_changed: share of codes that training changed.
        clip_rate: share of weights beyond the ends of the grid at the end.
        flipped: share of codes that differed from the first ones, by step of a held-out loss.
        layers_changed: `codes_changed` of each layer.
        sequences: those seen.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    held_out: dict[int, float] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    codes_changed: float = 0.0
    clip_rate: float = 0.0
    flipped: dict[int, float] = field(default_factory=dict)
    layers_changed: dict[str, float] = field(default_factory=dict)
    sequences: int = 0


def lr_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine to zero: factor of the learning rate at `step`, counted from 0."""
    warmup = max(1, round(config.warmup * config.max_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.max_steps - warmup)))


class TrainingData(NamedTuple):
    """Sequences ``(sequences, length)``, or ids and labels of conversations ``(sequences, 2, length)``.

    Attributes:
        train: what is trained on.
        held_out: what chooses the best state.
    """

    train: Tensor
    held_out: Tensor


class Trainer:
    """State of one run; `fit` drives it."""

    def __init__(
        self,
        model: nn.Module,
        data: TrainingData,
        config: ResolvedTrain,
        teacher: Teacher | None = None,
        seed: int = 0,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.config, self.teacher, self.checkpoints, self.data, self.seed = config, teacher, checkpoints, data, seed
        self.directory = None if checkpoints is None else checkpoints.directory
        check_tracker(config.tracker, self.directory)
        self.accelerator = accelerator_for(config, self.directory, next(model.parameters()).device)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.held_out = data.held_out.split(config.batch_size)
        self.result = TrainResult()
        self.best: dict[str, Tensor] = {}  # what this process holds of it
        self.writing, self.team = Background(), whole_team()
        self.unwrapped_model = model
        state = None if checkpoints is None else checkpoints.state
        disk = Disk(checkpoints.directory) if checkpoints is not None and in_files(model) else None
        keep_from_ends(model, MARGIN[config.loss], disk)
        self.first_codes = FirstCodes(model, disk)  # while every process has all of the model
        self.base = "" if checkpoints is None else hash_of_base(model, self.first_codes.packed)
        if checkpoints is not None and state is not None:
            check_base(state["base"], self.base, checkpoints.directory)
            put_back(model, state["trained"])
        groups = parameter_groups(model, config.mode, config)
        self.model, optimizer, self.sharded = prepare_model(self.accelerator, model, groups, teacher, config.optimizer)
        if self.sharded and not is_first():
            self.first_codes.packed.clear()  # the first process counts, once the model is whole again
        # A split head is whole inside the forward only.
        self.objective = Objective(model, config, teacher, apart=not self.sharded)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.scheduler = scheduler  # stepped here, once per optimizer step, whatever the number of processes
        if state is not None:
            self.restore(state)

    def loss(self, batch: Tensor) -> Tensor:
        """Loss of one batch of sequences: cross-entropy, or distance from the teacher."""
        ids, counts = unstack(batch)  # on the CPU, where nothing waits for the device
        counted, device = places(counts), self.accelerator.device
        counted = None if counted is None else counted.to(device, non_blocking=True)
        return self.objective.loss(self.model, ids.to(device, non_blocking=True), counted, self.accelerator.autocast)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss over the held-out sequences, of which each process takes its share."""
        self.model.eval()
        index, count, losses, numbers = self.accelerator.process_index, self.accelerator.num_processes, [], []
        with self.accelerator.autocast():
            for first in range(0, len(self.held_out), count):
                # Every process runs the model as often as the others do: past the end, for nothing.
                batch = self.held_out[min(first + index, len(self.held_out) - 1)]
                losses.append(self.loss(batch))
                numbers.append(positions(batch) if first + index < len(self.held_out) else 0)
        self.model.train()
        pairs = zip(torch.stack(losses).tolist(), numbers, strict=True)
        total = sum(loss * number for loss, number in pairs if number)
        return mean(self.accelerator, total * count) / sum(map(positions, self.held_out))

    def evaluate(self) -> None:
        """Held-out loss of the current state; keep the state if it is the best so far."""
        result = self.result
        loss = self.held_out_loss()
        self.check_finite(loss, "held-out", result.steps)
        result.held_out[result.steps] = loss
        if loss <= min(result.held_out.values()):
            result.best_step = result.steps
            self.best = taken_out(moving_tensors(self.unwrapped_model), self.directory)
        counted = {}
        if not self.sharded:
            self.count_codes(result.steps)
            result.flipped[result.steps] = result.codes_changed
            counted = {"codes_changed": result.codes_changed, "clip_rate": result.clip_rate}
        self.accelerator.log({"held_out_loss": loss, **counted}, step=result.steps)

    def count_codes(self, step: int) -> None:
        """How far codes are from the first ones, and weights from the grid, in the whole model with the state of a
        step."""
        counts = self.first_codes.counts if step == 0 else self.first_codes.compare(self.unwrapped_model)
        self.result.codes_changed, self.result.clip_rate, self.result.layers_changed = counts

    def check_finite(self, loss: float, kind: str, step: int) -> None:
        """Refuse a loss that is not finite, rather than train on, or ship, a broken model."""
        if not math.isfinite(loss):
            raise LlmqatError(
                f"the {kind} loss became {loss} at step {step}; lower --lr, or use --precision fp32; "
                "the last checkpoint is untouched"
            )

    def step(self, batches: Iterator[Tensor]) -> float:
        """One optimizer step over `accumulation` batches; the mean loss over the tokens that count."""
        parts = [next(batches) for _ in range(self.config.accumulation)]
        own = float(sum(map(positions, parts))), float(sum(map(token_count, parts)))
        counted, tokens = host_means(self.team, *own)
        average, total = counted / len(parts), torch.zeros((), device=self.accelerator.device)
        following = self.result.steps < self.config.freeze_observers
        follow_activations(self.unwrapped_model, following)
        for batch in parts:
            with self.accelerator.accumulate(self.model):
                loss = self.loss(batch) * (positions(batch) / average)
                total += loss.detach()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:  # of the last batch
                    found = self.update(total / len(parts))
        if following:
            same_ranges(self.accelerator, self.unwrapped_model)
        count = self.accelerator.num_processes
        self.result.steps += 1
        self.result.sequences += count * sum(map(len, parts))
        self.result.tokens += round(count * tokens)
        return found

    def update(self, total: Tensor) -> float:
        """Move what trains by its gradients; returns the mean loss, the one number of a step that the host waits for.

        It waits before anything moves: a loss that is not finite leaves the model as it was.
        """
        loss = mean(self.accelerator, total)
        self.check_finite(loss, "training", self.result.steps + 1)
        if self.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return loss

    def save(self) -> None:
        """Write the checkpoint, if there is a place for it, while training goes on.

        It does not go on in full mode: a copy of all weights and moments would take as much memory as they do.
        """
        if self.checkpoints is None:
            return
        result, moving, waits = self.result, moving_tensors(self.unwrapped_model), self.config.mode == "full"
        best = {name: from_shard(self.best[name], tensor) for name, tensor in moving.items()}
        state = {
            "base": self.base,
            "trained": moving,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best": None if result.best_step == result.steps else best,
            "result": vars(result),
            "rng": random_states(self.accelerator.device),
        }
        whole = on_first(state, copied=not waits)
        if self.accelerator.is_main_process:
            self.writing.start(partial(self.checkpoints.save, whole))
            if waits:
                self.writing.wait()
        self.team.wait()  # for the first, which may take long to write, before any collective that has a time limit

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, whose tensors are in the model already; it lets go of them."""
        load_gathered_state(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        best, trained, moving = state.pop("best"), state.pop("trained"), moving_tensors(self.unwrapped_model)
        own = {name: sharded_like((best or trained)[name], tensor) for name, tensor in moving.items()}
        self.best = taken_out(own, self.directory)
        self.result = TrainResult(**state["result"])
        put_back_random(state["rng"], self.accelerator.device)

    @torch.no_grad()
    def finish(self, everywhere: bool) -> TrainResult:
        """Put the best state back, take accelerate's autocast off the model, and count what changed."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        put_back(self.unwrapped_model, self.best)
        self.team.wait()  # for the first, which writes the last checkpoint
        for sharded in self.sharded:
            sharded.gather(everywhere)
        counted = self.result.best_step == self.result.steps
        if is_first() if self.sharded else not counted:
            self.count_codes(self.result.best_step)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.result


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM came; both wait for the end of the step."""
    caught: list[int] = []
    try:
        previous = {
            sig: signal.signal(sig, lambda number, _: caught.append(number)) for sig in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not in the main thread: signals are somebody else's business
        previous = {}
    try:
        yield lambda: bool(caught)
    finally:
        for sig, handler in previous.items():
            signal.signal(sig, handler)


def fit(
    model: nn.Module,
    data: TrainingData,
    config: ResolvedTrain,
    *,
    teacher: Teacher | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    everywhere: bool = False,
) -> TrainResult:
    """Train a prepared model in place, and leave it in the state with the least held-out loss.

    Args:
        model: prepared, with `requires_grad` set for the mode of `config`.
        data: sequences to train on and to hold out; step 0, before training, competes.
        config: mode, steps, rates, precision.
        teacher: the float model to distil from; None trains by cross-entropy.
        seed: order of the sequences.
        checkpoints: where states are kept, and the one to go on from; None keeps none.
        everywhere: under FSDP2, leave model and teacher whole in every process; otherwise they are in the first alone.

    Raises:
        LlmqatError: if a loss is not finite, or the run was interrupted (after its checkpoint was written).
    """
    trainer = Trainer(model, data, config, teacher, seed, checkpoints)
    if config.tracker:
        trainer.accelerator.init_trackers("llmqat")
    models = [model] if teacher is None else [model, teacher.model]
    faster = compiled_blocks if config.compile else training_kernels
    with trainer.writing, faster(*models):
        if checkpoints is None or checkpoints.state is None:
            trainer.evaluate()
            trainer.save()
        _run(trainer, config)
    result = trainer.finish(everywhere)
    del trainer  # with the states of its optimizer
    return_freed_memory()
    return result


def _run(trainer: Trainer, config: ResolvedTrain) -> None:
    result = trainer.result
    done = result.steps * config.accumulation * trainer.accelerator.num_processes
    sampler = EndlessSampler(len(trainer.data.train), config.batch_size, trainer.seed, done)
    loader: DataLoader[Tensor] = DataLoader(trainer.data.train, batch_sampler=sampler)  # type: ignore[arg-type]
    batches = iter(trainer.accelerator.prepare_data_loader(loader, device_placement=False))
    trainer.model.train()
    clock = Clock(result, "KL" if trainer.teacher else "loss")
    with interruptible() as caught, Meter("training", config.max_steps, result.steps) as meter:
        while result.steps < config.max_steps:
            loss = trainer.step(batches)
            if result.steps == clock.first + 1:  # moments now live between what the first step has freed
                return_freed_memory()
            trainer.writing.check()
            interrupted = any_of(trainer.team, caught())  # all stop after the same step
            result.losses[result.steps] = loss
            clock.update()
            logged = {"loss": loss, "lr": trainer.scheduler.get_last_lr()[0], "tokens_per_second": clock.speed()}
            trainer.accelerator.log(logged, step=result.steps)
            last = result.steps == config.max_steps
            if last or result.steps % config.eval_every == 0:
                trainer.evaluate()
            meter.update(result.steps, clock.figures())
            if last or interrupted or result.steps % config.save_every == 0:
                clock.update()
                trainer.save()
            if interrupted and not last:
                raise LlmqatError(
                    f"interrupted after step {result.steps}; the same command with --resume goes on from there"
                )


class Clock:
    """Counts the seconds of a run into its result, and gives its losses and speed in words."""

    def __init__(self, result: TrainResult, held_out: str) -> None:
        self.result, self.before, self.first, self.held_out = result, result.seconds, result.steps, held_out
        self.started = time.monotonic()

    def update(self) -> None:
        """Write the time spent so far into the result."""
        self.result.seconds = self.before + time.monotonic() - self.started

    def speed(self) -> float:
        """Tokens per second since this process began to train, held-out losses and checkpoints included."""
        steps = self.result.steps - self.first
        return self.result.tokens / self.result.steps * steps / (time.monotonic() - self.started)

    def figures(self) -> str:
        """Losses, codes flipped since the start of training (as of the last held-out loss), speed."""
        result = self.result
        step = max(result.held_out)
        flipped = f"{result.flipped[step]:.2%} of codes flipped, " if step in result.flipped else ""
        return (
            f"loss {result.losses[result.steps]:.4f}, held-out {self.held_out} {result.held_out[step]:.4f}, {flipped}"
            f"{self.speed():,.0f} tokens/s"
        )
