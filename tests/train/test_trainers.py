"""A prepared model under trainers that know nothing of it."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import llmqat
from llmqat import QuantScheme
from llmqat.models.patcher import quantized_layers
from llmqat.train.modes import select_trainable

ROWS = torch.randint(0, 128, (24, 16), generator=torch.Generator().manual_seed(1))
COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
}


def codes(model):
    return {name: layer.codes(adapters) for name, layer, adapters in quantized_layers(model)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def prepared(tiny_llama, mode, scheme=None):
    model = tiny_llama(vocab_size=258)
    llmqat.prepare(model, scheme or QuantScheme(4, 32), storage_dtype=torch.bfloat16)
    if mode == "lora":
        return llmqat.add_lora(model, r=4)
    select_trainable(model, mode)
    return model


def trained(model, directory, **options):
    """The model after `transformers.Trainer`, and the trainer."""
    arguments = TrainingArguments(str(directory), **{**COMMON, "learning_rate": 1e-2, **options})
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ROWS])
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(3, -1, False, 8)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["fp32", "bf16-gc"])
def test_what_the_trainer_left_is_what_is_packed(tiny_llama, mode, options, scheme, tmp_path):
    model = prepared(tiny_llama, mode, scheme)
    before, scales = codes(model), [layer.scale.detach().clone() for _, layer, _ in quantized_layers(model)]
    trained(model, tmp_path / "trainer", **options)
    moved = [
        not torch.equal(layer.scale, old) for (_, layer, _), old in zip(quantized_layers(model), scales, strict=True)
    ]
    assert all(moved) == (mode != "lora")
    assert same(codes(model), before) == (mode == "scales")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    llmqat.pack(model, tmp_path / "packed")
    check = llmqat.verify(tmp_path / "packed", against=model)
    assert check.ok
    assert check.layers == 14


@pytest.mark.parametrize("gptq", [False, True])
def test_checkpoints_of_the_trainer_resume_to_the_same_codes(tiny_llama, gptq, tmp_path):
    def model():
        own = tiny_llama(vocab_size=258)
        kwargs = {"init": "gptq", "calibration": list(ROWS.split(8)), "keep_float": True} if gptq else {}
        llmqat.prepare(own, QuantScheme(4, 32), **kwargs)
        select_trainable(own, "full")
        return own

    whole, again = model(), model()
    trained(whole, tmp_path / "a", save_strategy="steps", save_steps=2)
    trained(again, tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(codes(again), codes(whole))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


@pytest.fixture
def sft(tiny_llama, tokenizer, tmp_path):
    """``sft(model)``: trl's trainer on short conversations."""
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    talks = [
        {
            "prompt": [{"role": "user", "content": f"add {i}"}],
            "completion": [{"role": "assistant", "content": str(i + 1)}],
        }
        for i in range(24)
    ]
    llmqat.encode(own, [talks[0]["prompt"] + talks[0]["completion"]])  # gives it the plain template

    def make(model, peft_config=None, **options):
        config = SFTConfig(str(tmp_path / "sft"), **COMMON, learning_rate=1e-2, max_length=64, **options)
        data = Dataset.from_list(talks)
        return SFTTrainer(model, config, train_dataset=data, processing_class=own, peft_config=peft_config)

    return make


@pytest.mark.parametrize("options", [{"bf16": False}, {"bf16": True, "packing": True}], ids=["fp32", "bf16-packed"])
def test_sft_trainer(tiny_llama, sft, mode, options, tmp_path):
    model = prepared(tiny_llama, mode)
    before = codes(model)
    trainer = sft(model, **options)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert same(codes(model), before) == (mode == "scales")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    llmqat.pack(model, tmp_path / "packed")
    assert llmqat.verify(tmp_path / "packed", against=model).ok


def test_labels_of_trl_are_ours(tiny_llama, sft):
    """The same template, and loss on the same tokens."""
    trainer = sft(prepared(tiny_llama, "lora"), bf16=False)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    own = trainer.processing_class
    talk = [{"role": "user", "content": "add 0"}, {"role": "assistant", "content": "1"}]
    (ids, labels) = llmqat.sequences(own, [talk], 64)[0]
    assert batch["input_ids"][0].tolist() == ids.tolist()
    assert batch["labels"][0].tolist() == labels.tolist()


def test_adapters_beside_the_quantizer_are_refused(tiny_llama, sft):
    model = tiny_llama(vocab_size=258)
    llmqat.prepare(model, QuantScheme(4, 32))
    with pytest.raises(ValueError, match=r"Target module FakeQuantLinear.* is not supported"):
        sft(model, peft_config=LoraConfig(target_modules=["q_proj"]))
