import dataclasses
import os
import re
import signal
import threading
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmqat.config import TrainConfig
from llmqat.errors import LlmqatError
from llmqat.metrics.perplexity import Windows, evaluate
from llmqat.models import output_head
from llmqat.models.float_view import FloatView
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.scheme import QuantScheme
from llmqat.train import loop, objective
from llmqat.train.checkpoint import NAME, Background, Checkpoints, discard
from llmqat.train.first_latents import MARGIN, keep_from_ends
from llmqat.train.loop import Trainer, TrainingData, fit, lr_factor
from llmqat.train.modes import add_lora, select_trainable


def train(run, config, mode, **kwargs):
    kwargs.setdefault("teacher", run.teacher)
    return fit(run.model, run.data, dataclasses.replace(config, mode=mode), **kwargs)


def codes(model):
    return {name: layer.codes(adapters) for name, layer, adapters in quantized_layers(model)}


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_after(monkeypatch, steps, action):
    """Run `action` at the end of optimizer step `steps`."""
    original = Trainer.step

    def step(self, batches):
        loss = original(self, batches)
        if self.result.steps == steps:
            action()
        return loss

    monkeypatch.setattr(Trainer, "step", step)


def crash():
    raise RuntimeError("power cut")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_falls(prepared, train_config, mode, precision):
    run = prepared(mode)
    run.data = TrainingData(run.data.train, run.data.train)  # random tokens: what is learned is these
    lr = 0.02 if mode == "lora" else 0.01
    result = train(run, train_config(mode, max_steps=16, lr=lr, precision=precision, eval_every=4), mode)
    assert result.held_out[result.best_step] < 0.99 * result.held_out[0]
    assert result.best_step >= 8
    assert result.steps == 16
    assert result.tokens == 16 * 4 * 16
    assert result.held_out.keys() == set(range(0, 17, 4))
    assert result.losses.keys() == set(range(1, 17))
    assert result.seconds > 0
    assert (result.codes_changed > 0) == (mode != "scales")


def test_cross_entropy_falls_without_a_teacher(prepared, train_config, mode):
    run = prepared(mode)
    result = train(run, train_config(mode, max_steps=16, loss="ce"), mode, teacher=None)
    assert result.held_out[16] < result.held_out[0]


def test_a_single_step(prepared, train_config, mode):
    result = train(prepared(mode), train_config(mode, max_steps=1), mode)
    assert result.losses.keys() == {1}
    assert result.held_out.keys() == {0, 1}


def test_losses_are_those_of_their_step(prepared, train_config, monkeypatch):
    seen, original = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, batches: seen.append(original(self, batches)) or seen[-1])
    result = train(prepared("full"), train_config("full"), "full")
    assert result.losses == dict(enumerate(seen, start=1))


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("full", torch.float32), ("full", torch.bfloat16), ("lora", torch.bfloat16), ("scales", torch.float32)],
    ids=str,
)
def test_resume_is_bit_identical(prepared, train_config, mode, dtype, monkeypatch, tmp_path):
    rates = {"lr_scale": 1e-2} if mode == "full" else {}
    config = train_config(mode, max_steps=7, save_every=3, batch_size=2, accumulation=2, **rates)
    whole = prepared(mode, dtype=dtype)
    expected = train(whole, config, mode)

    broken = prepared(mode, dtype=dtype)
    with monkeypatch.context() as patch:
        stop_after(patch, 5, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(broken, config, mode, checkpoints=Checkpoints(tmp_path))

    again = prepared(mode, dtype=dtype)
    torch.rand(3)  # a new process has another random state
    state = Checkpoints(tmp_path).load()
    assert state["result"]["steps"] == 3
    result = train(again, config, mode, checkpoints=Checkpoints(tmp_path, state=state))
    assert dataclasses.replace(result, seconds=0) == dataclasses.replace(expected, seconds=0)
    assert same(codes(again.model), codes(whole.model))
    assert same(trained(again.model), trained(whole.model))


def test_a_state_is_not_put_on_another_base(prepared, train_config, mode, tmp_path):
    """One scale is another, as where GPTQ was run again on another machine; what trains may be."""
    config = train_config(mode)
    train(prepared(mode), config, mode, checkpoints=Checkpoints(tmp_path))
    other = prepared(mode)
    with torch.no_grad():
        quantized_layers(other.model)[2].layer.weight[0, 0] += 1
    message = r"the prepared model is not the one that the training in .* began with: GPTQ was run again because its .*"
    with pytest.raises(LlmqatError, match=message + "go on where it began, or start again with --overwrite"):
        train(other, config, mode, checkpoints=Checkpoints(tmp_path, state=Checkpoints(tmp_path).load()))


def bytes_of(state):
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))


def first(run):
    """What trains when training begins."""
    keep_from_ends(run.model, MARGIN["kd"])
    return trained(run.model)


def test_a_checkpoint_holds_what_trains(prepared, train_config, mode, tmp_path):
    """Its values and two moments in float32; the best ones only where they are others."""
    run = prepared(mode)
    before = trained(run.model)
    count, small = sum(tensor.numel() for tensor in before.values()), 4 * len(before) + torch.get_rng_state().nbytes
    result = train(run, train_config(mode, max_steps=2), mode, checkpoints=Checkpoints(tmp_path))
    state = Checkpoints(tmp_path).load()
    assert result.best_step == 2
    assert state["best"] is None
    assert bytes_of(state) == 12 * count + small
    assert same(state["trained"], trained(run.model))
    train(prepared(mode), train_config(mode, lr=50.0, warmup=0.0), mode, checkpoints=Checkpoints(tmp_path))
    state = Checkpoints(tmp_path).load()
    before = first(prepared(mode))
    assert same(state["best"], before)
    assert not same(state["trained"], before)
    assert bytes_of(state) == 16 * count + small


def test_a_checkpoint_is_written_while_training_goes_on(prepared, train_config, mode, monkeypatch, tmp_path):
    """It holds the state of its step; full mode waits, rather than copy all weights."""
    run, original, ahead, states, written = prepared(mode), Checkpoints.save, threading.Event(), {}, {}

    def save(self, state):
        step = state["result"]["steps"]
        if step == 2 and mode != "full":
            assert ahead.wait(30), "training waits for the checkpoint"
        written[step] = {name: tensor.clone() for name, tensor in state["trained"].items()}
        original(self, state)

    def look(self, batches):
        loss = step(self, batches)
        states[self.result.steps] = trained(run.model)
        if self.result.steps == 3:
            assert (2 in written) == (mode == "full")
            ahead.set()
        return loss

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", look)
    monkeypatch.setattr(Checkpoints, "save", save)
    train(run, train_config(mode), mode, checkpoints=Checkpoints(tmp_path))
    assert written.keys() == {0, 2, 4}
    assert same(written[2], states[2])
    assert not same(states[2], states[3])


def test_what_goes_wrong_while_writing_ends_the_training(prepared, train_config, monkeypatch, tmp_path):
    run, seen = prepared("lora"), []

    def save(self, state):
        raise LlmqatError("the disk is full")

    stop_after(monkeypatch, 3, lambda: seen.append(3))
    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(LlmqatError, match="the disk is full"):
        train(run, train_config("lora", max_steps=9), "lora", checkpoints=Checkpoints(tmp_path))
    assert not seen


def test_one_thing_at_a_time_goes_on_behind():
    running, most = [], []

    def work():
        running.append(1)
        most.append(len(running))
        running.pop()

    def run(*all_work, then=bool):
        with Background() as behind:
            for each in all_work:
                behind.start(each)
            then()

    run(*[work] * 20)
    assert most == [1] * 20
    with pytest.raises(RuntimeError, match="power cut"):
        run(crash, work)
    assert len(most) == 20
    with pytest.raises(RuntimeError, match="power cut"):
        run(work, then=crash)
    assert len(most) == 21, "what was begun is finished"


def test_live_figures(prepared, train_config, monkeypatch):
    shown = []
    monkeypatch.setattr(loop.Meter, "update", lambda self, done, figures: shown.append((done, figures)))
    result = train(prepared("full"), train_config("full", lr=0.05, warmup=0.0), "full")
    assert result.flipped.keys() == {0, 2, 4}
    assert result.flipped[0] == 0 < result.flipped[2]
    assert [done for done, _ in shown] == [1, 2, 3, 4]
    for done, figures in shown:
        step = done // 2 * 2
        expected = (
            f"loss {result.losses[done]:.4f}, held-out KL {result.held_out[step]:.4f}, {result.flipped[step]:.2%} of"
        )
        assert figures.startswith(expected)
        assert re.search(r" codes flipped, [\d,]+ tokens/s$", figures)


def test_codes_changed_are_those_of_the_best_state(prepared, train_config):
    run = prepared("full")
    before = codes(run.model)
    result = train(run, train_config("full", lr=0.05, warmup=0.0), "full")
    after = codes(run.model)
    changed = {name: float((before[name] != after[name]).float().mean()) for name in before}
    assert result.layers_changed == pytest.approx(changed)
    assert result.codes_changed == pytest.approx(result.flipped[result.best_step])


def test_the_best_state_is_kept(prepared, train_config, mode, monkeypatch):
    run = prepared(mode)
    states, original = {}, Trainer.evaluate

    def evaluate(self):
        original(self)
        states[self.result.steps] = trained(run.model)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    held_out = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(Trainer, "held_out_loss", lambda self: next(held_out))
    result = train(run, train_config(mode), mode)
    assert (result.best_step, result.held_out) == (2, {0: 5.0, 2: 3.0, 4: 4.0})
    assert same(trained(run.model), states[2])
    assert not same(states[2], states[4])


def test_the_state_before_training_competes(prepared, train_config, mode):
    run = prepared(mode)
    before, parameters = codes(run.model), first(prepared(mode))
    result = train(run, train_config(mode, lr=50.0, warmup=0.0), mode)
    assert result.best_step == 0
    assert result.held_out[4] > result.held_out[0]
    assert result.codes_changed == 0
    assert same(codes(run.model), before)
    assert same(trained(run.model), parameters)


def test_non_finite_training_loss_names_the_step(prepared, train_config, monkeypatch, tmp_path):
    calls, original = [], objective.kd_loss

    def kd_loss(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 6 else 1)  # 2 held-out batches, 3 steps

    monkeypatch.setattr(objective, "kd_loss", kd_loss)
    with pytest.raises(
        LlmqatError, match=r"the training loss became nan at step 4; lower --lr, or use --precision fp32"
    ):
        train(
            prepared("full"),
            train_config("full", eval_every=9, save_every=1),
            "full",
            checkpoints=Checkpoints(tmp_path),
        )
    assert Checkpoints(tmp_path).load()["result"]["steps"] == 3


def test_non_finite_held_out_loss_names_the_step(prepared, train_config, tmp_path):
    run = prepared("scales")
    with torch.no_grad():
        run.model.model.norm.weight[0] = float("inf")
    with pytest.raises(LlmqatError, match="the held-out loss became nan at step 0; lower --lr"):
        train(run, train_config("scales"), "scales", checkpoints=Checkpoints(tmp_path))
    assert Checkpoints(tmp_path).load() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_saves(prepared, train_config, monkeypatch, tmp_path, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop_after(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    message = "interrupted after step 3; the same command with --resume goes on from there"
    with pytest.raises(LlmqatError, match=message):
        train(prepared("full"), train_config("full"), "full", checkpoints=Checkpoints(tmp_path))
    assert Checkpoints(tmp_path).load()["result"]["steps"] == 3
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_signal_in_the_last_step_finishes_the_run(prepared, train_config, monkeypatch):
    stop_after(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(prepared("full"), train_config("full"), "full").steps == 4


def test_accumulation_equals_a_big_batch(prepared, train_config, mode):
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        run = prepared(mode)
        config = train_config(mode, max_steps=3, batch_size=size, accumulation=accumulation, eval_every=1)
        results.append(train(run, config, mode))
    for other in results[1:]:
        assert other.losses == pytest.approx(results[0].losses, rel=1e-4)
        assert other.held_out == pytest.approx(results[0].held_out, rel=1e-4)
        assert other.tokens == results[0].tokens


def test_gradient_checkpointing_changes_nothing(prepared, train_config, mode):
    losses = []
    for gradient_checkpointing in (False, True):
        run = prepared(mode)
        config = train_config(mode, gradient_checkpointing=gradient_checkpointing)
        losses.append(train(run, config, mode).losses)
        assert run.model.is_gradient_checkpointing == gradient_checkpointing
    assert losses[0] == losses[1]


def test_training_leaves_float32_logits(prepared, train_config):
    """accelerate wraps the forward in autocast; what is measured afterwards must not be."""
    run = prepared("full")
    ids = run.data.held_out[:1]
    train(run, train_config("full", lr=0.0, lr_scale=0.0, lr_float=0.0, precision="bf16"), "full")
    assert torch.equal(run.model.eval()(input_ids=ids).logits, prepared("full").model(input_ids=ids).logits)


def test_another_seed_is_another_order(prepared, train_config):
    losses = [train(prepared("full"), train_config("full"), "full", seed=seed).losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("warmup", "steps", "factors"), [(0.5, 4, [0.5, 1.0, 1.0, 0.5]), (0.0, 2, [1.0, 1.0]), (1.0, 2, [0.5, 1.0])]
)
def test_learning_rate_schedule(warmup, steps, factors):
    config = TrainConfig(warmup=warmup, max_steps=steps)
    assert [lr_factor(step, config) for step in range(steps)] == pytest.approx(factors)


def test_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    assert Checkpoints(tmp_path).load() is None
    Checkpoints(tmp_path).save({"x": torch.ones(2)})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda state, file: file.write(b"half") and crash())
        with pytest.raises(RuntimeError, match="power cut"):
            Checkpoints(tmp_path).save({"x": torch.zeros(2)})
    assert torch.equal(Checkpoints(tmp_path).load()["x"], torch.ones(2))
    discard(tmp_path)
    assert Checkpoints(tmp_path).load() is None


@pytest.mark.parametrize("content", [b"", b"no zip file at all"], ids=["empty", "text"])
def test_damaged_checkpoint(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(
        LlmqatError, match=r"checkpoint\.pt is damaged, or of another run .*; start again with --overwrite"
    ):
        Checkpoints(tmp_path).load()


def test_truncated_checkpoint(tmp_path):
    Checkpoints(tmp_path).save({"x": torch.ones(1000)})
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(LlmqatError, match="is damaged"):
        Checkpoints(tmp_path).load()


def conversations(rows, length=16):
    """Rows of ids and labels of random tokens, with answers of unequal length."""
    ids = torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(3))
    starts = torch.arange(rows).remainder(length - 5)[:, None] + 2
    inside = (torch.arange(length) >= starts) & (torch.arange(length) < starts + 3)
    return torch.stack([ids, torch.where(inside, ids, -100)], 1)


@pytest.mark.parametrize(("mode", "loss"), [("full", "kd"), ("lora", "ce"), ("scales", "kd")])
def test_conversations_train_on_their_answers_alone(prepared, train_config, mode, loss):
    """What no answer depends on (the tokens behind it) and labels without loss change nothing."""
    results = []
    for filler in (0, 77):
        run = prepared(mode)
        rows = conversations(20)
        behind = torch.arange(16) > (rows[:, 1] != -100).float().cumsum(-1).argmax(-1)[:, None]
        rows[:, 0][behind] = filler
        run.data = TrainingData(rows[:14], rows[14:])
        teacher = run.teacher if loss == "kd" else None
        results.append(train(run, train_config(mode, loss=loss), mode, teacher=teacher))
    assert results[0].losses == results[1].losses
    assert results[0].held_out == results[1].held_out
    assert results[0].held_out[4] != results[0].held_out[0]
    assert 4 * 4 * 5 <= results[0].tokens < 4 * 4 * 16


def test_accumulation_weighs_conversations_by_their_answers(prepared, train_config):
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        run = prepared("full")
        rows = conversations(20)
        rows[::2, 1, :8] = rows[::2, 0, :8]  # every other answer is longer
        run.data = TrainingData(rows[:14], rows[14:])
        config = train_config("full", max_steps=3, batch_size=size, accumulation=accumulation, eval_every=1)
        results.append(train(run, config, "full"))
    for other in results[1:]:
        assert other.losses == pytest.approx(results[0].losses, rel=1e-4)
        assert other.held_out == pytest.approx(results[0].held_out, rel=1e-4)
        assert other.tokens == results[0].tokens


def test_resume_with_8_bit_moments_is_bit_identical(prepared, train_config, mode, monkeypatch, tmp_path):
    config = train_config(mode, max_steps=5, save_every=3, optimizer="adamw8bit")
    whole = prepared(mode)
    expected = train(whole, config, mode)
    with monkeypatch.context() as patch:
        stop_after(patch, 4, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(prepared(mode), config, mode, checkpoints=Checkpoints(tmp_path))
    again = prepared(mode)
    result = train(again, config, mode, checkpoints=Checkpoints(tmp_path, state=Checkpoints(tmp_path).load()))
    assert dataclasses.replace(result, seconds=0) == dataclasses.replace(expected, seconds=0)
    assert same(trained(again.model), trained(whole.model))
    assert expected.held_out[4] < expected.held_out[0]


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation gave, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["lora", "scales"])
def test_no_step_and_no_evaluation_makes_all_logits(monkeypatch, tiny_llama, train_config, mode, precision):
    """Nothing is larger than the weights of the head: 8192 x 32, where all logits are 64 tokens of 8192."""
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", 4 * 8192)
    model = tiny_llama(vocab_size=8192, hidden_size=32, intermediate_size=32)
    prepare(model, QuantScheme(4, 32), init="rtn", keep_float=True)
    model = add_lora(model, 4) if mode == "lora" else model
    select_trainable(model, mode)
    ids, config = torch.randint(8192, (6, 32)), train_config(mode, batch_size=2, precision=precision)
    trainer = Trainer(model, TrainingData(ids, ids[:2]), config, FloatView(model))
    with Largest() as seen:
        trainer.step(iter([ids[:2]]))
        trainer.held_out_loss()
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        evaluate(model, Windows(ids[:2], "none"), FloatView(model))
    assert seen.numbers <= 32 * 8192


def test_compiled_blocks_train_on_the_same_grid(prepared, train_config, mode, monkeypatch):
    """The compiler sees operators in the place of quantized layers. Here it traces, and leaves out writing C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses = []
    for compiled in (False, True):
        run = prepared(mode)
        losses.append(train(run, train_config(mode, max_steps=2, compile=compiled), mode).losses)
        assert not [module for module in run.model.modules() if "forward" in vars(module)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_compiled_blocks_stay_compiled_under_gradient_checkpointing(prepared, train_config, monkeypatch):
    """The second forward, the teacher's and that of an evaluation are variants of each layer."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = train_config("lora", max_steps=1, gradient_checkpointing=True, precision="bf16", compile=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert train(prepared("lora"), config, "lora").steps == 1
