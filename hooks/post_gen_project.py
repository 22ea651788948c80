"""After rendering: put the files of the chosen answers in place, make scripts executable, and say what comes next.

Runs from a temporary file, in the rendered folder, with cookiecutter's own Python: standard library only, no network.
"""

import json
import shutil
from pathlib import Path

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")
VARIANTS = Path(".variants")
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
            if (VARIANTS / question / layer).is_dir():
                shutil.copytree(VARIANTS / question / layer, ".", dirs_exist_ok=True)
    shutil.rmtree(VARIANTS)
    for script in Path("scripts").glob("*.sh"):
        if script.read_text(encoding="utf-8").startswith("#!"):
            script.chmod(0o755)  # a template from a zip file has lost its run bits
    data_set = ANSWERS["data_set"]
    print(
        NEXT_STEPS.format(
            name=ANSWERS["project_name"], slug=ANSWERS["project_slug"], expectation=EXPECTATIONS[data_set]
        )
    )


main()
