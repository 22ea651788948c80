"""Which of how many processes this is, as torchrun says it in the environment: without torch, before any group."""

import os


def is_launched() -> bool:
    """Whether torchrun started this process: it sets all of these. One alone comes from elsewhere and means nothing."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def rank() -> int:
    """This process's number among all; 0 when it is alone."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """This process's number among those on its machine; 0 when it is alone."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def is_rank_zero() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0
