"""Reports, pre-flight checks and submissions: their packages, their start without torch, their documents."""

import re
import subprocess
import sys

from documents import ROOT, read_page
from test_architecture import LAYERS, packages

from batteries.core.project import project_settings
from tools.check import CHECKS


def test_packages_of_the_top_layer_are_reports_checks_submissions_and_sweeps():
    assert packages() - LAYERS.keys() == {"submission", "report", "preflight", "sweep"}


def test_a_run_builds_the_html_report():
    assert project_settings()["reports"] == ["tools/report.py"]


def test_tools_that_read_tables_start_without_torch(tmp_path):
    """Each takes half a second this way, and five with torch; errors are reported as quickly."""
    (tmp_path / "a.csv").write_text("id,cat,dog\na,0.5,0.5\n")
    table = str(tmp_path / "a.csv")
    command_lines = [
        ["tools/blend.py", table, "nowhere.csv"],
        ["tools/blend.py", table, table, "--output", str(tmp_path / "out.csv")],
        ["tools/submit.py", table, "--sample", "nowhere.csv"],
        ["tools/scores.py", "show", "--score-log", str(tmp_path / "scores.csv")],
        ["tools/scores.py", "add", "nowhere"],
        ["tools/report.py", "nowhere"],
    ]
    code = (
        "import contextlib, runpy, sys\n"
        f"for sys.argv in {command_lines}:\n"
        "    with contextlib.suppress(SystemExit): runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print('loaded', sorted({'torch', 'sklearn', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded []", done.stdout + done.stderr
    assert done.stderr.count("error: ") == 4
    assert (tmp_path / "out.csv").exists()


def test_the_page_on_checks_lists_every_check():
    table = read_page("docs/checks.md").partition("| Check |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([a-z ]+) \|", table, re.MULTILINE) == [name for name, _ in CHECKS]
