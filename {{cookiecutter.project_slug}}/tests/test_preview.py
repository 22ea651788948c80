"""The sheet shows what training gets."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import Pictures, Shake
from processes import End, run_train
from small_data import make_data
from torchvision.io import ImageReadMode, decode_image, read_file

from batteries.data.image_grid import make_grid_of_samples, sample_grid
from batteries.data.loaders import TrainLoader
from tools import preview


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def run_preview(data_dir, tmp_path, *flags: str) -> End:
    flags = ("--data-dir", str(data_dir), "--split-file", str(tmp_path / "x.csv"), *flags)
    return run_train(preview.main, preview.Config, *flags, name="tools/preview.py")


@pytest.mark.parametrize("mixing", [[], ["--mixup", "0.4", "--cutmix", "1"]])
def test_a_sheet_is_drawn_and_the_range_of_values_is_said(data_dir, tmp_path, mixing):
    sheet = tmp_path / "logs/sheet.png"
    end = run_preview(data_dir, tmp_path, "--sheet", str(sheet), "--samples", "3", "--epochs", "2", *mixing)
    assert end.code == 0, end.err
    picture = decode_image(read_file(str(sheet)), ImageReadMode.RGB)
    assert picture.shape[2] > picture.shape[1] > 300
    assert len(picture.flatten(1).unique(dim=1)[0]) > 20
    assert "a batch  (3, " in end.out
    assert "deviation" in end.out
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--samples", "1"], "--samples 1 must be 2 or more."),
        (["--epochs", "0"], "--epochs 0 must be 1 or more."),
        (["--samples", "12", "--batch-size", "4"], "--samples 12 are drawn of one batch: use --batch-size 12 or more."),
        (["--mixup", "-1"], "--mixup -1.0 must be 0 or more."),
        (["--cutmix", "nan"], "--cutmix nan must be 0 or more."),
        (["--sheet", "README.md/p.png"], "README.md/p.png cannot be written (File exists); use another --sheet."),
        (["--sheet", "sheet.jpg"], "--sheet sheet.jpg must end in .png."),
        (["--fold", "7"], "--fold 7 is not there"),
    ],
)
def test_bad_input_is_told_in_a_sentence(data_dir, tmp_path, flags, sentence):
    end = run_preview(data_dir, tmp_path, *flags)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert sentence in end.err


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ("0065: north", "0065: north"),
        ("images/of/2024/0065.jpg: north east", "images/of/2024/0065.jpg:\nnorth east"),
        ("0.75 a very long name + 0.25 another of the kind", "0.75 a very long name + 0.25\nanother of the kind"),
        ("0" * 40, f"{'0' * 28}\n{'0' * 12}"),
        (f"{'0065 ' * 30}end", f"{' '.join(['0065'] * 5)}\n{' '.join(['0065'] * 5)}\n{' '.join(['0065'] * 5)} …"),
    ],
)
def test_a_title_is_wrapped_and_its_beginning_is_never_cut(title, shown):
    assert preview.wrap(title) == shown


def test_letters_that_the_font_lacks_and_dollars_are_drawn_without_a_word(tmp_path):
    image, titles = torch.zeros(1, 8, 8, dtype=torch.uint8), ["猫: $x^$"] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preview.draw(tmp_path / "x.png", [image] * 2, [[image] * 2], torch.zeros(2, 1, 8, 8), titles, titles)
    assert (tmp_path / "x.png").stat().st_size > 0


def test_a_sample_can_be_looked_up_in_any_epoch_as_training_sees_it(cpu):
    loader = TrainLoader(Pictures(20), range(20), Shake(), cpu, seed=0, batch_size=20)
    epoch = loader.epoch(0, 3)
    [batch] = epoch
    for position, index in enumerate(epoch.order.tolist()):
        assert torch.equal(epoch.sample(index)[0], batch.images[position])


def test_the_sheet_for_the_tracker_has_originals_above_and_the_models_view_below(cpu):
    loader = TrainLoader(Pictures(20), range(20), Shake(), cpu, seed=0, batch_size=20)
    sheet = sample_grid(loader, lambda images: images.float() / 255 - 0.5)
    assert sheet is not None
    assert (sheet.dtype, sheet.shape) == (torch.uint8, (3, 22, 82))  # eight pictures of 8x8 in a row, two pixels apart
    originals, images, _ = loader.epoch(0, 1).peek(8)
    np.testing.assert_array_equal(sheet[0, 2:10, 2:10], originals[0][0])
    seen = images[1, 0].float() - images.min()
    np.testing.assert_allclose(sheet[0, 12:20, 12:20], seen / (images.max() - images.min()) * 255, atol=1)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_images_of_any_channels_and_sizes_can_be_shown(channels):
    originals = [torch.randint(256, (channels, 5 + size, 9), dtype=torch.uint8) for size in range(3)]
    assert make_grid_of_samples(originals, torch.randn(3, channels, 8, 8)).shape == (3, 22, 32)


def test_what_is_no_image_has_no_sheet(cpu):
    class Numbers(Pictures):
        def __getitem__(self, index):
            return torch.zeros(5), 0

    loader = TrainLoader(Numbers(20), range(20), None, cpu, seed=0, batch_size=20)
    assert sample_grid(loader, lambda images: images) is None


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.tensor(1), "land"),
        (torch.tensor(41.5), "41.5"),
        (torch.tensor([0.25, 0.0, 0.75]), "0.75 sea + 0.25 sky"),
        (torch.zeros(8, 6), "8 x 6"),
    ],
)
def test_a_target_of_any_kind_is_told_in_words(target, words):
    assert preview.name_of(target, SimpleNamespace(classes=("sky", "land", "sea"))) == words
