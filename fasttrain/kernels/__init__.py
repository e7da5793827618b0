"""Norm, clip and update in as few passes over memory as can be: the public face. The plain truth is `reference`."""

from fasttrain.kernels.face import clip_and_step_, grad_norm

__all__ = ["clip_and_step_", "grad_norm"]
