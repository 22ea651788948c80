"""The page that a rendered repository makes of its runs, opened from a file in a real browser."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, start_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or os.name == "nt", reason="there is no Chromium; .ci/run installs it"),
]
SHORT = ("--stages.0.epochs", "1", "--stages.1.epochs", "1", "--limit-batches", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def logs(render, tmp_path_factory) -> Path:
    """Two runs, each with the page that it made at its end, and one of both."""
    logs = tmp_path_factory.mktemp("logs")
    for name, more in (("first", ()), ("second", ("--seed", "1", "--ema-decay", "0.9"))):
        own = ("--logdir", str(logs / name), "--split-file", str(logs / "splits.csv"))  # render's folder is for all
        said = run_in(render(), "train.py", *own, "--tracker", "none", *SHORT, *more)
        assert said.splitlines()[-1] == f"report   {logs / name}/report.html"
    assert run_in(render(), "report.py", str(logs)) == f"report   {logs}/report.html\n"
    return logs


def run_in(folder: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["first/report.html", "second/report.html", "report.html"])
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_opens_without_complaint_with_all_its_pictures_and_asks_for_nothing(browser, logs, page, width, dark):
    browser.open(f"file://{logs / page}", width, dark)
    assert browser.complaints() == []
    pictures = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(pictures) >= 5
    assert min(pictures) > 0
    [address, *others] = browser.requests()
    assert address == f"file://{logs / page}"
    assert all(one.startswith("data:image/png;base64,") for one in others)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(17, 17, 18)" if dark else "rgb(246, 246, 244)")


def test_a_page_of_several_runs_leads_to_their_own(browser, logs):
    browser.open(f"file://{logs}/report.html")
    links = browser.evaluate("[...document.querySelectorAll('#runs a')].map(link => link.href)")
    assert links == [f"file://{logs}/{name}/report.html" for name in ("first", "second")]


def test_the_browser_would_tell_of_errors_broken_pictures_and_requests(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>nothing()</script><img src=gone.png>")
    browser.open(f"file://{page}")
    assert any("nothing is not defined" in str(complaint) for complaint in browser.complaints())
    assert f"file://{tmp_path}/gone.png" in browser.requests()
    assert browser.evaluate("[...document.images].map(image => image.naturalWidth)") == [0]


def test_the_policy_of_a_page_lets_no_script_run_and_nothing_be_fetched(browser, logs, tmp_path):
    page, picture = tmp_path / "page.html", logs / "first/plots/confusion.png"
    text = (logs / "first/report.html").read_text()
    page.write_text(text.replace("</main>", f"<script>window.ran = true</script><img src={picture}></main>"))
    browser.open(f"file://{page}")
    assert browser.evaluate("window.ran") is None
    assert browser.evaluate("[...document.images].at(-1).naturalWidth") == 0
    assert sum("Content Security Policy" in str(complaint) for complaint in browser.complaints()) == 2
