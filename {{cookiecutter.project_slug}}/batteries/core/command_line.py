"""The command line: from arguments to a Config, and from an exception to a message and an exit code."""

import contextlib
import dataclasses
import difflib
import io
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from batteries.core.code_errors import explain_code_error
from batteries.core.config_io import flatten, take_config_file, to_json
from batteries.core.errors import RunError, UserError, explain_dead_worker, explain_nondeterministic
from batteries.core.project import ROOT
from batteries.core.ranks import is_rank_zero, rank, world_size
from batteries.core.signals import Preempted
from batteries.core.text import count_of, did_you_mean

Config = TypeVar("Config")

# A rank that may only have seen the failure of another one waits, so that torchrun, which polls its processes ten times
# a second, reports the rank with the cause.
SECONDS_BEFORE_FAILING = 4

SECONDS_OF_A_DEATH = 0.2  # for a process that was killed to be gone


def run_command(
    main: Callable[[Config], object], config_class: Any, *, repeats: bool = True, default: Any = None
) -> None:
    """Parse the command line, call `main` with the Config, and exit.

    Exit codes: 0 success; 2 invalid input (one-line message); 128 + signal number after a signal, once the run is
    saved; 141 when the reader of stdout is gone, as `head` is; 1 for a run that cannot continue (one-line message) and
    for a bug (traceback). Under DDP only one rank prints the error.

    Args:
        main: The command.
        config_class: A dataclass of options, or a union of them with one member per subcommand.
        repeats: Accept `--config FILE`, which repeats the options of an earlier run.
        default: The options used when no subcommand is given.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        check_installed_project(sys.argv[0])
        main(parse(config_class, sys.argv[1:], repeats=repeats, default=default))
        sys.stdout.flush()
    except Preempted as preempted:
        _exit(128 + preempted.number, f"{preempted}; the run is saved, resume it with --resume.", only_rank_zero=True)
    except KeyboardInterrupt:
        moment = " before the first step" if repeats else ""
        _exit(130, f"stopped by SIGINT{moment}.", only_rank_zero=True)
    except Exception as error:  # noqa: BLE001 (a bug is shown with its traceback)
        _exit_after(_settle_workers(error))


def _exit_after(error: Exception) -> NoReturn:
    """Exit with the code and the message that fit an exception."""
    _wait_for_other_ranks(error)
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        _exit(141, "")  # as a shell reports a program that SIGPIPE ended
    if isinstance(error, UserError):
        _exit(2, f"error: {error}")
    if isinstance(error, RunError):
        _exit(1, f"error: {error}")
    if nondeterministic := explain_nondeterministic(error):
        _exit(2, f"error: {nondeterministic}")
    explanation = explain_dead_worker(error) or explain_code_error(error)
    _exit(1, traceback.format_exc() if explanation is None else f"error: {explanation}")


def check_installed_project(program: str) -> None:
    """Raise UserError if a script of one project would run with the `batteries` package of another one.

    `python tools/predict.py` imports the packages of the project that is installed in the environment. With several
    projects in one environment that can be another project.
    """
    script = Path(program).resolve()
    is_tool = script.parent.name == "tools"
    root = script.parent.parent if is_tool else script.parent
    if (root / "batteries/core/project.py").is_file() and not root.samefile(ROOT):
        module = f"tools.{script.stem}" if is_tool else script.stem
        raise UserError(
            f"{script} belongs to the project {root}, but the installed one is {ROOT}: run pip install -e {root}, or "
            f"start it in {root} with python -m {module}."
        )


def shell_command(*words: str) -> str:
    """Return a command as the user types it, with `uv run` in front if this process was started by uv."""
    prefix = "uv run " if "UV" in os.environ else ""
    return prefix + shlex.join(words)


def program_name() -> str:
    """Return the path of the running script in the project, such as `tools/predict.py`; elsewhere its name."""
    program = Path(sys.argv[0]).resolve()
    root = ROOT.resolve()
    return program.relative_to(root).as_posix() if program.is_relative_to(root) else program.name


def parse(config_class: Any, arguments: list[str], *, repeats: bool = True, default: Any = None) -> Any:
    """Build a Config from command-line arguments; `--help` prints the help and exits with 0.

    Args:
        config_class: A dataclass of options, or a union of them.
        arguments: The command line without the program name.
        repeats: Accept `--config FILE`, whose values apply to every option that is not given.
        default: The options used when no subcommand is given.

    Raises:
        UserError: If an argument is invalid; the message names the flag.
    """
    import tyro  # imported here because worker processes that import train.py do not need it

    arguments = [expand_home(argument) for argument in arguments]
    _check_no_repeated_flag(arguments)
    if repeats:
        default, arguments = take_config_file(config_class, arguments)
    else:
        default = tyro.MISSING_NONPROP if default is None else default
    panel = io.StringIO()
    try:
        with contextlib.redirect_stderr(panel):
            return tyro.cli(
                config_class,
                prog=program_name(),
                args=arguments,
                default=default,
                console_outputs=is_rank_zero(),
            )
    except SystemExit as end:
        if not end.code:
            sys.stdout.flush()
            raise
        raise UserError(_summarize_panel(panel.getvalue(), _list_flags(default))) from None


def expand_home(argument: str) -> str:
    """Expand `~` at the start of a value, also in `--logdir=~/x`, which a shell passes on unchanged."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return flag + equals + os.path.expanduser(value)


def _check_no_repeated_flag(arguments: list[str]) -> None:
    """Raise UserError if an option is given twice: tyro would use the last one, and `--run a --run b` means both."""
    given: dict[str, str] = {}  # the flag as it was written, by the name of its option
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        flag = argument.partition("=")[0]
        name = re.sub(r"(^--|\.)no-", r"\1", flag.replace("_", "-"))  # --no-resume sets the option --resume
        if name not in given:
            given[name] = flag
        elif given[name].replace("_", "-") == flag.replace("_", "-"):
            raise UserError(f"{flag} is given twice; give it once, with all its values.")
        else:
            raise UserError(f"{given[name]} and {flag} are both given; give one of them.")


def _list_flags(config: Any) -> list[str]:
    """List the flags of a Config, those of its stages included; none if `config` is not a dataclass."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return []
    flags = ["--config", "--help"]
    for name, value in flatten(to_json(config)):
        path, dot, last = name.replace("_", "-").rpartition(".")
        flags.append(f"--{path}{dot}{last}")
        if isinstance(value, bool):
            flags.append(f"--{path}{dot}no-{last}")
    return flags


def _summarize_panel(panel: str, flags: Sequence[str]) -> str:
    """Return tyro's error panel as one line, with the closest flag or choice.

    Args:
        panel: The output of tyro.
        flags: The flags of the command, as far as they are known.
    """
    see_help = f"See python {program_name()} --help."
    text = _text_of_panel(re.sub(r"\x1b\[[0-9;]*m", "", panel))
    if unknown := re.match(r"Unrecognized (?:or misplaced )?options: ([^\s,]+)", text):
        return f"{_describe_unknown(unknown[1], panel, flags)} {see_help}"
    if missing := re.match(r"Missing value for argument '(.*)'", text):
        return f"{missing[1]} needs a value. {see_help}"
    if missing := re.match(r"Missing from (.+?): (\S+) (.*?) ?\(required\)", text):
        return f"{missing[1]} needs {missing[2]}: {missing[3]}. {see_help}"
    if choice := re.match(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)", text):
        known = re.findall(r"'([^']*)'", choice[3])
        hint = did_you_mean(choice[1], known) or "."
        return f"{choice[2]} {choice[1]} is not a valid choice{hint} Use one of: {', '.join(known)}."
    if invalid := re.match(r"Error parsing (\S+): (invalid literal|could not convert).*?: '(.*)'", text):
        kind = "an integer" if invalid[2] == "invalid literal" else "a number"
        return f"{invalid[1]} {invalid[3]} must be {kind}. {see_help}"
    return f"{text.removeprefix('Error parsing ')}. {see_help}"


def _text_of_panel(plain: str) -> str:
    """Return the first section of tyro's panel as one line, without its frame and title."""
    title_lines = 1 if plain.startswith("╭") else 2  # a box, or two lines if the terminal is not UTF-8
    lines = [line.strip(" │") for line in plain.splitlines()][title_lines:]
    is_rule = [set(line) <= set("─-╰╯") for line in lines]
    section = lines[: is_rule.index(True)] if True in is_rule else lines
    return " ".join(section).rstrip(".")


def _describe_unknown(word: str, panel: str, flags: Sequence[str]) -> str:
    """Describe an unknown option or command, with the closest ones of `flags` or of those that tyro lists."""
    word = word.partition("=")[0]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", panel)
    known = list(flags) or re.findall(r"--[\w.-]+", plain.partition("Perhaps you meant")[2])
    known += re.findall(r"\w+", "".join(re.findall(r"Available subcommands: ([\w, ]+)", plain)))
    if word.lower() in ("true", "false"):
        return f"unknown word {word}; an option that is on or off takes no value: give --flag or --no-flag."
    if described := _describe_missing_item(word, known):
        return described
    is_flag = word.startswith("-")
    kind = "option" if is_flag else "command or option"
    matches = _closest_flags(word, known)
    hint = "." if is_flag else "; a value must follow its option."
    if matches:
        hint = f"; did you mean {' or '.join(map(repr, matches))}?"
    return f"unknown {kind} {word}{hint}"


def _describe_missing_item(word: str, known: Sequence[str]) -> str:
    """Describe a flag such as --stages.2.lr if there are only two stages; otherwise return an empty string."""
    parts = re.fullmatch(r"--([\w-]+)\.(\d+)\..+", word)
    if parts is None:
        return ""
    option, number = parts.groups()
    items = {match[1] for flag in known if (match := re.match(rf"--{option}\.(\d+)\.", flag))}
    if not items or number in items:
        return ""
    count = count_of(len(items), "item")
    return f"{word} does not exist: --{option} has {count}, from 0; add one in train.py, or in the file of --config."


def _closest_flags(word: str, known: Sequence[str]) -> list[str]:
    """Return the flag that is closest to `word`, or that of each stage: --stages.0.lr and --stages.1.lr for --lr."""
    wanted = word.lstrip("-").replace("_", "-")
    has_number = re.search(r"\.\d+\.", wanted)
    if not has_number:
        wanted = wanted.rpartition(".")[2]
    flags: dict[str, list[str]] = {}  # by their name, without the stage if `word` has none
    for flag in known:
        name = flag.lstrip("-")
        flags.setdefault(name if has_number else name.rpartition(".")[2], []).append(flag)
    longer = [name for name in flags if name.startswith(f"{wanted}-")]
    closest = difflib.get_close_matches(wanted, flags, n=1, cutoff=0.7)
    return [flag for name in (closest or longer)[:1] for flag in flags[name]]


def discard_output(stream: Any) -> None:
    """Redirect stdout or stderr to the null device, because Python flushes both once more when it exits."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), stream.fileno())


def _stdout_is_closed() -> bool:
    """Return whether the reader of stdout is gone; if so, discard what it did not read."""
    try:
        print(flush=True)
    except BrokenPipeError:
        discard_output(sys.stdout)
        return True
    return False


def _exit(code: int, message: str, *, only_rank_zero: bool = False) -> NoReturn:
    """Print `message` to stderr and exit."""
    if message and (is_rank_zero() or not only_rank_zero):
        prefix = "" if is_rank_zero() else f"[rank {rank()}] "
        print(prefix + message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    _kill_workers()
    if world_size() > 1:
        os._exit(code)  # without destructors, which could wait for a rank that is gone
    sys.exit(code)


def _settle_workers(error: Exception) -> Exception:
    """Return the error to report, and let no DataLoader worker that dies from now on raise another one.

    torch raises the death of a worker wherever this process is. A worker that is killed while this process takes a
    batch from it breaks their connection before its death is known.
    """
    try:
        if isinstance(error, ConnectionError | EOFError | FileNotFoundError) and multiprocessing.active_children():
            time.sleep(SECONDS_OF_A_DEATH)
    except RuntimeError as death:
        error = death
    _ignore_dead_workers()
    return error


def _ignore_dead_workers() -> None:
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _kill_workers() -> None:
    """Kill the DataLoader workers of an interrupted epoch; torch would report their death as an error."""
    _ignore_dead_workers()
    for worker in multiprocessing.active_children():
        worker.kill()


def _wait_for_other_ranks(error: Exception) -> None:
    """Wait until the rank with the cause has failed: torchrun then ends all others.

    The other ranks see a lost connection. If all ranks fail alike, rank 0 reports for them.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    lost_connection = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)
    if lost_connection:
        time.sleep(2 * SECONDS_BEFORE_FAILING)
    elif not is_rank_zero():
        time.sleep(SECONDS_BEFORE_FAILING)
