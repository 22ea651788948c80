"""Formatting of names, counts and durations in messages."""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence


def list_first(names: Iterable[object], most: int = 10) -> str:
    """List the first `most` names and the number of the others: `a, b and 3 more`."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def summarize_names(kind: str, names: Sequence[str]) -> str:
    """List up to three names, or two and the number of the others, after their kind: `ids a, b, 3 more`."""
    shown = names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"]
    return f"{pluralize(kind, len(names))} {', '.join(shown)}"


def pluralize(noun: str, count: int) -> str:
    """Return `noun` in the singular for one, else in the plural: sample, samples; class, classes."""
    if count == 1:
        return noun
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun: `1 sample`, `1,149 samples`."""
    return f"{count:,} {pluralize(noun, count)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known word, or an empty string."""
    matches = difflib.get_close_matches(word, [str(name) for name in known], n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def find_repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, in order of first occurrence."""
    return [name for name, count in Counter(names).items() if count > 1]


def format_duration(seconds: float) -> str:
    """Format a duration with its unit: `4.2 s`, `75 s`, `12 min`, `3.1 hours`, `5.0 days`."""
    for limit, unit, size in ((100, "s", 1), (6000, "min", 60), (48 * 3600, "hours", 3600)):
        if seconds < limit:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
