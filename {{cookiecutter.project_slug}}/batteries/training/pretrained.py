"""Pretrained weights from torchvision, from a URL or from a file."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from torch import nn

from batteries.checkpoint.io import scored_weights
from batteries.core.errors import UserError
from batteries.core.text import list_first
from batteries.distributed.collectives import run_on_rank_zero

# Parts that wrappers add to the names of weights: DataParallel, torch.compile, FSDP, activation checkpointing, Fabric.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


class PretrainedReport(NamedTuple):
    """Which tensors did not fit.

    Attributes:
        missing: The tensors of the model that keep their initial values.
        unused: The tensors of the source that the model does not have.
    """

    missing: list[str]
    unused: list[str]


def load_pretrained(model: nn.Module, source: str) -> PretrainedReport:
    """Load the pretrained tensors whose names and shapes fit the model. Every rank must call it.

    Args:
        model: The model, not wrapped.
        source: A file with weights or a checkpoint, its URL with its checksum (`https://…/weights.pth#sha256=…`), or
            a name in torchvision (`ResNet18_Weights.IMAGENET1K_V1`). Rank 0 downloads once, to torch's cache.

    Raises:
        UserError: On all ranks, if the source is none of these or cannot be downloaded, or if less than half of the
            tensors fit, which means another architecture.
    """
    expected = model.state_dict()
    weights = run_on_rank_zero(lambda: _read_weights(source))
    weights = _match_wrapped_names(weights, expected)
    fitting = {
        name: value for name, value in weights.items() if name in expected and value.shape == expected[name].shape
    }
    missing = [name for name in expected if name not in fitting]
    unused = [name for name in weights if name not in expected]
    if len(fitting) < len(expected) / 2:
        raise UserError(
            f"--pretrained {source} has a different architecture: only {len(fitting)} of {len(expected)} tensors fit. "
            f"These do not fit: {list_first(missing, 5)}."
        )
    model.load_state_dict({**expected, **fitting})
    return PretrainedReport(missing, unused)


def _match_wrapped_names(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename weights that were saved inside wrappers, such as `module._orig_mod.fc.bias`, to the names of the model."""
    name_without_wrappers = {_remove_wrappers(name): name for name in expected}
    renamed: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        plain = _remove_wrappers(name)
        renamed[name if name in expected else name_without_wrappers.get(plain, plain)] = value
    return renamed


def _remove_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _read_weights(source: str) -> Mapping[str, torch.Tensor]:
    if Path(source).is_file():
        return _read_file(source, Path(source))
    if "://" in source:
        return _read_file(source, _download_file(source))
    return _download_weights(source)


def _read_file(source: str, path: Path) -> Mapping[str, torch.Tensor]:
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"--pretrained {source} cannot be read as weights ({type(error).__name__}).") from error
    weights = contents if isinstance(contents, dict) else {}
    if "model_state_dict" in weights:
        weights = scored_weights(weights)
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(
            f"--pretrained {source} is not a dict of tensors; give the output of torch.save(model.state_dict(), …)."
        )
    return weights


def _download_file(source: str) -> Path:
    """Return the file of a URL in torch's cache; download it if the cache does not have it."""
    url, _, digest = source.partition("#sha256=")
    digest = digest.lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise UserError(
            f"--pretrained {source} needs the checksum of the file, 64 digits as sha256sum prints it: {url}#sha256=…"
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{digest[:16]}-{PurePosixPath(urlsplit(url).path).name}"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except RuntimeError:  # the message has two checksums of 64 digits
        raise UserError(f"--pretrained {url} has another sha256 than {digest}; nothing was loaded.") from None
    except (OSError, ValueError) as error:  # a URL without a host is a ValueError
        raise UserError(
            f"--pretrained {url} cannot be downloaded ({error}); on a machine without network, give a file."
        ) from None
    return path


def _download_weights(source: str) -> Mapping[str, torch.Tensor]:
    from torchvision.models import get_weight

    try:
        weights = get_weight(source)
    except (ValueError, AttributeError, KeyError):
        raise UserError(
            f"--pretrained {source} is neither a file, a URL nor a name in torchvision, such as "
            "ResNet18_Weights.DEFAULT."
        ) from None
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise UserError(f"--pretrained {source} cannot be downloaded ({error}); give a file of weights.") from None
