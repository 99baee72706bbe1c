"""Tasks of two local files; every number again in plain torch, on a model that no harness has seen."""

import json
import math
import random
import re
import runpy
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import llmqat
from llmqat.kernels import ops
from llmqat.metrics.harness import tasks as harness
from llmqat.nn.packed_linear import PackedLinear

CONTEXT = 64  # of the tiny model
CHOICE = """\
task: local_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """\
task: local_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
GENERATION = """\
task: local_words
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{continuation}}"
generation_kwargs: {until: ["|"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
FOUND = {"results": {"local_choice": {"acc,none": 0.5}}}
TASKS = {"local_choice": CHOICE, "local_text": ROLLING, "local_words": GENERATION}


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory, model_dir):
    model = llmqat.load_float(str(model_dir), torch.float32)
    llmqat.prepare(model, llmqat.QuantScheme(4, 16), init="rtn")
    return llmqat.pack(model, tmp_path_factory.mktemp("packed"), llmqat.load_tokenizer(str(model_dir)))


@pytest.fixture(scope="module")
def documents(packed_dir):
    draw = random.Random(1)

    def words(count):
        return " ".join(draw.choices(["def", "return", "self", "for", "range", "x"], k=count))

    questions = [
        {"question": words(3), "choices": [words(1), words(2), words(4)], "answer": draw.randrange(3)}
        for _ in range(12)
    ]
    texts = [{"text": words(count)} for count in (5, 40, 12)]  # the second one is longer than the context
    model, tokenizer = llmqat.load(packed_dir, torch.float32), llmqat.load_tokenizer(str(packed_dir))
    prompts = []
    for _ in range(2):
        ids = tokenizer(question := words(2), return_tensors="pt").input_ids
        given = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(given, skip_special_tokens=True).split("|")[0]
        prompts.append({"question": question, "continuation": text})
    prompts.append({"question": "x", "continuation": "not what it says"})
    return {"local_choice": questions, "local_text": texts, "local_words": prompts}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        rows = folder / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in documents[name]))
        source = {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")}
        where = f"dataset_path: json\ndataset_kwargs: {json.dumps(source)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(where + task)
    return folder


@torch.no_grad()
def log_likelihoods(model, ids):
    """Log-probability of ``ids[1:]``, each given what stands before it, in float64."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def expected(model, tokenizer, documents):
    """What the harness defines, without the harness: accuracy by choices, perplexity by disjoint windows."""

    def encode(text):
        return tokenizer(text)["input_ids"]

    found, normalized = [], []
    for row in documents["local_choice"]:
        start = len(encode(row["question"]))
        answers = [encode(f"{row['question']} {choice}") for choice in row["choices"]]
        sums = [float(log_likelihoods(model, ids)[start - 1 :].sum()) for ids in answers]
        found.append(sums.index(max(sums)) == row["answer"])
        by_length = [value / len(c) for value, c in zip(sums, row["choices"], strict=True)]
        normalized.append(by_length.index(max(by_length)) == row["answer"])
    total = 0.0
    for row in documents["local_text"]:
        ids = [tokenizer.bos_token_id, *encode(row["text"])]
        for first in range(1, len(ids), CONTEXT):
            last = min(first + CONTEXT, len(ids))
            window = ids[max(0, last - CONTEXT - 1) : last]
            total += float(log_likelihoods(model, window)[first - last :].sum())
    texts = [row["text"] for row in documents["local_text"]]
    return {
        ("local_choice", "acc"): sum(found) / len(found),
        ("local_choice", "acc_norm"): sum(normalized) / len(normalized),
        ("local_text", "word_perplexity"): math.exp(-total / sum(len(text.split()) for text in texts)),
        ("local_text", "byte_perplexity"): math.exp(-total / sum(len(text.encode()) for text in texts)),
        ("local_words", "exact_match"): 2 / 3,
    }


def results_of(packed_dir, task_folder, *names):
    model, tokenizer = llmqat.load(packed_dir, torch.float32), llmqat.load_tokenizer(str(packed_dir))
    tasks = harness.Tasks(names, str(task_folder))
    return tasks.run(model, tokenizer, tasks.manager())


def test_scores_are_those_of_plain_torch(packed_dir, task_folder, documents, model_dir, tmp_path, call, capsys):
    output, names = tmp_path / "scores.json", ",".join(TASKS)
    argv = ["eval", packed_dir, "--tasks", names, "--task-path", task_folder, "--against", model_dir, "--json", output]
    assert call(argv) == 0
    printed, written = capsys.readouterr().out, json.loads(output.read_text())
    rows = {(row["task"], row["metric"]): row for row in written["scores"]}
    tokenizer = llmqat.load_tokenizer(str(packed_dir))
    packed = expected(llmqat.load(packed_dir, torch.float32), tokenizer, documents)
    against = expected(llmqat.load_float(str(model_dir), torch.float32), tokenizer, documents)
    assert set(rows) == set(packed)
    for key, row in rows.items():
        assert row["value"] == pytest.approx(packed[key], rel=1e-5)
        if key[0] != "local_words":
            assert row["against"] == pytest.approx(against[key], rel=1e-5)
        assert row["difference"] == pytest.approx(row["value"] - row["against"])
    assert rows["local_text", "word_perplexity"]["value"] != rows["local_text", "word_perplexity"]["against"]
    assert rows["local_text", "word_perplexity"]["difference_stderr"] is None  # no mean over documents
    assert written["documents"] == {"local_choice": 12, "local_text": 3, "local_words": 3}
    assert (written["model"], written["names"]) == (str(packed_dir), list(TASKS))
    assert printed.splitlines()[0].split() == ["task", "metric", "score", "against", "difference"]
    assert f"{rows['local_choice', 'acc']['value']:.4f} ± " in printed


def test_what_is_asked_of_the_harness(packed_dir, task_folder, monkeypatch, call, capsys):
    asked = {}
    monkeypatch.setattr(harness, "simple_evaluate", lambda **options: asked.update(options) or FOUND)
    flags = ["--limit", "3", "--few-shot", "2", "--batch-size", "4", "--chat", "--activations", "int8"]
    assert call(["eval", packed_dir, "--tasks", "local_choice", "--task-path", task_folder, *flags]) == 0
    assert [asked[name] for name in ("limit", "num_fewshot", "apply_chat_template")] == [3, 2, True]
    assert (asked["model"].batch_size, asked["model"].model.dtype) == (4, torch.float32)
    layer = next(layer for layer in asked["model"].model.modules() if isinstance(layer, PackedLinear))
    assert (layer.scheme.act_bits, layer.trained_scheme.act_bits) == (8, None)
    assert capsys.readouterr().out.split() == ["task", "metric", "score", "local_choice", "acc", "0.5000"]


def test_the_difference_is_paired_over_documents(packed_dir, task_folder):
    results = results_of(packed_dir, task_folder, "local_choice")
    other = json.loads(json.dumps({key: results[key] for key in ("results", "samples")}, default=str))
    for sample in other["samples"]["local_choice"][:7]:
        sample["acc"] = 1 - sample["acc"]
    row = next(row for row in harness.scores(results, other) if row.metric == "acc")
    flips = [2 * sample["acc"] - 1 for sample in results["samples"]["local_choice"][:7]] + [0.0] * 5
    assert row.difference_stderr != pytest.approx(row.stderr, rel=0.01)
    assert row.difference_stderr == pytest.approx(torch.tensor(flips).std().item() / 12**0.5)


def test_every_request_runs_the_packed_op(packed_dir, task_folder, reference_op, monkeypatch):
    called = []
    reference = ops.reference
    monkeypatch.setattr(ops, "reference", lambda *args: called.append(args[0].shape) or reference(*args))
    for task in TASKS:
        called.clear()
        results_of(packed_dir, task_folder, task)
        assert len(called) >= 2 * 7  # a call per layer
        assert len(called) % (2 * 7) == 0


def test_a_tied_packed_head_stays_packed(tied_dir, tmp_path):
    model = llmqat.load_float(str(tied_dir), torch.float32)
    llmqat.prepare(model, llmqat.QuantScheme(4, 16), init="rtn", lm_head_bits=8)
    llmqat.pack(model, tmp_path, llmqat.load_tokenizer(str(tied_dir)))
    ids = torch.arange(12)[None]
    lm = harness.PackedLM(str(tmp_path), "float32")
    assert isinstance(lm.model.lm_head, PackedLinear)
    with torch.no_grad():
        expected = llmqat.load(tmp_path, torch.float32)(ids).logits
    assert torch.equal(lm._model_call(ids), expected)


@pytest.fixture
def only_local_tasks(monkeypatch):
    """Indexing the thousands of task files of the harness takes seconds."""
    make = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda *args, **o: make(*args, **{**o, "include_defaults": False}))


def test_the_command_line_of_the_harness_knows_the_model(
    packed_dir, task_folder, only_local_tasks, monkeypatch, capsys
):
    model = ["--model", "llmqat", "--model_args", f"pretrained={packed_dir},dtype=float32", "--device", "cuda:0"]
    argv = ["lm_eval", "run", *model, "--tasks", "local_choice", "--include_path", str(task_folder)]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_module("llmqat.metrics.harness", run_name="__main__")
    assert "|local_choice|" in capsys.readouterr().out


def test_the_entry_point_that_later_releases_of_the_harness_look_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    entry = EntryPoint("llmqat", project["entry-points"]["lm_eval.models"]["llmqat"], "lm_eval.models")
    assert entry.load() is get_model("llmqat") is harness.PackedLM


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "no_such_task"], r"has no task no_such_task; `lm_eval ls tasks` lists them, and --task-path adds"),
        (["--tasks", "x", "--task-path", "nowhere"], "nowhere is no folder of task files; give another --task-path"),
        (["--limit", "3"], "--limit says nothing without names in --tasks; add those, or leave it out"),
        (["--tasks", ""], "--tasks says nothing without names in --tasks"),
        (["--tasks", "x", "--window", "32"], "--window says nothing with --tasks, which bring their own texts; lea"),
        (["--tasks", "x", "--dataset", "my.txt"], "--dataset says nothing with --tasks"),
        (["--tasks", "x", "--throughput"], "--throughput says nothing with --tasks"),
        (["--tasks", "x", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    ],
)
def test_errors_are_one_line(packed_dir, only_local_tasks, call, capsys, flags, message):
    assert call(["eval", packed_dir, *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_a_harness_that_is_not_there(packed_dir, monkeypatch, call, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, harness.__name__)
    assert call(["eval", packed_dir, "--tasks", "arc_easy"]) == 1
    assert re.search(
        r"which is not there \(.*lm_eval.*\): pip install 'llmqat\[lm-eval\]'$", capsys.readouterr().err.strip()
    )


def test_an_unknown_dtype_names_the_known_ones(packed_dir):
    with pytest.raises(llmqat.LlmqatError, match="dtype must be one of auto, bfloat16, float16, float32; got 'int8'"):
        harness.PackedLM(str(packed_dir), "int8")
