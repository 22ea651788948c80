"""The template's questions with their answers, and a few sets of answers that contain every pair of answers."""

import ast
import itertools
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUESTIONS = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))
CHOICES: dict[str, list[str]] = {
    name: answers for name, answers in QUESTIONS.items() if isinstance(answers, list) and not name.startswith("_")
}

# The data sets that have targets of each task.
DATA_SETS = {
    "classification": ["digits", "image_folder", "csv", "cifar10", "mnist"],
    "multilabel": ["digits", "csv"],
    "regression": ["digits", "csv"],
    "segmentation": ["digits", "image_folder", "csv"],
}
COMBINATIONS = [(task, data_set) for task, data_sets in DATA_SETS.items() for data_set in data_sets]

Pair = tuple[tuple[str, str], tuple[str, str]]


def is_possible(answers: dict[str, str]) -> bool:
    """Return whether the data set has targets of the task."""
    return answers.get("data_set", "digits") in DATA_SETS[answers.get("task", "classification")]


def pairs_in(answers: dict[str, str]) -> set[Pair]:
    """Return every pair of answers of one set."""
    return set(itertools.combinations(sorted(answers.items()), 2))


def all_pairs(choices: dict[str, list[str]]) -> set[Pair]:
    """Return every possible pair of answers to different questions."""
    return {
        ((first, one), (second, other))
        for first, second in itertools.combinations(sorted(choices), 2)
        for one, other in itertools.product(choices[first], choices[second])
        if is_possible({first: one, second: other})
    }


def pairwise(choices: dict[str, list[str]]) -> list[dict[str, str]]:
    """Return sets of answers that contain every pair; each next set is the one with the most new pairs."""
    answers = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    candidates = list(filter(is_possible, answers))
    left = all_pairs(choices)
    chosen = []
    while left:
        chosen.append(max(candidates, key=lambda candidate: len(pairs_in(candidate) & left)))
        left -= pairs_in(chosen[-1])
    return chosen


def left_out_by_training() -> set[str]:
    """Return the paths that the hook deletes for toolkit=training."""
    tree = ast.parse((ROOT / "hooks/post_gen_project.py").read_text(encoding="utf-8"))
    [table] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEFT_OUT"
    ]
    return {f"{directory}/{name}" for directory, names in table.items() for name in names.split()}
