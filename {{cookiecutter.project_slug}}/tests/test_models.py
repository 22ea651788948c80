"""Networks that --model chooses, and their arguments (--model-args)."""

import json

import pytest
import torch
from marks import CLASSES_ONLY
from processes import End, run_ranks, run_train
from small_data import make_data
from torch import nn
from torchvision.models import ConvNeXt, convnext_tiny, resnet18

import train
from batteries.core.errors import UserError
from batteries.models.options import model_arguments, parse_arguments
from batteries.models.torchvision_models import MainOutput, make_classifier, make_segmenter, set_input_channels
from tools import average, predict
from train import Config


def test_a_network_equals_the_one_of_torchvision():
    torch.manual_seed(0)
    actual = make_classifier("resnet18", 5, zero_init_residual=True).state_dict()
    torch.manual_seed(0)
    expected = resnet18(num_classes=5, zero_init_residual=True).state_dict()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not actual["layer1.0.bn2.weight"].any()


def test_arguments_of_a_network_are_applied():
    network = make_classifier("convnext_tiny", 3, stochastic_depth_prob=0.7)
    assert isinstance(network, ConvNeXt)
    depths = [module.p for module in network.modules() if type(module).__name__ == "StochasticDepth"]
    assert max(depths) == 0.7


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_a_second_output_return_logits_in_training(name):
    images = torch.rand(2, 3, 96, 96)
    assert make_classifier(name, 4)(images).shape == (2, 4)


def test_main_output_is_the_first_of_a_tuple_or_the_one_called_out():
    class Several(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.outputs = outputs

        def forward(self, images):
            return self.outputs

    first, second = torch.zeros(1), torch.ones(1)
    for outputs in ((first, second), {"aux": second, "out": first}, first):
        assert MainOutput(Several(outputs))(second) is first


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_segmentation_networks_return_logits_for_each_pixel(name):
    network = make_segmenter(name, 3).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 64, 48)).shape == (1, 3, 64, 48)


def test_input_channels_are_set_in_the_first_convolution_only():
    network = set_input_channels(convnext_tiny(num_classes=2), 1)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [convolution.in_channels for convolution in convolutions[:2]] == [1, 96]
    assert convolutions[0].kernel_size == convolutions[0].stride == (4, 4)
    assert network(torch.rand(1, 1, 32, 32)).shape == (1, 2)
    assert set_input_channels(network, 1) is network
    assert convolutions[0] in list(network.modules())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "--model resnet19 is not a classification network of torchvision; use one of resnet1"),
        ("resnet18", {"drop": 1}, "--model-args drop=1: resnet18 does not accept that (ResNet.__init__() got an unexp"),
        ("vit_b_16", {"image_size": 30}, "--model-args image_size=30: vit_b_16 does not accept that (Input shape ind"),
        ("deeplabv3_resnet50", {}, "--model deeplabv3_resnet50 is not a classification network of torchvision; use "),
    ],
)
def test_an_unknown_network_or_argument_is_rejected(name, options, message):
    with pytest.raises(UserError) as error:
        make_classifier(name, 2, **options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_nearest_names_are_listed():
    with pytest.raises(UserError, match=r"use one of (.*, )?resnet101(, .*)?\.$"):
        make_classifier("resnet_101", 2)
    with pytest.raises(UserError, match=r"use one of unet, deeplabv3_mobilenet_v3_large, .*lraspp"):
        make_segmenter("zzz", 2, others=["unet"])


def test_values_are_parsed_as_python_literals_or_texts():
    texts = ["a=1", "b=0.5", "c=true", "d=None", "e=gelu", "f=(3,4)", "g=1e-6", "h='1'"]
    assert parse_arguments(texts) == {
        "a": 1,
        "b": 0.5,
        "c": True,
        "d": None,
        "e": "gelu",
        "f": (3, 4),
        "g": 1e-6,
        "h": "1",
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["dropout"], "--model-args dropout must be name=value, such as dropout=0.1."),
        (["=1"], "--model-args =1 must be name=value, such as dropout=0.1."),
        (["dropout="], "--model-args dropout= must be name=value, such as dropout=0.1."),
        (["num_classes=3"], "--model-args num_classes=3: num_classes follows from the data set; remove it."),
        (["name=resnet18"], "--model-args name=resnet18: name follows from --model; remove it."),
        (["a=1", "a=2"], "--model-args has a twice; give it once."),
    ],
)
def test_texts_that_are_not_arguments_are_rejected(texts, message):
    with pytest.raises(UserError) as error:
        parse_arguments(texts)
    assert str(error.value) == message


def test_options_that_build_model_does_not_take_are_rejected():
    def build_model(num_classes: int, width: int = 8) -> nn.Module:
        return nn.Linear(width, num_classes)

    assert model_arguments(build_model, 3, None, []) == {"num_classes": 3}
    assert model_arguments(build_model, 3, None, ["width=4"]) == {"num_classes": 3, "width": 4}
    with pytest.raises(UserError) as error:
        model_arguments(build_model, 3, "resnet18", [])
    assert str(error.value) == (
        "--model: build_model in experiment/model.py does not accept it (got an unexpected keyword argument 'name'); "
        "add the argument there, or remove the option."
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def run(data_dir, logdir, *flags: str) -> End:
    """Train for one step with the network of experiment/model.py."""
    flags = ("--data-dir", str(data_dir), "--split-file", str(logdir.with_name("split.csv")), *flags)
    flags = ("--logdir", str(logdir), "--limit-batches", "1", "--device", "cpu", "--tracker", "none", *flags)
    return run_train(train.main, Config, *ONE_EPOCH, *flags)


ONE_EPOCH = ("--stages.0.epochs", "1", "--stages.1.epochs", "1", "--batch-size", "8", "--num-workers", "0")
SMALL = ("--model", "shufflenet_v2_x0_5")


@CLASSES_ONLY
def test_model_of_a_run_is_stored_and_used_by_the_commands(data_dir, tmp_path):
    logdir = tmp_path / "run"
    assert run(data_dir, logdir, *SMALL, "--model-args", "inverted_residual=None").code == 2
    end = run(data_dir, logdir, *SMALL)
    assert end.code == 0, end.err
    assert "model    ShuffleNetV2" in end.out
    assert json.loads((logdir / "config.json").read_text())["model"] == SMALL[1]
    checkpoint = torch.load(logdir / "stage1/best.pth", weights_only=True)
    assert checkpoint["model_args"]["name"] == SMALL[1]
    [table] = run_ranks(
        1, lambda: predict.main(predict.Options(run=(logdir,), device="cpu", split="valid")), join=False
    )
    assert len(table["valid"].values)
    options = average.Options(
        run=logdir / "stage1", device="cpu", checkpoints=("last:1", str(logdir / "stage0/last.pth"))
    )
    run_ranks(1, lambda: average.main(options), join=False)
    assert (logdir / "stage1/swa.pth").exists()


@CLASSES_ONLY
def test_a_run_is_not_resumed_with_another_model(data_dir, tmp_path):
    assert run(data_dir, tmp_path / "run", *SMALL).code == 0
    end = run(data_dir, tmp_path / "run", "--model", "mobilenet_v3_small", "--resume")
    assert end.code == 2
    assert "--model was shufflenet_v2_x0_5 and is mobilenet_v3_small" in end.err


@CLASSES_ONLY
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model", "shufflenet"],
            "--model shufflenet is not a classification network of torchvision; use one ",
        ),
        ([*SMALL, "--model-args", "width"], "--model-args width must be name=value, such as dropout=0.1."),
        ([*SMALL, "--model-args", "width=1"], "--model-args width=1: shufflenet_v2_x0_5 does not accept that ("),
    ],
)
def test_an_invalid_model_ends_the_run_before_anything_is_written(data_dir, tmp_path, flags, message):
    end = run(data_dir, tmp_path / "run", *flags)
    assert end.code == 2
    assert end.err.startswith(f"error: {message}")
    assert end.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
