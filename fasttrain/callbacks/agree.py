"""One decision for all ranks: any, all, or what rank zero says. Nothing is exchanged when there is one rank."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def any_rank(decision: bool, world_size: int) -> bool:
    """True on every rank when it is True on one."""
    return any(_gather(decision, world_size))


def all_ranks(decision: bool, world_size: int) -> bool:
    """True on every rank when it is True on each."""
    return all(_gather(decision, world_size))


def from_rank_zero(value: T, world_size: int) -> T:
    """What rank zero has, on every rank."""
    if world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gather(decision: bool, world_size: int) -> list[bool]:
    if world_size == 1:
        return [decision]
    votes: list[bool] = [False] * world_size
    dist.all_gather_object(votes, decision)
    return votes
