"""Rank and world size from the variables that torchrun sets: without torch, and before there is a process group."""

import os


def is_launched() -> bool:
    """Return whether torchrun started this process. It sets all of these variables; other programs set some of them."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def rank() -> int:
    """Return the rank of this process among all processes; 0 if it is the only one."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """Return the rank of this process among those on its node; 0 if it is the only one."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def world_size() -> int:
    """Return the number of processes that train together."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def is_rank_zero() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return rank() == 0
