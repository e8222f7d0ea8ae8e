"""The study page in a real browser without a network: no errors, and every control does what it says."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdd.report.analyses import analyse
from sdd.report.arms import build_arms
from sdd.report.collect import collect
from sdd.report.contrasts import compare
from sdd.report.library import Library, find_evaluated
from sdd.report.page import write_page

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
def file(shared_study: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of which one prompt tries to break out."""
    folder = tmp_path_factory.mktemp("page")
    root = folder / "artifacts"
    shutil.copytree(shared_study.root, root)
    for path in root.glob("evaluated/*/samples/add.jsonl"):
        path.write_text(path.read_text().replace("add 1?", json.dumps(HOSTILE)[1:-1]))
    library = Library([root])
    runs, notes = collect(find_evaluated(root), library)
    study = compare(build_arms(runs), notes)
    write_page(study, library, analyse(study, library), folder)
    return folder / "report.html"


@pytest.fixture
def opened(browser: Any, file: Path) -> Any:
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get(file.as_uri())
    until(browser, "return document.documentElement.dataset.ready === 'true'")
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []


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
MARKS = "return document.querySelectorAll('[data-chart=retention] .mark-symbol.role-mark path').length"


def test_page_opens_without_errors_and_without_a_network(opened):
    requests = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len(texts(opened, "[data-chart] svg")) == len(texts(opened, "[data-chart]")) == 5
    assert opened.execute_script(MARKS) == 6
    assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_filters_change_rows_charts_and_samples(opened):
    assert len(texts(opened, ARMS)) == 8
    pick(opened, "[name=pruning]", "n4")
    until(opened, MARKS + " === 3")
    assert texts(opened, ARMS) == ["pruned n4", "sft n4", "self_distill n4"]
    assert texts(opened, "#count") == ["3 of 8 arms"]
    assert len(texts(opened, "#differences tbody tr")) == 3
    assert len(texts(opened, "#answers .sample:first-child .said > div")) == 3
    pick(opened, "[name=mode]", "teacher")
    until(opened, "return document.querySelector('[data-chart=retention] .empty') !== null")
    assert texts(opened, ARMS) == []
    click(opened, "#filters [type=reset]")
    until(opened, MARKS + " === 6")
    assert len(texts(opened, ARMS)) == 8


def test_what_has_no_metric_stays_when_a_metric_is_chosen(opened):
    assert opened.execute_script("return document.querySelector('[name=metric]')") is None  # there is only one
    pick(opened, "[name=pruning]", "none")
    assert texts(opened, ARMS) == ["teacher", "control sft"]


def test_columns_sort_by_number_in_both_directions(opened):
    def column(place: int) -> list[str]:
        return [text.split()[0] for text in texts(opened, f"{ARMS} ~ td:nth-child({place})")]

    header = "#table .scroll:nth-of-type(1) thead th:nth-child(3)"
    before = column(3)
    click(opened, f"{header} button")
    assert column(3) == sorted(before, key=float, reverse=True) != before
    assert opened.execute_script("return document.querySelector(arguments[0]).ariaSort", header) == "descending"
    click(opened, f"{header} button")
    assert column(3) == sorted(before, key=float)
    trained = header.replace("(3)", "(6)")
    assert texts(opened, trained) == ["trained on"]
    for _ in range(2):
        click(opened, f"{trained} button")
        values = column(6)
        assert values[-3:] == ["–"] * 3 and "–" not in values[:-3]


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
    assert len(verdicts) == 8 and set(verdicts) <= {"✓ right", "✗ wrong"}
    opened.execute_script(search, "nothing says this")
    assert texts(opened, "#answers output") == ["0 of 0 shown"]
    assert opened.execute_script("return window.broken") is None


def test_only_samples_on_which_arms_disagree(opened):
    click(opened, "[data-browser=answers] [name=apart]")
    each = "return [...document.querySelectorAll('#answers .sample')].map(s => new Set([...s.querySelectorAll("
    each += "'.said .label > span:last-child')].map(e => e.className)).size)"
    assert set(opened.execute_script(each)) == {2}


def test_rewrites_by_reason(opened):
    pick(opened, "[data-browser=rewrites] [name=reason]", "leak")
    verdicts = set(texts(opened, "#rewrites .said .label > span:last-child")) - {"reference"}
    assert verdicts == {"✗ reference kept: leak"}
    assert texts(opened, "#rewrites output") == ["8 of 10 shown"]


def test_dark_and_light(opened):
    ground = "return getComputedStyle(document.body).backgroundColor"
    chart = "return document.querySelector('[data-chart=retention] svg').style.backgroundColor"
    assert (opened.execute_script(ground), opened.execute_script(chart)) == ("rgb(255, 255, 255)", "rgb(255, 255, 255)")
    click(opened, "#theme")
    until(opened, chart + " === 'rgb(21, 24, 29)'")
    assert opened.execute_script(ground) == "rgb(21, 24, 29)"
    click(opened, "#theme")
    until(opened, chart + " === 'rgb(255, 255, 255)'")
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    opened.execute_script("delete document.documentElement.dataset.theme")
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    until(opened, chart + " === 'rgb(21, 24, 29)'")
    assert opened.execute_script(ground) == "rgb(21, 24, 29)"


def test_numbers_lead_to_how_they_were_made(opened):
    click(opened, "#table .scroll:nth-of-type(1) tbody tr:nth-child(5) td.number a")
    until(opened, "return document.querySelector(location.hash)?.open === true")
    (made,) = texts(opened, "details:target")
    assert made.startswith("self_distill n2")
    assert made.count("evaluated/") == made.count("tuned/") == 3
    click(opened, "details:target p a")
    until(opened, "return location.hash.startsWith('#artifact-') && document.querySelector(location.hash).open")


def test_marks_lead_there_too(opened):
    from selenium.webdriver.common.by import By

    marks = opened.find_elements(By.CSS_SELECTOR, "[data-chart=retention] .mark-symbol.role-mark path")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", marks[0])
    marks[0].click()
    until(opened, "return location.hash.startsWith('#arm-') && document.querySelector(location.hash).open")
    (made,) = texts(opened, "details:target summary")
    assert made == "pruned n2"


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


def test_narrow_screen_does_not_scroll_sideways(opened):
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        until(opened, "return innerWidth === 390 && document.querySelector('[data-chart=cost] svg').clientWidth <= 390")
        assert opened.execute_script("return document.documentElement.scrollWidth") == 390
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
