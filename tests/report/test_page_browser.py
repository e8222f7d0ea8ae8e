"""The study page in a real browser without a network: no errors, and every control does what it says."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdd.report.page import write_page
from sdd.report.page.marks import dark_palette

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver"),
]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1280,1000")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
HOSTILE = "</script><img src=x onerror='window.broken = 1'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    downloads = tmp_path_factory.mktemp("downloads")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    driver.downloads = downloads  # type: ignore[attr-defined]
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser: Any, whole_study: Any, read_study: Any) -> Any:
    """A page with every section, opened once, which tests leave as they found it; one prompt tries to break out."""
    for path in whole_study.root.glob("evaluated/*/samples/add.jsonl"):
        path.write_text(path.read_text().replace("add 1?", json.dumps(HOSTILE)[1:-1]))
    subject = read_study(whole_study.root)
    write_page(subject.study, subject.library, subject.analyses, whole_study.root)
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get((whole_study.root / "report.html").as_uri())
    until(browser, "return document.documentElement.dataset.ready === 'true'")
    browser.execute_script((Path(__file__).parent / "probe.js").read_text())
    browser.execute_script("document.documentElement.style.scrollBehavior = 'auto'")  # a mark on its way is not clicked
    data = browser.execute_script("return JSON.parse(document.getElementById('data').textContent)")
    browser.arms, browser.charts = data["arms"], data["charts"]
    return browser


@pytest.fixture
def opened(page: Any) -> Any:
    yield page
    assert [entry["message"] for entry in page.get_log("browser")] == []
    assert page.execute_script("return window.broken") is None


def until(browser: Any, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 120, poll_frequency=0.05).until(lambda driver: driver.execute_script(condition))


def texts(browser: Any, selector: str) -> list[str]:
    """What the visible elements say."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).map(e => e.innerText)"
    )
    return list(browser.execute_script(script, selector))


def pick(browser: Any, selector: str, value: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element(By.CSS_SELECTOR, selector)).select_by_visible_text(value)


def click(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


ARMS = "#table .scroll:nth-of-type(1) tbody th"
SECTIONS = ["retention", "gain", "merging", "cost", "speculative", "shift", "redundancy"]
WITH_TABLES = ["table", "differences", "cost", "speculative", "shift"]


def probe(browser: Any, name: str, *given: Any) -> Any:
    """What `probe.js` finds on the page."""
    return browser.execute_script(f"return probe.{name}(...arguments)", *given)


def expected(browser: Any, **wanted: str) -> dict[str, set[str]]:
    """The arms of every chart, '' for rows of none, as far as they fit; what has no value of a dimension fits."""
    fits = {each["name"] for each in browser.arms if all(each[name] in (None, value) for name, value in wanted.items())}
    rows = {name: {row.get("arm", "") for row in spec["datasets"]["rows"]} for name, spec in browser.charts.items()}
    return {name: arms & (fits | {""}) for name, arms in rows.items()}


def until_drawn(browser: Any, **wanted: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    def right(driver: Any) -> bool:
        return {name: set(arms) for name, arms in probe(driver, "arms").items()} == needed

    needed = expected(browser, **wanted)
    WebDriverWait(browser, 60, poll_frequency=0.1).until(right)


def test_page_opens_without_errors_and_without_a_network(opened):
    requests = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert urls and [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_every_section_has_visible_charts_and_tables(opened):
    anchors = opened.execute_script("return [...document.querySelectorAll('main > section')].map(e => e.id)")
    assert [anchor for anchor in anchors if anchor in SECTIONS] == SECTIONS
    until_drawn(opened)
    visible = probe(opened, "visible")
    assert set(visible) == set(opened.charts) and all(visible.values())
    kinds = ("retention", "gain-", "cost-1-speed", "speculative-1-speed", "speculative-2-", "shift-1-", "shift-2-kl")
    for kind in (*kinds, "shift-targets", "redundancy-"):
        assert [name for name in visible if name.startswith(kind)], kind
    assert len([name for name in visible if name.startswith("redundancy-")]) == 2, "spans, and blocks one by one"
    for anchor in WITH_TABLES:
        assert texts(opened, f"#{anchor} .sortable tbody tr"), anchor
    merged = [text.split()[:2] for text in texts(opened, "#merging p.merged > a:first-of-type")]
    assert sorted(merged) == [["merged", method] for method in ("linear", "slerp", "task_arithmetic", "ties")]


def test_every_look_has_a_glyph_of_its_own(opened):
    found = [each.rsplit('" ', 1) for each in probe(opened, "glyphs")]
    assert len(found) == len({each["look"] for each in opened.arms}) == 10
    assert len({content for content, _ in found}) == len({colour for _, colour in found}) == 10


def test_filters_reach_rows_charts_and_samples_of_every_section(opened):
    every = expected(opened)
    wanted = {"metric": "greedy", "pruning": "n2", "dataset": "tiny_instruct", "mode": "logit_distill"}
    for name, value in wanted.items():
        pick(opened, f"#filters [name={name}]", value)
        until_drawn(opened, **{name: value})
        assert expected(opened, **{name: value}) != every
        fits = [each["name"] for each in opened.arms if each[name] in (None, value)]
        assert texts(opened, "#count") == [f"{len(fits)} of {len(opened.arms)} arms"]
        assert texts(opened, ARMS) == fits
        for arm, other, hidden in probe(opened, "rows"):
            assert hidden == (not {arm, other} <= set(fits)), (arm, other)
        assert len(texts(opened, "#answers .sample:first-child .said > div")) == len(fits)
        opened.execute_script(f"document.querySelector('#filters [name={name}]').value = ''")  # the next change says so
    click(opened, "#filters [type=reset]")
    until_drawn(opened)
    assert len(texts(opened, ARMS)) == len(opened.arms)


def test_columns_sort_by_number_in_both_directions(opened):
    tables = opened.execute_script("return [...document.querySelectorAll('.sortable')]")
    assert len(tables) > 12
    press = "const h = arguments[0].tHead.rows[0].children[2]; h.querySelector('button').click(); return h.ariaSort"
    turned = 0
    for table in tables:
        before = probe(opened, "column", table, 2)
        known = sorted(float(each) for each in before if each)
        for direction, order in (("descending", known[::-1]), ("ascending", known)):
            assert opened.execute_script(press, table) == direction
            after = probe(opened, "column", table, 2)
            assert [float(each) for each in after if each] == order
            assert not any(after[len(order) :]), "what is not known comes last either way"
        turned += len(set(known)) > 1
    assert turned > 8


def test_samples_are_found_and_shown_as_text(opened):
    assert len(texts(opened, "#answers .sample")) == 8
    click(opened, "[data-more=answers]")
    assert len(texts(opened, "#answers .sample")) == 16
    pick(opened, "[data-browser=answers] [name=task]", "sort")
    assert {text.split()[0] for text in texts(opened, "#answers .sample h3")} == {"sort"}
    assert texts(opened, "#answers output") == ["8 of 24 shown"]
    search = "const e = document.querySelector('[data-browser=answers] [name=query]'); e.value = arguments[0];"
    search += "e.dispatchEvent(new Event('input', {bubbles: true}))"
    (title, *_) = texts(opened, "#answers .sample h3")
    number = title.split("-")[-1]
    opened.execute_script(search, f"SORT {number}?")
    assert texts(opened, "#answers .sample h3") == [title]
    (prompt, answer) = texts(opened, "#answers .asked .text")
    assert (prompt, answer) == (f"sort {number}?", number)
    verdicts = texts(opened, "#answers .said .label > span:last-child")
    assert len(verdicts) == len(opened.arms) and set(verdicts) <= {"✓ right", "✗ wrong"}
    opened.execute_script(search, "nothing says this")
    assert texts(opened, "#answers output") == ["0 of 0 shown"]
    opened.execute_script(search, "")
    pick(opened, "[data-browser=answers] [name=task]", "all")
    assert len(texts(opened, "#answers .sample")) == 8


def test_only_samples_on_which_arms_disagree(opened):
    click(opened, "[data-browser=answers] [name=apart]")
    each = "return [...document.querySelectorAll('#answers .sample')].map(s => new Set([...s.querySelectorAll("
    each += "'.said .label > span:last-child')].map(e => e.className)).size)"
    assert set(opened.execute_script(each)) == {2}
    click(opened, "[data-browser=answers] [name=apart]")


def test_rewrites_by_reason(opened):
    pick(opened, "[data-browser=rewrites] [name=reason]", "leak")
    verdicts = set(texts(opened, "#rewrites .said .label > span:last-child")) - {"reference"}
    assert verdicts == {"✗ reference kept: leak"}
    assert texts(opened, "#rewrites output") == ["8 of 10 shown"]


def test_dark_and_light(opened):
    """Words on the page and in charts have the contrast of WCAG AA; marks take the ground's own colours."""
    light, dark = "rgb(255, 255, 255)", "rgb(21, 24, 29)"

    def shown(colour: str) -> set[str]:
        until(opened, f"return probe.grounds().join() === '{colour}'")
        assert opened.execute_script("return getComputedStyle(document.body).backgroundColor") == colour
        assert probe(opened, "contrast") >= 4.5
        return set(probe(opened, "fills"))

    on_light = shown(light)
    assert on_light <= set(dark_palette())
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    on_dark = shown(dark)
    assert on_dark == {dark_palette()[colour] for colour in on_light}
    click(opened, "#theme")
    assert shown(light) == on_light
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    click(opened, "#theme")
    assert shown(dark) == on_dark
    click(opened, "#theme")
    shown(light)


def test_numbers_lead_to_how_they_were_made(opened):
    assert probe(opened, "dangling") == []
    click(opened, "#table [data-arm^=logit_distill] td.number a")
    until(opened, "return document.querySelector(location.hash)?.open === true")
    (made,) = texts(opened, "details:target")
    assert made.startswith("logit_distill n4")
    assert made.count("evaluated/") == made.count("tuned/") == 3
    click(opened, "details:target p a")
    until(opened, "return location.hash.startsWith('#artifact-') && document.querySelector(location.hash).open")


def test_marks_lead_there_too(opened):
    found = probe(opened, "links")
    assert all(found.values())
    assert probe(opened, "missing", sorted({link for each in found.values() for link in each})) == []
    for chart in ("retention", "cost-1-speed-1", "speculative-1-accepted-share", "speculative-1-speed", "shift-1-kl"):
        opened.execute_script("history.replaceState(null, '', location.pathname)")
        mark = probe(opened, "linked", chart)
        opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", mark)
        arm = opened.execute_script("return arguments[0].__data__.datum.arm", mark)
        mark.click()
        until(opened, "return location.hash.startsWith('#arm-') && document.querySelector(location.hash).open")
        assert opened.execute_script("return document.querySelector(location.hash).dataset.arm") == arm


def test_figures_are_saved(opened):
    for kind, start in (("svg", b"<svg"), ("png", b"\x89PNG")):
        click(opened, f"[data-chart=retention] [data-save={kind}]")
        saved = opened.downloads / f"retention.{kind}"
        until_saved(opened, saved)
        assert saved.read_bytes().startswith(start)
        assert saved.stat().st_size > 2_000


def until_saved(browser: Any, path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60, poll_frequency=0.05).until(lambda _: path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("wide", [360, 1280])
def test_nothing_is_cut_off(opened, wide):
    """No scroll sideways; words of a chart lie within it, and only charts that say so are wider than the screen."""
    metrics = {"width": wide, "height": 800, "deviceScaleFactor": 1, "mobile": wide < 600}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        until(opened, f"return innerWidth === {wide} && probe.fitting()")
        assert opened.execute_script("return document.documentElement.scrollWidth - document.body.clientWidth") == 0
        assert probe(opened, "cut") == []
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
