"""Lion as lion-pytorch writes it, for a torch that has none: the optimizer the fused one must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """Chen et al. 2023 (arXiv:2302.06675), with the groups and the state of lion-pytorch 0.2."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                moment = state["exp_avg"]
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * moment.mul(beta1).add(p.grad * (1 - beta1)).sign())
                moment.mul_(beta2).add_(p.grad * (1 - beta2))
