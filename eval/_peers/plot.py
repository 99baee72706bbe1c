"""The roofline: GB/s of stored weights against M for every layer, under the bandwidth that was read in the same run."""

from pathlib import Path
from typing import Any

from .catalog import A8, A8_KERNEL, A16, A16_KERNEL, ATEN, BF16, BITSANDBYTES, FP32, GPTQMODEL, READ

STYLES = {
    A8: ("C3", "-", 2.2),
    A16: ("C1", "-", 2.2),
    A8_KERNEL: ("C3", "--", 1.2),
    A16_KERNEL: ("C1", "--", 1.2),
    BF16: ("C0", "-", 1.2),
    FP32: ("C0", ":", 1.2),
    ATEN: ("C2", "-", 1.2),
    GPTQMODEL: ("C4", "-", 1.2),
    BITSANDBYTES: ("C5", "-", 1.2),
}


def roofline(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the layers of a run, a panel each, a row of panels for each set."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    measured = [row for row in rows if "failed" not in row]
    panels: dict[str, list[str]] = {}
    for row in measured:
        layers = panels.setdefault(row["set"], [])
        if row["layer"] not in layers:
            layers.append(row["layer"])
    columns = max(len(layers) for layers in panels.values())
    size = (2.9 * columns, 2.6 * len(panels) + 0.8)
    figure, axes = pyplot.subplots(len(panels), columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, (group, layers) in zip(axes, panels.items(), strict=True):
        for axis in line[len(layers) :]:
            axis.set_axis_off()
        for axis, layer in zip(line, layers, strict=False):
            _panel(axis, [row for row in measured if row["set"] == group and row["layer"] == layer])
        line[0].set_ylabel("GB/s of stored weights")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    axis.set_title(f"{first['set']} {first['layer']} {first['out']}x{first['in']}", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    ticks = sorted({row["m"] for row in rows})
    axis.set_xticks(ticks, [str(m) for m in ticks])
    axis.set_xlabel("M")
    ceiling = [row["gb_s"]["median"] for row in rows if row["peer"] == READ]
    if ceiling:
        axis.axhline(max(ceiling), color="black", linestyle="--", linewidth=1, label="read bandwidth")
    for peer, (color, style, width) in STYLES.items():
        points = [row for row in rows if row["peer"] == peer]
        if points:
            spread = [
                [abs(p["bytes"] / p["seconds"][end] / 1e9 - p["weight_gb_s"]) for p in points] for end in ("max", "min")
            ]
            xs, ys = [p["m"] for p in points], [p["weight_gb_s"] for p in points]
            axis.errorbar(xs, ys, spread, color=color, linestyle=style, linewidth=width, marker=".", label=peer)
