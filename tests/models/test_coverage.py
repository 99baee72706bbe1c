from llmqat.models.coverage import CoverageReport, LayerCoverage, by_expert
from llmqat.scheme import QuantScheme

INT4 = QuantScheme(4, 16)
LAYERS = (
    LayerCoverage("layers.0.q_proj", (8, 8), INT4),
    *(LayerCoverage(f"layers.0.experts.{e}.{p}", (4, 8), INT4) for e in range(12) for p in ("gate_proj", "up_proj")),
    *(LayerCoverage(f"layers.1.experts.{e}.up_proj", (4, 8), None, "override") for e in range(2)),
)


def test_experts_are_listed_once_for_each_projection():
    listed = dict(by_expert(LAYERS))
    assert list(listed) == [
        "layers.0.q_proj",
        "layers.0.experts.*.gate_proj x 12",
        "layers.0.experts.*.up_proj x 12",
        "layers.1.experts.*.up_proj x 2",
    ]
    assert listed["layers.0.experts.*.up_proj x 12"].shape == (4, 8)
    assert listed["layers.0.q_proj"] is LAYERS[0]


def test_experts_that_differ_are_listed_apart():
    layers = [LayerCoverage(f"mlp.experts.{e}.up_proj", (4, 8), QuantScheme(4 if e else 8, 16)) for e in range(3)]
    assert [name for name, _ in by_expert(layers)] == ["mlp.experts.0.up_proj", "mlp.experts.*.up_proj x 2"]


def test_summary_lists_skipped_experts_once():
    summary = CoverageReport(LAYERS, 10_000).summary()
    assert "25 layers quantized" in summary
    assert "  float: layers.1.experts.*.up_proj x 2 (override)" in summary


def test_layers_that_gptq_kept_are_named():
    report = CoverageReport(LAYERS, 10_000)
    assert report.error_summary() == ""
    report.errors.update({"a": (0.2, 0.1)} | {f"expert {e}": (0.2, None) for e in range(7)})
    assert report.kept == [f"expert {e}" for e in range(7)]
    measured, kept = report.error_summary().splitlines()
    assert measured.startswith("GPTQ: output error 50% of round-to-nearest's on average")
    assert measured.endswith("less in 1 of 1 layers")
    assert "GPTQ: 7 layers saw fewer than 2 calibration tokens for each of their inputs and keep " in kept
    assert kept.endswith("expert 3, expert 4 and 2 more; give more with --calibration-samples")
