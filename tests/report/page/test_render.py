import base64
import copy
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from llmqat.errors import LlmqatError
from llmqat.report import schema
from llmqat.report.page.layers import by_block, kind_and_depth
from llmqat.report.page.render import PAGE, render, write_page

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects the page's text, headings and ids."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.headings, self.texts, self.scripts = [], [], [], [], []
        self.elements = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, attrs))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts).append(data)


def embedded(text):
    """The layers that the page's script draws."""
    (data,) = re.findall(r'<script type="application/json" id="layers">(.*?)</script>', text)
    return json.loads(data)


@pytest.fixture
def report(finished):
    return json.loads((finished / "report.json").read_text())


@pytest.fixture
def details(finished):
    return json.loads((finished / "details.json").read_text())


ALL = ["Scoreboard", "Training", "Error by layer", "One layer", "Size and speed", "Proof", "Recipe and machine"]


def test_page_of_a_finished_run(finished, report, details):
    page = Page((finished / PAGE).read_text("utf-8"))
    assert page.headings == ["tiny", *ALL]
    assert len(set(page.ids)) == len(page.ids)
    verdict = details["verdict"]
    for part in (
        verdict[0].upper() + verdict[1:] + ".",
        f"{report['perplexity']['packed']:.4f}",
        f"{report['kl_to_float']['rtn']:.5f}",
        f"{report['top1_agreement']['qat']:.2%}",
        f"All {len(details['layers'])} layers as a table",
        f"{details['layers'][0]['errors']['qat']:.3%}",
        "Codes of the packed file equal the trained ones",
        "Scales of the packed file equal the trained ones",
        "Logits within the bound",
        report["environment"]["cpu"],
        "group_size: 32",
        "LoRA inside the quantizer",
        "paired bootstrap over windows",
    ):
        assert part in page.text, part
    assert "lm_head : output head" in page.text or "lm_head: output head" in page.text


def test_the_page_needs_nothing_else(finished):
    text = (finished / PAGE).read_text("utf-8")
    assert "default-src 'none'" in text
    assert "unsafe" not in text
    for kind in ("style", "script"):
        (source,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        allowed = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{allowed}'" in text
    assert not re.search(r"\s(style|on\w+)=", text)
    assert not re.search(r"""(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest|import\(""", text)
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_data_of_every_layer_is_embedded(finished, details):
    text = (finished / PAGE).read_text("utf-8")
    layers = embedded(text)
    assert [layer["codes"] for layer in layers] == [layer["codes"] for layer in details["layers"]]
    assert len(re.findall("<option>", text)) == len(layers)
    ids = set(re.findall(r'getElementById\("([\w-]+)"\)', text))
    assert ids <= set(Page(text).ids)


def test_names_are_escaped(report, details):
    report["model"] = "models/<b>&'\"</script>"
    details["layers"][0]["name"] = "model.layers.0.</script><i>"
    details["layers"][0]["scheme"] = "</script><!--"
    text = render(report, details)
    page = Page(text)
    assert embedded(text)[0]["scheme"] == "</script><!--"
    assert page.headings[0] == "script>"
    assert "</script><i>" in page.text
    assert "<b>" not in "".join(page.headings)


MARKUP = """<img src=x onerror=alert(1)>"'&<script>alert(2)</script></textarea>"""


def places(values, path=()):
    """Paths of all leaves of nested values, and of all mappings that any key may be added to."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def with_value(values, path, value):
    changed = copy.deepcopy(values)
    target = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return changed


def assert_no_markup(text):
    """No element, attribute or script of `MARKUP` came into being."""
    tags = [tag for tag, _ in Page(text).elements]
    assert "img" not in tags
    assert tags.count("script") == 2
    assert not any(name.startswith("on") for _, attributes in Page(text).elements for name, _ in attributes)


def test_markup_anywhere_is_shown_or_refused(report, details, tmp_path):
    """In every place of both files, and as a key of every mapping: never in the page as it is."""
    shown = refused = 0
    for name, check, values in (("report", schema.REPORT, report), ("details", schema.DETAILS, details)):
        files = {"report": report, "details": details}
        # One layer and one point of a curve stand for all.
        paths = [path for path in places(values) if not any(isinstance(key, int) and key > 0 for key in path)]
        for path in paths:
            changed = with_value(values, path, MARKUP)
            try:
                check(changed, name)
            except LlmqatError:
                refused += 1
                continue
            shown += 1
            assert_no_markup(render(**files | {name: changed}))
    assert shown > 20
    assert refused > 40


@pytest.mark.parametrize("path", [("environment",), ("recipe", "quant", "overrides"), ("recipe",)])
def test_markup_in_keys_is_shown(report, details, path):
    changed = with_value(report, (*path, MARKUP), "x")
    schema.REPORT(changed, "report")
    text = render(changed, details)
    assert_no_markup(text)
    assert "alert(1)" in Page(text).text


def test_markup_in_layers_and_curves_is_shown(report, details):
    details["layers"][0] |= {"name": f"model.layers.0.{MARKUP}", "scheme": MARKUP}
    details |= {"verdict": MARKUP, "measured_on": MARKUP, "scheme": MARKUP}
    report["throughput"]["kernel"] = MARKUP
    report["throughput"]["packed"] = {**dict.fromkeys(report["throughput"]["packed"], 1.0), "path": MARKUP}
    report["coverage"]["skipped"] = [{"layer": MARKUP, "reason": MARKUP}]
    schema.REPORT(report, "report")
    schema.DETAILS(details, "details")
    assert_no_markup(render(report, details))


def test_a_page_without_details(finished, tmp_path):
    directory = shutil.copytree(finished, tmp_path / "copy")
    (directory / "details.json").unlink()
    page = Page(write_page(directory).read_text("utf-8"))
    assert page.headings == ["tiny", *(name for name in ALL if name not in ("Error by layer", "One layer"))]


def test_a_page_without_training(report, details):
    for section in ("training", "verify"):
        report[section] = dict.fromkeys(report[section])
    report["perplexity"] = {**dict.fromkeys(report["perplexity"]), "float": 10.0, "packed": 11.0}
    report["gap_recovered"] = None
    page = Page(render(report, {**details, "curves": {}, "interval": None}))
    assert "Training" not in page.headings
    assert "Proof" not in page.headings
    assert "+10.00% against float 10" in page.text
    assert "recovered by training" not in page.text


def test_a_failed_proof_is_said(report, details):
    report["verify"] |= {"codes_equal": False, "max_logit_error": 1.0, "bound": 0.5}
    text = render(report, details)
    page = Page(text)
    assert "Codes of the packed file differ from the trained ones" in page.text
    assert "Logits beyond the bound: 1.0e+00 from float64; allowed is 5.0e-01" in page.text
    assert text.count('<li class="no">') == 2
    report["verify"] |= {"max_logit_error": None, "bound": None}
    assert "Logits were not compared" in Page(render(report, details)).text


def test_speed(report, details):
    fast = copy.deepcopy(report)
    fast["throughput"] = {
        "kernel": "reference",
        "float": {"prefill_tok_s": 1000.0, "decode_tok_s": 10.0},
        "packed": {"prefill_tok_s": 500.0, "decode_tok_s": 25.0, "weight_gb_s": 1.5, "path": "native loop 4 tokens"},
    }
    page = Page(render(fast, details))
    assert "prefill, tokens/s 1,000 500 0.5" in page.text
    assert "decode, tokens/s 10.0 25.0 2.5" in page.text
    assert "kernel reference, 1.50 GB/s of packed weights. Path taken: native loop 4 tokens." in page.text
    assert "tokens/s 1" not in Page(render(report, details)).text


@pytest.mark.parametrize(
    ("name", "kind", "depth"),
    [
        ("model.layers.3.mlp.down_proj", "mlp.down_proj", 3),
        ("transformer.h.11.attn.c_attn", "attn.c_attn", 11),
        ("model.layers.2.mlp.experts.5.up_proj", "mlp.experts.up_proj", 2),
        ("layers.4", "layers", 4),
        ("classifier", "classifier", 0),
    ],
)
def test_layers_are_told_apart(name, kind, depth):
    assert kind_and_depth(name) == (kind, depth)


def test_experts_of_a_block_are_averaged():
    members = [{"name": f"layers.1.experts.{n}.up", "errors": {"rtn": error}} for n, error in enumerate((0.1, 0.3))]
    members.append({"name": "layers.0.experts.0.up", "errors": {"rtn": 0.4, "qat": 0.5}})
    assert by_block(members, "rtn") == [(0, 0.4), (1, pytest.approx(0.2))]
    assert by_block(members, "qat") == [(0, 0.5)]


def test_a_part_of_many_layers_is_drawn(report, details):
    for layer in details["layers"][1:]:
        del layer["codes"]
    details["layers"][0]["float"] = None
    text = render(report, details)
    assert text.count("<option>") == 1
    assert f"1 of {len(details['layers'])} layers, evenly picked." in text
    assert f"All {len(details['layers'])} layers as a table" in text


def test_report_command(finished, tmp_path, call, capsys):
    directory = shutil.copytree(finished, tmp_path / "copy")
    before = (directory / PAGE).read_bytes()
    (directory / PAGE).unlink()
    assert call(["report", directory]) == 0
    assert capsys.readouterr().out == f"{directory / PAGE}\n"
    assert (directory / PAGE).read_bytes() == before


def test_quantize_writes_a_page_and_names_it(model_dir, text_file, tmp_path, call, capsys, quantize_flags):
    argv = ["quantize", "--model", model_dir, "--dataset", text_file, "--output", tmp_path / "out", *quantize_flags]
    assert call([*argv, "--act-bits", "8", "--asym"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"look at it in a browser: {tmp_path / 'out' / PAGE}"
    page = Page((tmp_path / "out" / PAGE).read_text("utf-8"))
    assert page.headings == ["tiny", *(name for name in ALL if name != "Training")]
    assert "trained (fake-quant)" not in page.text


def test_nothing_to_show(finished, tmp_path):
    with pytest.raises(LlmqatError, match=r"has no report\.json; `llmqat finetune` and `llmqat quantize` write one"):
        write_page(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(LlmqatError, match=r"report\.json is damaged; run it again, or copy it again"):
        write_page(tmp_path)
    (tmp_path / "report.json").write_text('{"model": "x"}')
    with pytest.raises(LlmqatError, match=r"is not one of this version of llmqat: report has no format; run it again"):
        write_page(tmp_path)
    (tmp_path / "report.json").unlink()
    (tmp_path / "report.json").mkdir()
    with pytest.raises(LlmqatError, match=r"has no report\.json"):
        write_page(tmp_path)
