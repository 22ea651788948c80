"""After rendering: put the files of the chosen answers in place, make scripts executable, and say what comes next.

Runs from a temporary file, in the rendered folder, with cookiecutter's own Python: standard library only, no network.
Most of its time goes into imports, so there are few, and what git needs is imported where there is git.
"""

import json
import os
import re
import sys

# Hooks are rendered in the template's folder, whose path is relative in _repo_dir where it was given so.
ANSWERS, TEMPLATE = json.loads(r"""[{{ cookiecutter | tojson }}, {{ '.' | absolute_path | tojson }}]""")
VARIANTS = ".variants"
QUESTIONS = ("license", "data_set", "tracker", "ci")
FOUNDATIONS = {"csv": "image_folder", "tensorboardx": "tensorboard"}  # an answer whose files lie over those of another

NEXT_STEPS = """
{name} is ready.

  cd {slug}
  scripts/train_device.sh        # train on one device; {expectation}
  make test                      # the promises of this repository, each as a test

README.md shows the rest, in five minutes.
"""
EXPECTATIONS = {
    "digits": "accuracy about 0.99 within a minute on a CPU",
    "image_folder": "wants data/CLASS/*.jpg, or --data-dir, and a GPU",
    "csv": "wants data/samples.csv with path and label, or --data-dir, and a GPU",
    "cifar10": "downloads 170 MB first; wants a GPU",
    "mnist": "downloads 12 MB first; wants a GPU",
}


def main() -> None:
    """Choose, clean up, and speak."""
    for question in QUESTIONS:
        answer = ANSWERS[question]
        for layer in (FOUNDATIONS.get(answer, answer), answer):
            lay_over(f"{VARIANTS}/{question}/{layer}")
    remove(VARIANTS)
    make_executable("scripts")
    if "_repo_dir" not in ANSWERS:
        return  # cruft renders, to compare: it keeps its own record
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 must not end a hook: that deletes the project
    expectation = EXPECTATIONS[ANSWERS["data_set"]]
    print(NEXT_STEPS.format(name=ANSWERS["project_name"], slug=ANSWERS["project_slug"], expectation=expectation))
    if missing := record_origin():
        print(f"`cruft update` will not find the template: {missing}. README.md says how to name it.\n")


def lay_over(folder: str) -> None:
    """Move the files of a folder, where there is one, to their places in the repository."""
    for source, _, names in os.walk(folder):
        place = os.path.relpath(source, folder)
        os.makedirs(place, exist_ok=True)
        for name in names:
            os.replace(f"{source}/{name}", f"{place}/{name}")


def remove(folder: str) -> None:
    """Delete a folder with all that is in it."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            os.remove(f"{place}/{name}")
        os.rmdir(place)


def make_executable(folder: str) -> None:
    """Give the run bits back that a template from a zip file has lost."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(f"{place}/{name}", "rb") as file:
                is_program = file.read(2) == b"#!"
            if is_program:
                os.chmod(f"{place}/{name}", 0o755)  # noqa: S103 (as git has them)


def record_origin() -> str | None:
    """Write .cruft.json, by which `cruft update` finds the template again; or say why it cannot be written."""
    if not os.path.exists(f"{TEMPLATE}/.git"):
        return "it is no git repository"
    import shutil

    if shutil.which("git") is None:
        return "git is not installed"
    if ask_git("status", "--porcelain"):
        return "it has changes that are not committed"
    address, commit = find_address(), ask_git("rev-parse", "--verify", "HEAD")
    if not commit:
        return "git cannot read it"
    answers = {name: answer for name, answer in ANSWERS.items() if not name.startswith("_")}
    record = {
        "template": address,
        "commit": commit,
        "checkout": ANSWERS["_checkout"],
        "context": {"cookiecutter": answers | {"_template": address, "_commit": commit}},
        "directory": None,
    }
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    with open(".cruft.json", "w", encoding="utf-8") as file:
        file.write(text)
    return None


def find_address() -> str:
    """Where the commit can be had by others: the clone's origin, without a password; else this folder."""
    origin = ask_git("config", "--get", "remote.origin.url")
    if not origin or not ask_git("for-each-ref", "--contains", "HEAD", "refs/remotes/origin"):
        return TEMPLATE
    return re.sub(r"^(https?://)[^/@]*@", r"\1", origin)


def ask_git(*command: str) -> str:
    """What git says of the template."""
    import subprocess

    return subprocess.run(["git", "-C", TEMPLATE, *command], capture_output=True, text=True).stdout.strip()


main()
