"""A split is written once, checked whenever it is read, and leaks nothing."""

import csv
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from pictures import Pictures
from processes import End, run_train

from batteries.core.errors import UserError
from batteries.data import splits as splits_module
from batteries.data.duplicates import find_duplicates
from batteries.data.image_stats import channel_statistics, image_signature, image_signatures
from batteries.data.splits import TEST, SplitFile, parse_folds, to_csv
from experiment.splits import make_folds
from tools import split


class Samples(Pictures):
    """Pictures as a data set that can be split, with ids."""

    def __init__(self, size: int = 80, **attributes: object) -> None:
        super().__init__(size)
        self.size = size
        self.ids = [f"picture {index}, a" for index in range(size)]
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        return str(self.images.sum())


def open_splits(tmp_path, dataset=None, make=make_folds) -> SplitFile:
    return SplitFile(tmp_path / "splits/x.csv", dataset or Samples(), make)


def groups_of(size: int) -> list[str]:
    """About four samples each."""
    return [f"group{number}" for number in np.random.default_rng(0).integers(size // 4, size=size)]


@pytest.mark.parametrize("targets", ["classes", "numbers", "several labels", "none"])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("official", [False, True])
def test_folds_cover_each_sample_once_and_neither_groups_nor_the_test_split_leak(targets, groups, official):
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


def test_a_column_that_the_user_brings_decides():
    brought = np.arange(80) % 3 - 1
    assert (make_folds(Samples(folds=brought)) == brought).all()


@pytest.mark.parametrize(
    ("dataset", "numbers"),
    [
        (Samples(folds=np.arange(80) % 3 - 1), {"num_folds": 10}),
        (Samples(folds=np.arange(80) % 3 - 1), {"test_fraction": 0.5}),
        (Samples(official_test=np.arange(80) < 20), {"test_fraction": 0.5}),
    ],
)
def test_a_number_that_would_change_nothing_is_refused(dataset, numbers):
    make_folds(dataset)
    with pytest.raises(UserError, match=rf"the data bring .* of their own: leave .*--{next(iter(numbers))[:3]}"):
        make_folds(dataset, **numbers)


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 0.9])
def test_the_test_share_is_what_was_asked_for_with_groups_too(share, classes):
    size = 800
    dataset = Samples(size, groups=groups_of(size), targets=np.arange(size) % 4, classes=tuple("abcd"))
    if not classes:
        dataset.classes = dataset.targets = None
    assert (make_folds(dataset, test_fraction=share) == TEST).mean() == pytest.approx(share, abs=0.03)


def test_parts_share_no_sample_and_training_is_what_neither_validates_nor_tests(tmp_path):
    splits = open_splits(tmp_path)
    for fold in range(5):
        parts = splits.select(fold)
        assert sorted(np.concatenate(parts).tolist()) == list(range(80))
        assert (splits.folds[parts.valid] == fold).all()
        assert (splits.folds[parts.test] == TEST).all()


def test_the_file_is_what_counts_from_then_on_and_its_rows_may_stand_in_another_order(tmp_path):
    first = open_splits(tmp_path)
    first.write()
    header, *rows = first.path.read_text().splitlines()
    first.path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    again = open_splits(tmp_path, make=lambda _: pytest.fail("made anew"))
    assert (again.folds == first.folds).all()
    assert again.sha256 != first.sha256


def test_a_table_that_went_through_a_spreadsheet_is_still_the_same(tmp_path):
    splits = open_splits(tmp_path)
    splits.write()
    header, *rows = splits.path.read_text().splitlines()
    rows = [row.rsplit(",", 2) for row in rows]
    text = "\ufeff" + "\r\n".join([header, *(f"{name},{target}.0,{fold}" for name, target, fold in rows)])
    splits.path.write_text(text, encoding="utf-8", newline="")
    assert (open_splits(tmp_path).folds == splits.folds).all()


def edit(text: str, row: int, column: int, value: str) -> str:
    """`text` with another value in one cell of x.csv."""
    lines = [line.rsplit(",", text.splitlines()[0].count(",")) for line in text.splitlines()]
    lines[row][column] = value
    return "\n".join(",".join(line) for line in lines) + "\n"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: text + text.splitlines()[1] + "\n", "x.csv has ids more than once: picture 0, a;"),
        (lambda text: "\n".join(text.splitlines()[:-2]), "without 2 samples of it (picture 78, a, picture 79, a)"),
        (lambda text: text + "other,0,1,g\n", "with 1 that it does not have (other)"),
        (lambda text: edit(text, 1, 1, "3"), "has target '3' for picture 0, a, and the data set '0'"),
        (lambda text: edit(text, 1, 1, "north"), "has target 'north' for picture 0, a, and the data set '0'"),
        (lambda text: edit(text, 1, 3, "g9"), "has group 'g9' for picture 0, a, and the data set 'g0'"),
        (lambda text: edit(text, 1, 2, "4"), "x.csv has group g0 in folds 4 and "),
        (lambda text: edit(text, 1, 2, "1.5"), "has fold '1.5' for picture 0, a; give a whole number from 0, or -1"),
        (lambda text: edit(text, 1, 2, "-2"), "has fold '-2' for picture 0, a"),
        (
            lambda text: text.replace("group", " Group"),
            "x.csv has a column ' Group', which is not read; call it 'group'",
        ),
        (lambda text: text.replace("target", "fold"), "x.csv has column fold more than once; leave one."),
        (lambda text: text.replace("fold", "part"), "x.csv has no column fold; it has id, target, part, group."),
        (lambda text: text.replace(",4,", ",5,"), "x.csv has the folds 0, 1, 2, 3, 5; number two or more from 0 on"),
        (lambda text: "", "x.csv has no column id, fold, target, group; it has none."),
    ],
)
def test_a_file_that_does_not_fit_the_data_is_refused_by_name(tmp_path, change, sentence):
    dataset = Samples(groups=[f"g{index // 2}" for index in range(80)])
    splits = open_splits(tmp_path, dataset, lambda _: np.arange(80) // 2 % 6 - 1)
    splits.write()
    splits.path.write_text(change(splits.path.read_text()).replace("picture", '"picture').replace(", a,", ', a",'))
    splits.path.write_text(splits.path.read_text().replace('""', '"'))
    with pytest.raises(UserError) as error:
        open_splits(tmp_path, dataset)
    assert sentence in str(error.value)


def in_class(index: int, size: int = 80) -> torch.Tensor:
    """Targets of which one class has a single sample, number `index`."""
    targets = torch.arange(size) % 3
    targets[index] = 3
    return targets


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        (Samples(targets=in_class(7)), "class west has 1 sample, too few for 6 parts"),
        (Samples(targets=torch.arange(80) % 3), "class west has 0 samples, too few for 6 parts"),
        (Samples(groups=["one"] * 80), "1 groups are too few for 5 parts"),
        (Samples(3, classes=None), "2 samples are too few for 5 parts"),
        (Samples(folds=np.arange(79) % 5), "gave int64 of shape (79,); give a whole number for each of 80 samples"),
        (Samples(folds=np.arange(80) % 5 / 2), "gave float64 of shape (80,)"),
        (Samples(folds=np.zeros(80, int)), "has the folds 0; number two or more"),
        (Samples(ids=["one"] * 80), "the data set's ids repeat: one; each sample needs one of its own."),
        (Samples(folds=np.arange(80) % 5, targets=np.full(80, 9)), "has target 9; with 4 classes a target is a whole"),
        (Samples(folds=np.arange(80) % 5, targets=np.full(80, 0.5)), "has target 0.5; with 4 classes a target is"),
        (Samples(folds=np.arange(80) % 5, targets=np.full(80, -1)), "trains on samples without a target: picture 0"),
        (Samples(classes=("id", "b", "c", "d")), "a class is called id, as is a column of predictions/*.csv; call it"),
        (Samples(classes=("a", "b", "c", "target")), "a class is called target, as is a column of predictions/*.csv"),
        (Samples(classes=("a", "b", "c", "a")), "more than one class is called a; each needs a name of its own."),
    ],
)
def test_data_that_cannot_be_split_are_refused_with_the_reason(tmp_path, dataset, sentence):
    with pytest.raises(UserError) as error:
        open_splits(tmp_path, dataset)
    assert sentence in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dataset", "share", "sentence"),
    [
        (
            Samples(),
            0.03,
            "is 3 to test and 77 for the folds; both need 4 or more, one for each class: use 0.05 to 0.95, or 0.",
        ),
        (Samples(), 0.99, "--test-share 0.99 of 80 samples is 80 to test and 0 for the folds; both need 4 or more"),
        (Samples(classes=None), 0.99, "--test-share 0.99 of 80 samples is 80 to test and 0 for the folds; both need 1"),
        (Samples(), 0.8, "class north keeps 4 samples beside the test split, too few for 5 folds; bring more, or use"),
        (
            Samples(60, targets=np.arange(60) % 10, classes=tuple("abcdefghij")),
            0.2,
            "class a keeps 4 samples beside the test split, too few for 5 folds; bring more, or use fewer folds or a",
        ),
        (Samples(groups=groups_of(80)), 0.01, "19 groups are too few for 100 parts; bring more, or use fewer folds or"),
        (Samples(groups=groups_of(80)), 0.99, "--test-share 0.99 leaves none of 19 groups; use a smaller one."),
        (Samples(groups=range(80)), 0.02, "no class has more than 20 samples, too few for 50 parts; use another"),
    ],
)
def test_a_test_share_that_leaves_too_little_on_either_side_is_refused(tmp_path, dataset, share, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        make_folds(dataset, test_fraction=share)
    assert isinstance(error.value, UserError)


@pytest.mark.parametrize(("where", "part"), [(0, "valid"), (1, "train"), (TEST, "train")])
def test_a_class_in_one_part_only_is_refused_by_the_name_of_a_part_without_it(tmp_path, where, part):
    folds = np.random.default_rng(0).permutation(np.arange(80) % 6 - 1)
    only = int(np.flatnonzero(folds == where)[0])
    splits = open_splits(tmp_path, Samples(targets=in_class(only)), lambda _: folds)
    with pytest.raises(UserError, match=rf"the {part} split of fold 1 has no sample of class west \(1 of west in all"):
        splits.select(1)


def test_an_official_test_split_may_lack_targets_and_classes(tmp_path):
    targets = torch.arange(80) % 4
    targets[:20] = -1
    dataset = Samples(targets=targets, official_test=np.arange(80) < 20)
    splits = open_splits(tmp_path, dataset)
    assert splits.select(0).test.tolist() == list(range(20))
    assert '"picture 0, a",,-1' in splits.text


def test_what_another_process_wrote_meanwhile_is_never_replaced(tmp_path):
    ours, theirs = (open_splits(tmp_path, make=lambda _, k=k: np.arange(80) // 4 % k) for k in (3, 4))
    theirs.write()
    with pytest.raises(UserError, match=r"x\.csv is another split by now, and no file is changed"):
        ours.write()
    assert ours.path.read_text() == theirs.text
    assert [path.name for path in ours.path.parent.iterdir()] == ["x.csv"]


@pytest.mark.parametrize("same", [True, False])
def test_of_two_processes_that_make_the_file_at_once_the_first_wins(monkeypatch, tmp_path, same):
    ours, theirs = (open_splits(tmp_path, make=lambda _, k=k: np.arange(80) // 4 % k) for k in (3, 3 if same else 4))
    write_text = splits_module.write_text

    def write_while_another_does(path, text) -> None:
        write_text(path, text)
        write_text(ours.path, theirs.text)  # between our draft and its name

    monkeypatch.setattr(splits_module, "write_text", write_while_another_does)
    if same:
        ours.write()
    else:
        with pytest.raises(UserError, match="another split by now"):
            ours.write()
    assert ours.path.read_text() == theirs.text
    assert [path.name for path in ours.path.parent.iterdir()] == ["x.csv"]


def run_split(monkeypatch, tmp_path, *flags: str, dataset=None) -> End:
    """`python tools/split.py FLAGS` over small pictures, with splits/x.csv as the file."""
    monkeypatch.setattr(split, "load_dataset", lambda _: dataset or Samples())
    file = str(tmp_path / "splits/x.csv")
    return run_train(split.main, split.Config, "--split-file", file, *flags, name="tools/split.py")


def test_split_py_writes_once_says_so_again_and_refuses_to_change(monkeypatch, tmp_path):
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
    assert (end.code, "x.csv is there already, and the same" in end.out) == (0, True)
    end = run_split(monkeypatch, tmp_path, "--num-folds", "4")
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert "is there and another split than this would be; write it under another name" in end.err
    assert run_split(monkeypatch, tmp_path, "--num-folds", "4", "--keep").code == 0
    assert (tmp_path / "splits/x.csv").read_bytes() == before


def test_a_file_with_equal_contents_is_the_same_split_however_it_was_saved(monkeypatch, tmp_path):
    run_split(monkeypatch, tmp_path)
    file = tmp_path / "splits/x.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    end = run_split(monkeypatch, tmp_path)
    assert end.code == 0, end.err
    assert "x.csv is there already, and the same" in end.out


@pytest.mark.parametrize("flags", [["--fold", "9"], ["--statistics", "--fold", "9"]])
def test_a_fold_that_is_not_there_is_refused_before_the_file_is_written(monkeypatch, tmp_path, flags):
    end = run_split(monkeypatch, tmp_path, *flags)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert "--fold 9 is not there; use 0 to 4." in end.err
    assert not list(tmp_path.iterdir())


def test_a_place_where_no_file_can_be_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "splits").write_text("a file")
    with pytest.raises(UserError, match=r"splits/x\.csv cannot be written \(File exists\); use another --split-file\."):
        open_splits(tmp_path).write()


def test_statistics_are_those_of_the_train_split_of_the_fold_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(split, "valid_transform", lambda: None)
    dataset = Samples()
    end = run_split(monkeypatch, tmp_path, "--statistics", "--fold", "2", dataset=dataset)
    train = open_splits(tmp_path).select(2).train
    values = dataset.images[torch.from_numpy(train)].numpy() / 255
    assert f"MEAN = ({values.mean():.4f},)\nSTD = ({values.std():.4f},)\n" in end.out


def test_statistics_of_each_channel_equal_numpys():
    images = torch.randint(256, (50, 3, 7, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = channel_statistics(images.split(16))
    np.testing.assert_allclose(mean, (images.numpy() / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (images.numpy() / 255).std((0, 2, 3)), rtol=1e-9)


def photo(seed: int, size: int = 64) -> torch.Tensor:
    """A smooth picture, as photographs are: (3, size, size), uint8."""
    coarse = torch.rand((1, 3, 6, 6), generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")[0].clamp(0, 255).to(torch.uint8)


def test_equal_and_nearly_equal_images_in_two_parts_are_found_and_no_others():
    from torchvision.io import decode_jpeg, encode_jpeg

    photos = [photo(seed) for seed in range(100)]
    recompressed = decode_jpeg(encode_jpeg(photos[3], quality=60))
    smaller = torch.nn.functional.interpolate(photos[4][None].float(), size=48, mode="area")[0].to(torch.uint8)
    brighter = (photos[5].float() * 0.95 + 5).to(torch.uint8)
    dark = (photos[7].float() * 0.4).to(torch.uint8)  # of the same hash, and another picture
    images = [*photos, photos[2].clone(), recompressed, smaller, brighter, photos[6].clone(), dark]
    parts = np.array([0] * 100 + [1, 1, TEST, 1, 0, 1])  # the last but one is a duplicate within one part
    pairs = find_duplicates([image_signature(image) for image in images], parts)
    assert pairs == [(2, 100, True), (3, 101, False), (4, 102, False), (5, 103, False)]


def test_hard_compression_hides_few_duplicates_and_makes_none():
    from torchvision.io import decode_jpeg, encode_jpeg

    photos = [photo(seed) for seed in range(60)]
    images = photos + [decode_jpeg(encode_jpeg(image, quality=15)) for image in photos]
    pairs = find_duplicates([image_signature(image) for image in images], np.repeat([0, 1], 60))
    assert all(pair.second == pair.first + 60 for pair in pairs)
    assert len(pairs) > 45


def test_files_that_a_data_set_left_out_are_told(monkeypatch, tmp_path):
    end = run_split(monkeypatch, tmp_path, dataset=Samples(left_out="3 .bmp"))
    assert "\nleft out: 3 .bmp\n" in end.out
    assert "left out" not in run_split(monkeypatch, tmp_path).out


def test_duplicates_are_counted_and_named_and_do_not_stop_the_split(monkeypatch, tmp_path):
    dataset = Samples(folds=np.arange(80) // 4 % 5)
    dataset.images[4] = dataset.images[0]
    end = run_split(monkeypatch, tmp_path, dataset=dataset)
    assert end.code == 0
    assert "picture 0, a (fold 0) and picture 4, a (fold 1) are equal\n" in end.out
    assert "duplicates across folds: 1 equal, 0 nearly equal" in end.out


def test_equal_images_with_other_targets_are_named_in_whatever_fold(monkeypatch, tmp_path):
    dataset = Samples(folds=np.arange(80) // 4 % 5, targets=torch.arange(80) % 4)
    dataset.images[1] = dataset.images[0]
    end = run_split(monkeypatch, tmp_path, dataset=dataset)
    assert end.code == 0
    assert "duplicates across folds: 0 equal, 0 nearly equal\n" in end.out
    assert "picture 0, a (north) and picture 1, a (east) are equal, and their targets are not\n" in end.out
    assert "contradictions: 1 pairs of equal images with different targets; mend or leave them out\n" in end.out
    dataset.images[1] = Samples().images[1]
    assert "contradictions" not in run_split(monkeypatch, tmp_path, "--keep", dataset=dataset).out


def test_what_is_not_known_contradicts_nothing(monkeypatch, tmp_path):
    targets = torch.arange(80) % 4
    targets[:20] = -1
    dataset = Samples(targets=targets, official_test=np.arange(80) < 20)
    dataset.images[0] = dataset.images[30]
    end = run_split(monkeypatch, tmp_path, dataset=dataset)
    assert "duplicates across folds: 1 equal" in end.out
    assert "contradictions" not in end.out


def test_a_broken_image_is_named_and_nothing_is_written(monkeypatch, tmp_path):
    class Broken(Samples):
        def __getitem__(self, index):
            if index == 7:
                raise UserError("image7.jpg is cut short.")
            return super().__getitem__(index)

    end = run_split(monkeypatch, tmp_path, dataset=Broken())
    assert (end.code, end.err) == (2, "error: 1 of 80 images cannot be read: image7.jpg is cut short.\n")
    assert not list(tmp_path.iterdir())
    assert sum(isinstance(found, str) for found in image_signatures(Broken(), range(10))) == 1
    assert json.dumps(open_splits(tmp_path).describe())


def test_groups_that_were_written_into_the_file_alone_stay_in_one_fold_too(tmp_path):
    splits = open_splits(tmp_path)
    splits.write()
    header, *lines = splits.text.splitlines()
    one, other = (next(place for place, line in enumerate(lines) if line.endswith(f",{fold}")) for fold in (0, 1))
    rows = [line + (",pair" if place in (one, other) else ",") for place, line in enumerate(lines)]
    splits.path.write_text("\n".join([f"{header},group", *rows]) + "\n")
    with pytest.raises(UserError, match=r"has group pair in folds [01] and [01]; a group stays in one"):
        open_splits(tmp_path)
    rows[other] = f"{lines[other]},"
    splits.path.write_text("\n".join([f"{header},group", *rows]) + "\n")
    assert (open_splits(tmp_path).folds == splits.folds).all()
