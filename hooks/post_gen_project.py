"""After rendering: put the files of the chosen answers in place, make scripts executable, and say what comes next.

Runs from a temporary file, in the rendered folder, with cookiecutter's own Python: standard library only, no network.
Most of its time goes into imports, so there are few, and what git needs is imported where there is git.
"""

import json
import os
import re
import shlex
import sys

# Hooks are rendered in the template's folder, whose path is relative in _repo_dir where it was given so.
ANSWERS, TEMPLATE = json.loads(r"""[{{ cookiecutter | tojson }}, {{ '.' | absolute_path | tojson }}]""")
VARIANTS = ".variants"
QUESTIONS = ("license", "data_set", "tracker", "ci")
FOUNDATIONS = {"csv": "image_folder", "tensorboardx": "tensorboard"}  # an answer whose files lie over those of another

NEXT_STEPS = """
{name} is ready.

  cd {folder}
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
    open_up(VARIANTS)
    for question in QUESTIONS:
        answer = ANSWERS[question]
        for layer in (FOUNDATIONS.get(answer, answer), answer):
            lay_over(f"{VARIANTS}/{question}/{layer}")
    remove(VARIANTS)
    make_executable("scripts")
    if "_repo_dir" not in ANSWERS:
        return  # cruft renders, to compare: it keeps its own record
    expectation = EXPECTATIONS[ANSWERS["data_set"]]
    said = NEXT_STEPS.format(name=ANSWERS["project_name"], folder=folder_from_here(), expectation=expectation)
    try:
        missing = record_origin()
    except (OSError, UnicodeError) as error:  # names that are no UTF-8
        missing = str(error)
    if missing:
        said += f"\n`cruft update` will not find the template: {missing}. README.md says how to name it.\n"
    say(said)


def folder_from_here() -> str:
    """The repository as the shell that called cookiecutter would find it."""
    here = os.getcwd()
    path = os.path.relpath(here, os.environ.get("PWD", os.path.dirname(here)))
    return shlex.quote(here if path.startswith("..") else path)


def say(text: str) -> None:
    """Print. A terminal that is closed or without UTF-8 must not end a hook: cookiecutter would delete the project."""
    try:
        sys.stdout.reconfigure(errors="replace")
        print(text, flush=True)
    except AttributeError:  # closed before the start
        pass
    except OSError:  # closed since, or full; python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_up(folder: str) -> None:
    """Let files be moved out of a folder and those in it: of a read-only template they are read-only copies."""
    for place, _, _ in os.walk(folder):
        os.chmod(place, 0o700)


def lay_over(folder: str) -> None:
    """Move the files of a folder, where there is one, to their places in the repository."""
    for source, _, names in os.walk(folder):
        place = os.path.relpath(source, folder)
        os.makedirs(place, exist_ok=True)
        for name in names:
            move(f"{source}/{name}", f"{place}/{name}")


def move(source: str, target: str) -> None:
    """Move a file; a folder of the repository may be a link to another disk."""
    try:
        os.replace(source, target)
    except OSError:
        import shutil

        shutil.move(source, target)


def remove(folder: str) -> None:
    """Delete a folder with all that is in it."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            os.remove(f"{place}/{name}")
        os.rmdir(place)


def make_executable(folder: str) -> None:
    """Give the run bits back that a template from a zip file has lost."""
    for place, _, names in os.walk(folder):
        for path in [f"{place}/{name}" for name in names if name.endswith(".sh")]:
            if is_program(path):
                os.chmod(path, 0o755)  # noqa: S103 (as git has them)


def is_program(path: str) -> bool:
    """Whether a file says what runs it."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


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
        "checkout": ANSWERS.get("_checkout"),
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

    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    done = subprocess.run(["git", "-C", TEMPLATE, *command], env=environment, capture_output=True, text=True)
    return done.stdout.strip()


main()
