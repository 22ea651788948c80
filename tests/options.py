"""Which answers there are, and few sets of them that hold every pair."""

import itertools
import json
from pathlib import Path

QUESTIONS = json.loads((Path(__file__).parent.parent / "cookiecutter.json").read_text(encoding="utf-8"))
CHOICES: dict[str, list[str]] = {
    name: answers for name, answers in QUESTIONS.items() if isinstance(answers, list) and not name.startswith("_")
}

Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_in(answers: dict[str, str]) -> set[Pair]:
    """Every two answers of a set."""
    return set(itertools.combinations(sorted(answers.items()), 2))


def all_pairs(choices: dict[str, list[str]]) -> set[Pair]:
    """Every two answers to different questions."""
    return {
        ((first, one), (second, other))
        for first, second in itertools.combinations(sorted(choices), 2)
        for one, other in itertools.product(choices[first], choices[second])
    }


def pairwise(choices: dict[str, list[str]]) -> list[dict[str, str]]:
    """Sets of answers in which every pair is found: each next one has the most that are new."""
    candidates = [dict(zip(choices, answers, strict=True)) for answers in itertools.product(*choices.values())]
    left, chosen = all_pairs(choices), []
    while left:
        chosen.append(max(candidates, key=lambda answers: len(pairs_in(answers) & left)))
        left -= pairs_in(chosen[-1])
    return chosen
