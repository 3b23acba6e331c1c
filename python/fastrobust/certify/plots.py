"""Pictures of certificates (figures 3.3, 3.5, 3.6 and 3.9 of Liu's thesis, Towards Verifiable,
Generalizable and Efficient Robust Deep Neural Networks, EPFL, 2022). matplotlib is needed, nothing else of the library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.certify.envelope import polyhedral_envelope


def _axes(ax: Any | None, **size: Any) -> Any:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure  # a figure of its own: no window, no global state

    return Figure(layout="constrained", **size).subplots()


def bounding_map(eps: Tensor, ax: Any | None = None) -> Any:
    """Figure 3.5: one image's eps as a picture, lighter where the bound is smaller. eps: (H, W), (C, H, W) or (H *
    H)."""
    values = eps.detach().cpu().double()
    if values.dim() == 3:
        values = values.mean(0)
    if values.dim() == 1:
        side = math.isqrt(values.numel())
        if side * side != values.numel():
            raise ValueError(f"eps: got {values.numel()} features, expected an image")
        values = values.view(side, side)
    if values.dim() != 2:
        raise ValueError(f"eps: got shape {tuple(eps.shape)}, expected (H, W), (C, H, W) or a square image's features")
    ax = _axes(ax)
    ax.imshow(values.numpy(), cmap="gray_r", interpolation="nearest")
    ax.set_axis_off()
    return ax


def radius_histogram(
    radii: Mapping[str, Tensor], target: float | None = None, bins: int = 50, ax: Any | None = None
) -> Any:
    """Figure 3.9: distributions of certified radii by model, the target budget as a vertical line."""
    if not radii:
        raise ValueError("radii: got no models, expected at least one")
    ax = _axes(ax)
    high = max(float(r.max()) for r in radii.values())
    for name, r in radii.items():
        ax.hist(r.detach().cpu().numpy(), bins=bins, range=(0.0, high or 1.0), histtype="step", label=name)
    if target is not None:
        ax.axvline(target, color="red")
    ax.set_xlabel("certified radius")
    ax.set_ylabel("examples")
    ax.legend()
    return ax


def bound_curve(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Sequence[float] | Tensor,
    *,
    norm: float | str = math.inf,
    clip: tuple[float, float] | None = None,
    method: str = "fast-lin",
    ax: Any | None = None,
) -> Any:
    """Figure 3.6: what one example is certified for, against the eps of the bounds: the linear certificate and
    polyhedral envelope certification (PEC).

    x: (1, *shape), y: (1,).
    """
    if x.shape[0] != 1:
        raise ValueError(f"x: got {x.shape[0]} examples, expected one")
    budgets = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    with torch.no_grad():
        count = len(budgets)
        found = polyhedral_envelope(
            model, x.expand(count, *x.shape[1:]), y.expand(count), budgets, norm=norm, clip=clip, method=method
        )
    ax = _axes(ax)
    ax.plot(budgets.cpu(), found.radius.cpu(), label="polyhedral envelope (PEC)")
    ax.plot(
        budgets.cpu(),
        torch.where(found.certified, budgets, 0.0).cpu(),
        linestyle="--",
        label="linear bounds (KW / Fast-Lin)",
    )
    ax.set_xlabel("eps")
    ax.set_ylabel("certified radius")
    ax.legend()
    return ax


def regions(
    model: nn.Module,
    points: Tensor,
    uniform: Tensor,
    nonuniform: Tensor,
    limits: tuple[float, float] = (-1.0, 1.0),
    resolution: int = 300,
    ax: Any | None = None,
) -> Any:
    """Figure 3.3: decision boundaries of a model on the plane, with uniform and non-uniform certified boxes.

    points: (N, 2); uniform: (N,); nonuniform: (N, 2).
    """
    if points.dim() != 2 or points.shape[1] != 2:
        raise ValueError(f"points: got shape {tuple(points.shape)}, expected (N, 2)")
    from matplotlib.patches import Rectangle

    ax = _axes(ax)
    line = torch.linspace(*limits, resolution, dtype=points.dtype, device=points.device)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        classes = model(grid).argmax(1).view(resolution, resolution).T.cpu()
    for label in classes.unique().tolist():
        ax.contour(line.cpu(), line.cpu(), (classes == label).double(), levels=[0.5], colors="black", linewidths=0.8)
    for point, one, both in zip(points.cpu(), uniform.cpu(), nonuniform.cpu(), strict=True):
        for half, colour in ((one.expand(2), "gold"), (both, "tab:blue")):
            corner = (point - half).tolist()
            ax.add_patch(Rectangle(corner, *(2 * half).tolist(), fill=False, edgecolor=colour))
        ax.plot(*point.tolist(), marker=".", color="black", markersize=3)
    ax.set_xlim(*limits)
    ax.set_ylim(*limits)
    ax.set_aspect("equal")
    return ax
