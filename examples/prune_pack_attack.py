"""Prune a trained network, attack what is left, and store it in a packed file.

python examples/prune_pack_attack.py [--rate 0.7] [--epochs 5] [--eps 0.05] [--out pruned.frp]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import fastrobust as fr
from fastrobust.models import digits_cnn, train_digits


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.7, help="the fraction of the weights that is removed")
    parser.add_argument("--epochs", type=int, default=5, help="of learning which weights to keep")
    parser.add_argument("--eps", type=float, default=0.05)
    parser.add_argument("--out", default="pruned.frp")
    args = parser.parse_args(argv)

    dense = train_digits()
    train, test = fr.data.load("digits", "train"), fr.data.load("digits", "test", limit=200)
    x, y = test.images, test.labels

    masked = fr.nn.convert(dense, rate=args.rate, gamma=1, init="given")  # by magnitude, weights as they are
    loader = fr.training.loader(train.images, train.labels, batch_size=64)
    fr.training.edge_popup(
        masked, loader, epochs=args.epochs, eps=args.eps, steps=3
    )  # which weights to keep, under attack
    frozen = fr.nn.freeze(masked.eval())  # one compiled program: only the kept weights are visited

    accuracy = lambda model, images: (model(images).argmax(1) == y).float().mean().item()
    for name, model in (("dense", dense), ("masked", frozen)):
        adv = fr.attacks.pgd(model, x, y, eps=args.eps, steps=20, seed=0)
        print(f"{name:7} clean {accuracy(model, x):.1%}, robust at most {accuracy(model, adv):.1%}")

    size = fr.nn.save_packed(masked, args.out)  # masks at their entropy, the kept weights exactly
    again = fr.nn.load_packed(args.out, fr.nn.convert(digits_cnn(), rate=args.rate, gamma=1, init="given")).eval()
    print(f"{args.out}: {size} bytes, dense {4 * sum(p.numel() for p in dense.parameters())}")
    same = torch.equal(masked(x), again(x))
    return {"clean": accuracy(frozen, x), "robust": accuracy(frozen, adv), "bytes": size, "same": float(same)}


if __name__ == "__main__":
    main()
