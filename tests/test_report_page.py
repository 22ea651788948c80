"""The reports of a generated repository, opened as files in a real browser."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, start_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or os.name == "nt", reason="Chromium is not installed; .ci/run installs it"),
]
SHORT = ("--stages.0.epochs", "1", "--stages.1.epochs", "1", "--limit-batches", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def logs(render, tmp_path_factory) -> Path:
    """Two runs, each with the report built at its end, and one report of both."""
    logs = tmp_path_factory.mktemp("logs")
    for name, more in (("first", ()), ("second", ("--seed", "1", "--ema-decay", "0.9"))):
        # The generated directory is shared, so nothing is written into it.
        paths = ("--logdir", str(logs / name), "--split-file", str(logs / "splits.csv"))
        output = run_in(render(), "train.py", *paths, "--tracker", "none", *SHORT, *more)
        assert output.splitlines()[-1] == f"report   {logs / name}/report.html"
    assert run_in(render(), "-m", "tools.report", str(logs)) == f"report   {logs}/report.html\n"
    return logs


def run_in(folder: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["first/report.html", "second/report.html", "report.html"])
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_report_opens_with_all_images_and_without_errors_or_requests(browser, logs, page, width, dark):
    browser.open(f"file://{logs / page}", width, dark)
    assert browser.problems() == []
    widths = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) >= 5
    assert min(widths) > 0
    [address, *others] = browser.requests()
    assert address == f"file://{logs / page}"
    assert all(one.startswith("data:image/png;base64,") for one in others)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # no horizontal scrolling
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(17, 17, 18)" if dark else "rgb(246, 246, 244)")


def test_a_report_of_several_runs_links_the_report_of_each(browser, logs):
    browser.open(f"file://{logs}/report.html")
    links = browser.evaluate("[...document.querySelectorAll('#runs a')].map(link => link.href)")
    assert links == [f"file://{logs}/{name}/report.html" for name in ("first", "second")]


def test_the_browser_detects_errors_broken_images_and_requests(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>nothing()</script><img src=gone.png>")
    browser.open(f"file://{page}")
    assert any("nothing is not defined" in str(problem) for problem in browser.problems())
    assert f"file://{tmp_path}/gone.png" in browser.requests()
    assert browser.evaluate("[...document.images].map(image => image.naturalWidth)") == [0]


def test_the_content_policy_of_a_report_blocks_scripts_and_requests(browser, logs, tmp_path):
    page, image = tmp_path / "page.html", logs / "first/plots/confusion.png"
    text = (logs / "first/report.html").read_text()
    page.write_text(text.replace("</main>", f"<script>window.ran = true</script><img src={image}></main>"))
    browser.open(f"file://{page}")
    assert browser.evaluate("window.ran") is None
    assert browser.evaluate("[...document.images].at(-1).naturalWidth") == 0
    assert sum("Content Security Policy" in str(problem) for problem in browser.problems()) == 2
