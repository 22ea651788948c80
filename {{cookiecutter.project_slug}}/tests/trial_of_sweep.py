"""A launch script that takes the place of training in tests of sweeps: it starts in milliseconds.

It writes the files of a run and resumes by the lines of metrics.jsonl. Each epoch takes 0.05 s. The score is best for
a learning rate of 3e-3 and grows with the epochs.
"""

import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path


def main(flags: dict[str, str]) -> int:
    """Train, and return the exit code."""
    config = json.loads(Path(flags["--config"]).read_text())
    logdir = Path(flags["--logdir"])
    logdir.mkdir(parents=True, exist_ok=True)
    with (logdir / ".lock").open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"error: --logdir {logdir} is in use by another process; wait for it, or use another.")
            return 2
        return train(config, logdir, flags.get("--device", "none"))


def train(config: dict, logdir: Path, device: str) -> int:
    """Write the lines of the epochs that are missing."""
    with (logdir / "starts.txt").open("a") as file:
        file.write(f"{device} {os.environ.get('OMP_NUM_THREADS')} {time.time()}\n")
    if config["label_smoothing"] == 0.5:
        print("Traceback (most recent call last):\n  something\nerror: label smoothing of a half is too much.")
        return 2
    if config["label_smoothing"] == 0.25:
        try:
            Path("/dev/full").write_text("weights")
        except OSError as error:
            print(f"error: best.pth cannot be written: {error.strerror}; make space.")
            return 2
    if config["label_smoothing"] == 0.75:
        os.kill(os.getpid(), signal.SIGKILL)
    lr = config["stages"][0]["lr"]
    epochs = sum(stage["epochs"] for stage in config["stages"])
    path = logdir / "metrics.jsonl"
    done = len(path.read_text().splitlines()) if path.exists() else 0
    (logdir / "config.json").write_text(json.dumps(config))
    for epoch in range(done + 1, epochs + 1):
        time.sleep(0.05)
        score = 1 - 0.1 * abs(math.log10(lr / 3e-3)) - 0.2 / epoch
        with path.open("a") as file:
            file.write(json.dumps({"stage": "stage0", "epoch": epoch, "valid": {"accuracy": score}}) + "\n")
    scores = [json.loads(line)["valid"]["accuracy"] for line in path.read_text().splitlines()]
    (logdir / "stage0").mkdir(exist_ok=True)
    (logdir / "stage0/best.pth").write_text("weights")
    best = {"metric": "accuracy", "score": max(scores), "stage": "stage0", "epoch": len(scores)}
    (logdir / "run.json").write_text(json.dumps({"exit": "finished", "best": best}))
    return 0


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--no-report")]
    sys.exit(main(dict(zip(words[::2], words[1::2], strict=True))))
