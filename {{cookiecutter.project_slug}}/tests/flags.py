"""Command lines of tests: usual options, and those that a test changes."""

from collections.abc import Sequence


def override(flags: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return `flags` without the options that `others` gives, and then `others`: no option may be given twice."""
    given = {word.partition("=")[0] for word in others if word.startswith("--")}
    kept: list[str] = []
    keep = True
    for word in flags:
        if word.startswith("--"):
            keep = word.partition("=")[0] not in given
        if keep:
            kept.append(word)
    return [*kept, *others]
