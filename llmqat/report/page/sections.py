"""The sections of the page, each a string of HTML made from `report.json` and `details.json`."""

from collections.abc import Callable
from html import escape

from llmqat.progress import duration
from llmqat.report.page.charts import Series, line_chart, meter, percent, short
from llmqat.report.page.layers import histograms, layer_errors
from llmqat.report.page.markup import Values, facts, section, table, written
from llmqat.report.scoreboard import LABELS, ROWS

MODES = {"full": "all weights", "lora": "LoRA inside the quantizer", "scales": "scales and norms"}


def header(report: Values, details: Values) -> str:
    """Model, scheme, the verdict, and the four numbers people look for."""
    size, check, perplexity = report["size"], report["verify"], report["perplexity"]
    base, packed = perplexity["float"], perplexity["packed"]
    tiles = []
    if base and packed:
        tiles.append(("perplexity, packed", f"{packed:.4g}", f"{packed / base - 1:+.2%} against float {base:.4g}"))
    if report["gap_recovered"] is not None:
        tiles.append(("recovered by training", f"{report['gap_recovered']:.0%}", "of what the best PTQ costs"))
    if size["packed_bytes"]:
        ratio = size["packed_bytes"] / size["float_bytes"]
        tiles.append(("quantized layers", f"{ratio:.1%} of float", f"{size['bits_per_weight']:.2f} bits per weight"))
    if check["codes_equal"] is not None:
        equal = check["codes_equal"] and check["scales_equal"]
        tiles.append(
            (
                "packed = trained",
                "bit for bit" if equal else '<span class="bad">different</span>',
                "codes and scales, by verify",
            )
        )
    boxes = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in tiles)
    name = escape(report["model"].rstrip("/").rsplit("/", 1)[-1])
    text = details.get("verdict", "")
    return (
        f'<header>\n<p class="eyebrow">llmqat report · {escape(details.get("scheme", ""))}</p>\n<h1>{name}</h1>\n'
        f'<p class="verdict">{escape(text[:1].upper() + text[1:])}{"." if text else ""}</p>\n'
        f'<dl class="tiles">{boxes}</dl>\n</header>'
    )


def scoreboard(report: Values, details: Values) -> str:
    """Float, the baselines, what was trained and what ships, on the same tokens."""
    perplexity, kl, top1 = report["perplexity"], report["kl_to_float"], report["top1_agreement"]
    base = perplexity["float"]
    rows = [row for row in ROWS if perplexity[row] is not None]
    worst = max((kl[row] for row in rows if kl.get(row) is not None), default=0.0)
    lines = []
    for row in rows:
        change = "" if base is None or row == "float" else f"{perplexity[row] / base - 1:+.2%}"
        divergence, agreement = kl.get(row), top1.get(row)
        bar = meter(divergence / worst, row) if divergence is not None and worst > 0 else ""
        cells = (f"{perplexity[row]:.4f}", change, written(divergence, "{:.5f}"), written(agreement, "{:.2%}"))
        numbers = "".join(f"<td>{cell or ''}</td>" for cell in (*cells[:3],))
        last = f'<td class="bar">{bar}</td><td>{cells[3] or ""}</td>'
        lines.append(f'<tr class="{row}"><th scope="row">{LABELS[row]}</th>{numbers}{last}</tr>')
    on = escape(details.get("measured_on", f"{report['tokens']['eval']:,} test tokens"))
    note = (
        f"Every row on the same {on}. KL is the mean over tokens of KL(float ‖ row) in nats; top-1 the share of tokens "
        "whose most likely successor is the float model's."
    )
    head = ("", "perplexity", "vs float", "KL to float", None, "top-1")
    return section("Scoreboard", note, table(head, lines) + _interval(details))


def _interval(details: Values) -> str:
    interval = details.get("interval")
    if not interval:
        return ""
    return (
        f'<p class="note">Perplexity, packed minus {LABELS[interval["against"]]}: 95 % between {interval["low"]:+.4f} '
        f"and {interval['high']:+.4f} (paired bootstrap over windows).</p>"
    )


def training(report: Values, details: Values) -> str:
    """Loss curves, codes flipped, and what training took."""
    curves, done = details.get("curves") or {}, report["training"]
    if done["steps"] is None:
        return ""
    distilled = report["recipe"]["train"]["loss"] == "kd"
    held_out = "Held-out KL to float" if distilled else "Held-out loss"
    panels: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
        ("loss", "Training loss", "qat", short),
        ("held_out", held_out, "qat", short),
        ("flipped", "Codes flipped since the start", "qat", percent),
    )
    figures = []
    for key, title, css, y_format in panels:
        points = [(float(x), float(y)) for x, y in curves.get(key, [])]
        best = curves.get("best_step") if key == "held_out" else None
        label = f"{title} by step" + (f", from {y_format(points[0][1])} to {y_format(points[-1][1])}" if points else "")
        chart = line_chart([Series(title, css, points)], label, "step", y_format, from_zero=key == "flipped", mark=best)
        note = f" <small>best at step {best}</small>" if best is not None else ""
        figures.append(f"<figure><h3>{title}{note}</h3>{chart}</figure>" if chart else "")
    config = report["recipe"]["train"]
    pairs = facts(
        [
            ("trained", MODES[config["mode"]]),
            ("steps", f"{done['steps']:,}"),
            ("tokens", written(report["tokens"]["train"], "{:,}")),
            ("time", duration(done["seconds"])),
            ("peak memory", None if done["peak_memory_bytes"] is None else f"{done['peak_memory_bytes'] / 1e9:.2f} GB"),
            ("codes changed", written(done["codes_changed"], "{:.2%}")),
            ("weights beyond the grid", written(done["clip_rate"], "{:.2%}")),
        ]
    )
    return section("Training", "", f'<div class="charts">{"".join(figures)}</div>{pairs}')


def size_and_speed(report: Values, details: Values) -> str:
    """Bytes of the quantized layers, and tokens per second, float and packed."""
    size, speed = report["size"], report["throughput"]
    rows = []
    groups: tuple[tuple[str, str, float | None, float | None], ...] = (
        ("quantized layers, MB", "{:,.2f}", _millions(size["float_bytes"]), _millions(size["packed_bytes"])),
        ("prefill, tokens/s", "{:,.0f}", speed["float"]["prefill_tok_s"], speed["packed"]["prefill_tok_s"]),
        ("decode, tokens/s", "{:,.1f}", speed["float"]["decode_tok_s"], speed["packed"]["decode_tok_s"]),
    )
    for name, form, base, packed in groups:
        if base and packed:
            cells = (
                f"<td>{form.format(base)}</td><td>{form.format(packed)}</td><td>{packed / base:.3g}&#8239;&times;</td>"
            )
            bars = meter(base / max(base, packed), "float") + meter(packed / max(base, packed), "packed")
            rows.append(f'<tr><th scope="row">{name}</th>{cells}<td class="bar">{bars}</td></tr>')
    if not rows:
        return ""
    config = report["recipe"]["eval"]
    bandwidth = speed["packed"]["weight_gb_s"]
    note = f"{report['coverage']['parameters_quantized']:.1%} of all parameters are on the grid."
    if bandwidth is not None:
        note += (
            f" Speed at batch 1: a prompt of {config['prompt']} tokens, {config['new_tokens']} generated, median of "
            f"{config['repeats']}; kernel {escape(str(speed['kernel']))}, {bandwidth:.2f} GB/s of packed weights."
        )
    head = ("", "float", "packed", "ratio", None)
    return section("Size and speed", note, table(head, rows))


def _millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def proof(report: Values, details: Values) -> str:
    """What `verify` found."""
    check = report["verify"]
    if check["codes_equal"] is None:
        return ""
    items = [
        (
            "yes" if check[key] else "no",
            f"{name} of the packed file {'equal' if check[key] else 'differ from'} the trained ones",
        )
        for key, name in (("codes_equal", "Codes"), ("scales_equal", "Scales"))
    ]
    error, bound = check["max_logit_error"], check["bound"]
    if error is None:
        items.append(("none", "Logits were not compared"))
    else:
        inside, where = error <= bound, "within" if error <= bound else "beyond"
        allowed = f"{error:.1e} from float64; allowed is {bound:.1e}, twice the error of plain float32 torch"
        items.append(("yes" if inside else "no", f"Logits {where} the bound: {allowed}"))
    listed = "".join(f'<li class="{css}">{text}</li>' for css, text in items)
    return section(
        "Proof",
        "Found by <code>llmqat verify</code> on the files in this directory.",
        f'<ul class="checks">{listed}</ul>',
    )


def recipe_and_machine(report: Values, details: Values) -> str:
    """The resolved recipe and the environment."""
    import yaml

    env = report["environment"]
    names = {"cpu": "processor", "gpu": "GPU", "cores": "cores", "threads": "threads", "python": "Python"}
    pairs = [(names.get(key, key), None if value is None else str(value)) for key, value in env.items()]
    pairs.sort(key=lambda pair: pair[0] not in names.values())
    skipped = report["coverage"]["skipped"]
    kept = "".join(f"<li><code>{escape(row['layer'])}</code>: {escape(row['reason'])}</li>" for row in skipped)
    float_layers = f"<details><summary>Kept in float: {len(skipped)}</summary><ul>{kept}</ul></details>" if kept else ""
    text = escape(yaml.safe_dump(report["recipe"], sort_keys=False))
    recipe = f"<details><summary>Recipe, fully resolved</summary><pre>{text}</pre></details>"
    return section("Recipe and machine", "", facts(pairs) + recipe + float_layers)


SECTIONS = (header, scoreboard, training, layer_errors, histograms, size_and_speed, proof, recipe_and_machine)
