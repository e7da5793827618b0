"""``track_grad_norm``: the norms of a window's gradients, for whoever logs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class GradientNorms:
    """``track_grad_norm``: each parameter's norm and that of all together, unscaled and before clipping; read by nobody here.

    ``names()`` maps the ids of parameters to their names; ``tell(names, values)`` hears of every update's norms.
    """

    def __init__(
        self, norm_type: float, names: Callable[[], dict[int, str]], tell: Callable[[tuple[str, ...], list[Tensor]], None]
    ) -> None:
        self.type, self._names, self._tell = norm_type, names, tell

    @torch.no_grad()
    def __call__(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], factor: float = 1.0) -> None:
        """In a pass over the gradients of its own."""
        present = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None and g.layout is torch.strided]
        if not present:
            return
        norms = list(torch._foreach_norm([g for _, g in present], self.type))
        if factor != 1.0:
            torch._foreach_mul_(norms, factor)
        total = torch.linalg.vector_norm(torch.stack([n.float() for n in norms]), self.type)
        self.measured(self.names([p for p, _ in present]), norms, total)

    def names(self, params: Sequence[Tensor]) -> tuple[str, ...]:
        """What these parameters' norms are called, and that of all together."""
        known, prefix = self._names(), f"grad_{float(self.type)}_norm"
        return (*(f"{prefix}/{known.get(id(p), '?')}" for p in params), f"{prefix}_total")

    def measured(self, names: tuple[str, ...], norms: Sequence[Tensor], total: Tensor) -> None:
        """By somebody else, in a pass over the gradients that was made anyway."""
        self._tell(names, [*norms, total])
