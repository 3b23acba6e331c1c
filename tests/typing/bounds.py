"""Read by mypy in tests/test_types.py: an ignore that is not needed is an error."""

import torch
from torch import Tensor, nn

from fastrobust import bounds

model, x = nn.Linear(4, 3), torch.rand(2, 4)
low: Tensor = bounds.compute_bounds(model, x, 0.1).lower
up: Tensor = bounds.compute_bounds(model, x, 0.1, method="crown", clip=(0.0, 1.0)).upper
one: Tensor = bounds.compute_bounds(model, x, 0.1, sides="lower").lower
none: None = bounds.compute_bounds(model, x, 0.1, sides="lower").upper
other: Tensor = bounds.compute_bounds(lambda t: model(t), x, torch.rand(2), sides="upper").upper
words: str = bounds.compute_bounds(model, x, 0.1).lower  # type: ignore[assignment]
bounds.compute_bounds(model, x, 0.1, nonsense=3)  # type: ignore[call-overload]
bounds.compute_bounds(model, x, 0.1, intersect="yes")  # type: ignore[call-overload]
