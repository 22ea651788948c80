"""Finish a generated repository: apply the chosen variants, make scripts executable and print the next steps.

Cookiecutter runs this file from a temporary path, in the generated directory, with its own Python: standard library
only, no network. Imports take most of its time, so there are few, and those that only git needs are made later.
"""

import json
import os
import re
import shlex
import sys

# Hooks are rendered in the directory of the template; _repo_dir may hold a relative path.
ANSWERS, TEMPLATE = json.loads(r"""[{{ cookiecutter | tojson }}, {{ '.' | absolute_path | tojson }}]""")
VARIANTS = ".variants"
QUESTIONS = ("license", "data_set", "task", "tracker", "ci")
BASE_VARIANTS = {"csv": "image_folder", "tensorboardx": "tensorboard"}  # an answer whose files extend those of another

# The files that toolkit=training leaves out, by directory. They are listed one by one, so that generating over an
# existing repository deletes no file of the user. tests/test_toolkit.py compares the list with the template.
LEFT_OUT = {
    "batteries/evaluation": "comparison.py repeated_runs.py",
    "batteries/preflight": "__init__.py data_checks.py machine_checks.py model_checks.py results.py target_checks.py",
    "batteries/report": """
        __init__.py calibration.py class_sections.py history.py html.py label_sections.py mask_sections.py
        number_sections.py plots.py prediction_plots.py sample_list.py sections.py sweep_report.py
    """,
    "batteries/submission": """
        __init__.py blending.py mask_blending.py mask_submission.py score_log.py submission_file.py
    """,
    "batteries/sweep": "__init__.py optional_import.py search_space.py study.py trial_process.py trial_table.py",
    "docs": "checks.md comparison.md reports.md submission.md sweeps.md",
    "tests": """
        test_blend.py test_check.py test_compare.py test_full_commands.py test_full_predictions.py test_full_task.py
        test_full_toolkit.py test_report.py test_report_tasks.py test_scores.py test_submission_walkthrough.py
        test_submit.py test_sweep.py trial_of_sweep.py
    """,
    "scripts": "train_seeds.sh",
    "tools": "blend.py check.py compare.py report.py scores.py submit.py sweep.py",
}

NEXT_STEPS = """
{name} is ready.

  cd {directory}
  scripts/train_device.sh        # train on one device; {expectation}
  make test                      # run the tests of this repository
{augmentation}
README.md explains the next steps.
"""
SCORES_OF_DIGITS = {
    "classification": "accuracy about 0.99",
    "multilabel": "mean average precision about 1.00",
    "regression": "mean absolute error about 2.6 degrees",
    "segmentation": "mean IoU about 0.93",
}
EXPECTATIONS = {
    "digits": f"{SCORES_OF_DIGITS[ANSWERS['task']]} within about a minute on a CPU",
    "image_folder": "needs data/CLASS/*.jpg, or --data-dir, and a GPU",
    "csv": "needs data/samples.csv (see experiment/dataset.py), or --data-dir, and a GPU",
    "cifar10": "downloads 170 MB first; needs a GPU",
    "mnist": "downloads 12 MB first; needs a GPU",
}
if ANSWERS["task"] == "segmentation":
    EXPECTATIONS["image_folder"] = "needs data/images and data/masks, or --data-dir, and a GPU"
PHOTO_AUGMENTATION = """
Training mirrors images, and crops them to a quarter of their area or more. If that can change the target
of an image, edit experiment/augmentations.py first; tools/preview.py draws its effect.
"""
AUGMENTATIONS = {"image_folder": PHOTO_AUGMENTATION, "csv": PHOTO_AUGMENTATION}


def main() -> None:
    """Apply the answers, record the template's commit and print the next steps."""
    make_writable(VARIANTS)
    for question in QUESTIONS:
        answer = ANSWERS[question]
        for variant in (BASE_VARIANTS.get(answer, answer), answer):
            move_files(f"{VARIANTS}/{question}/{variant}")
    data_set = ANSWERS["data_set"]
    for variant in (BASE_VARIANTS.get(data_set, data_set), data_set):
        move_files(f"{VARIANTS}/combination/{variant}-{ANSWERS['task']}")
    delete_directory(VARIANTS)
    if ANSWERS["toolkit"] == "training":
        delete_files(LEFT_OUT)
    make_executable("scripts")
    if "_repo_dir" not in ANSWERS:
        return  # cruft generates the repository to compare it, and keeps its own record
    text = NEXT_STEPS.format(
        name=ANSWERS["project_name"],
        directory=path_from_shell(),
        expectation=EXPECTATIONS[ANSWERS["data_set"]],
        augmentation=AUGMENTATIONS.get(ANSWERS["data_set"], ""),
    )
    try:
        problem = record_template()
    except (OSError, UnicodeError) as error:  # for example a path that is not UTF-8
        problem = str(error)
    if problem:
        text += f"\n`cruft update` cannot find the template: {problem}. README.md explains how to record it.\n"
    print_safely(text)


def path_from_shell() -> str:
    """Return the repository's path, quoted, relative to the directory of the shell that called cookiecutter."""
    here = os.getcwd()
    path = os.path.relpath(here, os.environ.get("PWD", os.path.dirname(here)))
    return shlex.quote(here if path.startswith("..") else path)


def print_safely(text: str) -> None:
    """Print. A closed or non-UTF-8 terminal must not fail the hook, because cookiecutter would delete the project."""
    try:
        sys.stdout.reconfigure(errors="replace")
        print(text, flush=True)
    except AttributeError:  # closed before the start
        pass
    except OSError:  # closed since, or full; Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_writable(directory: str) -> None:
    """Allow moving files out of a directory tree; copies of a read-only template are read-only."""
    for path, _, _ in os.walk(directory):
        os.chmod(path, 0o700)


def move_files(directory: str) -> None:
    """Move the files of a directory, if it exists, to the same relative paths in the repository."""
    for source, _, names in os.walk(directory):
        target = os.path.relpath(source, directory)
        os.makedirs(target, exist_ok=True)
        for name in names:
            move_file(f"{source}/{name}", f"{target}/{name}")


def move_file(source: str, target: str) -> None:
    """Move a file, also across file systems: a directory of the repository may be a link to another disk."""
    try:
        os.replace(source, target)
    except OSError:
        import shutil

        shutil.move(source, target)


def delete_directory(directory: str) -> None:
    """Delete a directory tree."""
    for path, _, names in os.walk(directory, topdown=False):
        for name in names:
            os.remove(f"{path}/{name}")
        os.rmdir(path)


def delete_files(table: dict[str, str]) -> None:
    """Delete the listed files, and each directory that is empty afterwards."""
    for directory, names in table.items():
        for path in (f"{directory}/{name}" for name in names.split()):
            if os.path.isfile(path):
                os.remove(path)
        if os.path.isdir(directory) and not os.listdir(directory):
            os.rmdir(directory)


def make_executable(directory: str) -> None:
    """Set the executable bits of scripts; a template from a zip file has lost them."""
    for path, _, names in os.walk(directory):
        for name in names:
            if name.endswith(".sh") and has_shebang(f"{path}/{name}"):
                os.chmod(f"{path}/{name}", 0o755)  # noqa: S103 (as git stores them)


def has_shebang(path: str) -> bool:
    """Return whether a path is a file that begins with `#!`."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


def record_template() -> str | None:
    """Write .cruft.json, which `cruft update` needs to find the template. Return the problem if that is impossible."""
    import shutil

    if shutil.which("git") is None:
        return "git is not installed"
    # The template may be a subdirectory of a repository. The prefix is its path there, with a slash, or empty.
    root, _, prefix = run_git("rev-parse", "--show-toplevel", "--show-prefix").partition("\n")
    if not root and os.path.exists(f"{TEMPLATE}/.git"):
        return "git cannot read it"
    if not root or not run_git("ls-files", "cookiecutter.json"):  # or an unrelated repository around the template
        return "it is not a git repository"
    if run_git("status", "--porcelain", "."):
        return "it has uncommitted changes"
    commit = run_git("rev-parse", "--verify", "HEAD")
    if not commit:
        return "git cannot read it"
    address = find_address(root if prefix else TEMPLATE)
    answers = {name: answer for name, answer in ANSWERS.items() if not name.startswith("_")}
    record = {
        "template": address,
        "commit": commit,
        "checkout": ANSWERS.get("_checkout"),
        "context": {"cookiecutter": answers | {"_template": address, "_commit": commit}},
        "directory": prefix.rstrip("/") or None,
    }
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    with open(".cruft.json", "w", encoding="utf-8") as file:
        file.write(text)
    return None


def find_address(clone: str) -> str:
    """Return the clone's origin without a password if the origin has the commit, otherwise the clone's path."""
    origin = run_git("config", "--get", "remote.origin.url")
    if not origin or not run_git("for-each-ref", "--contains", "HEAD", "refs/remotes/origin"):
        return clone
    return re.sub(r"^(https?://)[^/@]*@", r"\1", origin)


def run_git(*command: str) -> str:
    """Run git in the template's directory and return its output."""
    import subprocess

    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    done = subprocess.run(["git", "-C", TEMPLATE, *command], env=environment, capture_output=True, text=True)
    return done.stdout.strip()


main()
