"""The sections about layers: their errors before and after training, and the histograms of one of them."""

from collections.abc import Sequence
from html import escape
from statistics import fmean

from llmqat.report.page.charts import HEIGHT, WIDTH, Series, legend, line_chart, percent
from llmqat.report.page.markup import Values, section, table, written

# Rows of the scoreboard with an error per layer, and what they are called where room is short.
COMPARED = {"rtn": "round to nearest", "gptq": "GPTQ", "qat": "trained"}


def kind_and_depth(name: str) -> tuple[str, int]:
    """Kind of a layer and its block: ``model.layers.3.mlp.experts.5.up_proj`` to ``mlp.experts.up_proj`` and 3."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return name, 0
    below = [part for part in parts[numbers[0] + 1 :] if not part.isdigit()]
    return ".".join(below) or parts[0], int(parts[numbers[0]])


def by_block(members: Sequence[Values], row: str) -> list[tuple[float, float]]:
    """Error of a kind of layer under `row` by block; the mean where a block has several."""
    found: dict[int, list[float]] = {}
    for member in members:
        if row in member["errors"]:
            found.setdefault(kind_and_depth(member["name"])[1], []).append(member["errors"][row])
    return [(block, fmean(errors)) for block, errors in sorted(found.items())]


def layer_errors(report: Values, details: Values) -> str:
    """Error of each layer's output before and after training, a small chart for each kind of layer."""
    layers = [layer for layer in details.get("layers", []) if layer["errors"]]
    rows = [row for row in COMPARED if any(row in layer["errors"] for layer in layers)]
    if not layers:
        return ""
    kinds: dict[str, list[Values]] = {}
    for layer in layers:
        kinds.setdefault(kind_and_depth(layer["name"])[0], []).append(layer)
    figures = []
    for kind, members in kinds.items():
        series = [Series(COMPARED[row], row, by_block(members, row)) for row in rows]
        chart = line_chart(series, f"Output error of {kind} by block", "block", percent, from_zero=True)
        figures.append(f"<figure><h3>{escape(kind)}</h3>{chart}</figure>")
    note = (
        "Squared difference of each layer's output from the float model's, relative to the float output, on the test "
        "tokens. Errors of earlier layers are in it, and so is what a layer does to make up for them. Lower is better."
    )
    shown = legend([(COMPARED[row], row) for row in rows])
    charts = f'<div class="charts">{"".join(figures)}</div>'
    return section("Error by layer", note, shown + charts + _error_table(layers, rows))


def _error_table(layers: Sequence[Values], rows: Sequence[str]) -> str:
    lines = []
    for layer in layers:
        cells = "".join(f"<td>{written(layer['errors'].get(row), '{:.3%}') or ''}</td>" for row in rows)
        changed = written(layer["codes_changed"], "{:.2%}") or ""
        lines.append(f'<tr><th scope="row">{escape(layer["name"])}</th>{cells}<td>{changed}</td></tr>')
    head = ("layer", *(COMPARED[row] for row in rows), "codes changed")
    return f"<details><summary>All {len(layers)} layers as a table</summary>{table(head, lines)}</details>"


def histograms(report: Values, details: Values) -> str:
    """Weights and codes of the layer chosen in a select box; drawn by the page's script."""
    layers = [layer for layer in details.get("layers", []) if "codes" in layer]
    options = "".join(f"<option>{escape(layer['name'])}</option>" for layer in layers)
    if not layers:
        return ""
    shown = legend([("float weights", "float"), ("weights on the grid, as packed", "packed area")])
    box = f'<svg id="{{}}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{{}}"></svg>'
    body = f"""<noscript><p class="note">Choosing a layer needs JavaScript.</p></noscript>
<div id="one-layer" hidden>
<label for="layer">Layer</label><select id="layer">{options}</select>
<p class="note" id="about" aria-live="polite"></p>
<div class="charts pair">
<figure><h3>Weights</h3>{box.format("weights", "Histogram of weights")}{shown}</figure>
<figure><h3>Codes</h3>{box.format("codes", "How often each code is used")}</figure>
</div></div>"""
    count = len(details["layers"])
    note = f"{len(layers)} of {count} layers, evenly picked." if len(layers) < count else ""
    return section("One layer", note, body)
