"""The numbers of a run in words: the verdict, the lines below the scoreboard, the model card."""

from typing import Any

from llmqat.data.named_sets import NAMED_SETS
from llmqat.formats.compressed_tensors import readers, transformers_route
from llmqat.formats.export.check import not_run
from llmqat.formats.verify import Verification
from llmqat.machine import environment
from llmqat.metrics.perplexity import bootstrap_difference
from llmqat.models.dequantized import in_words
from llmqat.report.measured import Measured
from llmqat.report.names import is_local, markdown, one_line, public_name
from llmqat.report.remedies import remedies
from llmqat.report.scoreboard import LABELS, score_rows, scoreboard
from llmqat.version import __version__

WORTHWHILE_GAP = 0.01
LICENSE = "# license: to be filled in before it is published\n"


def facts(measured: Measured) -> list[str]:
    """Lines below the scoreboard: the verdict, then how everything was measured."""
    lines = [verdict(measured), *_interval_lines(measured), f"measured on {measured_on(measured)}"]
    lines += [f"the model was {in_words(measured.stored_format)}"] if measured.stored_format else []
    lines += [*_tool_lines(measured), *_size_lines(measured), *_speed_lines(measured), *_training_lines(measured)]
    return [*lines, *_verify_lines(measured.verification)]


def facts_on(name: str, measured: Measured) -> list[str]:
    """Lines below the scoreboard on another text: the verdict, and how it was measured."""
    return [verdict(measured), *_interval_lines(measured), f"measured on {measured_on(measured, name)}"]


def _interval_lines(measured: Measured) -> list[str]:
    best = measured.best_ptq()
    if best is None or "packed" not in measured.perplexity or measured.training is None:
        return []
    low, high = bootstrap_difference(measured.perplexity["packed"], measured.perplexity[best])
    return [f"perplexity, packed minus {LABELS[best]}: 95 % between {low:+.4f} and {high:+.4f} (paired bootstrap)"]


def _tool_lines(measured: Measured) -> list[str]:
    lines = []
    for name, told in measured.baselines.items():
        versions = ", ".join(f"{package} {version}" for package, version in told["versions"].items())
        lines.append(f"{LABELS[name]}: {told['seconds']:,.0f} s, {versions}; same grid and calibration tokens")
    return lines


def _size_lines(measured: Measured) -> list[str]:
    size, lines = measured.size, []
    if size:
        lines.append(
            f"quantized layers: {size['packed_bytes'] / 1e6:.2f} MB, {size['packed_bytes'] / size['float_bytes']:.3f} "
            f"of float, {size['bits_per_weight']:.2f} bits per weight; {measured.coverage.parameters_quantized:.1%} of "
            "all parameters"
        )
    lines += [f"{layer.role}: {layer.scheme}" for layer in measured.coverage.quantized if layer.role]
    if measured.recipe.quant.kv_bits:
        lines.append("key-value cache: int8, a scale per token and head; read by llmqat, other readers use a float one")
    return lines


def _speed_lines(measured: Measured) -> list[str]:
    lines = []
    for variant, speed in measured.throughput.items():
        kernel = f", {speed.weight_gb_s:.2f} GB/s of weights, kernel {measured.kernel}" if variant == "packed" else ""
        kernel += f"; {speed.paths.summary()}" if speed.paths else ""
        lines.append(
            f"{LABELS[variant]}: prefill {speed.spread(speed.prefill)} tok/s of {speed.prompt}, decode "
            f"{speed.spread(speed.decode)} tok/s of {speed.new_tokens}{kernel}"
        )
    return lines


def _training_lines(measured: Measured) -> list[str]:
    done = measured.training
    if done is None:
        return []
    memory = "" if measured.peak_memory_bytes is None else f", peak {measured.peak_memory_bytes / 1e9:.2f} GB"
    if measured.peak_device_memory_bytes is not None:
        memory += f" and {measured.peak_device_memory_bytes / 1e9:.2f} GB on {measured.device}"
    return [
        f"training: {done.steps} steps, {done.tokens:,} tokens, {done.seconds:.0f} s{memory}; best at step "
        f"{done.best_step}; {done.codes_changed:.1%} of codes changed, {done.clip_rate:.2%} of weights beyond the grid"
    ]


def measured_on(measured: Measured, name: str | None = None) -> str:
    """The test tokens of the scoreboard, of the run's dataset or of another `name`, and how they were scored."""
    data, dataset = measured.data, public_name(name or measured.recipe.data.dataset)
    place = "" if measured.device == "cpu" else f" on {measured.device}"
    return f"{data.tokens:,} test tokens of {dataset}: {data.protocol}, float32 compute{place}, ids {data.sha256[:12]}"


def _verify_lines(check: Verification | None) -> list[str]:
    if check is None:
        return []
    logits = ""
    if check.max_logit_error is not None:
        logits = f"; logits within {check.max_logit_error:.1e} of float64 (bound {check.bound:.1e})"
    state = "equal" if check.codes_equal and check.scales_equal else f"DIFFERENT in {', '.join(check.mismatched[:5])}"
    return [f"verify: codes and scales of {check.layers} layers {state} to the trained ones{logits}"]


def verdict(measured: Measured) -> str:
    """Whether training was worth it."""
    gap, recovered = measured.gap(), measured.gap_recovered()
    if gap is None:
        return "no post-training baseline was measured"
    if measured.training is None or "packed" not in measured.perplexity:
        return f"the best post-training quantization costs {gap:.2%} of perplexity"
    if measured.training.best_step == 0:
        return "training found nothing better than its start, which is what was packed; try a lower --lr"
    base, packed = measured.ppl("float"), measured.ppl("packed")
    if base is not None and packed is not None and packed < base:
        learned = "the packed model is better than float: training learned the text"
        control = measured.ppl("float_finetuned")
        if control is None:
            return f"{learned}, not only the grid; --control trains float on the same tokens"
        return f"{learned}; the grid costs {packed / control - 1:+.2%} beside float trained on the same tokens"
    if recovered is None:
        return f"post-training quantization costs nothing here ({gap:+.2%} of perplexity): there is nothing to recover"
    if recovered < 0:
        return (
            f"training made it worse: the best post-training quantization costs {gap:.2%} of perplexity, and the "
            f"packed model {-recovered:.1%} of that more; try a lower --lr or more steps"
        )
    if gap < WORTHWHILE_GAP:
        return (
            f"training recovered {recovered:.1%} of what the best post-training quantization costs, but that is only "
            f"{gap:.2%} of perplexity: it is not worth it here"
        )
    return f"of the {gap:.2%} that the best post-training quantization costs, training recovered {recovered:.1%}"


def print_scoreboard(measured: Measured) -> None:
    """Print the scoreboard and what it means."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    console.print(scoreboard(measured.perplexity, f"{measured.recipe.model}: {measured.recipe.scheme()}"))
    done = measured.training
    advice = [] if done is None else remedies(done, measured.recipe.train.mode)
    for line in [*facts(measured), *advice]:
        console.print(line, markup=False, highlight=False)
    for name, other in measured.on_other_texts():
        console.print(scoreboard(other.perplexity, f"on {public_name(name)}"))
        for line in facts_on(name, other):
            console.print(line, markup=False, highlight=False)


def model_card(measured: Measured) -> str:
    """README.md of the packed directory; a model or dataset of this machine goes by the last part of its path."""
    env = environment()
    name, scheme = markdown(public_name(measured.recipe.model)), measured.recipe.scheme()
    unread = not_run(measured.coverage.layers, measured.recipe.quant.kv_bits)
    lines = "\n".join(f"- {markdown(line)}" for line in [*facts(measured), *([unread] if unread else [])])
    machine = markdown(
        f"{env['cpu']}, {env['threads']} threads; torch {env['torch']}, transformers {env['transformers']}"
    )
    return f"""---
{_front_matter(measured)}---
# {name}, {scheme}

Quantized by llmqat {__version__} from {name}; codes and scales in this directory are those of training, bit for bit
(`llmqat verify` checks it). The format is compressed-tensors `pack-quantized`: {readers(measured.coverage)}.

{_table(measured)}

{lines}
{_other_texts(measured)}
Machine: {machine}. All numbers are in `report.json`, the recipe is `recipe.yaml`.

```python
import llmqat
model = llmqat.load("path/to/this/directory")  # runs on the packed weights
{_loading(measured)}```
"""


def _table(measured: Measured) -> str:
    """The scoreboard in Markdown."""
    rows = "\n".join(f"| {' | '.join(row)} |" for row in score_rows(measured.perplexity))
    return f"| | perplexity | vs float | KL to float | top-1 |\n|---|---:|---:|---:|---:|\n{rows}"


def _other_texts(measured: Measured) -> str:
    """A section of the model card for each of the other texts."""
    sections = []
    for name, other in measured.on_other_texts():
        lines = "\n".join(f"- {markdown(line)}" for line in facts_on(name, other))
        sections.append(f"\n## On {markdown(public_name(name))}\n\n{_table(other)}\n\n{lines}\n")
    return "".join(sections)


def _front_matter(measured: Measured) -> str:
    """The part of a model card that the Hub reads, as YAML; base model and dataset only where these are Hub ids. The
    license is for whoever publishes the model."""
    import yaml

    model, bits = one_line(measured.recipe.model), measured.recipe.quant.bits
    values: dict[str, Any] = {"library_name": "transformers", "tags": ["llmqat", "compressed-tensors", f"int{bits}"]}
    if "/" in model and not is_local(model):
        values["base_model"] = model
    dataset = measured.recipe.data.dataset
    if dataset != "stdlib" and not is_local(dataset):
        known = NAMED_SETS.get(dataset)
        values["datasets"] = [one_line(known.hub if known else dataset).partition(":")[0]]
    if "packed" in measured.perplexity:
        values["model-index"] = [{"name": public_name(measured.recipe.model), "results": [_result(measured)]}]
    return f"{yaml.safe_dump(values, sort_keys=False)}{LICENSE}"


def _result(measured: Measured) -> dict[str, Any]:
    """The packed model's row of the scoreboard, as the Hub reads it."""
    dataset, packed = public_name(measured.recipe.data.dataset), measured.perplexity["packed"]
    values = {"perplexity": packed.perplexity, "kl_to_float": packed.kl_to_float, "top1": packed.top1_agreement}
    metrics = [{"type": key, "value": round(float(value), 6)} for key, value in values.items() if value is not None]
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": dataset, "type": dataset},
        "metrics": metrics,
    }


def _loading(measured: Measured) -> str:
    """Python lines with which transformers reads the directory; none where it cannot."""
    route = transformers_route(measured.coverage)
    if route is None:
        return ""
    hint = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if route else ""
    return f"""
from transformers import AutoModelForCausalLM{", CompressedTensorsConfig" if route else ""}
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory"{hint})
"""
