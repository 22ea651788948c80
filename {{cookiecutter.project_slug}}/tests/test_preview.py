"""tools/preview.py and image grids show what training gets."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_data import RandomImages, RandomNoise
from processes import End, run_train
from small_data import make_data

from batteries.data.image_decoding import decode_file
from batteries.data.image_grid import make_grid_of_samples, sample_grid
from batteries.data.loaders import TrainLoader
from experiment.augmentations import train_transform
from tools import preview


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def run_preview(data_dir, tmp_path, *flags: str) -> End:
    flags = ("--data-dir", str(data_dir), "--split-file", str(tmp_path / "x.csv"), *flags)
    return run_train(preview.main, preview.Config, *flags, name="tools/preview.py", repeats=False)


MIXING = ["--mixup", "0.4", "--cutmix", "1"]


@pytest.mark.parametrize("mixing", [[], MIXING, [*MIXING, "--shards", "8"]])
def test_the_image_is_drawn_and_the_range_of_values_printed(data_dir, tmp_path, mixing):
    sheet = tmp_path / "logs/sheet.png"
    end = run_preview(data_dir, tmp_path, "--sheet", str(sheet), "--samples", "3", "--epochs", "2", *mixing)
    assert end.code == 0, end.err
    image = decode_file(sheet, "RGB")
    assert image.shape[2] > image.shape[1] > 300
    assert len(image.flatten(1).unique(dim=1)[0]) > 20
    assert "batch    (3, " in end.out
    assert "deviation" in end.out
    [line] = [line for line in end.out.splitlines() if line.startswith("augment  ")]
    assert line.endswith("; see experiment/augmentations.py")
    for step in train_transform().transforms:
        assert repr(step) in line
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "1"], "--samples 1 must be 2 or more."),
        (["--epochs", "0"], "--epochs 0 must be 1 or more."),
        (
            ["--samples", "12", "--batch-size", "4"],
            "--samples 12 must not exceed --batch-size 4, because they come from one batch; "
            "use --batch-size 12 or more.",
        ),
        (["--mixup", "-1"], "--mixup -1.0 must be 0 or more."),
        (["--cutmix", "nan"], "--cutmix nan must be finite and 0 or more."),
        (["--sheet", "README.md/p.png"], "README.md/p.png cannot be written (File exists); use another --sheet."),
        (["--sheet", "sheet.jpg"], "--sheet sheet.jpg must end in .png."),
        (["--fold", "7"], "--fold 7 does not exist"),
    ],
)
def test_invalid_options_are_rejected_with_one_line(data_dir, tmp_path, flags, message):
    end = run_preview(data_dir, tmp_path, *flags)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert message in end.err


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
def test_titles_are_wrapped_and_keep_their_beginning(title, shown):
    assert preview.wrap_title(title) == shown


def test_missing_glyphs_and_dollar_signs_do_not_warn(tmp_path):
    image = torch.zeros(3, 8, 8)
    titles = ["猫: $x^$"] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preview.draw(
            tmp_path / "x.png", [image / 255.0] * 2, [[image / 255.0] * 2], torch.zeros(2, 1, 8, 8), "0", titles, titles
        )
    assert (tmp_path / "x.png").stat().st_size > 0


def test_sample_returns_the_augmentation_of_any_epoch(cpu):
    loader = TrainLoader(RandomImages(20), range(20), RandomNoise(), cpu, seed=0, batch_size=20)
    epoch = loader.epoch(0, 3)
    [batch] = epoch
    for position, index in enumerate(epoch.order.tolist()):
        assert torch.equal(epoch.sample(index)[0], batch.images[position])


def test_the_grid_has_originals_above_the_model_inputs(cpu):
    loader = TrainLoader(RandomImages(20), range(20), RandomNoise(), cpu, seed=0, batch_size=20)
    grid = sample_grid(loader, lambda images: images.float() / 255 - 0.5)
    assert grid is not None
    assert (grid.dtype, grid.shape) == (torch.uint8, (3, 22, 82))  # eight images of 8x8 in a row, two pixels apart
    originals, images, _ = loader.epoch(0, 1).peek(8)
    np.testing.assert_array_equal(grid[0, 2:10, 2:10], originals[0][0])
    shifted = images[1, 0].float() - images.min()
    np.testing.assert_allclose(grid[0, 12:20, 12:20], shifted / (images.max() - images.min()) * 255, atol=1)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_grids_accept_any_number_of_channels_and_sizes(channels):
    originals = [torch.randint(256, (channels, 5 + size, 9), dtype=torch.uint8) for size in range(3)]
    assert make_grid_of_samples(originals, torch.randn(3, channels, 8, 8)).shape == (3, 22, 32)


def test_samples_that_are_not_images_have_no_grid(cpu):
    class Numbers(RandomImages):
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
def test_targets_of_any_kind_are_described(target, words):
    assert preview.describe_target(target, SimpleNamespace(classes=("sky", "land", "sea"))) == words


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.tensor([1, 0, 1]), "sky, sea"),
        (torch.tensor([0.0, 1.0, 0.0]), "land"),
        (torch.tensor([0, 0, 0]), "no label"),
        (torch.tensor([0.25, 1.0, 0.75]), "1.00 land, 0.75 sea, 0.25 sky"),
    ],
)
def test_labels_are_listed_with_weights_if_they_are_mixed(target, words):
    dataset = SimpleNamespace(classes=("sky", "land", "sea"), targets=np.eye(3, dtype=int))
    assert preview.describe_target(target, dataset) == words


@pytest.mark.parametrize(
    ("targets", "target", "words"),
    [
        (np.linspace(0, 9, 5), torch.tensor(41.5), "age 41.5"),
        (np.linspace(0, 9, 5), torch.tensor([0.0]), "age 0"),  # as mixup returns it
        (np.linspace((0, 1), (8, 9), 5), torch.tensor([-1.25, 3e6]), "age -1.25, mass 3e+06"),
    ],
)
def test_numbers_are_described_with_their_names(targets, target, words):
    names = ("age", "mass")[: targets[:1].size]
    assert preview.describe_target(target, SimpleNamespace(classes=names, targets=targets)) == words
