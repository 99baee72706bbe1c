"""The Python surface, as the README uses it."""

import io
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from rich.console import Console
from transformers import Trainer, TrainingArguments

import llmqat
from llmqat import QuantScheme
from llmqat.errors import LlmqatError
from llmqat.models.patcher import quantized_layers
from llmqat.nn.packed_linear import PackedLinear

IDS = torch.randint(0, 128, (20, 16), generator=torch.Generator().manual_seed(1))
OPTIONS = {"max_steps": 4, "batch_size": 4, "precision": "fp32", "eval_every": 2}


def codes(model):
    return {name: layer.codes(adapters) for name, layer, adapters in quantized_layers(model)}


def test_exports():
    assert llmqat.__all__ == sorted(llmqat.__all__)
    for name in llmqat.__all__:
        assert getattr(llmqat, name) is not None
        assert not isinstance(getattr(llmqat, name), ModuleType), f"a module hides llmqat.{name}"
    assert set(llmqat.__all__) <= set(dir(llmqat))
    for verb in ("prepare", "smooth", "add_lora", "finetune", "pack", "load", "perplexity", "throughput", "verify"):
        assert verb in llmqat.__all__
    with pytest.raises(AttributeError, match="module 'llmqat' has no attribute 'quantise'"):
        llmqat.quantise  # noqa: B018


@pytest.mark.parametrize("mode", ["full", "lora", "scales"])
def test_from_the_float_model_to_the_packed_file(tiny_llama, tokens, tokenizer, tmp_path, mode):
    model, teacher = tiny_llama(), tiny_llama()
    assert max(site.change for site in llmqat.smooth(model, tokens).values()) < 1e-5
    report = llmqat.prepare(
        model,
        QuantScheme(3, 32),
        init="gptq",
        calibration=tokens,
        keep_float=mode != "full",
        storage_dtype=torch.bfloat16,
    )
    assert len(report.quantized) == len(report.errors) == 14
    if mode == "lora":
        model = llmqat.add_lora(model, r=4)
    result = llmqat.finetune(
        model,
        IDS[:14],
        IDS[14:],
        mode=mode,
        teacher=teacher if mode == "full" else "self",
        **OPTIONS,
        output=tmp_path / "checkpoint",
    )
    assert result.steps == 4
    assert (tmp_path / "checkpoint" / "checkpoint.pt").exists()
    llmqat.pack(model, tmp_path / "packed", tokenizer=tokenizer)
    packed = llmqat.load(tmp_path / "packed")
    assert packed.dtype == torch.bfloat16
    assert packed.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 19)
    check = llmqat.verify(tmp_path / "packed", against=model)
    assert check.ok
    alone = llmqat.verify(tmp_path / "packed")  # decoding is then compared with the weights of the file
    assert alone.ok
    # The errors are those of two runs: not the same to the last bit.
    errors = dict.fromkeys(("max_logit_error", "bound", "decode_error", "decode_bound"))
    assert replace(check, **errors) == replace(alone, **errors)
    ppl = llmqat.perplexity(llmqat.load(tmp_path / "packed", torch.float32), IDS.flatten(), window=16)
    assert ppl == pytest.approx(llmqat.perplexity(model, IDS.flatten(), window=16), rel=1e-2)
    assert min(llmqat.throughput(packed, prompt=8, new_tokens=4, repeats=1).decode) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["full", "lora", "scales"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_16_bits_trains_and_then_computes_in_float32(model_dir, tmp_path, dtype, mode, precision):
    model = llmqat.load_float(str(model_dir), dtype)
    llmqat.prepare(model, QuantScheme(4, 16))
    model = llmqat.add_lora(model, 4) if mode == "lora" else model
    ids = torch.randint(0, 128, (4, 16))
    done = llmqat.finetune(model, ids, ids, mode=mode, precision=precision, max_steps=1, batch_size=2)
    assert done.steps == 1
    assert model(input_ids=ids).logits.dtype == torch.float32
    assert model.generate(input_ids=ids[:1, :8], max_new_tokens=2, do_sample=False).shape == (1, 10)
    assert llmqat.verify(llmqat.pack(model, tmp_path), model).ok


def test_convert_in_place(tiny_llama):
    model = tiny_llama()
    llmqat.prepare(model, QuantScheme(4, 32))
    expected = model(input_ids=IDS).logits
    assert llmqat.convert(model) is model
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(LlmqatError, match="nothing to convert: no layer of this model is quantized"):
        llmqat.convert(model)


def test_teachers(tiny_llama):
    """The float model inside a scales model, the same as a copy, and either as a view; and no teacher at all."""

    def losses(teacher):
        model = tiny_llama()
        llmqat.prepare(model, QuantScheme(3, 32))
        teacher = teacher(model) if callable(teacher) else teacher
        return llmqat.finetune(model, IDS[:14], IDS[14:], mode="scales", teacher=teacher, **OPTIONS).losses

    distilled = losses("self")
    assert losses(lambda _: tiny_llama()) == distilled
    assert losses(llmqat.FloatCopy(tiny_llama())) == distilled
    assert losses(llmqat.FloatView) == distilled
    entropy = losses(None)
    assert entropy != distilled
    assert entropy[1] > 2
    with pytest.raises(
        LlmqatError, match="teacher must be a model, a FloatCopy, a FloatView, 'self' or None; got 'llama'"
    ):
        losses("llama")


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ({"max_step": 4}, "full", "unknown key train.max_step; did you mean train.max_steps?"),
        ({"lr": -1.0}, "full", "train.lr must be at least 0"),
        ({}, "all", "train.mode must be one of full, lora, scales; got 'all'"),
    ],
)
def test_bad_options(tiny_llama, options, mode, message):
    model = tiny_llama()
    llmqat.prepare(model, QuantScheme(4, 32))
    with pytest.raises(LlmqatError, match=message):
        llmqat.finetune(model, IDS[:14], IDS[14:], mode=mode, **options)


def test_unprepared_model(tiny_llama):
    with pytest.raises(LlmqatError, match=r"no layer of this model is quantized; call llmqat\.prepare"):
        llmqat.finetune(tiny_llama(), IDS[:14], IDS[14:], **OPTIONS)


def test_seed_and_default_rate(tiny_llama):
    def train(**options):
        model = tiny_llama()
        llmqat.prepare(model, QuantScheme(4, 32))
        return llmqat.finetune(model, IDS[:14], IDS[14:], **{**OPTIONS, **options}, seed=3).losses

    assert train() == train()
    assert train() != train(lr=0.05)


def test_perplexity_is_the_gptq_protocol(tiny_llama):
    model, stream = tiny_llama(), IDS.flatten()[:70]
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in stream[:64].view(4, 16)]
    expected = float(torch.tensor(losses).mean().exp())
    assert llmqat.perplexity(model, stream, window=16) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(LlmqatError, match="the evaluation text has 10 tokens, fewer than one sequence of 16"):
        llmqat.perplexity(model, stream[:10], window=16)


def test_the_trainer_of_transformers_trains_it_unchanged(tiny_llama, tmp_path):
    model = tiny_llama()
    llmqat.prepare(model, QuantScheme(4, 32))
    before = codes(model)
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()
    trained = codes(model)
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
    llmqat.pack(model, tmp_path / "packed")
    grids = {
        name: module.unpack()[0]
        for name, module in llmqat.load(tmp_path / "packed").named_modules()
        if isinstance(module, PackedLinear)
    }
    assert grids.keys() == trained.keys()
    assert all(torch.equal(grids[name], trained[name]) for name in trained)


def test_inspect_is_the_dry_run(model_dir):
    plan = llmqat.inspect(model_dir, quant={"bits": 3, "group_size": 16}, train={"mode": "scales"})
    text = str(plan)
    assert "W3A16 g16 symmetric: 14 layers" in text
    assert "predicted memory for --train scales" in text
    with pytest.raises(LlmqatError, match=r"unknown key quant\.bit; did you mean quant\.bits\?"):
        llmqat.inspect(str(model_dir), quant={"bit": 3})


def test_a_directory_is_named_by_text_or_path(model_dir):
    for name in (model_dir, str(model_dir)):
        assert llmqat.load_float(name).config.vocab_size == len(llmqat.load_tokenizer(name))


def test_scoreboard_shows_in_a_notebook_and_on_a_terminal(tiny_llama):
    model, test = tiny_llama(), llmqat.Windows(IDS, "none")
    results = {"float": llmqat.evaluate(model, test)}
    llmqat.prepare(model, QuantScheme(3, 32))
    results["rtn"] = llmqat.evaluate(model, test, llmqat.FloatCopy(tiny_llama()))
    table = llmqat.scoreboard(results, "tiny")
    html = table._repr_mimebundle_([], [])["text/html"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    for text in (html, console.export_text()):
        for part in (
            "tiny",
            "round to nearest",
            f"{results['rtn'].perplexity:.4f}",
            f"{results['rtn'].kl_to_float:.5f}",
        ):
            assert part in text


def test_silent_modes_are_refused(tiny_llama, tokens):
    """What would train everything, or teach by something else than the float model."""

    def train(model, **kwargs):
        return llmqat.finetune(model, IDS[:14], IDS[14:], **{**OPTIONS, "max_steps": 1, **kwargs})

    def prepared(**kwargs):
        model = tiny_llama()
        llmqat.prepare(model, QuantScheme(4, 32), **kwargs)
        return model

    with pytest.raises(LlmqatError, match=r"this model has none that train; call model = llmqat\.add_lora\(model\)"):
        train(prepared(), mode="lora")
    with pytest.raises(LlmqatError, match=r"lora_r changes nothing: the rank of adapters is that of add_lora"):
        train(prepared(), mode="lora", lora_r=2)
    for loss, teacher in (("kd", None), ("ce", tiny_llama())):
        with pytest.raises(LlmqatError, match=f"loss='{loss}' changes nothing: finetune distils where it is given"):
            train(prepared(), loss=loss, teacher=teacher)
    calibrated = {"init": "gptq", "calibration": tokens}
    lost = r"is no longer inside this one, .*; prepare it with keep_float=True, or give the float model as teacher"
    for teacher in ("self", llmqat.FloatView):
        model = prepared(**calibrated)
        with pytest.raises(LlmqatError, match=lost):
            train(model, mode="scales", teacher=teacher if teacher == "self" else teacher(model))
    model = prepared(**calibrated, keep_float=True)
    train(model, mode="scales", teacher="self")
    with pytest.raises(LlmqatError, match="mode='full' trains the weights that teacher='self' would teach from"):
        train(model, mode="full", teacher="self")
    with pytest.raises(LlmqatError, match=r"teacher must be a model, .* got the model that trains"):
        train(model, mode="scales", teacher=model)
    train(model, mode="full")
    with pytest.raises(LlmqatError, match=lost):
        train(model, mode="scales", teacher="self")


def test_the_old_spelling_of_options(tiny_llama):
    def train(**kwargs):
        model = tiny_llama()
        llmqat.prepare(model, QuantScheme(4, 32))
        return llmqat.finetune(model, IDS[:14], IDS[14:], **kwargs).losses

    with pytest.warns(DeprecationWarning, match=r"finetune\(options=.*\) is now finetune\(\.\.\., max_steps=100"):
        old = train(options={**OPTIONS, "max_steps": 2}, seed=3)
    assert old == train(**{**OPTIONS, "max_steps": 2}, seed=3)


def test_the_old_name_of_split_stream():
    with pytest.warns(DeprecationWarning, match=r"llmqat\.blocks is now llmqat\.split_stream; the old name goes"):
        assert llmqat.blocks is llmqat.split_stream
    assert "blocks" not in dir(llmqat)
