"""From the command line to a Config, and from an error to one sentence."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from batteries.errors import BadInput, RunFailed, is_bad_input, near
from batteries.interrupts import Stopped
from batteries.ranks import is_main, rank, world_size

Config = TypeVar("Config")

SECONDS_TO_SPEAK = 4  # torchrun looks after its processes ten times a second


def run_command(
    main: Callable[[Config], object], config_class: Any, *, repeats: bool = True, default: Any = None
) -> None:
    """Parse the command line, run `main`, and end with the exit code that fits.

    `config_class` is a dataclass of knobs, or a union of them, one for each subcommand; then `default` is what no
    subcommand means. With `repeats`, `--config FILE` repeats what a run was given.
    Bad input: one sentence and 2. A signal: 128 and its number, after a save; where a reader has gone, as `head` does,
    that of SIGPIPE. A run that cannot go on, such as one that lost a worker of a loader: one sentence and 1. Anything
    else is a bug: its traceback and 1. Of many one speaks.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(parse(config_class, sys.argv[1:], repeats=repeats, default=default))
        sys.stdout.flush()
    except Stopped as stopped:
        _end(128 + stopped.number, f"{stopped}; the run is saved, --resume goes on with it." if is_main() else "")
    except KeyboardInterrupt:
        _end(130, f"stopped by SIGINT{' before the first step' if repeats else ''}." if is_main() else "")
    except Exception as error:  # noqa: BLE001 (what is not for the user is shown with its traceback)
        _wait_for_another_rank(error)
        if isinstance(error, BrokenPipeError) and _nobody_listens():
            _end(141, "")  # what a shell says of a program that SIGPIPE ended
        if is_bad_input(error):
            _end(2, f"error: {error}")
        if isinstance(error, RunFailed):
            _end(1, f"error: {error}")
        from batteries.data import explain_lost_worker  # which needs torch: verbs that read tables start without it

        if lost := explain_lost_worker(error):  # torch raises it wherever the signal finds this process
            _end(1, f"error: {lost}")
        _end(1, traceback.format_exc())


def as_typed(*words: str) -> str:
    """A command as a person types it where this process was started: through uv where uv did that."""
    return ("uv run " if "UV" in os.environ else "") + shlex.join(words)


def parse(config_class: Any, arguments: list[str], *, repeats: bool = True, default: Any = None) -> Any:
    """A Config from flags; with `repeats`, `--config FILE` gives the values that no flag beside it sets.

    Raises BadInput in the words of the flags; `--help` prints and exits with 0.
    """
    import tyro  # here, so that a worker process that imports train.py does not pay for it

    if repeats:
        default, arguments = _take_config_file(config_class, arguments)
    else:
        _refuse_doubles(arguments)
        default = tyro.MISSING_NONPROP if default is None else default
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_class, args=arguments, default=default, console_outputs=is_main())
    except SystemExit as end:
        if not end.code:
            sys.stdout.flush()
            raise
        raise BadInput(_one_sentence(said.getvalue())) from None


def _refuse_doubles(arguments: list[str]) -> None:
    """Raise BadInput for a flag that is given twice: only the last would count, and `--run a --run b` means both."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise BadInput(f"{flag} is given twice; give it once, with all its values.")


def to_json(config: Any) -> dict[str, Any]:
    """A Config as plain values, in the order of its fields."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """(name, value) for each plain value in nested mappings and lists of mappings: `stages.0.lr` is a name."""
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        pairs = enumerate(value)
    else:
        return [(name, value)]
    return [found for key, item in pairs for found in flatten(item, f"{name}.{key}" if name else str(key))]


def from_json(config_class: type[Config], values: Any, where: str = "the config") -> Config:
    """A Config from what `to_json` gave; fields that are not named keep their defaults.

    Raises BadInput for a name that is no field and for a value of another type.
    """
    if not isinstance(values, dict):
        names = ", ".join(f'"{field.name}"' for field in dataclasses.fields(config_class)[:3])  # type: ignore[arg-type]
        raise BadInput(f"{where} must be an object with {names} and so on, not {values!r}.")
    types = get_type_hints(config_class)
    for name in values:
        if name not in types:
            raise BadInput(f"{where} has {name!r}, which is no knob{near(name, types) or '.'}")
    fields = {name: _restore(types[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return config_class(**fields)
    except TypeError as error:
        raise BadInput(f"{where} does not make a {config_class.__name__}: {error}.") from None


def _restore(kind: Any, value: Any, where: str) -> Any:
    """The value of one field, which JSON holds without Path, tuple and dataclass; `kind` is its type."""
    arguments = get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, where)  # type: ignore[arg-type]
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_restore(arguments[0], item, where) for item in value)
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else _restore(arguments[0], value, where)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if value in arguments if get_origin(kind) is Literal else type(value) is kind:
        return value
    wanted = " or ".join(map(repr, arguments)) if get_origin(kind) is Literal else getattr(kind, "__name__", str(kind))
    raise BadInput(f"{where} is {value!r}, and must be {wanted}.")


def _take_config_file(config_class: type[Config], arguments: list[str]) -> tuple[Config, list[str]]:
    """The Config in the file of `--config`, and the other arguments."""
    rest, path = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            path = next(remaining, "")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    if path is None:
        return config_class(), rest
    if not path:
        raise BadInput("--config needs a file, such as logs/baseline/config.json.")
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"--config {path} cannot be read ({error}); give a run's config.json.") from None
    return from_json(config_class, values, f"--config {path}"), rest


def _one_sentence(panel: str) -> str:
    """The panel of tyro as one sentence, with the nearest flag or choice."""
    see = f"See python {Path(sys.argv[0]).name} --help."
    plain = re.sub(r"\x1b\[[0-9;]*m", "", panel)
    title_lines = 1 if plain.startswith("╭") else 2  # it draws a box or, where the terminal has no UTF-8, two lines
    lines = [line.strip(" │") for line in plain.splitlines()][title_lines:]
    ruled = [set(line) <= set("─-╰╯") for line in lines]
    text = " ".join(lines[: ruled.index(True)] if True in ruled else lines).rstrip(".")
    if unknown := re.match(r"Unrecognized (?:or misplaced )?options: ([^\s,]+)", text):
        known = re.findall(r"--[\w.-]+", plain.partition("Perhaps you meant")[2])
        known += re.findall(r"\w+", "".join(re.findall(r"Available subcommands: ([\w, ]+)", plain)))
        kind = "flag" if unknown[1].startswith("-") else "command or flag"
        return f"{unknown[1]} is no {kind}{near(unknown[1], known) or '.'} {see}"
    if missing := re.match(r"Missing from (.+?): (\S+) (.*?) ?\(required\)", text):
        return f"{missing[1]} needs {missing[2]}: {missing[3]}. {see}"
    if choice := re.match(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)", text):
        known = re.findall(r"'([^']*)'", choice[3])
        return f"{choice[2]} {choice[1]} is no choice{near(choice[1], known) or '.'} Use one of: {', '.join(known)}."
    return f"{text.removeprefix('Error parsing ')}. {see}"


def drop_output(stream: Any) -> None:
    """Let what is written to stdout or stderr go nowhere: python flushes both once more at its end."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _nobody_listens() -> bool:
    """Whether the reader of stdout has gone; what it did not take is then dropped."""
    try:
        print(flush=True)
    except BrokenPipeError:
        drop_output(sys.stdout)
        return True
    return False


def _end(code: int, message: str) -> NoReturn:
    """Say `message` and end."""
    if message:
        who = f"[rank {rank()}] " if not is_main() else ""
        print(who + message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    _end_workers()
    if world_size() > 1:
        os._exit(code)  # no destructor may wait for a rank that has gone
    sys.exit(code)


def _end_workers() -> None:
    """End the workers of a loader whose epoch was cut short; torch takes the death of one for an error."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def _wait_for_another_rank(error: Exception) -> None:
    """Let the rank with the cause speak: torchrun ends all others once it has failed.

    A lost connection is what the others see; and where all fail alike, rank 0 speaks for them.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)
    if lost or not is_main():
        time.sleep(SECONDS_TO_SPEAK * (2 if lost else 1))
