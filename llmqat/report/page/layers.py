"""The sections about layers: their errors before and after training, and the histograms of one of them."""

from collections.abc import Sequence
from statistics import fmean

from llmqat.report.page.charts import HEIGHT, WIDTH, Series, legend, line_chart, percent
from llmqat.report.page.markup import Html, Values, element, formatted, section, table, table_row

# Variants of the model with an error per layer -> what they are called where room is short.
COMPARED = {"rtn": "round to nearest", "gptq": "GPTQ", "blockwise": "block-wise", "qat": "trained"}


def kind_and_depth(name: str) -> tuple[str, int]:
    """Kind of a layer and its block: ``model.layers.3.mlp.experts.5.up_proj`` to ``mlp.experts.up_proj`` and 3."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return name, 0
    below = [part for part in parts[numbers[0] + 1 :] if not part.isdigit()]
    return ".".join(below) or parts[0], int(parts[numbers[0]])


def by_block(members: Sequence[Values], variant: str) -> list[tuple[float, float]]:
    """Errors of a kind of layer in one variant of the model, by block; the mean where a block has several."""
    found: dict[int, list[float]] = {}
    for member in members:
        if variant in member["errors"]:
            found.setdefault(kind_and_depth(member["name"])[1], []).append(member["errors"][variant])
    return [(block, fmean(errors)) for block, errors in sorted(found.items())]


def layer_errors(report: Values, details: Values) -> Html:
    """Error of each layer's output before and after training, a small chart for each kind of layer."""
    layers = [layer for layer in details.get("layers", []) if layer["errors"]]
    variants = [variant for variant in COMPARED if any(variant in layer["errors"] for layer in layers)]
    if not layers:
        return Html()
    kinds: dict[str, list[Values]] = {}
    for layer in layers:
        kinds.setdefault(kind_and_depth(layer["name"])[0], []).append(layer)
    figures = []
    for kind, members in kinds.items():
        series = [Series(COMPARED[variant], variant, by_block(members, variant)) for variant in variants]
        chart = line_chart(series, f"Output error of {kind} by block", "block", percent, from_zero=True)
        figures.append(element("figure", element("h3", kind), chart))
    note = (
        "Squared difference of each layer's output from the float model's, relative to the float output, on the test "
        "tokens. Errors of earlier layers are in it, and so is what a layer does to make up for them. Lower is better."
    )
    body = element(
        "div",
        legend([(COMPARED[variant], variant) for variant in variants]),
        element("div", *figures, class_="charts"),
        _error_table(layers, variants),
    )
    return section("Error by layer", note, body)


def _error_table(layers: Sequence[Values], variants: Sequence[str]) -> Html:
    lines = [
        table_row(
            layer["name"],
            *(formatted(layer["errors"].get(variant), "{:.3%}") for variant in variants),
            formatted(layer["codes_changed"], "{:.2%}"),
        )
        for layer in layers
    ]
    head = ("layer", *(COMPARED[variant] for variant in variants), "codes changed")
    return element("details", element("summary", f"All {len(layers)} layers as a table"), table(head, lines))


def histograms(report: Values, details: Values) -> Html:
    """Weights and codes of the layer chosen in a select box; drawn by the page's script."""
    layers = [layer for layer in details.get("layers", []) if "codes" in layer]
    if not layers:
        return Html()
    body = element(
        "div",
        element("noscript", element("p", "Choosing a layer needs JavaScript.", class_="note")),
        element("div", *_one_layer([layer["name"] for layer in layers]), id="one-layer", hidden=True),
    )
    count = len(details["layers"])
    note = f"{len(layers)} of {count} layers, evenly picked." if len(layers) < count else ""
    return section("One layer", note, body)


def _one_layer(names: Sequence[str]) -> list[Html]:
    """The select box, and what the script fills in for the layer chosen."""
    shown = legend([("float weights", "float"), ("weights on the grid, as packed", "packed area")])
    weights = element("figure", element("h3", "Weights"), _empty_chart("weights", "Histogram of weights"), shown)
    codes = element("figure", element("h3", "Codes"), _empty_chart("codes", "How often each code is used"))
    return [
        element("label", "Layer", for_="layer"),
        element("select", *(element("option", name) for name in names), id="layer"),
        element("p", class_="note", id="about", aria_live="polite"),
        element("div", weights, codes, class_="charts pair"),
    ]


def _empty_chart(name: str, label: str) -> Html:
    return element("svg", id=name, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
