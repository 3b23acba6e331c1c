"""Prints a hash of the results of every op: `python pgd_digest.py VARIANT THREADS`. Equal hashes are equal bits."""

from __future__ import annotations

import hashlib
import sys

import torch

import fastrobust as fr
from fastrobust.ops.pgd.square import square_propose
from pgd_oracles import INF, NORMS, assert_proposals_agree, images

CASES = [
    (3, (5,), (0.0, 1.0)),
    (7, (17,), None),
    (4, (3, 31, 33), (0.1, 0.3)),
    (2, (3, 97, 101), (0.0, 1.0)),
    (16, (3, 32, 32), (-0.3, 0.7)),
]
hashes: dict[str, object] = {}


def keep(name: str, *tensors: torch.Tensor) -> None:
    for t in tensors:
        hashes.setdefault(name, hashlib.sha256()).update(t.contiguous().numpy().tobytes())  # type: ignore[attr-defined]


def steps(seed: int, batch: int, shape: tuple[int, ...], clip: tuple[float, float] | None) -> None:
    o = fr.ops
    x, x0, grad = images(seed, batch, shape, clip)
    grad.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), 1e-42, -0.0])
    generator = torch.Generator().manual_seed(seed)
    v, step, eps = torch.rand(3, batch, generator=generator)
    active = v > 0.3
    for norm in NORMS:
        for g in (grad, grad.half(), grad.bfloat16()):
            keep(f"step {norm}", o.pgd_step(x, x0, g, 0.1, 0.3, norm, clip))
            keep(f"step {norm}", o.pgd_step(x, x0, g, step, eps, norm, clip, active))
            keep(f"fosc {norm}", *o.pgd_step_fosc(x, x0, g, 0.1, 0.3, 1.0, norm, clip))
            for variant in ("paper", "authors"):
                keep(f"atas {norm}", *o.atas_step(x, x0, g, v, 0.1, 0.3, norm, clip, variant=variant))
        keep(f"step {norm}", o.pgd_step(x, x0, grad, 0.1, 0.3, norm, clip, normalize=False))
        for radius in (0.3, eps):
            keep(f"project {norm}", o.project(x, x0, radius, norm, clip))
            keep(f"start {norm}", o.random_start(x0, radius, norm, clip, seed=seed))
    each = torch.rand(x.shape, generator=generator)
    keep("step inf", o.pgd_step(x, x0, grad, each, each, INF, clip))


def zeros() -> None:
    """Faces at zero: an exact sum of zero has a sign."""
    x0 = torch.tensor([[-0.5, 0.5, -0.25, -0.0, 0.0] * 8])
    for grad in (torch.ones_like(x0), -torch.ones_like(x0)):
        for eps in (x0.abs(), 0.5, 0.0):
            keep("zeros", fr.ops.pgd_step(x0, x0, grad, 2.0, eps, INF, None))


def losses(classes: int) -> None:
    o, g = fr.ops, torch.Generator().manual_seed(classes)
    z, r = 5 * torch.randn(9, classes, generator=g), torch.randn(9, classes, generator=g)
    y = torch.randint(0, classes, (9,), generator=g)
    keep("cross_entropy", *o.cross_entropy(z, y))
    keep("kl", *o.kl_divergence(z, r))
    keep("margin", *o.margin_loss(z, y))
    if classes > 3:
        keep("dlr", *o.dlr_loss(z, y), *o.dlr_targeted_loss(z, y, (y + 1) % classes))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    assert fr.build_info()["cpu_variant"] == sys.argv[1]
    for seed, case in enumerate(CASES):
        steps(seed, *case)
    zeros()
    big = torch.linspace(-1, 2, 1_700_000)[None]
    keep("streamed", fr.ops.pgd_step(big, big.clamp(0, 1), big - 0.5, 0.02, 0.1))
    for classes in (2, 10, 33, 1000):
        losses(classes)
    for shape in ((1, 1, 9), (3, 8, 7), (130, 3, 4)):
        keep("square", *(t.float() for t in assert_proposals_agree(square_propose, shape)))
    for name, h in hashes.items():
        print(name, h.hexdigest())  # type: ignore[attr-defined]
