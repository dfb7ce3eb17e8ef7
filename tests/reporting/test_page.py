"""The page: whole in itself, escaped, honest about what is missing, and shown by a real browser without a complaint."""

import re
import shutil
import subprocess
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from potstill.reporting import figures
from potstill.reporting.page import render, write_report
from potstill.reporting.summary import summarise_all
from potstill.run_folder import RunFolder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">'\"&"
STEPS = 40


def metric(value, error=0.01, **changes):
    described = {"label": "forward KL", "unit": "nats", "higher_is_better": False, "count": 900, "counted": "targets", "num_clusters": 50}
    return described | {"value": value, "standard_error": error, "low": value - 0.02, "high": value + 0.02} | changes


def make_run(path, text, *, finish=True, steps=STEPS):
    with RunFolder.open(path, {"student": {"path": text}, "objective": {"kd_ratio": 0.5 if "kd" in path.name else 0.0}}) as folder:
        for step in range(1, steps + 1):
            line = {"step": step, "loss/ce": 3 / step, f"odd {text}": float(step)}
            folder.append_metrics(line | ({"eval_loss/ce": 3.5 / step} if step % 10 == 0 else {}))
        accuracy = metric(0.9, label="accuracy", unit="", higher_is_better=True)
        models = [
            {"name": f"teacher {text}", "num_parameters": 999, "num_seeds": 1, "metrics": {"accuracy": accuracy}},
            {"name": "student", "num_parameters": None, "num_seeds": 3, "metrics": {"forward_kl": metric(0.25)}},
        ]  # fmt: skip
        pair = {
            "metric": "forward_kl", "label": "forward KL", "unit": "nats", "higher_is_better": False, "first": "KD", "second": text,
            "difference": -0.1, "standard_error": 0.01, "low": -0.12, "high": -0.08, "p_value": 0.0001, "smallest_visible": 0.03,
            "is_significant": True, "method": "paired", "verdict": f"KD is lower. {text}",
        }  # fmt: skip
        record = {"kind": "evaluation", "version": 1, "title": f"Tasks {text}", "data": {"text": text}, "warnings": [text]}
        folder.write_json("evaluation/test.json", record | {"models": models, "comparisons": [pair]})
        if finish:
            folder.finish({"steps": steps})
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    return [make_run(place / "kd", "plain"), make_run(place / "sft", "plain")]


class Reader(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._inside = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = [*self._inside, tag] if tag in ("script", "style") else self._inside

    def handle_endtag(self, tag):
        self._inside = self._inside[:-1] if tag in ("script", "style") else self._inside

    def handle_data(self, data):
        self.text += "" if self._inside else data


def test_the_page_says_what_the_runs_say(runs):
    text = Reader(render(summarise_all(runs), written=datetime(2030, 1, 2, tzinfo=UTC))).text
    for part in (
        "kd: finished, sft: finished", "2030-01-02", "0.900 ± 0.010", "0.250 ± 0.010", "0.230 to 0.270", "3 seeds", "999", "KD is lower.",
        "larger than its uncertainty", "-0.120 to -0.080", "< 0.001", "cross-entropy (nats per target)", "objective.kd_ratio", "potstill",
    ):  # fmt: skip
        assert part in text, part
    # The key in which the runs differ stands before those that they share.
    assert text.index("objective.kd_ratio") < text.index("student.path")


def test_the_page_asks_the_network_for_nothing(runs):
    page = render(summarise_all(runs))
    policy = [attrs["content"] for tag, attrs in Reader(page).tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"]
    for tag, attrs in Reader(page).tags:
        assert tag not in ("iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "action", "data", "poster"):
            assert attrs.get(name, "data:,") == "data:,", (tag, attrs)
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert not any("url(" in style or "@import" in style for style in styles[:1])


def test_the_script_of_plotly_is_there_once(runs):
    page = render(summarise_all(runs))
    assert page.count("Plotly.newPlot") >= 2
    assert page.count("plotly.js v") == 1


def test_every_text_of_a_run_is_escaped(tmp_path):
    page = render(summarise_all([make_run(tmp_path / "kd<b>", HOSTILE)]))
    reader = Reader(page)
    assert not any(attrs.get("onerror") or tag in ("img", "b") for tag, attrs in reader.tags)
    assert "<script>document.title" not in page
    assert reader.text.count(HOSTILE) >= 6
    assert "kd<b>" in reader.text


def test_plotly_is_given_names_as_text_and_not_as_markup(tmp_path):
    """Plotly reads a little HTML in names; a run called kd<b> must be shown as it is called."""
    page = render(summarise_all([make_run(tmp_path / "kd<b>", "plain"), make_run(tmp_path / "sft", "plain")]))
    assert '"name":"kd&lt;b&gt;, validation"' in page


def test_without_plotly_the_curves_are_tables(runs, monkeypatch):
    monkeypatch.setattr(figures, "has_plotly", lambda: False)
    monkeypatch.setattr("potstill.reporting.page.has_plotly", lambda: False)
    page = render(summarise_all(runs))
    reader = Reader(page)
    assert not any(tag == "script" for tag, _ in reader.tags)
    assert "Install the extra" in reader.text
    assert "kd, validation" in reader.text
    assert "3.000" in reader.text
    assert len(page) < 40_000


def test_long_curves_are_thinned_and_the_page_says_so(tmp_path):
    page = render(summarise_all([make_run(tmp_path / "kd", "plain", steps=3000)]))
    assert re.search(r"2,0\d\d points are left out of this picture", Reader(page).text)
    traces = re.findall(r'"x":\[([\d,]+)\]', page)
    assert max(trace.count(",") + 1 for trace in traces) <= figures.MOST_POINTS


def test_what_is_missing_is_said(tmp_path):
    with RunFolder.open(tmp_path / "bare", {"run": {"seed": 1}}):
        pass
    text = Reader(render(summarise_all([tmp_path / "bare"]))).text
    assert "No evaluation was recorded in this run" in text
    assert "No run logged a quantity at more than one step" in text
    assert "the run is not finished" in text


def test_the_page_is_written_into_the_first_folder_or_where_asked(runs, tmp_path):
    assert write_report(runs) == runs[0] / "report.html"
    assert (runs[0] / "report.html").read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")
    assert write_report(runs, tmp_path / "deep" / "page.html").is_file()


def browse(page, *options):
    """The document after its scripts have run, and what the browser wrote to its console."""
    shown = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=4000",
            f"--user-data-dir={page.parent / 'profile'}", *options, "--dump-dom", page.absolute().as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return shown.stdout, [line for line in shown.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize(
    ("text", "options"), [("plain", []), (HOSTILE, ["--blink-settings=preferredColorScheme=0"])], ids=["light", "hostile, dark"]
)
def test_a_real_browser_shows_the_page_without_complaint(tmp_path, text, options):
    make_run(tmp_path / "runs" / "kd", text)
    make_run(tmp_path / "runs" / "sft", text)
    dom, console = browse(write_report([tmp_path / "runs"], tmp_path / "report.html"), *options)
    assert console == []
    assert "<title>kd · sft</title>" in dom
    assert dom.count('class="main-svg"') >= 2 * 3
    assert dom.count('class="js-line"') >= 2 * 2


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_browser_would_have_complained(tmp_path):
    page = tmp_path / "bad.html"
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; script-src \'unsafe-inline\'">'
    page.write_text(f"{policy}<script>console.error('seen')</script><img src='http://example.invalid/x.png'>", encoding="utf-8")
    _, console = browse(page)
    assert any("seen" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
