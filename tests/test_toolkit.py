"""toolkit=training leaves out reports, pre-flight checks and submissions, and no text mentions them."""

import re
from pathlib import PurePosixPath

import pytest
from conftest import SLUG, files_in
from options import left_out_by_training
from test_rendered import INDEPENDENT, LONG, OWN_DATA, assert_tests_pass, ignoring, run_in

# Words of the parts that are left out, besides the names of their files.
WORDS = r"\b(submissions?|pre-?flight|leaderboards?|report\.html|scores\.csv)\b"
GENERIC_NAMES = {"__init__.py"}


@pytest.fixture(scope="module")
def project(render):
    """A repository with toolkit=training."""
    return render(toolkit="training")


def is_left_out(name: str) -> bool:
    """Return whether a file of the template belongs to reports, checks, submissions, sweeps or comparisons."""
    pattern = (
        r"batteries/(preflight|report|submission|sweep)/\w+\.py|batteries/evaluation/(comparison|repeated_runs)\.py"
        r"|tools/(blend|check|compare|report|scores|submit|sweep)\.py|scripts/train_seeds\.sh"
        r"|tests/test_(blend|check|compare|full_\w+|report\w*|scores|submission\w*|submit|sweep)\.py"
        r"|tests/trial_of_sweep\.py|docs/(checks|comparison|reports|submission|sweeps)\.md"
    )
    return re.fullmatch(pattern, name) is not None


def mentions(text: str, name: str) -> list[str]:
    """List the places where a text names a file, as a path, as a module or by its file name."""
    path = PurePosixPath(name)
    patterns = [re.escape(str(path.with_suffix(""))), re.escape(".".join(path.with_suffix("").parts))]
    patterns.append(rf"from {'.'.join(path.parent.parts)} import .*\b{path.stem}\b")
    if path.name not in GENERIC_NAMES:
        patterns.append(re.escape(path.name))
    return re.findall(rf".*(?<![\w.-])(?:{'|'.join(patterns)})(?![\w-]).*", text)


def test_the_hook_lists_exactly_the_files_to_leave_out(template):
    names = {name for name in files_in(template / SLUG) if not name.startswith(".variants/")}
    assert left_out_by_training() == {name for name in names if is_left_out(name)}


def test_a_training_repository_has_no_empty_package(project):
    for name in ("preflight", "report", "submission", "sweep"):
        assert not (project / "batteries" / name).exists()


def test_no_text_mentions_what_is_left_out(project):
    found = []
    for name, content in files_in(project).items():
        if name == "LICENSE" or b"\0" in content:
            continue
        text = content.decode()
        for left_out in left_out_by_training():
            found += [f"{name}: {line}" for line in mentions(text, left_out)]
        found += [f"{name}: {line}" for line in re.findall(rf".*{WORDS}.*", text, re.IGNORECASE)]
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize(
    "text",
    [
        "see tools/check.py",
        "python -m tools.check",
        "from tools import check",
        "from tools import average, check",
        "run check.py first",
        "`tools/check`",
    ],
)
def test_every_kind_of_mention_is_found(text):
    assert mentions(text, "tools/check.py") == [text]
    assert not mentions("make check, check_files, tools/checkpoint.py and precheck.py", "tools/check.py")


def test_a_run_builds_no_report(project, tmp_path):
    flags = ["--limit-batches", "1", "--stages.0.epochs", "1", "--stages.1.epochs", "1", "--device", "cpu"]
    flags += ["--logdir", str(tmp_path / "run"), "--split-file", str(tmp_path / "split.csv"), "--tracker", "none"]
    done = run_in(project, "python", "train.py", *flags)
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout
    assert not re.search(r"^report", done.stdout, re.MULTILINE)
    assert (tmp_path / "run/stage1/best.pth").is_file()
    done = run_in(project, "python", "-m", "tools.predict", "--run", str(tmp_path / "run"), "--device", "cpu")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_training_repository_passes_its_own_fast_tests(project, tmp_path):
    collected = run_in(project, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only")
    assert collected.returncode == 0, collected.stdout  # every module is imported
    # What these test is the same as in the default repository.
    names = [name for name in (*INDEPENDENT, *OWN_DATA, *LONG) if (project / f"tests/{name}.py").exists()]
    assert_tests_pass(project, tmp_path / "copy", "not slow", *ignoring(*names))
