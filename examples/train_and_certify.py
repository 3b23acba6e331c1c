"""Train a network on a sound bound of the worst case, and certify how far each image can be moved.

python examples/train_and_certify.py [--eps 0.1] [--epochs 25] [--method crown-ibp]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import fastrobust as fr


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--method", default="crown-ibp", help="any of fastrobust train --list")
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    train, test = fr.data.load("digits", "train"), fr.data.load("digits", "test", limit=args.images)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    history = fr.training.train(
        model,
        fr.training.loader(train.images, train.labels, batch_size=64),
        fr.training.make(args.method, eps=args.eps),
        epochs=args.epochs,
        optimizer=torch.optim.Adam(model.parameters(), 3e-3),
    )
    print(f"last epoch: loss {history[-1]['loss']:.3f}")

    x, y = test.images, test.labels
    clean = (model.eval()(x).argmax(1) == y).float().mean().item()
    radius = fr.certify.search_radius(model, x, y, high=3 * args.eps, tol=1e-3, clip=(0, 1), method="crown").radius
    error = fr.certify.certified_robust_error(radius, args.eps)
    print(f"clean accuracy {clean:.1%}; certified robust error at eps {args.eps}: {float(error):.1f} %")
    print(f"radius: mean {radius.mean():.3f}, median {radius.median():.3f}")
    return {"clean": clean, "error": float(error), "radius": radius.mean().item()}


if __name__ == "__main__":
    main()
