"""The page in a real browser, opened from disk with the network cut: drawn, sorted, filtered, themed, printed, and no complaint."""

import json
import shutil
from contextlib import contextmanager

import pytest

import reported
from potstill.reporting.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
OPTIONS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--disable-component-update",
    "--disable-dev-shm-usage",
]  # fmt: skip
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"&{{ 7 * 7 }}"
# Numbers whose order as text is another than as numbers; the model without one stays last.
LENGTHS = {"teacher": 9.5, "before": 100.25, "sft": 10.75, "kd_ratio=0.5": -3.0, "kd_ratio=1": None}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = reported.write_study(tmp_path_factory.mktemp("browser") / "study", ratios=(0.0, 0.5, 1.0), seeds=(0, 1), num_samples=6)
    file = folder / "evaluation" / "study.json"
    record = json.loads(file.read_text())
    for model in record["models"]:
        model["metrics"]["arithmetic/mean_length"]["value"] = LENGTHS[model["name"]]
    file.write_text(json.dumps(record))
    return write_report([folder])


@contextmanager
def opened(browser, file, *, width=1280, dark=False, drawn=True):
    """The page after its pictures are drawn. Leaving it asserts that nothing was complained of and nothing was asked for."""
    complaints = []
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light") as context:
        context.set_offline(True)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: complaints.append(f"asked for {request.url}") if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        if drawn:
            page.wait_for_selector("html[data-drawn=all]", state="attached", timeout=120_000)
        page.complaints = complaints
        yield page
    assert complaints == []


def points_of(page):
    """For each picture the number of corners and marks that are really drawn."""
    return page.evaluate("""() => [...document.querySelectorAll('.chart')].map(chart => {
        const lines = [...chart.querySelectorAll('.scatterlayer path.js-line')];
        const corners = lines.map(path => (path.getAttribute('d') || '').split(/[LHVM]/).length - 1);
        return corners.reduce((sum, count) => sum + count, 0) + chart.querySelectorAll('.scatterlayer .points path').length;
    })""")


def is_too_wide(page):
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)], ids=["light", "dark", "narrow"])
def test_every_picture_is_drawn_and_the_page_is_as_wide_as_the_window(browser, study, width, dark):
    with opened(browser, study, width=width, dark=dark) as page:
        points = points_of(page)
        # Three pictures of the study, three series, and six logged quantities.
        assert len(points) == 3 + 3 + 6
        assert min(points) >= 2
        assert sum(points) > 300
        assert not is_too_wide(page)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 22, 24)" if dark else "rgb(252, 252, 250)")


def order_of(page):
    return page.locator(".results table.wide tbody th").evaluate_all("rows => rows.map(row => row.firstChild.textContent.trim())")


def test_a_click_sorts_by_number_and_the_keyboard_does_too(browser, study):
    with opened(browser, study, drawn=False) as page:
        head = page.locator(".results th", has_text="mean length")
        known = sorted((name for name in LENGTHS if LENGTHS[name] is not None), key=lambda name: LENGTHS[name])
        assert order_of(page) != [*known[::-1], "kd_ratio=1"]
        head.locator("button").click()
        assert order_of(page) == [*known[::-1], "kd_ratio=1"]
        assert head.get_attribute("aria-sort") == "descending"
        head.locator("button").focus()
        page.keyboard.press("Enter")
        assert order_of(page) == [*known, "kd_ratio=1"]
        assert head.get_attribute("aria-sort") == "ascending"
        # Where less is better, the first click puts the best on top; only one column is marked as sorted.
        bits = page.locator(".results th", has_text="bits per byte")
        bits.locator("button").click()
        assert order_of(page)[0] == "teacher"
        assert bits.get_attribute("aria-sort") == "ascending"
        assert page.locator(".results table.wide [aria-sort]").count() == 1
        page.locator(".results table.wide th button", has_text="model").click()
        assert order_of(page) == sorted(LENGTHS)


def test_rows_tasks_and_metrics_can_be_left_out(browser, study):
    with opened(browser, study, drawn=False) as page:
        visible = page.locator(".results table.wide tbody tr:visible")
        assert visible.count() == 5
        page.locator(".results input.rows").fill("KD_ratio")
        assert visible.count() == 2
        page.locator(".results input.rows").fill("")
        assert visible.count() == 5
        heads = page.locator(".results th[data-column]:visible")
        assert heads.count() == 6
        page.get_by_role("button", name="primary only").click()
        assert heads.count() == 3
        page.get_by_role("group", name="Tasks").get_by_role("button", name="commonsense").click()
        assert heads.count() == 2
        assert page.locator(".results table.wide tbody tr:first-child td[data-column]:visible").count() == 2
        assert page.locator(".results .tasks th:visible").count() == 2
        page.get_by_role("button", name="all metrics").click()
        assert heads.count() == 5
        page.get_by_role("group", name="Metrics by name").get_by_role("button", name="forward KL").click()
        assert heads.count() == 4


def test_answers_can_be_searched(browser, study):
    with opened(browser, study, drawn=False) as page:
        shown = page.locator(".entry:visible")
        assert shown.count() == 6
        page.locator("#find-answers").fill("3 apples AND 4 pears")
        assert shown.count() == 1
        page.locator("#find-answers").fill("")
        page.get_by_role("button", name="where some are right").click()
        assert shown.count() == page.locator(".entry[data-divided=true]").count()
        assert page.locator("#answers-count").text_content().endswith("of 6 shown")
        page.get_by_role("button", name="open all").click()
        assert page.locator(".entry[open]").count() == 6
        assert page.locator(".entry mark:visible").count() > 0


def test_the_theme_is_the_readers_choice_and_pictures_follow(browser, study):
    def colours(page):
        return page.evaluate("""() => [getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector('.chart .xtick text')).fill,
            getComputedStyle(document.querySelector('.curves .chart path.js-line')).stroke]""")

    with opened(browser, study) as page:
        before = colours(page)
        page.locator("#theme").click()      # light, as it is
        assert colours(page) == before
        page.locator("#theme").click()
        dark = colours(page)
        assert all(one != other for one, other in zip(before, dark, strict=True))
        page.reload()
        page.wait_for_selector("html[data-drawn=all]", state="attached", timeout=120_000)
        assert colours(page) == dark
        page.locator("#theme").click()
        assert colours(page) == before
        page.emulate_media(color_scheme="dark")
        for _ in range(50):     # the page hears of it a little later
            if colours(page) == dark:
                break
            page.wait_for_timeout(100)
        assert colours(page) == dark


def test_runs_kinds_and_smoothing_change_the_curves(browser, study):
    def lines(page):
        paths = page.locator(".curves .chart").first.locator("path.js-line")
        return paths.evaluate_all("paths => paths.map(path => path.getAttribute('d'))")

    with opened(browser, study) as page:
        every = lines(page)
        assert len(every) == 3 * 2 * 3      # cells, training and validation, two seeds and their mean
        page.locator(".run.chip").first.click()
        assert len(lines(page)) == 12
        page.locator(".run.chip").first.click()
        assert lines(page) == every
        page.locator("#smoothing").fill("0.9")
        assert lines(page) != every
        page.locator(".kind.chip", has_text="training").click()
        assert len(lines(page)) == 9


def test_on_paper_there_are_no_controls_and_a_few_answers_are_open(browser, study):
    with opened(browser, study, dark=True) as page:
        before = page.locator(".entry[open]").count()
        assert page.pdf().startswith(b"%PDF")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert page.locator(".controls:visible, .bar:visible").count() == 0
        assert page.locator(".entry[open]").count() == 6 > before
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 31, 33)"
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator(".entry[open]").count() == before
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(231, 232, 230)"


def test_hostile_text_is_shown_and_never_run(browser, tmp_path):
    folder = reported.write_study(tmp_path / "study", ratios=(0.0, 0.5), seeds=(0,), text=HOSTILE)
    record = reported.evaluation((f"sft {HOSTILE}", f"kd {HOSTILE}"), text=HOSTILE, title=HOSTILE)
    for series in record["series"]:
        series |= {"label": HOSTILE, "x_label": HOSTILE}
    (folder / "evaluation" / "study.json").write_text(json.dumps(record))
    for place in range(2):
        reported.write_run(folder / "runs" / f"x{place}", reported.recipe(0.5, place, HOSTILE), quantities=(f"odd {HOSTILE}",))
    with opened(browser, write_report([folder]), width=390) as page:
        assert page.title().startswith("The weight of the divergence, ")
        assert page.locator("img, .chart a").count() == 0
        assert page.locator(".entry pre", has_text="onerror").count() > 0
        assert any("<img src=x" in text for text in page.locator(".chart text").all_text_contents())
        assert min(points_of(page)) >= 2
        assert not is_too_wide(page)


def test_the_browser_would_have_complained(browser, tmp_path):
    bad = tmp_path / "bad.html"
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; script-src \'unsafe-inline\'">'
    bad.write_text(f"{policy}<script>console.error('seen'); nowhere()</script><img src='http://example.invalid/x.png'>", encoding="utf-8")
    with pytest.raises(AssertionError), opened(browser, bad, drawn=False) as page:
        pass
    for part in ("error: seen", "nowhere is not defined", "Content Security Policy", "asked for http://example.invalid"):
        assert part in " ".join(page.complaints)
