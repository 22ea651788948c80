"""Splits: written once, validated whenever they are read, without leakage; and tools/split.py."""

import csv
import json
import re
from collections import Counter

import numpy as np
import pytest
import sklearn
import torch
from image_data import RandomImages
from marks import CLASSES_ONLY
from processes import End, run_train
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split

from batteries.core.errors import UserError
from batteries.data import splits as splits_module
from batteries.data.duplicates import find_duplicates
from batteries.data.image_stats import channel_statistics, image_signature, image_signatures
from batteries.data.splits import TEST, SplitFile, parse_folds, to_csv
from batteries.data.summary import find_unusual, summary_lines
from experiment.splits import make_folds
from tools import split

pytestmark = CLASSES_ONLY


class Samples(RandomImages):
    """Images with ids, and other attributes of a data set."""

    def __init__(self, size: int = 80, **attributes: object) -> None:
        super().__init__(size)
        self.size = size
        self.ids = [f"image {index}, a" for index in range(size)]
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        return str(self.images.sum())


def open_splits(tmp_path, dataset=None, make=make_folds) -> SplitFile:
    return SplitFile(tmp_path / "splits/x.csv", dataset or Samples(), make)


def groups_of(size: int) -> list[str]:
    """Return random groups of about four samples each."""
    return [f"group{number}" for number in np.random.default_rng(0).integers(size // 4, size=size)]


@pytest.mark.parametrize("targets", ["classes", "numbers", "several labels", "none"])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("official", [False, True])
def test_folds_cover_each_sample_once_without_leakage(targets, groups, official):
    size = 400
    dataset = Samples(size, groups=groups_of(size) if groups else None)
    if targets != "classes":
        kinds = {
            "numbers": np.random.default_rng(0).normal(size=size),
            "several labels": np.eye(4)[np.arange(size) % 4],
        }
        dataset.classes, dataset.targets = None, kinds.get(targets)
    if official:
        dataset.official_test = np.isin(groups_of(size), groups_of(size)[:20]) if groups else np.arange(size) < 50
    folds = parse_folds(to_csv(dataset, make_folds(dataset)), dataset, "x.csv")
    assert set(folds.tolist()) == {TEST, 0, 1, 2, 3, 4}
    if official:
        assert ((folds == TEST) == dataset.official_test).all()
    else:
        assert 0.1 < (folds == TEST).mean() < 0.3
    if groups:
        for group in set(dataset.groups):
            assert (
                len({fold for fold, other in zip(folds.tolist(), dataset.groups, strict=True) if other == group}) == 1
            )
    elif targets == "classes" and not official:
        for fold in range(5):
            counts = Counter(dataset.targets[folds == fold].tolist())
            assert max(counts.values()) - min(counts.values()) <= 1


def test_folds_of_the_data_set_are_used():
    folds = np.arange(80) % 3 - 1
    assert (make_folds(Samples(folds=folds)) == folds).all()


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        (
            Samples(folds=np.arange(80) % 3 - 1),
            {"num_folds": 10},
            "the data set defines its own folds; remove --num-folds and --test-fraction.",
        ),
        (
            Samples(folds=np.arange(80) % 3 - 1),
            {"test_fraction": 0.5},
            "the data set defines its own folds; remove --num-folds and --test-fraction.",
        ),
        (
            Samples(official_test=np.arange(80) < 20),
            {"test_fraction": 0.5},
            "the data set has an official test split; remove --test-fraction.",
        ),
    ],
)
def test_arguments_without_effect_are_rejected(dataset, arguments, message):
    make_folds(dataset)
    with pytest.raises(UserError, match=re.escape(message)):
        make_folds(dataset, **arguments)


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 0.9])
def test_the_test_fraction_is_reached_with_groups(fraction, classes):
    size = 800
    dataset = Samples(size, groups=groups_of(size), targets=np.arange(size) % 4, classes=tuple("abcd"))
    if not classes:
        dataset.classes = dataset.targets = None
    assert (make_folds(dataset, test_fraction=fraction) == TEST).mean() == pytest.approx(fraction, abs=0.03)


def one_large_group(seed: int = 0) -> Samples:
    """Return 300 samples: a camera has 120 of the 150 of one class, and 60 cameras have three samples each."""
    targets = np.array([0] * 120 + np.random.default_rng(seed).permutation([0] * 30 + [1] * 150).tolist())
    groups = ["camera"] * 120 + [f"camera{index // 3}" for index in range(180)]
    order = np.random.default_rng(seed).permutation(300)
    return Samples(300, targets=targets[order], groups=np.array(groups)[order], classes=("empty", "car"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_a_group_with_most_of_a_class_does_not_make_the_test_split_larger(fraction, seed):
    dataset = one_large_group(seed)
    folds = make_folds(dataset, test_fraction=fraction)
    assert (folds == TEST).mean() == pytest.approx(fraction, abs=0.01)
    for group in set(dataset.groups.tolist()):
        assert len(set(folds[dataset.groups == group].tolist())) == 1
    sizes = np.bincount(folds[folds != TEST])
    if fraction < 0.5:  # the large group fits into no split but one fold, which is the last
        assert set(folds[dataset.groups == "camera"].tolist()) == {4}
        assert np.ptp(sizes[:4]) <= 3
    for fold in range(TEST, 5):
        assert set(dataset.targets[folds == fold]) == {0, 1}


def test_grouped_folds_do_not_depend_on_the_order_of_the_samples():
    first, second = one_large_group(), one_large_group()
    order = np.random.default_rng(1).permutation(300)
    second.targets, second.groups = first.targets[order], first.groups[order]
    assert (make_folds(second) == make_folds(first)[order]).all()


def test_grouped_folds_are_stratified_and_of_equal_size():
    generator = np.random.default_rng(0)
    groups, targets = np.repeat(np.arange(200), 5), np.repeat(generator.integers(4, size=200), 5)
    folds = make_folds(Samples(1000, groups=groups, targets=targets, classes=tuple("abcd")))
    assert np.bincount(folds + 1).tolist() == [200, 160, 160, 160, 160, 160]
    for fold in range(TEST, 5):
        fractions = np.bincount(targets[folds == fold]) / (folds == fold).sum()
        assert fractions == pytest.approx(np.bincount(targets) / 1000, abs=0.03)


def test_a_class_in_few_groups_is_in_each_fold():
    targets = np.array([0] * 6 + [1] * 294)
    groups = np.array([f"rare{index}" for index in range(6)] + [f"group{index // 10}" for index in range(294)])
    folds = make_folds(Samples(300, groups=groups, targets=targets, classes=("rare", "common")))
    assert sorted(folds[:6].tolist()) == [TEST, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(("sizes", "fraction"), [([100] * 3, 0.2), ([90, 70, 20], 0.3), ([60] * 7, 0.35)])
def test_a_fraction_that_groups_do_not_allow_is_rejected_with_one_that_they_do(sizes, fraction):
    groups = np.repeat([f"g{index}" for index in range(len(sizes))], sizes)
    dataset = Samples(len(groups), groups=groups, targets=np.arange(len(groups)) % 4)
    with pytest.raises(UserError, match=r"--test-fraction [\d.]+ is not possible with \d groups and 2 folds") as error:
        make_folds(dataset, 2, fraction)
    possible = float(re.search(r"use --test-fraction ([\d.]+), or 0\.$", str(error.value))[1])
    assert (make_folds(dataset, 2, possible) == TEST).mean() == pytest.approx(possible, abs=0.01)
    assert set(make_folds(dataset, 2, 0)) == {0, 1}


@pytest.mark.parametrize("fraction", [0.2, 0.1, 0.0])
@pytest.mark.parametrize("classes", [True, False])
def test_splits_without_groups_are_those_of_scikit_learn(fraction, classes):
    dataset = Samples(200) if classes else Samples(200, classes=None)
    labels, rest = dataset.targets.numpy() if classes else None, np.arange(200)
    if fraction:
        rest, _ = train_test_split(rest, test_size=fraction, stratify=labels, random_state=0)
    splitter = (StratifiedKFold if classes else KFold)(4, shuffle=True, random_state=0)
    expected = np.full(200, TEST)
    for fold, (_, chosen) in enumerate(splitter.split(rest, labels[rest] if classes else None)):
        expected[rest[chosen]] = fold
    assert (make_folds(dataset, 4, fraction) == expected).all()


def test_splits_are_disjoint_and_complete(tmp_path):
    splits = open_splits(tmp_path)
    for fold in range(5):
        selected = splits.select(fold)
        assert sorted(np.concatenate(selected).tolist()) == list(range(80))
        assert (splits.folds[selected.valid] == fold).all()
        assert (splits.folds[selected.test] == TEST).all()


def test_an_existing_file_is_used_with_rows_in_any_order(tmp_path):
    first = open_splits(tmp_path)
    first.write()
    header, *rows = first.path.read_text().splitlines()
    first.path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    again = open_splits(tmp_path, make=lambda _: pytest.fail("the folds were made again"))
    assert (again.folds == first.folds).all()
    assert again.sha256 != first.sha256


def test_a_file_saved_by_a_spreadsheet_is_the_same_split(tmp_path):
    splits = open_splits(tmp_path)
    splits.write()
    header, *rows = splits.path.read_text().splitlines()
    rows = [row.rsplit(",", 2) for row in rows]
    text = "\ufeff" + "\r\n".join([header, *(f"{name},{target}.0,{fold}" for name, target, fold in rows)])
    splits.path.write_text(text, encoding="utf-8", newline="")
    assert (open_splits(tmp_path).folds == splits.folds).all()


def edit(text: str, row: int, column: int, value: str) -> str:
    """Return `text` with another value in one cell."""
    lines = [line.rsplit(",", text.splitlines()[0].count(",")) for line in text.splitlines()]
    lines[row][column] = value
    return "\n".join(",".join(line) for line in lines) + "\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + text.splitlines()[1] + "\n", "x.csv has repeated ids: image 0, a; keep one row of each."),
        (lambda text: "\n".join(text.splitlines()[:-2]), "2 samples not in the file (image 78, a, image 79, a)"),
        (
            lambda text: text + "other,0,1,g\n",
            "x.csv belongs to another data set: 1 sample not in the data set (other)",
        ),
        (lambda text: edit(text, 1, 1, "3"), "has target '3' for image 0, a, but the data set has '0'"),
        (lambda text: edit(text, 1, 1, "north"), "has target 'north' for image 0, a, but the data set has '0'"),
        (lambda text: edit(text, 1, 3, "g9"), "has group 'g9' for image 0, a, but the data set has 'g0'"),
        (lambda text: edit(text, 1, 2, "4"), "x.csv has group g0 in folds 4 and "),
        (lambda text: edit(text, 1, 2, "1.5"), "has fold '1.5' for image 0, a; use an integer from 0, or -1"),
        (lambda text: edit(text, 1, 2, "-2"), "has fold '-2' for image 0, a"),
        (
            lambda text: text.replace("group", " Group"),
            "x.csv has a column ' Group', which is not read; rename it to 'group'",
        ),
        (lambda text: text.replace("target", "fold"), "x.csv has more than one column fold; keep one."),
        (lambda text: text.replace("fold", "part"), "x.csv has no column fold; it has id, target, part, group."),
        (
            lambda text: text.replace(",4,", ",5,"),
            "x.csv has the folds 0, 1, 2, 3, 5; number two or more folds from 0 on",
        ),
        (lambda text: "", "x.csv has no column id, fold, target, group; it has none."),
    ],
)
def test_a_file_that_does_not_fit_the_data_is_rejected(tmp_path, change, message):
    dataset = Samples(groups=[f"g{index // 2}" for index in range(80)])
    splits = open_splits(tmp_path, dataset, lambda _: np.arange(80) // 2 % 6 - 1)
    splits.write()
    splits.path.write_text(change(splits.path.read_text()).replace("image", '"image').replace(", a,", ', a",'))
    splits.path.write_text(splits.path.read_text().replace('""', '"'))
    with pytest.raises(UserError) as error:
        open_splits(tmp_path, dataset)
    assert message in str(error.value)


def single_sample_class(index: int, size: int = 80) -> torch.Tensor:
    """Return targets of which one class has a single sample, number `index`."""
    targets = torch.arange(size) % 3
    targets[index] = 3
    return targets


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Samples(targets=single_sample_class(7)),
            "class west has 1 sample, too few for 6 subsets (folds and test split); add samples until",
        ),
        (Samples(targets=torch.arange(80) % 5 - 1), "16 samples without a target can only be in the test split; set"),
        (Samples(targets=torch.arange(80) % 3), "class west has 0 samples, too few for 6 subsets"),
        (Samples(groups=["one"] * 80), "1 group cannot be divided into 6 subsets (folds and test split); add"),
        (Samples(3, classes=None), "2 samples cannot be divided into 5 subsets; add samples, or"),
        (
            Samples(folds=np.arange(79) % 5),
            "returned int64 of shape (79,); return an integer for each of the 80 samples",
        ),
        (Samples(folds=np.arange(80) % 5 / 2), "returned float64 of shape (80,)"),
        (Samples(folds=np.zeros(80, int)), "has the folds 0; number two or more folds"),
        (Samples(ids=["one"] * 80), "the data set has repeated ids: one; make each id unique."),
        (
            Samples(folds=np.arange(80) % 5, targets=np.full(80, 9)),
            "has target 9; with 4 classes it must be an integer",
        ),
        (
            Samples(targets=np.arange(80) % 4 + 1),
            "has target 4; with 4 classes it must be an integer from 0 to 3: correct targets of Samples in tests/test_",
        ),
        (Samples(folds=np.arange(80) % 5, targets=np.full(80, 0.5)), "has target 0.5; with 4 classes it must be"),
        (Samples(folds=np.arange(80) % 5, targets=np.full(80, -1)), "has samples without a target in folds: image 0"),
        (
            Samples(classes=("id", "b", "c", "d")),
            "a class has the name id, as a column of predictions/*.csv does; rename",
        ),
        (
            Samples(classes=("a", "b", "c", "target")),
            "a class has the name target, as a column of predictions/*.csv does",
        ),
        (Samples(classes=("a", "b", "c", "a")), "more than one class has the name a; make each name unique."),
    ],
)
def test_data_that_cannot_be_split_are_rejected_with_the_reason(tmp_path, dataset, message):
    with pytest.raises(UserError) as error:
        open_splits(tmp_path, dataset)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dataset", "fraction", "message"),
    [
        (
            Samples(),
            0.03,
            "is 3 for the test split and 77 for the folds; both need 4 or more, one for each class: "
            "use 0.05 to 0.95, or 0.",
        ),
        (
            Samples(),
            0.99,
            "--test-fraction 0.99 of 80 samples is 80 for the test split and 0 for the folds; both need 4 or",
        ),
        (
            Samples(classes=None),
            0.99,
            "--test-fraction 0.99 of 80 samples is 80 for the test split and 0 for the folds; both need 1 or more: use",
        ),
        (Samples(), 0.8, "class north has 4 samples outside the test split, too few for 5 folds; add samples, or use"),
        (
            Samples(60, targets=np.arange(60) % 10, classes=tuple("abcdefghij")),
            0.2,
            "class a has 4 samples outside the test split, too few for 5 folds; add samples, or use fewer folds or a",
        ),
        (
            Samples(groups=groups_of(80)),
            0.01,
            "--test-fraction 0.01 is not possible with 19 groups and 5 folds; the nearest found is ",
        ),
        (Samples(groups=groups_of(80)), 0.99, "--test-fraction 0.99 is not possible with 19 groups and 5 folds; the"),
        (
            Samples(groups=range(80)),
            0.02,
            "--test-fraction 0.02 is not possible with 80 groups and 5 folds; the nearest found is 4 of 80 samples: "
            "use --test-fraction 0.05, or 0.",
        ),
    ],
)
def test_a_test_fraction_that_leaves_too_little_is_rejected(tmp_path, dataset, fraction, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        make_folds(dataset, test_fraction=fraction)
    assert isinstance(error.value, UserError)


@pytest.mark.parametrize(("only_fold", "split_name"), [(0, "valid"), (1, "train"), (TEST, "train")])
def test_a_class_that_is_missing_in_a_split_is_rejected(tmp_path, only_fold, split_name):
    folds = np.random.default_rng(0).permutation(np.arange(80) % 6 - 1)
    index = int(np.flatnonzero(folds == only_fold)[0])
    splits = open_splits(tmp_path, Samples(targets=single_sample_class(index)), lambda _: folds)
    message = rf"the {split_name} split of fold 1 has no sample of class west \(.*x\.csv has 1 sample of west\)"
    with pytest.raises(UserError, match=message):
        splits.select(1)


def test_an_official_test_split_may_lack_targets_and_classes(tmp_path):
    targets = torch.arange(80) % 4
    targets[:20] = -1
    dataset = Samples(targets=targets, official_test=np.arange(80) < 20)
    splits = open_splits(tmp_path, dataset)
    assert splits.select(0).test.tolist() == list(range(20))
    assert '"image 0, a",,-1' in splits.text


def open_numbered_splits(tmp_path, num_folds: int) -> SplitFile:
    return open_splits(tmp_path, make=lambda _: np.arange(80) // 4 % num_folds)


def test_the_file_of_another_process_is_never_replaced(tmp_path):
    late = open_numbered_splits(tmp_path, 3)
    first = open_numbered_splits(tmp_path, 4)
    first.write()
    with pytest.raises(UserError, match=r"x\.csv already exists with a different split and is not overwritten; use"):
        late.write()
    assert late.path.read_text() == first.text
    assert [path.name for path in late.path.parent.iterdir()] == ["x.csv"]


@pytest.mark.parametrize("same", [True, False])
def test_the_first_of_two_concurrent_writers_wins(monkeypatch, tmp_path, same):
    late = open_numbered_splits(tmp_path, 3)
    first = open_numbered_splits(tmp_path, 3 if same else 4)
    write_text = splits_module.write_text

    def write_both(path, text) -> None:
        write_text(path, text)
        write_text(late.path, first.text)  # after the temporary file is written, before it is renamed

    monkeypatch.setattr(splits_module, "write_text", write_both)
    if same:
        late.write()
    else:
        with pytest.raises(UserError, match="already exists with a different split"):
            late.write()
    assert late.path.read_text() == first.text
    assert [path.name for path in late.path.parent.iterdir()] == ["x.csv"]


def run_split(monkeypatch, tmp_path, *flags: str, dataset=None) -> End:
    """Run `python tools/split.py FLAGS` with small images and the file splits/x.csv."""
    monkeypatch.setattr(split, "load_dataset", lambda _: dataset or Samples())
    file = str(tmp_path / "splits/x.csv")
    return run_train(split.main, split.Config, "--split-file", file, *flags, name="tools/split.py", repeats=False)


def test_split_writes_once_and_does_not_overwrite(monkeypatch, tmp_path):
    end = run_split(monkeypatch, tmp_path)
    assert end.code == 0, end.err
    assert "x.csv is written: 80 samples, 5 folds, sha256 " in end.out
    with (tmp_path / "splits/x.csv").open(newline="") as file:
        counts = Counter((row["target"], row["fold"]) for row in csv.DictReader(file))
    for target, name in enumerate(Samples.classes):
        row = [counts[str(target), str(fold)] for fold in (*range(5), TEST)]
        [shown] = [line.replace("│", " ").split() for line in end.out.splitlines() if f" {name} " in line]
        assert shown == [name, *map(str, row), str(sum(row))]
    before = (tmp_path / "splits/x.csv").read_bytes()
    end = run_split(monkeypatch, tmp_path)
    assert (end.code, "x.csv is up to date: 80 samples, 5 folds, " in end.out) == (0, True)
    end = run_split(monkeypatch, tmp_path, "--num-folds", "4")
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert "x.csv already exists with a different split and is not overwritten; use another file" in end.err
    assert run_split(monkeypatch, tmp_path, "--num-folds", "4", "--keep").code == 0
    assert (tmp_path / "splits/x.csv").read_bytes() == before


@pytest.mark.parametrize("flag", ["--test-fraction", "--test-share"])
def test_the_test_fraction_and_its_former_name_set_the_size_of_the_test_split(monkeypatch, tmp_path, flag):
    end = run_split(monkeypatch, tmp_path, flag, "0.5")
    assert end.code == 0, end.err
    with (tmp_path / "splits/x.csv").open(newline="") as file:
        assert Counter(row["fold"] for row in csv.DictReader(file))[str(TEST)] == 40


def test_a_file_with_another_encoding_is_the_same_split(monkeypatch, tmp_path):
    run_split(monkeypatch, tmp_path)
    file = tmp_path / "splits/x.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    end = run_split(monkeypatch, tmp_path)
    assert end.code == 0, end.err
    assert "x.csv is up to date" in end.out


@pytest.mark.parametrize("flags", [["--fold", "9"], ["--statistics", "--fold", "9"]])
def test_a_missing_fold_is_rejected_before_the_file_is_written(monkeypatch, tmp_path, flags):
    end = run_split(monkeypatch, tmp_path, *flags)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert re.search(r"--fold 9 does not exist; .*x\.csv has the folds 0 to 4\.$", end.err.strip())
    assert not list(tmp_path.iterdir())


def test_an_unwritable_path_is_rejected(tmp_path):
    (tmp_path / "splits").write_text("a file")
    with pytest.raises(UserError, match=r"splits/x\.csv cannot be written \(File exists\); use another --split-file\."):
        open_splits(tmp_path).write()


def test_statistics_are_of_the_train_split_of_the_fold(monkeypatch, tmp_path):
    monkeypatch.setattr(split, "valid_transform", lambda: None)
    dataset = Samples()
    end = run_split(monkeypatch, tmp_path, "--statistics", "--fold", "2", dataset=dataset)
    train = open_splits(tmp_path).select(2).train
    values = dataset.images[torch.from_numpy(train)].numpy() / 255
    assert f"MEAN = ({values.mean():.4f},)\nSTD = ({values.std():.4f},)\n" in end.out


def test_channel_statistics_equal_those_of_numpy():
    images = torch.randint(256, (50, 3, 7, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = channel_statistics(images.split(16))
    np.testing.assert_allclose(mean, (images.numpy() / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (images.numpy() / 255).std((0, 2, 3)), rtol=1e-9)


def photo(seed: int, size: int = 64) -> torch.Tensor:
    """Return a smooth image, as photographs are, shape (3, size, size), uint8."""
    coarse = torch.rand((1, 3, 6, 6), generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")[0].clamp(0, 255).to(torch.uint8)


def recompress(image: torch.Tensor, quality: int) -> torch.Tensor:
    from torchcodec.decoders import decode_jpeg
    from torchcodec.encoders import JpegEncoder

    return decode_jpeg(JpegEncoder(image).to_tensor(quality=quality))


def test_duplicates_in_two_subsets_are_found_without_false_pairs():
    photos = [photo(seed) for seed in range(100)]
    recompressed = recompress(photos[3], quality=60)
    smaller = torch.nn.functional.interpolate(photos[4][None].float(), size=48, mode="area")[0].to(torch.uint8)
    brighter = (photos[5].float() * 0.95 + 5).to(torch.uint8)
    dark = (photos[7].float() * 0.4).to(torch.uint8)  # another image with the same hash
    images = [*photos, photos[2].clone(), recompressed, smaller, brighter, photos[6].clone(), dark]
    subsets = np.array([0] * 100 + [1, 1, TEST, 1, 0, 1])  # the last but one is a duplicate within one subset
    pairs = find_duplicates([image_signature(image) for image in images], subsets)
    assert pairs == [(2, 100, True), (3, 101, False), (4, 102, False), (5, 103, False)]


def stroke(slant: float) -> torch.Tensor:
    """Return a slanted stroke on a black image, as of a digit 1 in MNIST, shape (1, 28, 28), uint8."""
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    distance = (x - 13.5 - slant * (y - 13.5)).abs()
    return ((1.8 - distance).clamp(0, 1) * 255 * ((y > 4) & (y < 23)))[None].to(torch.uint8)


def test_sparse_images_are_not_duplicates_because_most_pixels_are_black():
    images = [stroke(slant) for slant in np.linspace(-0.3, 0.3, 7)]
    images.append((images[2].float() * 0.95).to(torch.uint8))
    pairs = find_duplicates([image_signature(image) for image in images], np.arange(8))
    assert pairs == [(2, 7, False)]


def test_strong_compression_hides_few_duplicates():
    photos = [photo(seed) for seed in range(60)]
    images = photos + [recompress(image, quality=15) for image in photos]
    pairs = find_duplicates([image_signature(image) for image in images], np.repeat([0, 1], 60))
    assert all(pair.second == pair.first + 60 for pair in pairs)
    assert len(pairs) > 45


def test_files_left_out_are_printed(monkeypatch, tmp_path):
    end = run_split(monkeypatch, tmp_path, dataset=Samples(left_out="3 .bmp"))
    assert "\nleft out: 3 .bmp\n" in end.out
    assert "left out" not in run_split(monkeypatch, tmp_path).out


def test_what_was_understood_is_printed_with_the_fractions(monkeypatch, tmp_path):
    dataset = one_large_group()
    end = run_split(monkeypatch, tmp_path, "--test-fraction", "0.1", "--no-check-images", dataset=dataset)
    assert end.code == 0, end.err
    rows = [line.replace("│", " ").split() for line in end.out.splitlines()]
    assert ["requested", *["18.0%"] * 5, "10.0%"] in rows
    [actual] = [row[1:] for row in rows if row[:1] == ["actual"]]
    assert (actual[-1], max(actual[:-1])) == ("10.0%", "41.0%")
    assert "\nclasses  2, with samples: empty: 150, car: 150\n" in end.out
    assert "\ngroups   61 groups; the largest, camera, has 120 samples\n" in end.out
    assert re.search(
        r"\nwarning: fold \d has 123 samples and the others 36 to 39, because group camera has 120; divide", end.out
    )


def test_fractions_are_only_compared_with_those_of_the_options(monkeypatch, tmp_path):
    dataset = Samples(official_test=np.arange(80) < 20)
    end = run_split(monkeypatch, tmp_path, "--num-folds", "3", dataset=dataset)
    rows = [line.replace("│", " ").split() for line in end.out.splitlines()]
    assert ["requested", *["25.0%"] * 4] in rows
    assert "warning" not in end.out
    assert "requested" not in run_split(monkeypatch, tmp_path, "--num-folds", "2", "--keep", dataset=dataset).out
    dataset.folds = np.arange(80) % 3 - 1
    assert "requested" not in run_split(monkeypatch, tmp_path / "own", dataset=dataset).out


def labelled(counts: dict[str, int], **attributes: object) -> Samples:
    """Return samples with so many of each label, without groups."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    classes = tuple(dict.fromkeys(label for label in labels if label))
    targets = np.array([classes.index(label) if label else -1 for label in labels])
    return Samples(len(labels), targets=targets, classes=classes, **attributes)


@pytest.mark.parametrize(
    ("counts", "warnings"),
    [
        ({"cat": 10, "dog": 10, "new york": 5, "hot dog": 3, "7": 1, "12": 1}, []),
        (
            {"red": 10, "green": 9, "red green": 7},
            ["label 'red green' (7 samples) is one class, but looks like several labels, red and green; docs/data.md"],
        ),
        (
            {"red|green": 7, "green|blue": 1, "blue|red": 2, "dog": 1},
            [
                "label 'red|green' (7 samples) is one class, but looks like several labels, red and green",
                "label 'green|blue' (1 sample) is one class, but looks like several labels, green and blue",
                "label 'blue|red' (2 samples) is one class",
            ],
        ),
        ({"cat": 10, "nan": 3}, ["label 'nan' (3 samples) looks like a missing value, but is a class; leave it empty"]),
        (
            {"cat": 10, "N/A": 3, "None": 1},
            ["label 'N/A' (3 samples) looks like", "label 'None' (1 sample) looks like"],
        ),
        (
            {"cat": 10, "Cat": 3, "dog": 2},
            ["labels 'cat' (10 samples) and 'Cat' (3 samples) are different classes; write them in one way if"],
        ),
        (
            {"big cat": 10, "big_cat": 3, "Big  Cat": 1},
            ["'big_cat' (3 samples) and 'Big  Cat' (1 sample) are different"],
        ),
        (
            {"K\u00e4se": 4, "Ka\u0308se": 3},
            ["labels 'K\u00e4se' (4 samples) and 'Ka\u0308se' (3 samples) are different"],
        ),
        ({"1": 4, "01": 3, "1.5": 1}, ["labels '1' (4 samples) and '01' (3 samples) are different classes"]),
    ],
)
def test_unusual_labels_are_named_with_their_counts(counts, warnings):
    found = find_unusual(labelled(counts), np.zeros(sum(counts.values()), int))
    assert len(found) == len(warnings), found
    for text, warning in zip(found, warnings, strict=True):
        assert warning in text
        assert "\n" not in text


def test_labels_that_are_read_as_one_class_are_named():
    dataset = labelled({"0": 7, "1": 3}, raw_labels=["0"] * 4 + ["0.0"] * 3 + ["1"] * 3)
    [warning] = find_unusual(dataset, np.zeros(10, int))
    assert warning == "labels '0' (4 samples) and '0.0' (3 samples) are read as one class, 0."
    assert find_unusual(labelled({"0": 7, "1": 3}, raw_labels=["0.0"] * 7 + ["1.0"] * 3), np.zeros(10, int)) == []


def test_samples_without_a_label_are_counted():
    assert summary_lines(labelled({"cat": 1200, "dog": 3, "": 40})) == [
        "classes  2, with samples: cat: 1,200, dog: 3",
        "unknown  40 samples without a label, which can only be in the test split",
    ]
    many = summary_lines(labelled({f"class{index}": 1 for index in range(30)}))
    assert many[0].endswith("class9: 1 and 20 more")
    assert summary_lines(Samples(classes=None)) == []


def with_labels(labels: np.ndarray, names: tuple[str, ...], **attributes: object) -> Samples:
    """Return samples with several labels each."""
    return Samples(len(labels), targets=labels, classes=names, **attributes)


def test_labels_are_counted_in_the_summary():
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 0], [-1, -1]])
    assert summary_lines(with_labels(labels, ("cat", "dog"))) == [
        "labels   2, with samples: cat: 2, dog: 1; 2 samples with none of them",
        "unknown  1 sample without a label, which can only be in the test split",
    ]
    assert summary_lines(with_labels(labels[:2], ("cat", "dog"))) == ["labels   2, with samples: cat: 2, dog: 1"]


def test_the_range_of_numbers_is_in_the_summary():
    numbers = np.array([[1.5, 1e6], [-2.0, 3e6], [np.nan, 1.0]])
    assert summary_lines(Samples(3, targets=numbers, classes=("age", "mass"))) == [
        "numbers  2: age: -2 to 1.5, mean -0.25, mass: 1e+06 to 3e+06, mean 2e+06",
        "unknown  1 sample without a target, which can only be in the test split",
    ]
    assert summary_lines(Samples(3, targets=np.arange(3.0), classes=("age",))) == ["numbers  1: age: 0 to 2, mean 1"]


def test_unusual_names_of_labels_and_constant_numbers_are_warned_of():
    names = ("cat", "dog", "cat dog", "Cat ", "nan")
    assert find_unusual(with_labels(np.eye(5, dtype=int), names), np.zeros(5, int)) == [
        "label 'nan' (1 sample) looks like a missing value, but is a class; leave it empty, or the samples out, if it "
        "is none.",
        "labels 'cat' (1 sample) and 'Cat ' (1 sample) are different classes; write them in one way if they are one "
        "class.",
        "label 'cat dog' (1 sample) is one label, but looks like several labels, cat and dog; check what separates the "
        "labels.",
    ]
    numbers = np.array([[1.0, 7.0], [2.0, 7.0], [3.0, np.nan]])
    assert find_unusual(Samples(3, targets=numbers, classes=("age", "mass")), np.zeros(3, int)) == [
        "mass is 7 in all samples, so there is nothing to learn; check its column."
    ]


def rows_of_table(out: str) -> dict[str, list[str]]:
    """Return the cells of each row of the table that tools/split.py prints, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    return {name: cells for name, *cells in rows}


def test_the_table_has_a_row_for_each_label(monkeypatch, tmp_path):
    labels = np.random.default_rng(0).integers(2, size=(80, 3))
    labels[:10] = -1
    folds = np.where(np.arange(80) < 20, TEST, np.arange(80) % 3)
    end = run_split(monkeypatch, tmp_path, dataset=with_labels(labels, ("cat", "dog", "owl"), folds=folds))
    assert (end.code, end.err) == (0, "")
    assert "┃ label " in end.out
    wanted = {}
    for column, name in enumerate(("cat", "dog", "owl")):
        counts = [sum(labels[row][column] == 1 for row in np.flatnonzero(folds == fold)) for fold in (0, 1, 2, TEST)]
        wanted[name] = [str(count) for count in [*counts, sum(counts)]]
    rows = rows_of_table(end.out)
    assert {name: rows[name] for name in wanted} == wanted
    empty = [int(sum(not labels[row].any() for row in np.flatnonzero(folds == fold))) for fold in (0, 1, 2, TEST)]
    assert rows["no label"] == [str(count) for count in [*empty, sum(empty)]]
    assert rows["unknown"] == ["0", "0", "0", "10", "10"]
    assert rows["all"] == ["20", "20", "20", "20", "80"]


def test_the_table_has_the_mean_of_each_number_and_statistics_are_those_of_the_train_split(monkeypatch, tmp_path):
    numbers = np.random.default_rng(0).normal((5, -1e6), (2, 1e5), size=(80, 2))
    numbers[:20] = np.nan
    folds = np.where(np.arange(80) < 20, TEST, np.arange(80) % 3)
    dataset = Samples(targets=numbers, classes=("age", "mass"), folds=folds)
    end = run_split(monkeypatch, tmp_path, "--statistics", "--fold", "1", dataset=dataset)
    assert (end.code, end.err) == (0, "")
    rows = rows_of_table(end.out)
    for column, name in enumerate(("age", "mass")):
        means = [np.mean([numbers[row, column] for row in np.flatnonzero(folds == fold)]) for fold in (0, 1, 2)]
        assert rows[f"mean {name}"] == [*[f"{mean:.4g}" for mean in means], "–", f"{numbers[20:, column].mean():.4g}"]
    assert rows["unknown"] == ["0", "0", "0", "20", "20"]
    train = numbers[(folds == 0) | (folds == 2)]
    constants = dict(re.findall(r"^(TARGET_\w+) = \((.+),\)$", end.out, re.MULTILINE))
    for name, wanted in (("TARGET_MEAN", train.mean(0)), ("TARGET_STD", train.std(0))):
        assert [float(value) for value in constants[name].split(", ")] == pytest.approx(wanted.tolist(), rel=1e-5)
    assert "TARGET_MEAN" not in run_split(monkeypatch, tmp_path / "other", "--statistics").out


def test_the_libraries_are_recorded_when_a_split_is_made(tmp_path):
    splits = open_splits(tmp_path)
    assert (splits.is_new, splits.describe()["made_with"]["scikit-learn"]) == (True, sklearn.__version__)
    splits.write()
    again = open_splits(tmp_path)
    assert (again.is_new, again.describe()["made_with"]) == (False, None)


def test_duplicates_are_listed_and_the_file_is_written(monkeypatch, tmp_path):
    dataset = Samples(folds=np.arange(80) // 4 % 5)
    dataset.images[4] = dataset.images[0]
    end = run_split(monkeypatch, tmp_path, dataset=dataset)
    assert end.code == 0
    assert "image 0, a (fold 0) and image 4, a (fold 1) are equal\n" in end.out
    assert "duplicates across folds: 1 equal, 0 nearly equal" in end.out


def test_equal_images_with_different_targets_are_listed(monkeypatch, tmp_path):
    dataset = Samples(folds=np.arange(80) // 4 % 5, targets=torch.arange(80) % 4)
    dataset.images[1] = dataset.images[0]
    end = run_split(monkeypatch, tmp_path, dataset=dataset)
    assert end.code == 0
    assert "duplicates across folds: 0 equal, 0 nearly equal\n" in end.out
    assert "image 0, a (north) and image 1, a (east) are equal but have different targets\n" in end.out
    assert (
        "contradictions: 1 pair of equal images with different targets; fix the targets or remove the images\n"
        in end.out
    )
    dataset.images[1] = Samples().images[1]
    assert "contradictions" not in run_split(monkeypatch, tmp_path, "--keep", dataset=dataset).out


@pytest.mark.parametrize(
    ("targets", "names", "described"),
    [
        (np.arange(80)[:, None] % (2, 3) % 2, ("cat", "dog"), ["(no label)", "(cat, dog)"]),
        (np.arange(80) / 8, ("age",), ["(age 0)", "(age 0.125)"]),
        (np.arange(80)[:, None] / (8, -4), ("age", "mass"), ["(age 0, mass 0)", "(age 0.125, mass -0.25)"]),
    ],
)
def test_equal_images_with_different_labels_or_numbers_are_listed(monkeypatch, tmp_path, targets, names, described):
    dataset = Samples(folds=np.arange(80) // 2 % 3, targets=targets, classes=names)
    dataset.images[1] = dataset.images[0]
    first, second = described
    line = f"image 0, a {first} and image 1, a {second} are equal but have different targets\n"
    assert line in run_split(monkeypatch, tmp_path, dataset=dataset).out
    dataset.targets = targets.copy()
    dataset.targets[1] = targets[0]
    assert "contradictions" not in run_split(monkeypatch, tmp_path / "other", dataset=dataset).out
    dataset.targets[0] = np.nan if targets.dtype == float else -1
    dataset.folds = np.where(np.arange(80) < 1, TEST, dataset.folds)
    assert "contradictions" not in run_split(monkeypatch, tmp_path / "third", dataset=dataset).out


def test_unknown_targets_are_not_contradictions(monkeypatch, tmp_path):
    targets = torch.arange(80) % 4
    targets[:20] = -1
    dataset = Samples(targets=targets, official_test=np.arange(80) < 20)
    dataset.images[0] = dataset.images[30]
    end = run_split(monkeypatch, tmp_path, dataset=dataset)
    assert "duplicates across folds: 1 equal" in end.out
    assert "contradictions" not in end.out


def test_an_invalid_image_is_reported_and_nothing_is_written(monkeypatch, tmp_path):
    class Damaged(Samples):
        def __getitem__(self, index):
            if index == 7:
                raise UserError("image7.jpg is truncated.")
            return super().__getitem__(index)

    end = run_split(monkeypatch, tmp_path, dataset=Damaged())
    assert (end.code, end.err) == (2, "error: 1 of 80 images cannot be read: image7.jpg is truncated.\n")
    assert not list(tmp_path.iterdir())
    assert sum(isinstance(found, str) for found in image_signatures(Damaged(), range(10))) == 1
    assert json.dumps(open_splits(tmp_path).describe())


def test_groups_that_only_the_file_has_must_be_in_one_fold(tmp_path):
    splits = open_splits(tmp_path)
    splits.write()
    header, *lines = splits.text.splitlines()
    in_fold_0 = next(number for number, line in enumerate(lines) if line.endswith(",0"))
    in_fold_1 = next(number for number, line in enumerate(lines) if line.endswith(",1"))
    pair = (in_fold_0, in_fold_1)
    rows = [line + (",pair" if number in pair else ",") for number, line in enumerate(lines)]
    splits.path.write_text("\n".join([f"{header},group", *rows]) + "\n")
    with pytest.raises(UserError, match=r"has group pair in folds [01] and [01]; a group must be in one"):
        open_splits(tmp_path)
    rows[in_fold_1] = f"{lines[in_fold_1]},"
    splits.path.write_text("\n".join([f"{header},group", *rows]) + "\n")
    assert (open_splits(tmp_path).folds == splits.folds).all()
