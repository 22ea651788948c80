"""Runs on packs of the data set, which tools/pack.py makes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from documents import WITHOUT_REPORT, code_blocks, copy_repository, read_page, run_commands, section
from models import tiny_network
from processes import End, run_train
from small_data import make_data
from small_runs import assert_rejected, train_on

from batteries.evaluation.predictions import read_predictions
from experiment import task
from experiment.dataset import load_dataset
from tools import pack, predict

pytestmark = pytest.mark.skipif(task.PREDICTIONS == "mask", reason="masks cannot be packed")
KINDS = pytest.mark.parametrize("kind", [["--quality", "95"], ["--raw"]], ids=["jpeg", "raw"])


def make_pack(data: Path, output: Path, *flags: str) -> End:
    flags = ("--data-dir", str(data), "--output", str(output), *flags)
    return run_train(pack.main, pack.Config, *flags, name="tools/pack.py", repeats=False)


@KINDS
def test_a_pack_has_the_samples_of_its_source(tmp_path, kind):
    source = load_dataset(make_data(tmp_path / "data"))
    end = make_pack(tmp_path / "data", tmp_path / "pack", "--side", "16", *kind)
    assert (end.code, end.err) == (0, "")
    packed = load_dataset(tmp_path / "pack")
    assert list(packed.ids) == source.ids
    assert list(packed.classes) == list(source.classes)
    for name in ("targets", "groups", "folds", "official_test"):
        assert np.array_equal(getattr(packed, name, None), getattr(source, name, None)), name
    image, target = packed[7]
    assert (image.shape, image.dtype) == ((3, 16, 16), torch.uint8)
    assert np.array_equal(target, source[7][1])


@KINDS
def test_a_pack_that_changes_no_image_gives_the_numbers_of_its_source(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(predict, "build_model", tiny_network)
    data = make_data(tmp_path / "data")
    assert make_pack(data, tmp_path / "pack", *kind).code == 0
    tables = []
    for source in (data, tmp_path / "pack"):
        logdir = tmp_path / f"run_{source.name}"
        end = train_on(source, tmp_path, "--logdir", str(logdir), "--num-workers", "1")
        assert end.code == 0, end.err
        end = run_train(
            predict.main, predict.Options, "--run", str(logdir), "--split", "valid", name="predict.py", repeats=False
        )
        assert end.code == 0, end.err
        tables.append(read_predictions(logdir / "predictions/valid.csv"))
    assert tables[0].ids == tables[1].ids
    assert np.array_equal(tables[0].values, tables[1].values)


@KINDS
def test_a_run_is_resumed_on_the_same_pack_only(tmp_path, kind):
    data = make_data(tmp_path / "data")
    for name, side in (("pack", "16"), ("other", "20")):
        assert make_pack(data, tmp_path / name, "--side", side, *kind).code == 0
    assert train_on(tmp_path / "pack", tmp_path).code == 0
    for source in (tmp_path / "other", data):
        end = train_on(source, tmp_path, "--resume")
        assert (end.code, end.err.count("\n")) == (2, 1), end
        assert "data" in end.err
    assert train_on(tmp_path / "pack", tmp_path, "--resume").code == 0


@KINDS
def test_a_pack_that_is_out_of_date_ends_training_before_anything_is_written(tmp_path, kind):
    data = make_data(tmp_path / "data")
    assert make_pack(data, tmp_path / "pack", *kind).code == 0
    with (data / load_dataset(data).ids[3]).open("ab") as file:
        file.write(b"more")
    assert_rejected(train_on(tmp_path / "pack", tmp_path), "has changed since; pack it again with: ", tmp_path)


def test_other_images_are_predicted_with_a_run_on_a_raw_pack(monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "build_model", tiny_network)
    data = make_data(tmp_path / "data")
    assert make_pack(data, tmp_path / "pack", "--raw").code == 0
    assert train_on(tmp_path / "pack", tmp_path).code == 0
    image = data / load_dataset(data).ids[0]
    flags = ["--run", str(tmp_path / "run"), "--images", str(image.parent), "--output", str(tmp_path / "out")]
    end = run_train(predict.main, predict.Options, *flags, name="tools/predict.py", repeats=False)
    assert end.code == 0, end.err
    [table] = (tmp_path / "out").glob("*.csv")
    assert image.name in read_predictions(table).ids


@pytest.mark.slow
def test_the_commands_of_the_documents_run(tmp_path):
    copy = copy_repository(tmp_path / "project")
    code = "\n".join(code_blocks(section(read_page("docs/data.md"), "Packs"), "sh"))
    run_commands(code, copy, WITHOUT_REPORT)
    assert (copy / "data-packed/pack.json").is_file()
    assert (copy / "data-raw/images.bin").is_file()
    assert (copy / "logs/baseline/metrics.jsonl").is_file()
