"""The command line: from arguments to a Config, and from an exception to a message and an exit code."""

import contextlib
import io
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from batteries.core.config_io import take_config_file
from batteries.core.errors import RunError, UserError, explain_dead_worker
from batteries.core.project import ROOT
from batteries.core.ranks import is_rank_zero, rank, world_size
from batteries.core.signals import Preempted
from batteries.core.text import did_you_mean

Config = TypeVar("Config")

# A rank that may only have seen the failure of another one waits, so that torchrun, which polls its processes ten times
# a second, reports the rank with the cause.
SECONDS_BEFORE_FAILING = 4


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
        _exit_after(error)


def _exit_after(error: Exception) -> NoReturn:
    """Exit with the code and the message that fit an exception."""
    _wait_for_other_ranks(error)
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        _exit(141, "")  # as a shell reports a program that SIGPIPE ended
    if isinstance(error, UserError):
        _exit(2, f"error: {error}")
    if isinstance(error, RunError):
        _exit(1, f"error: {error}")
    explanation = explain_dead_worker(error)  # torch raises it wherever the signal reaches this process
    _exit(1, traceback.format_exc() if explanation is None else f"error: {explanation}")


def check_installed_project(program: str) -> None:
    """Raise UserError if a script of one project would run with the `batteries` package of another one.

    `python tools/predict.py` imports the packages of the project that is installed in the environment. With several
    projects in one environment that can be another project.
    """
    script = Path(program).resolve()
    root = script.parent.parent if script.parent.name == "tools" else script.parent
    if (root / "batteries").is_dir() and root != ROOT.resolve():
        raise UserError(
            f"{script} belongs to the project {root}, but the installed one is {ROOT}: run pip install -e {root}, or "
            f"start it in {root} with python -m tools.{script.stem}."
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

    if repeats:
        default, arguments = take_config_file(config_class, arguments)
    else:
        _check_no_repeated_flag(arguments)
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
        raise UserError(_summarize_panel(panel.getvalue())) from None


def _check_no_repeated_flag(arguments: list[str]) -> None:
    """Raise UserError if a flag is given twice: tyro would use the last one, and `--run a --run b` means both."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise UserError(f"{flag} is given twice; give it once, with all its values.")


def _summarize_panel(panel: str) -> str:
    """Return tyro's error panel as one line, with the closest flag or choice."""
    see_help = f"See python {program_name()} --help."
    text = _text_of_panel(re.sub(r"\x1b\[[0-9;]*m", "", panel))
    if unknown := re.match(r"Unrecognized (?:or misplaced )?options: ([^\s,]+)", text):
        return f"{_describe_unknown(unknown[1], panel)} {see_help}"
    if missing := re.match(r"Missing from (.+?): (\S+) (.*?) ?\(required\)", text):
        return f"{missing[1]} needs {missing[2]}: {missing[3]}. {see_help}"
    if choice := re.match(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)", text):
        known = re.findall(r"'([^']*)'", choice[3])
        hint = did_you_mean(choice[1], known) or "."
        return f"{choice[2]} {choice[1]} is not a valid choice{hint} Use one of: {', '.join(known)}."
    return f"{text.removeprefix('Error parsing ')}. {see_help}"


def _text_of_panel(plain: str) -> str:
    """Return the first section of tyro's panel as one line, without its frame and title."""
    title_lines = 1 if plain.startswith("╭") else 2  # a box, or two lines if the terminal is not UTF-8
    lines = [line.strip(" │") for line in plain.splitlines()][title_lines:]
    is_rule = [set(line) <= set("─-╰╯") for line in lines]
    section = lines[: is_rule.index(True)] if True in is_rule else lines
    return " ".join(section).rstrip(".")


def _describe_unknown(word: str, panel: str) -> str:
    """Describe an unknown option or command, with the closest one that tyro lists."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", panel)
    known = re.findall(r"--[\w.-]+", plain.partition("Perhaps you meant")[2])
    known += re.findall(r"\w+", "".join(re.findall(r"Available subcommands: ([\w, ]+)", plain)))
    kind = "option" if word.startswith("-") else "command or option"
    return f"unknown {kind} {word}{did_you_mean(word, known) or '.'}"


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


def _kill_workers() -> None:
    """Kill the DataLoader workers of an interrupted epoch; torch would report their death as an error."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
