"""Training in shards on small images, without a run directory, and the plain loop that it must equal."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from image_data import RandomImages, RandomNoise
from interrupted_runs import hash_of
from loops import CONFIG, CPU, ExponentialLR
from models import CHANNELS, dropout_network
from torch import nn
from torch.amp import GradScaler

from batteries.data.loaders import TrainLoader
from batteries.data.mixing import make_mixer
from batteries.distributed.unwrap import unwrap_model
from batteries.training.ema import EMA
from batteries.training.state import SilentLogger, TrainState
from batteries.training.wrap import prepare_model, wrap_model
from experiment.augmentations import normalize
from train import Config, train_fn

SIZE, BATCH_SIZE, SHARDS, EPOCHS = 75, 32, 4, 2  # the last step of an epoch has 11 samples, in shards of 2 or 3


def make_loader(
    shards: int | None = SHARDS,
    *,
    accumulation_steps: int = 1,
    num_workers: int = 0,
    mixup: float = 0.0,
    device: torch.device = CPU,
) -> TrainLoader:
    return TrainLoader(
        RandomImages(SIZE, CHANNELS),
        range(SIZE),
        RandomNoise(),
        device,
        seed=3,
        batch_size=BATCH_SIZE,
        accumulation_steps=accumulation_steps,
        shards=shards,
        drop_last=False,
        num_workers=num_workers,
        mixer=make_mixer(mixup, 0.0, 4),
    )


def build_network(network: Callable[..., nn.Module] = dropout_network) -> nn.Module:
    torch.manual_seed(2)
    return network(num_classes=4)


def make_state(model: nn.Module, device: torch.device = CPU, **others: Any) -> TrainState:
    wrapped = wrap_model(prepare_model(model, device, sync_batchnorm=False), device, shards=SHARDS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    return TrainState(wrapped, optimizer, ExponentialLR(optimizer, 0.95), ema=EMA(model, 0.9), **others)


def train_in_shards(
    config: Config = CONFIG,
    network: Callable[..., nn.Module] = dropout_network,
    device: torch.device = CPU,
    **options: Any,
) -> dict[str, Any]:
    """Train some epochs with train_fn; return the weights, the steps that were taken, and the hash of everything."""
    scaler = GradScaler("cpu", init_scale=2.0**18) if config.precision == "fp16" else GradScaler("cpu", enabled=False)
    state = make_state(build_network(network), device, scaler=scaler)
    loader = make_loader(device=device, **options)
    metrics = [train_fn(state, loader.epoch(0, epoch), SilentLogger(device), config) for epoch in range(1, EPOCHS + 1)]
    model = unwrap_model(state.model)
    weights = {name: value.detach().cpu().numpy().copy() for name, value in model.state_dict().items()}
    everything = [model.state_dict(), state.optimizer.state_dict(), state.extra(), metrics]
    steps = max(int(values["step"]) for values in state.optimizer.state.values())
    return {"weights": weights, "steps": steps, "sha256": hash_of(everything)}


def add_in_tree(leaves: Sequence[Any]) -> Any:
    """Return the sum of a number of values that is a power of two, in a balanced binary tree."""
    half = len(leaves) // 2
    return leaves[0] if half == 0 else add_in_tree(leaves[:half]) + add_in_tree(leaves[half:])


def train_plainly(device: torch.device = CPU) -> dict[str, torch.Tensor]:
    """Return the weights that `train_in_shards` must give, from a loop that keeps the gradients of all shards."""
    model = build_network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    scheduler = ExponentialLR(optimizer, 0.95)
    loader = make_loader(device=device)
    for epoch in range(1, EPOCHS + 1):
        batches = list(loader.epoch(0, epoch))
        for step in range(0, len(batches), SHARDS):
            begin = {name: value.clone() for name, value in model.state_dict().items()}
            gradients, states = [], []
            shards = batches[step : step + SHARDS]
            for shard in shards:
                model.load_state_dict(begin)
                optimizer.zero_grad()
                torch.manual_seed(shard.seed)
                loss = nn.functional.cross_entropy(model(normalize(shard.images)), shard.targets)
                (loss * (len(shard.targets) / sum(len(other.targets) for other in shards))).backward()
                gradients.append([value.grad.clone() for value in model.parameters()])
                states.append({name: value.clone() for name, value in model.state_dict().items()})
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = add_in_tree([gradient[number] for gradient in gradients])
            for name, buffer in model.named_buffers():
                values = [state[name] for state in states]
                buffer.copy_(add_in_tree(values) / SHARDS if buffer.is_floating_point() else values[0])
            optimizer.step()
            scheduler.step()
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}
