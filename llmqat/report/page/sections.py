"""The sections of the page, each made from `report.json` and `details.json`."""

from collections.abc import Callable, Iterator

from llmqat.progress import duration
from llmqat.report.page.charts import Series, line_chart, meter, percent, three_digits
from llmqat.report.page.layers import histograms, layer_errors
from llmqat.report.page.markup import (
    Html,
    Values,
    definitions,
    element,
    formatted,
    join,
    section,
    table,
    table_row,
)
from llmqat.report.scoreboard import LABELS, VARIANTS

TRAINED = {"full": "all weights", "lora": "LoRA inside the quantizer", "scales": "scales and norms"}
MACHINE = {"cpu": "processor", "gpu": "GPU", "cores": "cores", "threads": "threads", "python": "Python"}


def header(report: Values, details: Values) -> Html:
    """Model, scheme, the verdict, and the four numbers people look for."""
    verdict = details.get("verdict", "")
    boxes = [
        element("div", element("dt", name), element("dd", value, element("small", note)))
        for name, value, note in _tiles(report)
    ]
    return element(
        "header",
        element("p", f"llmqat report · {details.get('scheme', '')}", class_="eyebrow"),
        element("h1", report["model"].rstrip("/").rsplit("/", 1)[-1]),
        element("p", verdict[:1].upper() + verdict[1:] + ("." if verdict else ""), class_="verdict"),
        element("dl", *boxes, class_="tiles"),
    )


def _tiles(report: Values) -> Iterator[tuple[str, str, str]]:
    """Name, value and note of each number in the header."""
    size, check, perplexity = report["size"], report["verify"], report["perplexity"]
    base, packed = perplexity["float"], perplexity["packed"]
    if base is not None and packed is not None:
        yield "perplexity, packed", f"{packed:.4g}", f"{packed / base - 1:+.2%} against float {base:.4g}"
    if report["gap_recovered"] is not None:
        yield "recovered by training", f"{report['gap_recovered']:.0%}", "of what the best PTQ costs"
    if size["packed_bytes"] and size["float_bytes"]:
        bits = formatted(size["bits_per_weight"], "{:.2f} bits per weight") or ""
        yield "quantized layers", f"{size['packed_bytes'] / size['float_bytes']:.1%} of float", bits
    if check["codes_equal"] is not None:
        equal = check["codes_equal"] and check["scales_equal"]
        found = "bit for bit" if equal else element("span", "different", class_="bad")
        yield "packed = trained", found, "codes and scales, by verify"


def score_table(report: Values, details: Values) -> Html:
    """Float, the baselines, what was trained and what ships, on the same tokens."""
    measured_on = details.get("measured_on", f"{report['tokens']['eval']:,} test tokens")
    note = (
        f"Every row on the same {measured_on}. KL is the mean over tokens of KL(float ‖ row) in nats; top-1 the share "
        "of tokens whose most likely successor is the float model's."
    )
    others = (
        join([element("h3", f"On {name}, {scores['tokens']:,} test tokens"), _scores(scores)])
        for name, scores in report.get("also", {}).items()
    )
    return section("Scoreboard", note, join([_scores(report), _interval(details), *others]))


def _scores(scores: Values) -> Html:
    """A row for each variant that was scored on one text."""
    perplexity, kl, top1 = scores["perplexity"], scores["kl_to_float"], scores["top1_agreement"]
    base = perplexity["float"]
    scored = [variant for variant in VARIANTS if perplexity.get(variant) is not None]
    worst = max((kl[variant] for variant in scored if kl.get(variant) is not None), default=0.0)
    lines = []
    for variant in scored:
        divergence = kl.get(variant)
        bar = meter(divergence / worst, variant) if divergence is not None and worst > 0 else None
        lines.append(
            table_row(
                LABELS[variant],
                f"{perplexity[variant]:.4f}",
                None if base is None or variant == "float" else f"{perplexity[variant] / base - 1:+.2%}",
                formatted(divergence, "{:.5f}"),
                element("td", bar, class_="bar"),
                formatted(top1.get(variant), "{:.2%}"),
                class_=variant,
            )
        )
    return table(("", "perplexity", "vs float", "KL to float", None, "top-1"), lines)


def _interval(details: Values) -> Html | None:
    interval = details.get("interval")
    if not interval:
        return None
    text = (
        f"Perplexity, packed minus {LABELS[interval['against']]}: 95 % between {interval['low']:+.4f} and "
        f"{interval['high']:+.4f} (paired bootstrap over windows)."
    )
    return element("p", text, class_="note")


def training(report: Values, details: Values) -> Html:
    """Loss curves, codes flipped, and what training took."""
    done, config = report["training"], report["recipe"]["train"]
    if done["steps"] is None:
        return Html()
    held_out = "Held-out KL to float" if config["loss"] == "kd" else "Held-out loss"
    figures = [
        _curve(details, "loss", "Training loss", three_digits),
        _curve(details, "held_out", held_out, three_digits),
        _curve(details, "flipped", "Codes flipped since the start", percent),
    ]
    memory = done["peak_memory_bytes"]
    pairs = [
        ("trained", TRAINED.get(config["mode"])),
        ("steps", f"{done['steps']:,}"),
        ("tokens", formatted(report["tokens"]["train"], "{:,}")),
        ("time", None if done["seconds"] is None else duration(done["seconds"])),
        ("peak memory", None if memory is None else f"{memory / 1e9:.2f} GB"),
        ("codes changed", formatted(done["codes_changed"], "{:.2%}")),
        ("weights beyond the grid", formatted(done["clip_rate"], "{:.2%}")),
    ]
    return section("Training", "", join([element("div", *figures, class_="charts"), definitions(pairs)]))


def _curve(details: Values, key: str, title: str, y_format: Callable[[float], str]) -> Html | None:
    """One curve by step, with the step that was kept marked on the held-out one; None without points."""
    curves = details.get("curves") or {}
    points = [(float(x), float(y)) for x, y in curves.get(key, [])]
    if not points:
        return None
    best = curves.get("best_step") if key == "held_out" else None
    label = f"{title} by step, from {y_format(points[0][1])} to {y_format(points[-1][1])}"
    chart = line_chart([Series(title, "qat", points)], label, "step", y_format, from_zero=key == "flipped", mark=best)
    note = None if best is None else element("small", f" best at step {best}")
    return element("figure", element("h3", title, note), chart)


def size_and_speed(report: Values, details: Values) -> Html:
    """Bytes of the quantized layers, and tokens per second, float and packed."""
    size, speed = report["size"], report["throughput"]
    compared: tuple[tuple[str, str, float | None, float | None], ...] = (
        ("quantized layers, MB", "{:,.2f}", _millions(size["float_bytes"]), _millions(size["packed_bytes"])),
        ("prefill, tokens/s", "{:,.0f}", speed["float"]["prefill_tok_s"], speed["packed"]["prefill_tok_s"]),
        ("decode, tokens/s", "{:,.1f}", speed["float"]["decode_tok_s"], speed["packed"]["decode_tok_s"]),
    )
    rows = []
    for name, form, base, packed in compared:
        if base and packed:
            bars = join([meter(base / max(base, packed), "float"), meter(packed / max(base, packed), "packed")])
            ratio = f"{packed / base:.3g}\u202f\u00d7"
            rows.append(
                table_row(name, form.format(base), form.format(packed), ratio, element("td", bars, class_="bar"))
            )
    if not rows:
        return Html()
    return section("Size and speed", _speed_note(report), table(("", "float", "packed", "ratio", None), rows))


def _speed_note(report: Values) -> str:
    config, packed = report["recipe"]["eval"], report["throughput"]["packed"]
    note = f"{report['coverage']['parameters_quantized']:.1%} of all parameters are on the grid."
    if packed["weight_gb_s"] is None:
        return note
    path = f" Path taken: {packed['path']}." if packed.get("path") else ""
    return (
        f"{note} Speed at batch 1: a prompt of {config['prompt']} tokens, {config['new_tokens']} generated, median of "
        f"{config['repeats']}; kernel {report['throughput']['kernel']}, {packed['weight_gb_s']:.2f} GB/s of packed "
        f"weights.{path}"
    )


def _millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def proof(report: Values, details: Values) -> Html:
    """The findings of `verify`."""
    check = report["verify"]
    if check["codes_equal"] is None:
        return Html()
    items = [
        (
            "yes" if check[key] else "no",
            f"{name} of the packed file {'equal' if check[key] else 'differ from'} the trained ones",
        )
        for key, name in (("codes_equal", "Codes"), ("scales_equal", "Scales"))
    ]
    error, bound = check["max_logit_error"], check["bound"]
    if error is None or bound is None:
        items.append(("none", "Logits were not compared"))
    else:
        inside, where = error <= bound, "within" if error <= bound else "beyond"
        allowed = f"{error:.1e} from float64; allowed is {bound:.1e}, twice the error of plain float32 torch"
        items.append(("yes" if inside else "no", f"Logits {where} the bound: {allowed}"))
    listed = element("ul", *(element("li", text, class_=css) for css, text in items), class_="checks")
    note = join(["Found by ", element("code", "llmqat verify"), " on the files in this directory."])
    return section("Proof", note, listed)


def recipe_and_machine(report: Values, details: Values) -> Html:
    """The resolved recipe and the environment."""
    import yaml

    environment = report["environment"].items()
    pairs = [(MACHINE.get(key, key), None if value is None else str(value)) for key, value in environment]
    pairs.sort(key=lambda pair: pair[0] not in MACHINE.values())
    skipped = report["coverage"]["skipped"]
    kept = [element("li", element("code", row["layer"]), f": {row['reason']}") for row in skipped]
    recipe = yaml.safe_dump(report["recipe"], sort_keys=False)
    parts = [
        definitions(pairs),
        element("details", element("summary", "Recipe, fully resolved"), element("pre", recipe)),
        element("details", element("summary", f"Kept in float: {len(kept)}"), element("ul", *kept)) if kept else None,
    ]
    return section("Recipe and machine", "", join(parts))


SECTIONS = (header, score_table, training, layer_errors, histograms, size_and_speed, proof, recipe_and_machine)
