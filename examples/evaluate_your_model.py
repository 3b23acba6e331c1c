"""Evaluate your model: clean, robust and proven accuracy, and what each attack found.

python examples/evaluate_your_model.py [--eps 0.05] [--images 200] [--version fast]

Put your own model and images in place of `model` and `data`: an nn.Module from images in [0, 1] to logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import fastrobust as fr
from fastrobust.models import train_digits


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eps", type=float, default=0.05)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--version", default="fast", help='"standard" is what papers report')
    args = parser.parse_args(argv)

    model = train_digits()
    data = fr.data.load("digits", "test", limit=args.images)
    x, y = data.images, data.labels

    proof = fr.certify.polyhedral_envelope(model, x, y, args.eps, clip=(0, 1), method="crown")
    found = fr.attacks.autoattack(model, x, y, eps=args.eps, version=args.version, return_details=True)
    proven = proof.certified.float().mean().item()

    print(found.report)
    print(f"robust accuracy at eps {args.eps}: between {proven:.1%} (proven) and {found.report.robust_accuracy:.1%}")
    broken = (model(found.adv).argmax(1) != y) & (model(x).argmax(1) == y)
    for i in broken.nonzero().flatten()[:3].tolist():
        print(f"image {i}: {int(y[i])} becomes {int(model(found.adv[i : i + 1]).argmax())}")
    return {"clean": found.report.clean_accuracy, "robust": found.report.robust_accuracy, "proven": proven}


if __name__ == "__main__":
    main()
