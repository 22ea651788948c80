"""What a run leaves of itself, and what it says: run.json, packages.txt, git.diff, train.log and the terminal."""

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

import pytest
import torch
from models import tiny_network
from processes import run_ranks, run_train
from small_data import make_data

import train
from batteries.core.config_io import to_json
from batteries.core.errors import RunError
from batteries.run import metadata as run_metadata
from batteries.run import report_hook as reports
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


def command(config: Config, *flags: str):
    """`python train.py` with this config."""
    path = config.logdir.with_name("config.json")
    path.write_text(json.dumps(to_json(config)))
    return run_train(train.main, Config, "--config", str(path), *flags)


def read_record(config: Config) -> dict:
    return json.loads((config.logdir / "run.json").read_text())


def test_the_record_says_what_ran_on_what_and_how_it_ended(config):
    assert command(config).code == 0
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


def test_runs_of_one_recipe_share_a_config_hash_and_another_recipe_has_another(config):
    hashes = []
    for number, changes in enumerate(({}, {"num_workers": 1}, {"batch_size": 16})):
        one = dataclasses.replace(config, logdir=config.logdir.with_name(f"run{number}"), **changes)
        assert command(one).code == 0
        hashes.append(read_record(one)["config_hash"])
    assert hashes[0] == hashes[1] != hashes[2]
    again = dataclasses.replace(config, logdir=config.logdir.with_name("again"))
    flags = ["--config", str(config.logdir.with_name("run0") / "config.json"), "--logdir", str(again.logdir)]
    assert run_train(train.main, Config, *flags).code == 0
    assert read_record(again)["config_hash"] == hashes[0]
    weights = str(config.logdir.with_name("run0") / "first/best.pth")
    other = dataclasses.replace(config, logdir=config.logdir.with_name("other"), init_from=Path(weights))
    assert command(other).code == 0
    assert read_record(other)["config_hash"] != hashes[0]


def test_a_config_hash_is_that_of_the_config_file_which_has_floats_for_whole_numbers():
    one, other = ({"stages": [{"lr": 1, "warmup_epochs": zero}], "resume": False} for zero in (0, 0.0))
    assert run_metadata.hash_config(one, ()) == run_metadata.hash_config(other, ())
    assert run_metadata.hash_config(one, ()) != run_metadata.hash_config({"stages": [{"lr": 1}], "resume": False}, ())


def test_a_config_file_repeats_a_run(config):
    assert command(dataclasses.replace(config, seed=7, mixup=0.2)).code == 0
    again = config.logdir.with_name("again")
    flags = ["--config", str(config.logdir / "config.json"), "--logdir", str(again)]
    assert run_train(train.main, Config, *flags).code == 0
    assert (again / "metrics.jsonl").read_bytes() == (config.logdir / "metrics.jsonl").read_bytes()


def test_a_run_whose_last_stage_stops_early_says_so_and_again_when_it_is_asked_to_go_on(config, monkeypatch):
    monkeypatch.setattr(train, "valid_fn", lambda *_: {"accuracy": 0.5, "loss": 1.0})
    config = dataclasses.replace(config, stages=(Stage("first", 4, 1e-2),), patience=1)
    assert command(config).code == 0
    assert read_record(config)["exit"] == "stopped early"
    assert command(config, "--resume").code == 0
    assert read_record(config)["exit"] == "stopped early"


def test_a_failed_run_says_why(config, monkeypatch):
    def fail(*_):
        raise RunError("the sky fell on the data; look up.")

    monkeypatch.setattr(train, "valid_fn", fail)
    assert command(config).code == 1
    assert read_record(config)["exit"] == "failed: the sky fell on the data; look up."
    assert "ERROR failed: the sky fell on the data; look up.\n" in (config.logdir / "train.log").read_text()


def test_a_run_knows_its_commit_branch_and_changes(monkeypatch, tmp_path):
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


def test_without_git_the_record_says_nothing_of_a_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(run_metadata, "ROOT", tmp_path)
    record = run_metadata.RunMetadata(tmp_path)
    record.begin({}, run_metadata.uncommitted_diff(), resumed=False)
    assert [record.values[name] for name in ("git_commit", "git_branch", "git_dirty")] == [None, None, None]


def test_every_installed_package_is_listed_with_its_version(config):
    assert command(config).code == 0
    lines = (config.logdir / "packages.txt").read_text().splitlines()
    assert f"torch=={metadata.version('torch')}" in lines
    assert f"pytest=={metadata.version('pytest')}" in lines
    assert lines == sorted(set(lines), key=str.lower)


def test_the_log_has_all_that_the_terminal_said_but_no_control_characters(config, monkeypatch):
    build_criterion = train.build_criterion

    def talk(*arguments):
        print("\x1b[1mbold\x1b[0m words", end="")
        print(" of the user")
        print("redrawn 1\rredrawn 2", file=sys.stderr)
        print(warnings.formatwarning("a library's", UserWarning, "file.py", 1), file=sys.stderr)  # pytest has warn()
        return build_criterion(*arguments)

    monkeypatch.setattr(train, "build_criterion", talk)
    end = command(dataclasses.replace(config, show_warnings=True))
    assert end.code == 0
    log = (config.logdir / "train.log").read_text()
    assert not re.search(r"[^\n\x20-\x7e]", log)
    said = [line.split(" ", 3)[3] for line in log.splitlines() if " INFO " in line]
    assert said[:-1] == [line for line in end.out.splitlines() if "bold" not in line]
    assert said[-1] == "finished"
    assert " OUT bold words of the user\n" in log
    assert " ERR redrawn 2\n" in log
    assert re.search(r" ERR .*UserWarning: a library's\n", log)
    assert "\x1b[1mbold\x1b[0m words of the user\n" in end.out


def test_a_bug_leaves_its_traceback_in_the_log(config, monkeypatch):
    monkeypatch.setattr(train, "valid_fn", lambda *_: int("a word"))
    assert command(config).code == 1
    log = (config.logdir / "train.log").read_text()
    assert " ERROR Traceback (most recent call last):\n" in log
    assert " ERROR failed: ValueError: invalid literal for int() with base 10: 'a word'\n" in log


def test_other_ranks_speak_into_the_log_alone_each_line_with_its_rank(config, monkeypatch, tmp_path, capfd):
    build_criterion = train.build_criterion

    def talk(*arguments):
        print(f"rank {os.environ['RANK']} prints")
        print(f"rank {os.environ['RANK']} warns", file=sys.stderr)
        return build_criterion(*arguments)

    monkeypatch.setattr(train, "build_criterion", talk)
    run_ranks(2, lambda: train.main(config), join=False)
    log = (config.logdir / "train.log").read_text()
    assert " OUT rank 0 prints\n" in log
    assert " OUT [rank 1] rank 1 prints\n" in log
    assert " ERR [rank 1] rank 1 warns\n" in log
    assert log.count("logdir   ") == 1
    out, err = capfd.readouterr()
    assert "rank 0 prints" in out
    assert "rank 1" not in out + err


def test_the_cause_of_a_failing_rank_is_in_the_log_with_its_rank(config, monkeypatch):
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


def test_a_quiet_run_says_nothing_but_what_is_wrong_and_logs_all(config):
    end = command(dataclasses.replace(config, quiet=True))
    assert (end.code, end.out, end.err) == (0, "", "")
    assert " INFO best     accuracy " in (config.logdir / "train.log").read_text()


@pytest.fixture
def terminal(config, monkeypatch):
    """Runs train.py in a terminal of 80 columns and gives what it wrote there."""

    def run() -> str:
        ours, theirs = pty.openpty()
        size = (24).to_bytes(2, sys.byteorder) + (80).to_bytes(2, sys.byteorder) + bytes(4)
        import fcntl
        import termios

        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        environment = {"TERM": "xterm-256color", "COLUMNS": "80"}

        def child() -> None:
            os.close(ours)
            os.environ.update(environment)
            sys.stdout = os.fdopen(theirs, "w")
            train.main(config)
            sys.stdout.flush()

        process = get_context("fork").Process(target=child)
        process.start()
        os.close(theirs)
        said = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux: the other side has closed
                break
            if not part:
                break
            said += part
        process.join()
        assert process.exitcode == 0
        return said.decode()

    return run


def test_on_a_terminal_a_bar_of_80_columns_shows_how_far_an_epoch_is(terminal, monkeypatch, config):
    monkeypatch.setattr("batteries.run.console.SECONDS_BETWEEN_DRAWINGS", 0.0)
    monkeypatch.setattr("batteries.run.stage.LOG_EVERY", 1)
    said = terminal()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said)
    drawn = [line for line in re.split(r"[\r\n]+", plain) if re.match(r"first [12]/2 .*/s wait ", line)]
    assert drawn
    assert max(map(len, drawn)) <= 80
    assert re.search(r" 3/3 loss \d\.\d{3} accuracy 0\.\d{3} \d+/s wait \d+% \d\.\d GB", drawn[-1]), drawn[-1]
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("first ") and " s" in line[-12:]]
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in (config.logdir / "train.log").read_text()


def test_in_a_pipe_plain_lines_say_how_far_an_epoch_is(config, monkeypatch):
    monkeypatch.setattr("batteries.run.console.SECONDS_BETWEEN_LINES", 0)
    end = command(config)
    assert not re.search(r"[^\n\x20-\x7e]", end.out)
    said = re.findall(r"^first (\d)/2  (\d)/3  loss \d\.\d{3} accuracy 0\.\d{3} \d+/s wait .*$", end.out, re.MULTILINE)
    assert said == [(str(epoch), str(step)) for epoch in (1, 2) for step in (1, 2, 3)]
    monkeypatch.setattr("batteries.run.console.SECONDS_BETWEEN_LINES", 3600)
    assert "/s wait " not in command(dataclasses.replace(config, logdir=config.logdir.with_name("other"))).out


def test_what_the_user_prints_comes_above_the_bar_and_into_the_log(terminal, monkeypatch, config):
    monkeypatch.setattr("batteries.run.console.SECONDS_BETWEEN_DRAWINGS", 0.0)
    optimizer_step = train.optimizer_step

    def talk(*arguments):
        print("seen", 32)
        return optimizer_step(*arguments)

    monkeypatch.setattr(train, "optimizer_step", talk)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal())
    assert [line for line in re.split(r"[\r\n]+", plain) if line == "seen 32"] == ["seen 32"] * 6
    assert (config.logdir / "train.log").read_text().count(" OUT seen 32\n") == 6


def test_a_run_whose_output_nobody_reads_any_more_goes_on_to_its_end(config):
    def start() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        train.main(config)

    process = get_context("fork").Process(target=start)
    process.start()
    process.join(60)
    assert (process.exitcode, read_record(config)["exit"]) == (0, "finished")
    said = (config.logdir / "train.log").read_text()
    assert said.count("Nobody reads the output any more: the run goes on, and train.log has what it says.") == 1
    assert "first 2/2" in said


def test_the_split_file_that_a_run_makes_is_no_change_of_its_code(config, monkeypatch, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for words in (["init", "-qb", "trunk"], ["commit", "-qm", "one", "--allow-empty"]):
        subprocess.run(
            ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", *words], cwd=project, check=True
        )
    monkeypatch.setattr(run_metadata, "ROOT", project)
    assert command(dataclasses.replace(config, split_file=project / "splits/default.csv")).code == 0
    assert (project / "splits/default.csv").exists()
    assert (read_record(config)["git_dirty"], (config.logdir / "git.diff").exists()) == (False, False)


@pytest.mark.parametrize("by_uv", [False, True])
def test_the_next_command_is_one_that_a_shell_understands(config, monkeypatch, by_uv):
    monkeypatch.delenv("UV", raising=False)
    if by_uv:
        monkeypatch.setenv("UV", "/usr/bin/uv")
    logdir = config.logdir.with_name("odd #1? ü")
    end = command(dataclasses.replace(config, logdir=logdir))
    words = ["uv", "run"] * by_uv + ["python", "tools/predict.py", "--run", str(logdir), "--split", "test"]
    [line] = [line for line in end.out.splitlines() if line.startswith("next ")]
    assert shlex.split(line) == ["next", *words]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_was_asked_to_stop_is_preempted(config, monkeypatch, number):
    optimizer_step = train.optimizer_step

    def stop(*arguments):
        os.kill(os.getpid(), number)
        return optimizer_step(*arguments)

    monkeypatch.setattr(train, "optimizer_step", stop)
    end = command(config)
    assert end.code == 128 + number
    assert read_record(config)["exit"] == f"preempted by {number.name}"
    assert Path(config.logdir / "first/epoch_1_step_1.pth").exists()


def test_nohup_keeps_a_run_from_the_end_of_its_terminal(config, monkeypatch):
    def hang_up(*arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        return optimizer_step(*arguments)

    optimizer_step = train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert command(config).code == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_record(config)["exit"] == "finished"


@pytest.fixture
def page_maker(config, monkeypatch, tmp_path):
    """Runs train.py with a stand-in for report.py, which is started for real."""
    monkeypatch.setattr("batteries.run.run.make_reports", reports.make_reports)
    monkeypatch.setattr(reports, "ROOT", tmp_path)

    def run(code: str, *flags: str):
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools/report.py").write_text(f"import json, os, sys\n{code}\n")
        return command(config, *flags)

    return run


def test_the_report_is_made_at_the_end_by_one_process_from_the_whole_record(page_maker, config, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # one of torchrun's, which report.py must not see
    end = page_maker(
        "record = json.load(open(sys.argv[1] + '/run.json'))\n"
        "print('report  ', *sys.argv[1:], record['exit'], record['best']['epoch'] > 0, 'LOCAL_RANK' in os.environ)"
    )
    assert end.code == 0
    assert end.out.splitlines()[-1] == f"report   {config.logdir} --device cpu finished True False"
    log = (config.logdir / "train.log").read_text()
    assert f" INFO report   {config.logdir} --device cpu finished True False\n" in log


def test_a_report_that_fails_is_said_and_the_run_is_whole(page_maker, config):
    end = page_maker("sys.exit('error: no ink')")
    assert end.code == 0
    sentence = "The run is whole, but its report was not made (error: no ink); try python tools/report.py "
    assert f"{sentence}{config.logdir}.\n" in end.out
    assert read_record(config)["exit"] == "finished"


def test_without_a_report_none_is_started(page_maker, config):
    end = page_maker("sys.exit('started')", "--no-report")
    assert (end.code, "started" in end.out) == (0, False)
