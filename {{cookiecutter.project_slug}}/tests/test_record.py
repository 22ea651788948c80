"""Run metadata and output: run.json, packages.txt, git.diff, train.log and the terminal."""

import dataclasses
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import warnings
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from marks import CLASSES_ONLY, MIXING
from models import tiny_network
from processes import SECONDS, run_ranks, run_train
from small_data import make_data

import train
from batteries.core.config_io import to_json
from batteries.core.errors import RunError
from batteries.run import metadata as run_metadata
from batteries.run import report_hook
from batteries.run.messages import describe_improvement, epoch_line
from batteries.run.timing import Stopwatch
from batteries.training.metrics import MeanMetrics
from train import Config, Stage


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(monkeypatch, data_dir, tmp_path) -> Config:
    monkeypatch.setattr(train, "build_model", tiny_network)
    return Config(
        stages=(Stage("first", 2, 1e-2),),
        data_dir=data_dir,
        split_file=tmp_path / "splits.csv",
        logdir=tmp_path / "run",
        device="cpu",
        limit_batches=3,
        num_workers=0,
        tracker=("none",),
    )


def run_command(config: Config, *flags: str):
    """Run `python train.py` with this config and more flags."""
    path = config.logdir.with_name("config.json")
    path.write_text(json.dumps(to_json(config)))
    return run_train(train.main, Config, "--config", str(path), *flags)


def read_record(config: Config) -> dict:
    return json.loads((config.logdir / "run.json").read_text())


@CLASSES_ONLY
def test_run_json_describes_the_run_and_its_end(config):
    assert run_command(config).code == 0
    record = read_record(config)
    assert record["command"].startswith("train.py --config ")
    assert record["versions"]["torch"] == torch.__version__
    assert (record["host"], record["world_size"], record["seed"]) == (os.uname().nodename, 1, 0)
    assert (record["device"], record["exit"]) == ("cpu", "finished")
    assert record["start"] <= record["end"]
    lines = [json.loads(line) for line in (config.logdir / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["valid"]["accuracy"], -line["epoch"]))
    score = best["valid"]["accuracy"]
    assert record["best"] == {"metric": "accuracy", "score": score, "stage": "first", "epoch": best["epoch"]}


def test_config_hash_is_equal_only_for_equal_options(config):
    hashes = []
    for number, changes in enumerate(({}, {"num_workers": 1}, {"batch_size": 16})):
        changed = dataclasses.replace(config, logdir=config.logdir.with_name(f"run{number}"), **changes)
        assert run_command(changed).code == 0
        hashes.append(read_record(changed)["config_hash"])
    assert hashes[0] == hashes[1] != hashes[2]
    again = dataclasses.replace(config, logdir=config.logdir.with_name("again"))
    flags = ["--config", str(config.logdir.with_name("run0") / "config.json"), "--logdir", str(again.logdir)]
    assert run_train(train.main, Config, *flags).code == 0
    assert read_record(again)["config_hash"] == hashes[0]
    weights = str(config.logdir.with_name("run0") / "first/best.pth")
    other = dataclasses.replace(config, logdir=config.logdir.with_name("other"), init_from=Path(weights))
    assert run_command(other).code == 0
    assert read_record(other)["config_hash"] != hashes[0]


def test_config_hash_does_not_distinguish_integers_from_floats():
    integer = {"stages": [{"lr": 1, "warmup_epochs": 0}], "resume": False}
    floating = {"stages": [{"lr": 1, "warmup_epochs": 0.0}], "resume": False}
    without = {"stages": [{"lr": 1}], "resume": False}
    assert run_metadata.hash_config(integer, ()) == run_metadata.hash_config(floating, ())
    assert run_metadata.hash_config(integer, ()) != run_metadata.hash_config(without, ())


def test_config_file_repeats_a_run(config):
    assert run_command(dataclasses.replace(config, seed=7, **MIXING)).code == 0
    again = config.logdir.with_name("again")
    flags = ["--config", str(config.logdir / "config.json"), "--logdir", str(again)]
    assert run_train(train.main, Config, *flags).code == 0
    assert (again / "metrics.jsonl").read_bytes() == (config.logdir / "metrics.jsonl").read_bytes()


@CLASSES_ONLY
def test_early_stop_is_recorded_and_kept_when_resumed(config, monkeypatch):
    monkeypatch.setattr(train, "valid_fn", lambda *_: {"accuracy": 0.5, "loss": 1.0})
    config = dataclasses.replace(config, stages=(Stage("first", 4, 1e-2),), patience=1)
    assert run_command(config).code == 0
    assert read_record(config)["exit"] == "stopped early"
    assert run_command(config, "--resume").code == 0
    assert read_record(config)["exit"] == "stopped early"


def test_failed_run_records_the_reason(config, monkeypatch):
    def fail(*_):
        raise RunError("the data set is empty; check --data-dir.")

    monkeypatch.setattr(train, "valid_fn", fail)
    assert run_command(config).code == 1
    assert read_record(config)["exit"] == "failed: the data set is empty; check --data-dir."
    assert "ERROR failed: the data set is empty; check --data-dir.\n" in (config.logdir / "train.log").read_text()


def test_git_commit_branch_and_changes_are_recorded(monkeypatch, tmp_path):
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    monkeypatch.setattr(run_metadata, "ROOT", tmp_path)
    logdir = tmp_path / "ignored"
    logdir.mkdir()
    for words in (["init", "-qb", "trunk"], ["commit", "-qm", "one", "--allow-empty"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    (tmp_path / ".git/info/exclude").write_text("ignored\n")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    record = run_metadata.RunMetadata(logdir)
    record.begin({}, run_metadata.uncommitted_diff(), resumed=False)
    assert (record.values["git_commit"], record.values["git_branch"]) == (commit, "trunk")
    assert record.values["git_dirty"] is False
    assert not (logdir / "git.diff").exists()

    (tmp_path / "new.py").write_bytes(b"caf\xe9\n")
    record.begin({}, run_metadata.uncommitted_diff(), resumed=False)
    assert record.values["git_dirty"] is True
    assert b"+caf\xe9\n" in (logdir / "git.diff").read_bytes()
    assert subprocess.run(["git", "status", "-s"], cwd=tmp_path, capture_output=True).stdout == b"?? new.py\n"


def test_git_entries_are_null_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(run_metadata, "ROOT", tmp_path)
    record = run_metadata.RunMetadata(tmp_path)
    record.begin({}, run_metadata.uncommitted_diff(), resumed=False)
    assert [record.values[name] for name in ("git_commit", "git_branch", "git_dirty")] == [None, None, None]


def make_repository(directory: Path) -> str:
    """Make a git repository with one commit; return the commit."""
    directory.mkdir(parents=True, exist_ok=True)
    for words in (["init", "-qb", "trunk"], ["commit", "-qm", directory.name, "--allow-empty"]):
        git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
        subprocess.run([*git, *words], cwd=directory, check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=directory, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("place", ["untracked", "tracked", "ignored", "by a hook"])
def test_git_entries_are_null_in_a_subdirectory_of_another_repository(monkeypatch, tmp_path, place):
    make_repository(tmp_path / "parent")
    project = tmp_path / "parent/sub/project"
    project.mkdir(parents=True)
    (project / "train.py").write_text("x = 1\n")
    if place == "tracked":
        subprocess.run(["git", "add", "."], cwd=project, check=True)
    if place == "ignored":
        (tmp_path / "parent/.gitignore").write_text("sub\n")
    if place == "by a hook":  # git sets these variables for its hooks
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "parent/.git"))
        monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "parent/.git/index"))
    monkeypatch.setattr(run_metadata, "ROOT", project)
    assert run_metadata.uncommitted_diff() is None
    record = run_metadata.RunMetadata(tmp_path)
    record.begin({}, run_metadata.uncommitted_diff(), resumed=False)
    assert [record.values[name] for name in ("git_commit", "git_branch", "git_dirty")] == [None, None, None]
    assert not (tmp_path / "git.diff").exists()


@pytest.mark.parametrize("place", ["inside another", "a symbolic link", "a worktree"])
def test_commit_of_the_project_itself_is_recorded(monkeypatch, tmp_path, place):
    make_repository(tmp_path / "parent")
    project = tmp_path / "parent/new\nline ü"
    commit = make_repository(project)
    if place == "a symbolic link":
        (tmp_path / "link").symlink_to(project)
        project = tmp_path / "link"
    if place == "a worktree":
        subprocess.run(["git", "worktree", "add", "-qb", "other", str(tmp_path / "tree")], cwd=project, check=True)
        project = tmp_path / "tree"
    monkeypatch.setattr(run_metadata, "ROOT", project)
    assert run_metadata.describe_process()["git_commit"] == commit
    (project / "new.py").write_text("x = 1\n")
    assert b"+x = 1\n" in run_metadata.uncommitted_diff()


def test_epoch_lines_have_their_metrics_in_one_order():
    train = {"loss": 1.0, "accuracy": 0.5}
    line = epoch_line(
        "a 1/2", {"train": train, "valid": {"roc_auc": 0.5, "brier": 0.1, "iou/cat": 1.0, **train}}, 3.0, "best"
    )
    assert line == "a 1/2  accuracy 0.5000/0.5000  brier 0.1000  loss 1.0000/1.0000  roc_auc 0.5000  3.0 s  best"
    other = epoch_line("a 2/2", {"train": {"loss": 1.0}, "valid": train}, 3.0, "")
    assert other == "a 2/2  accuracy 0.5000  loss 1.0000/1.0000  3.0 s"


@pytest.mark.parametrize(
    ("score", "before", "is_best", "text"),
    [
        (0.9, 0.8, True, "best by 0.1000"),
        (0.8, 0.803, True, "best by 0.0030"),
        (0.8, None, True, "best"),
        (0.8, 0.9, False, ""),
    ],
)
def test_improvement_is_described_without_a_sign(score, before, is_best, text):
    assert describe_improvement(score, before, is_best) == text


def test_progress_names_metrics_in_the_order_of_the_epoch_line():
    metrics = MeanMetrics()
    metrics.update(4, loss=torch.tensor(1.0), accuracy=torch.tensor(0.5))
    watch = Stopwatch(SimpleNamespace(device=torch.device("cpu")), metrics)
    for _ in range(2):
        assert re.match(r"accuracy 0\.500 loss 1\.000 \d+ samples/s wait \d+% \d+\.\d GB$", watch.status())
        metrics.restore(metrics.state())


def test_metrics_jsonl_has_the_highest_learning_rate_of_each_epoch(config):
    stages = (Stage("first", 1, 3e-3), Stage("second", 2, 1e-3, "constant"))
    assert run_command(dataclasses.replace(config, stages=stages)).code == 0
    lines = [json.loads(line) for line in (config.logdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["lr"] < 1e-7
    assert [line["max_lr"] for line in lines] == pytest.approx([3e-3, 1e-3, 1e-3], rel=0.3)
    assert [line["lr"] for line in lines[1:]] == [1e-3, 1e-3]


def test_packages_txt_lists_all_installed_packages(config):
    assert run_command(config).code == 0
    lines = (config.logdir / "packages.txt").read_text().splitlines()
    assert f"torch=={metadata.version('torch')}" in lines
    assert f"pytest=={metadata.version('pytest')}" in lines
    assert lines == sorted(set(lines), key=str.lower)


def test_train_log_has_all_output_without_control_characters(config, monkeypatch):
    batch_metrics = train.task.batch_metrics

    def print_more(*arguments):
        print("\x1b[1mbold\x1b[0m words", end="")
        print(" of the user")
        print("redrawn 1\rredrawn 2", file=sys.stderr)
        # pytest replaces warnings.warn().
        print(warnings.formatwarning("a library's", UserWarning, "file.py", 1), file=sys.stderr)
        return batch_metrics(*arguments)

    monkeypatch.setattr(train.task, "batch_metrics", print_more)
    end = run_command(dataclasses.replace(config, show_warnings=True))
    assert end.code == 0
    log = (config.logdir / "train.log").read_text()
    assert not re.search(r"[^\n\x20-\x7e]", log)
    logged = [line.split(" ", 3)[3] for line in log.splitlines() if " INFO " in line]
    assert logged[:-1] == [line for line in end.out.splitlines() if "bold" not in line]
    assert logged[-1] == "finished"
    assert " OUT bold words of the user\n" in log
    assert " ERR redrawn 2\n" in log
    assert re.search(r" ERR .*UserWarning: a library's\n", log)
    assert "\x1b[1mbold\x1b[0m words of the user\n" in end.out


def test_train_log_has_the_traceback_of_a_bug(config, monkeypatch):
    monkeypatch.setattr(train, "valid_fn", lambda *_: int("a word"))
    assert run_command(config).code == 1
    log = (config.logdir / "train.log").read_text()
    assert " ERROR Traceback (most recent call last):\n" in log
    assert " ERROR failed: ValueError: invalid literal for int() with base 10: 'a word'\n" in log


def test_other_ranks_write_to_train_log_only_with_their_rank(config, monkeypatch, tmp_path, capfd):
    batch_metrics = train.task.batch_metrics

    def print_more(*arguments):
        print(f"rank {os.environ['RANK']} prints")
        print(f"rank {os.environ['RANK']} warns", file=sys.stderr)
        return batch_metrics(*arguments)

    monkeypatch.setattr(train.task, "batch_metrics", print_more)
    run_ranks(2, lambda: train.main(config), join=False)
    log = (config.logdir / "train.log").read_text()
    assert " OUT rank 0 prints\n" in log
    assert " OUT [rank 1] rank 1 prints\n" in log
    assert " ERR [rank 1] rank 1 warns\n" in log
    assert log.count("logdir   ") == 1
    out, err = capfd.readouterr()
    assert "rank 0 prints" in out
    assert "rank 1" not in out + err


def test_train_log_has_the_error_of_a_failing_rank(config, monkeypatch):
    def fail(*_):
        if os.environ["RANK"] == "1":
            raise RuntimeError("a broken disk")
        return {"accuracy": 0.5, "loss": 1.0}

    def outcome() -> str:
        try:
            train.main(config)
        except Exception as error:  # noqa: BLE001 (of either rank)
            return str(error)
        return ""

    monkeypatch.setattr(train, "valid_fn", fail)
    monkeypatch.setattr("batteries.run.stage.StageRun.log_epoch", lambda *_, **__: None)
    assert "a broken disk" in run_ranks(2, outcome, join=False)[1]
    assert " ERROR [rank 1] failed: RuntimeError: a broken disk\n" in (config.logdir / "train.log").read_text()


@CLASSES_ONLY
def test_quiet_run_prints_nothing_and_logs_everything(config):
    end = run_command(dataclasses.replace(config, quiet=True))
    assert (end.code, end.out, end.err) == (0, "", "")
    assert " INFO best     accuracy " in (config.logdir / "train.log").read_text()


@pytest.fixture
def terminal(config, monkeypatch):
    """Return a function that runs train.py in a terminal of 80 columns and returns its output."""

    def run() -> str:
        parent_end, child_end = pty.openpty()
        size = (24).to_bytes(2, sys.byteorder) + (80).to_bytes(2, sys.byteorder) + bytes(4)
        import fcntl
        import termios

        fcntl.ioctl(child_end, termios.TIOCSWINSZ, size)
        environment = {"TERM": "xterm-256color", "COLUMNS": "80"}

        def child() -> None:
            os.close(parent_end)
            os.environ.update(environment)
            sys.stdout = os.fdopen(child_end, "w")
            train.main(config)
            sys.stdout.flush()

        process = get_context("fork").Process(target=child)
        process.start()
        os.close(child_end)
        output = b""
        while True:
            try:
                data = os.read(parent_end, 65536)
            except OSError:  # on Linux, once the other end is closed
                break
            if not data:
                break
            output += data
        process.join()
        assert process.exitcode == 0
        return output.decode()

    return run


@CLASSES_ONLY
def test_terminal_shows_a_progress_bar_of_80_columns(terminal, monkeypatch, config):
    monkeypatch.setattr("batteries.run.console.SECONDS_BETWEEN_DRAWINGS", 0.0)
    monkeypatch.setattr("batteries.run.stage.LOG_EVERY", 1)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal())
    drawn = [line for line in re.split(r"[\r\n]+", plain) if re.match(r"first [12]/2 .* samples/s wait ", line)]
    assert drawn
    assert max(map(len, drawn)) <= 80
    assert re.search(r" 3/3 accuracy 0\.\d{3} loss \d\.\d{3} \d+ samples/s wait \d+% \d\.\d GB", drawn[-1]), drawn[-1]
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("first ") and " s" in line[-12:]]
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in (config.logdir / "train.log").read_text()


@CLASSES_ONLY
def test_pipe_gets_plain_lines_of_progress(config, monkeypatch):
    monkeypatch.setattr("batteries.run.console.SECONDS_BETWEEN_LINES", 0)
    end = run_command(config)
    assert not re.search(r"[^\n\x20-\x7e]", end.out)
    line = r"^first (\d)/2  (\d)/3  accuracy 0\.\d{3} loss \d\.\d{3} \d+ samples/s wait .*$"
    assert re.findall(line, end.out, re.MULTILINE) == [
        (str(epoch), str(step)) for epoch in (1, 2) for step in (1, 2, 3)
    ]
    monkeypatch.setattr("batteries.run.console.SECONDS_BETWEEN_LINES", 3600)
    other = run_command(dataclasses.replace(config, logdir=config.logdir.with_name("other")))
    assert "samples/s wait " not in other.out


def test_user_output_is_shown_above_the_bar_and_logged(terminal, monkeypatch, config):
    monkeypatch.setattr("batteries.run.console.SECONDS_BETWEEN_DRAWINGS", 0.0)
    optimizer_step = train.optimizer_step

    def print_more(*arguments):
        print("seen", 32)
        return optimizer_step(*arguments)

    monkeypatch.setattr(train, "optimizer_step", print_more)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal())
    assert [line for line in re.split(r"[\r\n]+", plain) if line == "seen 32"] == ["seen 32"] * 6
    assert (config.logdir / "train.log").read_text().count(" OUT seen 32\n") == 6


def test_run_continues_after_stdout_is_closed(config):
    def start() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        train.main(config)

    process = get_context("fork").Process(target=start)
    process.start()
    process.join(SECONDS)
    assert (process.exitcode, read_record(config)["exit"]) == (0, "finished")
    log = (config.logdir / "train.log").read_text()
    assert log.count("stdout is closed (broken pipe). Training continues; see train.log.") == 1
    assert "first 2/2" in log


def test_new_split_file_does_not_make_the_run_dirty(config, monkeypatch, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for words in (["init", "-qb", "trunk"], ["commit", "-qm", "one", "--allow-empty"]):
        subprocess.run(
            ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", *words], cwd=project, check=True
        )
    monkeypatch.setattr(run_metadata, "ROOT", project)
    assert run_command(dataclasses.replace(config, split_file=project / "splits/default.csv")).code == 0
    assert (project / "splits/default.csv").exists()
    assert (read_record(config)["git_dirty"], (config.logdir / "git.diff").exists()) == (False, False)


@pytest.mark.parametrize("by_uv", [False, True])
def test_next_command_is_quoted_for_the_shell(config, monkeypatch, by_uv):
    monkeypatch.delenv("UV", raising=False)
    if by_uv:
        monkeypatch.setenv("UV", "/usr/bin/uv")
    logdir = config.logdir.with_name("odd #1? ü")
    end = run_command(dataclasses.replace(config, logdir=logdir))
    words = ["uv", "run"] * by_uv + ["python", "tools/predict.py", "--run", str(logdir), "--split", "test"]
    [line] = [line for line in end.out.splitlines() if line.startswith("next ")]
    assert shlex.split(line) == ["next", *words]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_run_as_preempted(config, monkeypatch, number):
    optimizer_step = train.optimizer_step

    def stop(*arguments):
        os.kill(os.getpid(), number)
        return optimizer_step(*arguments)

    monkeypatch.setattr(train, "optimizer_step", stop)
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    try:
        end = run_command(config)
    finally:
        signal.signal(number, before)
    assert end.code == 128 + number
    assert read_record(config)["exit"] == f"preempted by {number.name}"
    assert Path(config.logdir / "first/epoch_1_step_1.pth").exists()


def test_run_ignores_sighup_under_nohup(config, monkeypatch):
    def hang_up(*arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        return optimizer_step(*arguments)

    optimizer_step = train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command(config).code == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_record(config)["exit"] == "finished"


@pytest.fixture
def run_with_report(config, monkeypatch, tmp_path):
    """Return a function that runs train.py with code for its report, which runs in a real subprocess."""
    monkeypatch.setattr("batteries.run.run.make_reports", report_hook.make_reports)
    monkeypatch.setattr(report_hook, "ROOT", tmp_path)
    monkeypatch.setattr(report_hook, "project_settings", lambda: {"reports": ["tools/summary.py"]})

    def run(code: str, *flags: str):
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools/summary.py").write_text(f"import json, os, sys\n{code}\n")
        return run_command(config, *flags)

    return run


def test_report_is_built_after_the_run_by_a_single_process(run_with_report, config, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # set by torchrun; the script must not see it
    end = run_with_report(
        "record = json.load(open(sys.argv[1] + '/run.json'))\n"
        "print('report  ', *sys.argv[1:], record['exit'], record['best']['epoch'] > 0, 'LOCAL_RANK' in os.environ)"
    )
    assert end.code == 0
    assert end.out.splitlines()[-1] == f"report   {config.logdir} --device cpu finished True False"
    log = (config.logdir / "train.log").read_text()
    assert f" INFO report   {config.logdir} --device cpu finished True False\n" in log


def test_failed_report_is_a_warning_and_the_run_finishes(run_with_report, config):
    end = run_with_report("sys.exit('error: no space left')")
    assert end.code == 0
    warning = (
        "Training finished, but the report could not be built (error: no space left); try python tools/summary.py "
    )
    assert f"{warning}{config.logdir}.\n" in end.out
    assert read_record(config)["exit"] == "finished"


def test_no_report_option_starts_no_report(run_with_report, config):
    end = run_with_report("sys.exit('started')", "--no-report")
    assert (end.code, "started" in end.out) == (0, False)
