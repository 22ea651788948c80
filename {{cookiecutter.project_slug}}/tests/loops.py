"""What train_fn needs for some epochs on small pictures, without the folder of a run."""

import torch
from models import CHANNELS
from pictures import Pictures, Shake
from torch import nn

from batteries import TrainLoader
from batteries.parallel import place_model, share_model
from batteries.state import TrainState
from train import Config

SIZE, BATCH_SIZE, EPOCHS = 57, 16, 3  # the last step of an epoch has 9 samples
CPU = torch.device("cpu")
CONFIG = Config(tracker=("none",))


class Run:
    """As much of a run as train_fn and valid_fn ask for."""

    device = CPU

    def track(self, batches, metrics):
        return batches

    def log_step(self, lr, gradient_norm):
        pass


def make_optimizer(model: nn.Module) -> tuple:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer, ExponentialLR(optimizer, 0.95)


class ExponentialLR(torch.optim.lr_scheduler.ExponentialLR):
    """A scheduler of torch, as train_fn uses one."""

    def learning_rate(self) -> float:
        return self.get_last_lr()[0]


def make_state(model: nn.Module, data_parallel: bool = False, sync_batchnorm: bool = True) -> TrainState:
    model = place_model(model, CPU, sync_batchnorm=sync_batchnorm)
    return TrainState(share_model(model, CPU, data_parallel=data_parallel), *make_optimizer(model))


def make_loader(accumulation_steps: int = 1) -> TrainLoader:
    return TrainLoader(
        Pictures(SIZE, CHANNELS),
        range(SIZE),
        Shake(),
        CPU,
        seed=3,
        batch_size=BATCH_SIZE,
        accumulation_steps=accumulation_steps,
        drop_last=False,
    )
