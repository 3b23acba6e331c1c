"""Interval and linear bound propagation ops."""

from fastrobust.reference.bounds import (
    concretize,
    concretize_rows,
    interval_activation,
    interval_ball_conv2d,
    interval_ball_linear,
    interval_conv2d,
    interval_linear,
    linear_back_step,
    relax,
)

__all__ = [
    "concretize", "concretize_rows", "interval_activation", "interval_ball_conv2d", "interval_ball_linear", "interval_conv2d",
    "interval_linear", "linear_back_step", "relax",
]  # fmt: skip
