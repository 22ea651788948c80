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

Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_in(answers: dict[str, str]) -> set[Pair]:
    """Return every pair of answers of one set."""
    return set(itertools.combinations(sorted(answers.items()), 2))


def all_pairs(choices: dict[str, list[str]]) -> set[Pair]:
    """Return every pair of answers to different questions."""
    return {
        ((first, one), (second, other))
        for first, second in itertools.combinations(sorted(choices), 2)
        for one, other in itertools.product(choices[first], choices[second])
    }


def pairwise(choices: dict[str, list[str]]) -> list[dict[str, str]]:
    """Return sets of answers that contain every pair; each next set is the one with the most new pairs."""
    candidates = [dict(zip(choices, answers, strict=True)) for answers in itertools.product(*choices.values())]
    left = all_pairs(choices)
    chosen = []
    while left:
        chosen.append(max(candidates, key=lambda answers: len(pairs_in(answers) & left)))
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
