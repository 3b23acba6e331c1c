"""The support matrix of docs/support.md, found by calling every op; `python docs/_mkdocs/support.py --write` writes it
there."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastrobust as fr

PAGE = Path(__file__).parents[1] / "support.md"
BEGIN, END = "<!-- matrix: begin -->\n", "<!-- matrix: end -->\n"
NORMS = (1, 2, 3, math.inf)
INF = math.inf


class Op(NamedTuple):
    """``call(dtype, norm, **tensors)`` with the tensors that may be differentiated, as ``inputs(dtype)`` makes them;
    ``half`` names the argument that may be of half precision; ``registered`` the operators of torch that a call
    becomes."""

    call: Callable[..., Any]
    inputs: Callable[[torch.dtype], dict[str, Tensor]]
    registered: tuple[str, ...]
    norms: bool = False
    half: str | None = None


def _images(*names: str) -> Callable[[torch.dtype], dict[str, Tensor]]:
    def make(dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {n: torch.rand(4, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype) for n in names}

    return make


def _rows(**shapes: tuple[int, ...]) -> Callable[[torch.dtype], dict[str, Tensor]]:
    def make(dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {n: torch.rand(*s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}

    return make


_LABELS = torch.arange(4) % 4
_EXAMPLE = torch.arange(4).repeat_interleave(3)


def _loss(name: str, *more: Tensor) -> Op:
    call = lambda dtype, norm, logits: getattr(fr.ops, name)(logits, _LABELS, *more).value
    return Op(call, _rows(logits=(4, 6)), (name,), half="logits")


def _packed(shape: tuple[int, ...]) -> Any:
    return fr.ops.pack(torch.rand(shape, generator=torch.Generator().manual_seed(1)).sub(0.5).sign())


def _store(dtype: torch.dtype, norm: Any, x: Tensor) -> Tensor:
    return fr.ops.store_gather(torch.zeros(4, 1, 6, 6), torch.arange(4), x, 0.1, norm)


def _scatter(dtype: torch.dtype, norm: Any, adv: Tensor, x: Tensor) -> Tensor:
    return fr.ops.store_scatter(torch.zeros(4, 1, 6, 6), torch.arange(4), adv, x)


OPS = {
    "pgd_step": Op(
        lambda d, n, x, x0, grad: fr.ops.pgd_step(x, x0, grad, 0.1, 0.2, n),
        _images("x", "x0", "grad"),
        ("pgd_step", "pgd_step_out"),
        True,
        "grad",
    ),
    "project": Op(lambda d, n, x, x0: fr.ops.project(x, x0, 0.2, n), _images("x", "x0"), ("pgd_step",), True),
    "random_start": Op(
        lambda d, n, x0: fr.ops.random_start(x0, 0.2, n, seed=0), _images("x0"), ("random_start",), True
    ),
    "fosc": Op(
        lambda d, n, x, x0, grad: fr.ops.fosc(x, x0, grad, 0.2, n), _images("x", "x0", "grad"), ("fosc",), True, "grad"
    ),
    "pgd_step_fosc": Op(
        lambda d, n, x, x0, grad: fr.ops.pgd_step_fosc(x, x0, grad, 0.1, 0.2, 0.0, n)[0],
        _images("x", "x0", "grad"),
        ("pgd_step_fosc", "pgd_step_fosc_out"),
        True,
        "grad",
    ),
    "atas_step": Op(
        lambda d, n, x, x0, grad: fr.ops.atas_step(x, x0, grad, torch.zeros(4, dtype=d), 0.1, 0.2, norm=n)[0],
        _images("x", "x0", "grad"),
        ("atas_step", "atas_step_out"),
        True,
        "grad",
    ),
    "apgd_step": Op(
        lambda d, n, x, previous, x0, grad: fr.ops.apgd_step(x, previous, x0, grad, 0.1, 0.2, n),
        _images("x", "previous", "x0", "grad"),
        ("apgd_step",),
        True,
        "grad",
    ),
    "cross_entropy": _loss("cross_entropy"),
    "margin_loss": _loss("margin_loss"),
    "dlr_loss": _loss("dlr_loss"),
    "dlr_targeted_loss": _loss("dlr_targeted_loss", (_LABELS + 1) % 4),
    "kl_divergence": Op(
        lambda d, n, logits, reference: fr.ops.kl_divergence(logits, reference).value,
        _rows(logits=(4, 6), reference=(4, 6)),
        ("kl_divergence",),
        half="logits",
    ),
    "shift_flip": Op(
        lambda d, n, x: fr.ops.shift_flip(x, torch.ones(4, 2, dtype=torch.int64)),
        _images("x"),
        ("shift_flip",),
        half="x",
    ),
    "store_gather": Op(_store, _images("x"), ("store_gather",), True),
    "store_scatter": Op(_scatter, _images("adv", "x"), ("store_scatter",)),
    "interval_linear": Op(
        lambda d, n, lower, weight: fr.ops.interval_linear(lower, lower + 1, weight)[0],
        _rows(lower=(4, 6), weight=(3, 6)),
        ("bounds_interval_linear",),
    ),
    "interval_conv2d": Op(
        lambda d, n, lower, weight: fr.ops.interval_conv2d(lower, lower + 1, weight)[0],
        _rows(lower=(4, 2, 6, 6), weight=(3, 2, 3, 3)),
        ("bounds_interval_conv2d",),
    ),
    "interval_ball_linear": Op(
        lambda d, n, x, weight: fr.ops.interval_ball_linear(x, 0.1, n, None, weight)[0],
        _rows(x=(4, 6), weight=(3, 6)),
        ("bounds_interval_linear",),
        True,
    ),
    "interval_ball_conv2d": Op(
        lambda d, n, x, weight: fr.ops.interval_ball_conv2d(x, 0.1, n, None, weight)[0],
        _rows(x=(4, 2, 6, 6), weight=(3, 2, 3, 3)),
        ("bounds_interval_conv2d",),
        True,
    ),
    "interval_activation": Op(
        lambda d, n, lower: fr.ops.interval_activation(lower - 0.5, lower + 0.5, "tanh")[0],
        _rows(lower=(4, 6)),
        ("bounds_lines",),
    ),
    "relax": Op(
        lambda d, n, lower: fr.ops.relax(lower - 0.5, lower + 0.5, "tanh", "crown")[0],
        _rows(lower=(4, 6)),
        ("bounds_lines",),
    ),
    "linear_back_step": Op(
        lambda d, n, A, slopes: fr.ops.linear_back_step(A, A.new_zeros(2, 12), slopes, A.new_zeros(2, 4, 6), _EXAMPLE)[
            0
        ],
        _rows(A=(1, 12, 6), slopes=(1, 4, 6)),
        ("bounds_back_step",),
    ),
    "concretize": Op(
        lambda d, n, A, x: fr.ops.concretize(A, A.new_zeros(4, 3), x, 0.1, n)[0],
        _rows(A=(4, 3, 6), x=(4, 6)),
        ("bounds_concretize",),
        True,
    ),
    "polyhedral_distance": Op(
        lambda d, n, a, b: fr.ops.polyhedral_distance(-a, b, -1.0, 1.0, n),
        _rows(a=(4, 6), b=(4,)),
        ("polyhedral_distance",),
        True,
    ),
    "topk_mask": Op(lambda d, n, scores: fr.ops.topk_mask(scores, 5), _rows(scores=(4, 6)), ("topk_mask",)),
    "topk_masks": Op(lambda d, n, scores: fr.ops.topk_masks([scores], [5])[0], _rows(scores=(4, 6)), ("topk_mask",)),
    "pack": Op(lambda d, n, weight: fr.ops.pack(weight.round()).index, _rows(weight=(4, 6)), ()),
    "masked_conv2d": Op(
        lambda d, n, x: fr.ops.masked_conv2d(x, _packed((3, 2, 3, 3))), _rows(x=(4, 2, 6, 6)), ("masked_conv2d",)
    ),
    "masked_linear": Op(lambda d, n, x: fr.ops.masked_linear(x, _packed((3, 6))), _rows(x=(4, 6)), ("masked_conv2d",)),
}


def takes(op: Op, dtype: torch.dtype = torch.float32, norm: Any = INF, half: torch.dtype | None = None) -> bool:
    """Whether a call is served rather than refused."""
    tensors = op.inputs(dtype)
    if half is not None:
        assert op.half is not None
        tensors[op.half] = tensors[op.half].to(half)
    try:
        op.call(dtype, norm, **tensors)
    except (TypeError, ValueError):
        return False
    return True


def derivatives(op: Op) -> str:
    """Of which arguments a call is differentiable, and whether its derivative is, too."""
    names, twice = [], False
    for name in op.inputs(torch.float32):
        tensors = op.inputs(torch.float32)
        tensors[name].requires_grad_()
        out = op.call(torch.float32, INF, **tensors)
        if not out.requires_grad:
            continue
        names.append(name)
        (first,) = torch.autograd.grad((out**2).sum(), tensors[name], create_graph=True)
        try:
            torch.autograd.grad((first**2).sum(), tensors[name])
            twice = True
        except RuntimeError:
            pass
    return f"{', '.join(names)}{'' if twice else ', once'}" if names else "no"


def has_kernel(op: Op, key: str) -> bool:
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrobust::{n}", key) for n in op.registered)


def row(name: str, op: Op) -> str:
    cuda = "yes" if has_kernel(op, "CUDA") else "no"
    double = "yes" if takes(op, torch.float64) else "no"
    halves = [h for h in (torch.float16, torch.bfloat16) if op.half is not None and takes(op, half=h)]
    half = f"`{op.half}`" if len(halves) == 2 else "no"
    norms = "-"
    if op.norms:
        taken = [n for n in NORMS if takes(op, norm=n)]
        norms = "any p >= 1" if taken == list(NORMS) else ", ".join(str(n) for n in taken)
    recorded = ", ".join(f"`{n}`" for n in op.registered if not n.endswith("_out")) or "plain torch"
    return f"| `{name}` | {'yes' if takes(op) else 'no'}, {cuda} | {double} | {half} | {norms} | {derivatives(op)} | {recorded} |"


def matrix() -> str:
    head = "| op | CPU, CUDA | float64 | half precision | norms | differentiable in | recorded as |\n|---|---|---|---|---|---|---|\n"
    return head + "".join(row(name, op) + "\n" for name, op in OPS.items())


def write() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + matrix() + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    write() if "--write" in sys.argv else print(matrix())
