"""The page as text: whole in itself, small enough, escaped, and honest about what is missing or damaged."""

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

import reported
from potstill.reporting import figures
from potstill.reporting.page import render, safe_json, write_report
from potstill.reporting.summary import summarise_all
from potstill.run_folder import RunFolder

HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">'\"&"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return reported.write_study(tmp_path_factory.mktemp("report") / "weights", seeds=(0, 1), steps=40)


@pytest.fixture(scope="module")
def page(study):
    return render(summarise_all([study]), written=datetime(2030, 1, 2, tzinfo=UTC))


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


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_says_what_was_done_and_what_came_of_it(page):
    text = " ".join(Reader(page).text.split())
    for part in (
        "The weight of the divergence, plain", "10 runs: 9 finished, 1 interrupted", "2030-01-02", "5 cells, along kd_ratio",
        "In the published study 0.5 was best", "0.75 × cross-entropy + 0.25 × forward KL", "none: the text alone is learned", "seeds0, 1",
        "0.5300 ± 0.0060", "0.5180 to 0.5420", "▲ better", "▼ worse", "≈ not told apart", "★ best", "3 seeds",
        "kd_ratio=1: seed 1 failed: out of memory", "one row was too long", "the run is not finished", "off target", "560,256",
        "0.4100 → 0.5300", "20% to 60%", "How many pieces are 3 apples and 4 pears?", "✓ right", "✗ wrong",
        "cross-entropy (nats per target)", "objective.kd_ratio",
        "divergence by position", "potstill 0.", "tokens per second", "peak memory (GiB)",
    ):  # fmt: skip
        assert part in text, part
    # The key in which the runs differ stands before those that they share.
    assert text.index("objective.kd_ratio") < text.index("student.path")


def test_runs_of_a_study_that_are_not_finished_are_listed(page):
    assert "<tr><td>kd_ratio=1</td><td>1</td><td>failed</td><td>out of memory</td></tr>" in page
    assert "<td>finished</td>" not in page


def test_the_page_asks_the_network_for_nothing(page):
    reader = Reader(page)
    assert [attrs["content"] for _, attrs in reader.tags if attrs.get("http-equiv") == "Content-Security-Policy"] == [POLICY]
    for tag, attrs in reader.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "action", "data", "poster"):
            assert attrs.get(name, "#").startswith("#") or attrs[name] == "data:,", (tag, attrs)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_the_script_of_plotly_is_there_once_and_the_page_is_small(page):
    assert page.count("plotly.js v") == 1
    assert len(page.encode()) < 5_200_000


def test_every_text_of_a_run_is_escaped(tmp_path):
    folder = reported.write_study(tmp_path / "study", ratios=(0.0, 0.5), seeds=(0,), text=HOSTILE)
    record = reported.evaluation((f"sft {HOSTILE}", f"kd {HOSTILE}"), text=HOSTILE, title=HOSTILE)
    record["warnings"] = [HOSTILE]
    for sample in record["samples"]:
        sample |= {"item": HOSTILE, "reference": HOSTILE}
    for series in record["series"]:
        series |= {"label": HOSTILE, "x_label": HOSTILE, "y_label": HOSTILE}
    for task in record["tasks"]:
        task["data"] = {HOSTILE: HOSTILE}
    (folder / "evaluation" / "study.json").write_text(json.dumps(record))
    reported.write_run(folder / "runs" / "x", reported.recipe(0.5, 7, HOSTILE), quantities=(f"odd {HOSTILE}",))
    page = render(summarise_all([folder]))
    reader = Reader(page)
    assert not any(attrs.get("onerror") or tag in ("img", "b") for tag, attrs in reader.tags)
    assert "<script>document.title" not in page
    assert page.count("<script") == 3 + page.count('"<script')   # plotly's source holds the word in its own strings
    assert reader.text.count(HOSTILE) >= 60
    names = {line["name"] for figure in data_of(page) for line in figure["lines"]}
    assert not any("<" in name for name in names)


def test_data_inside_a_script_cannot_end_it():
    text = safe_json(["</script><!--<script>&\u2028"])
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == ["</script><!--<script>&\u2028"]


def test_without_plotly_there_are_tables(study, monkeypatch):
    monkeypatch.setattr(figures, "has_plotly", lambda: False)
    page = render(summarise_all([study]))
    text = Reader(page).text
    assert "Plotly.newPlot" not in page
    assert "plotly.js v" not in page
    assert "Install the extra" in text
    assert "kd_ratio=0.5, validation" in text
    assert "answer lengths" in text
    assert len(page) < 300_000


def test_forty_long_runs_stay_under_eight_megabytes(tmp_path):
    runs = tmp_path / "runs"
    quantities = tuple(f"rollouts/quantity_{place}" for place in range(8))
    for place in range(40):
        path = runs / f"run-{place:02}"
        reported.write_run(path, reported.recipe(place / 40, 0), steps=2, quantities=quantities)
        line = (path / "metrics.jsonl").read_text().splitlines()[-1]
        logged = json.loads(line)
        (path / "metrics.jsonl").write_text("".join(json.dumps(logged | {"step": step}) + "\n" for step in range(1, 3001)))
    (runs / "evaluation").mkdir()
    names = [f"run-{place:02}" for place in range(40)]
    record = reported.evaluation(names, text="a long answer " * 400, num_samples=30)
    (runs / "evaluation" / "all.json").write_text(json.dumps(record))
    page = write_report([runs])
    assert page.stat().st_size < 8_000_000
    assert re.search(r"[\d,]+ points are left out of this picture", page.read_text())
    assert "more are in the record" in page.read_text()


def test_a_page_that_would_be_too_large_shows_less(study):
    summaries = summarise_all([study])
    whole = render(summaries)
    smaller = render(summaries, largest=len(whole.encode()) - 1)
    assert len(smaller) < len(whole)
    # The numbers stay; points or answers go, and the page says so.
    assert "points are left out" in smaller or "more are in the record" in smaller
    assert smaller.count("0.5300 ± 0.0060") == whole.count("0.5300 ± 0.0060")


def test_a_run_without_anything_says_so(tmp_path):
    with RunFolder.open(tmp_path / "bare", {"run": {"seed": 1}}):
        pass
    text = Reader(render(summarise_all([tmp_path / "bare"]))).text
    assert "No evaluation was recorded in this run" in text
    assert "No run logged a quantity at more than one step" in text
    assert "the run is not finished" in text


# What a kill, a full disk or an editor leaves, by file, and the word that a reader should find.
DAMAGE = {
    "recipe.yaml": ("student: [", "recipe.yaml: damaged or half-written"),
    "summary.json": ('{"steps": ', "summary.json: damaged"),
    "environment.json": ("[1, 2]", "environment.json: holds something else"),
    "metrics.jsonl": ('{"step": 1, "loss": 2.0}\nnonsense\n{"step": 2, "loss": 1.0}\n{"st', "1 lines are damaged"),
    "evaluation/study.json": ('{"kind": "evaluation", "version": 2, "models": [{"nam', "evaluation/study.json: damaged"),
    "evaluation/new.json": ('{"kind": "evaluation", "version": 99}', "version '99', this Potstill reads up to 2"),
    "evaluation/foreign.json": ('{"results": {}}', "not one of Potstill's evaluations"),
    "evaluation/bytes.json": ("\x00\x01", "evaluation/bytes.json: damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_one_line_and_the_rest_appears(tmp_path, name):
    run = reported.write_run(tmp_path / "kd", reported.recipe(0.5, 0))
    (run / "evaluation").mkdir()
    (run / "evaluation" / "good.json").write_text(json.dumps(reported.evaluation(title="The good record")))
    content, words = DAMAGE[name]
    (run / name).write_text(content)
    summaries = summarise_all([run])
    assert len([line for line in summaries[0].warnings if words in line]) == 1
    text = Reader(render(summaries)).text
    assert words in " ".join(text.split())
    assert "The good record" in text
    if name != "metrics.jsonl":
        assert "cross-entropy (nats per target)" in text


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"kind": "study", "version": 9}', '{"kind": "study", "version": 1, "axes": 3, "cells": [5, {}]}']
)
def test_a_study_that_does_not_read_leaves_its_runs_and_results(tmp_path, content):
    folder = reported.write_study(tmp_path / "study", ratios=(0.0, 0.5), seeds=(0,))
    (folder / "study.json").write_text(content)
    text = Reader(render(summarise_all([folder]))).text
    assert "A study of the weight" in text
    assert "cross-entropy (nats per target)" in text


def test_several_evaluations_of_the_same_tasks_stand_in_one_table(tmp_path):
    runs = []
    for name in ("first", "second"):
        run = reported.write_run(tmp_path / name, reported.recipe(0.5, 0, name))
        (run / "evaluation").mkdir()
        (run / "evaluation" / "test.json").write_text(json.dumps(reported.evaluation((f"{name} student",))))
        runs.append(run)
    page = render(summarise_all(runs))
    assert page.count('<div class="results"') == 1
    assert Reader(page).text.count("student") >= 2


def test_the_page_is_written_where_asked_and_markdown_by_its_ending(study, tmp_path):
    record = study / "evaluation" / "study.json"
    assert write_report([study]) == study / "report.html"
    assert (study / "report.html").read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")
    assert write_report([study, tmp_path / "nowhere"], tmp_path / "deep" / "page.html").is_file()
    assert "nowhere: neither a run folder" in (tmp_path / "deep" / "page.html").read_text()
    assert "A study of the weight" in write_report([record], tmp_path / "one.html").read_text()
    assert write_report([study], tmp_path / "card.md").read_text().startswith("# ")
