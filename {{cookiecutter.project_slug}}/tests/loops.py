"""Everything that train_fn needs for some epochs on small images, without a run directory."""

import torch
from image_data import RandomImages, RandomNoise
from models import CHANNELS
from torch import nn

from batteries.data.loaders import TrainLoader
from batteries.training.state import SilentLogger, TrainState
from batteries.training.wrap import prepare_model, wrap_model
from train import Config

SIZE, BATCH_SIZE, EPOCHS = 57, 16, 3  # the last step of an epoch has 9 samples
CPU = torch.device("cpu")
CONFIG = Config(tracker=("none",))
LOGGER = SilentLogger(CPU)


def make_optimizer(model: nn.Module) -> tuple:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer, ExponentialLR(optimizer, 0.95)


class ExponentialLR(torch.optim.lr_scheduler.ExponentialLR):
    """A scheduler of torch with the method that train_fn calls."""

    def learning_rate(self) -> float:
        return self.get_last_lr()[0]


def make_state(
    model: nn.Module,
    data_parallel: bool = False,
    sync_batchnorm: bool = True,
    find_unused_parameters: bool = False,
) -> TrainState:
    model = prepare_model(model, CPU, sync_batchnorm=sync_batchnorm)
    wrapped = wrap_model(model, CPU, data_parallel=data_parallel, find_unused_parameters=find_unused_parameters)
    return TrainState(wrapped, *make_optimizer(model))


def make_loader(accumulation_steps: int = 1) -> TrainLoader:
    return TrainLoader(
        RandomImages(SIZE, CHANNELS),
        range(SIZE),
        RandomNoise(),
        CPU,
        seed=3,
        batch_size=BATCH_SIZE,
        accumulation_steps=accumulation_steps,
        drop_last=False,
    )
