"""Tables of README.md and the pages that are made of rows of runs: Markdown with a figure's name in each figure's
place.

``{{ FILE / ROW / FIELD }}`` is what benchmarks/figures.py knows; `pages.py` puts the tables between the markers of
their name. A template holds no figure of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from . import figures

PGD, AVX2, LINES, BINARY, NETS = "pgd-cpu", "bounds-avx2-cpu", "lines-cpu", "binary-cpu", "networks-cpu"
BOUNDS, FULL, OTHERS = "bounds-cpu-2026-11-21", "bounds-full-cpu", "bounds-networks-cpu"
STEPS, VICTIMS, DISTANCES = "attack-steps-cpu", "victims-cpu", "polyhedron-cpu"
EVALUATIONS = "attacks-cpu"


DENSE = "dense NCHW or dense NHWC"


def place(file: str, row: str, field: str) -> str:
    return "{{ " + f"{file} / {row} / {field}" + " }}"


def places(file: str, rows: Iterable[str], field: str, between: str = "; ") -> str:
    return between.join(place(file, row, field) for row in rows)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    texts = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(line)} |" for line in lines)]
    return "\n".join(text.replace("|  |", "| |") for text in texts)


def steps() -> str:
    rows = [
        ("`pgd_step` L-inf, 16x1x28x28, `out=`", "pgd_step Linf 16x1x28x28", True, False),
        ("`pgd_step` L-inf, 128x3x32x32", "pgd_step Linf 128x3x32x32", True, True),
        ("`pgd_step` L-inf, 64x3x224x224", "pgd_step Linf 64x3x224x224", True, True),
        ("`pgd_step` L2, 128x3x32x32", "pgd_step L2 128x3x32x32", True, True),
        ("`pgd_step` L2, 64x3x224x224", "pgd_step L2 64x3x224x224", True, True),
        ("`pgd_step_fosc` L-inf, 64x3x224x224", "pgd_step_fosc Linf 64x3x224x224", False, True),
        ("`atas_step` L-inf, 64x3x224x224", "atas_step Linf 64x3x224x224", False, True),
    ]
    return table(
        ["Work", "Ours", "Eager torch", "torch.compile", "Share of the floor"],
        (
            [
                name, place(PGD, row, "ours"), place(PGD, row, "eager torch"),
                place(PGD, row, "torch.compile") if compiled else "", place(PGD, row, "floor") if floor else "",
            ]
            for name, row, compiled, floor in rows
        ),
    )  # fmt: skip


def attacks() -> str:
    victim = lambda work, network, batch: place(VICTIMS, f"{work} {network} {batch}", "torchattacks")
    large = "; ".join(victim("PGD-1", network, 128) for network in ("ResNet-18", "MobileNetV2"))
    small = place(VICTIMS, "~MNIST CNN", "torchattacks")
    beside = "; ".join(place(STEPS, f"~{attack}", "share 1/x") for attack in ("apgd", "fab", "square"))
    return table(
        ["Attacks, 2 threads (an Intel Xeon)", "Peer", "Ratio"],
        [
            [
                "PGD-10 with `prepare=True`, batch 32: ResNet-18; MobileNetV2", "torchattacks",
                f"{victim('PGD-10', 'ResNet-18', 32)}; {victim('PGD-10', 'MobileNetV2', 32)}",
            ],
            ["the same, one step of 128", "torchattacks", large],
            ["the same, a network of two convolutions", "torchattacks", small],
            ["beside the passes, a step of APGD; FAB; Square at batch 64 to 250", "the public AutoAttack", beside],
        ],
    )  # fmt: skip


def autoattack(results: Path = figures.SHIPPED) -> str:
    """Whole evaluations; a row that no run of the suite "attacks" holds yet, or whose results differ, is left out."""
    public, standard = "AutoAttack", "standard"
    rows = [
        (f"{text}, {images}: L-inf; L2; L1", [f"{work} {norm} {model}" for norm in ("Linf", "L2", "L1")], peer, name)
        for images, end in (("MNIST", ""), ("CIFAR-10", ", CIFAR-10"))
        for text, work, model, peer, name in (
            ("standard, a plain CNN", "standard", f"plain{end}", public, "the public one"),
            ("standard, a PGD-trained CNN", "standard", f"PGD-trained{end}", public, "the public one"),
            ('`version="fast"`, a plain CNN', "fast", f"plain{end}", standard, "our standard one"),
            ('`version="fast"`, a PGD-trained CNN', "fast", f"PGD-trained{end}", standard, "our standard one"),
        )
    ]
    rows.append(
        (
            "standard with `certify_first`, a provably trained network", ["certify first Linf provably trained"],
            public, "the public one",
        )
    )  # fmt: skip
    return table(
        ["AutoAttack, same accuracy", "Peer", "Ratio"],
        (
            [text, name, places(EVALUATIONS, titles, peer)]
            for text, titles, peer, name in rows
            if all(held(place(EVALUATIONS, title, peer), results) for title in titles)
        ),
    )


def held(cell: str, results: Path) -> bool:
    """Whether the results hold the figure of a place."""
    try:
        figures.value(cell.strip("{ }"), results)
    except ValueError:
        return False
    return True


def work() -> str:
    """Bounds, distances and masked networks."""
    lirpa = "auto_LiRPA"

    def row(name: str, file: str, rows: Sequence[str], peer: str, says: str | None = None) -> list[str]:
        return [name, places(file, rows, "ours"), says or peer, places(file, rows, peer)]

    def bounds(name: str, file: str, method: str, models: Sequence[str]) -> list[str]:
        return row(name, file, [f"{method} {model}" for model in models], lirpa)

    better = "torch, the better layout"

    def masked(name: str, file: str, rows: Sequence[str]) -> list[str]:
        return row(name, file, rows, "best", better)

    def others(name: str, networks: Sequence[str]) -> list[str]:
        pairs = [[f"forward {network} {rate} 16" for rate in ("0.9", "0.99")] for network in networks]
        cell = lambda field: "; ".join(places(NETS, pair, field, " and ") for pair in pairs)
        return [name, cell("ours"), better, cell("best")]

    plain, trained = ("FC1 100", "CNN 100"), ("FC1 trained 100", "CNN trained 100")
    net = "ResNet-34"
    return table(
        ["Work", "Ours", "Peer", "Ratio"],
        [
            row(
                'IBP margins, batch 8: FC1; CNN, `check="none"`', BOUNDS, ["IBP margins FC1 8", "IBP margins CNN 8"],
                "two products in torch", "two products a layer in torch",
            ),
            bounds("Fast-Lin margins, batch 100: FC1; CNN", BOUNDS, "fast-lin margins", plain),
            bounds(
                "CROWN margins, batch 100: FC1; CNN; FC1 with its trained weights", BOUNDS, "crown margins",
                [*plain, trained[0]],
            ),
            row(
                "Fast-Lin and CROWN margins of a residual network (CIFAR), batch 8", FULL,
                ["fast-lin margins residual 8", "crown margins residual 8"], lirpa,
            ),
            bounds("CROWN-IBP margins, batch 100: FC1; CNN", BOUNDS, "crown-ibp margins", plain),
            bounds("the same with their trained weights", BOUNDS, "crown-ibp margins", trained),
            bounds("CROWN-IBP bounds and backward, batch 100: FC1; CNN", BOUNDS, "crown-ibp bounds and backward", plain),
            bounds("the same with their trained weights", BOUNDS, "crown-ibp bounds and backward", trained),
            bounds(
                "CROWN-IBP margins of networks of other people (an Intel Xeon): max pooling, batch 16; average "
                "pooling, 16; "
                "batch norm with residual blocks, 8; depthwise, 8; ResNet-18 of width 16, 4", OTHERS, "crown-ibp margins",
                [
                    "max pooling 16", "leaky, average pooling 16", "batch norm residual 8", "depthwise 8",
                    "ResNet-18 width 16 4",
                ],
            ),
            row(
                "`relax`, a million neurons, adaptive lines: tanh; GELU", LINES,
                ["lines tanh crown 1000000", "lines gelu crown 1000000"], "definition in torch", "its definition in torch",
            ),
            [
                "`polyhedral_distance`, 900x3072, L-inf", place(DISTANCES, "polyhedral_distance 900x3072 Linf", "ours"),
                "greedy in torch; FAB's projection", "; ".join(
                    place(DISTANCES, "polyhedral_distance 900x3072 Linf", peer) for peer in ("greedy torch", "FAB sort")
                ),
            ],
            masked(
                "ResNet-34 (CIFAR), 1 % of the weights, gamma 0.1, forward, batch 16; 128", BINARY,
                [f"{net} forward 0.99 0.1 16", f"{net} forward 0.99 0.1 128"],
            ),
            masked(
                "the same, gamma 1.0, batch 16; 128", BINARY,
                [f"{net} forward 0.99 1.0 16", f"{net} forward 0.99 1.0 128"],
            ),
            masked(
                "gamma 0.1 with the input's gradient, batch 16; 128", BINARY,
                [f"{net} forward and input gradient 0.99 0.1 {batch}" for batch in (16, 128)],
            ),
            others(
                "networks of other people, 10 % and 1 % of the weights, batch 16: MobileNetV2 (ReLU6); WRN-28-4",
                ["MobileNetV2 ReLU6", "WRN-28-4 ReLU"],
            ),
            others(
                "the same, DenseNet-BC-40; U-Net; VGG-16", ["DenseNet-BC-40 ReLU", "U-Net ReLU", "VGG-16-BN ReLU"]
            ),
            [
                "`topk_mask`, 2.4 million scores", place(BINARY, "topk_mask 2359296 23592", "ours"), "sort; kthvalue",
                "; ".join(place(BINARY, "topk_mask 2359296 23592", peer) for peer in ("sort", "kthvalue")),
            ],
        ],
    )  # fmt: skip


# layers of ResNet-34 with their density at r 0.99 and gamma 0.1
_LAYERS = (
    ("64 ch 3x3 on 32x32", "0.131"), ("128 ch 3x3 on 16x16", "0.038"), ("256 ch 3x3 on 8x8", "0.011"),
    ("512 ch 3x3 on 4x4", "0.0031"), ("3-64 ch 3x3 on 32x32", "1.0"), ("64-128 ch 3x3/2 on 32x32", "0.07"),
    ("64-128 ch 1x1/2 on 32x32", "0.51"), ("128-256 ch 3x3/2 on 16x16", "0.02"), ("128-256 ch 1x1/2 on 16x16", "0.146"),
    ("256-512 ch 3x3/2 on 8x8", "0.0058"), ("256-512 ch 1x1/2 on 8x8", "0.042"),
)  # fmt: skip
_DENSITIES = ("0.5", "0.2", "0.05", "0.01", "0.002")
_WHOLE = (
    ("forward", "0.99", "0.1", 1),
    ("forward", "0.99", "0.1", 16),
    ("forward and input gradient", "0.99", "0.1", 16),
    ("forward", "0.99", "1.0", 16),
    ("forward", "0.99", "1.0", 1),
    ("forward and input gradient", "0.99", "1.0", 16),
    ("forward", "0.99", "0.1", 128),
    ("forward", "0.99", "1.0", 128),
    ("forward and input gradient", "0.99", "0.1", 128),
    *(("forward", rate, "0.1", 16) for rate in ("0.5", "0.8", "0.9", "0.95", "0.995", "0.998")),
)


def layers() -> str:
    """Every layer at its own density."""
    lines = []
    for layer, density in _LAYERS:
        forward = [f"masked conv {layer} {density} {batch}" for batch in (1, 16, 128)]
        gradient = f"masked conv input gradient {layer} {density} 16"
        cells = [place(BINARY, row, DENSE) for row in (*forward, gradient)]
        lines.append([layer, f"{100 * float(density):.3g} %", *cells, place(BINARY, forward[1], "sparseprop")])
    return table(["layer", "density", "batch 1", "16", "128", "input gradient, 16", "SparseProp, 16"], lines)


def densities() -> str:
    return table(
        ["layer", "batch", *(f"{100 * float(d):g} %" for d in _DENSITIES)],
        (
            [layer, str(batch), *(place(BINARY, f"masked conv {layer} {d} {batch}", DENSE) for d in _DENSITIES)]
            for layer, _ in _LAYERS[:4]
            for batch in (1, 16, 33)
        ),
    )


def whole_networks() -> str:
    return table(
        ["ResNet-34", "r", "gamma", "batch", "against the better of NCHW and channels_last"],
        (
            [work, rate, gamma, str(batch), place(BINARY, f"ResNet-34 {work} {rate} {gamma} {batch}", "best")]
            for work, rate, gamma, batch in _WHOLE
        ),
    )


def without_avx512() -> str:
    lines = []
    for name in (
        "IBP margins",
        "fast-lin margins",
        "crown margins",
        "crown-ibp margins",
        "crown-ibp bounds and backward",
    ):
        models = ["FC1", "CNN"] + (["FC1 trained", "CNN trained"] if name.startswith("crown-ibp") else [])
        for model in models:
            row = f"{name} {model} 100"
            lines.append([name, model, *(place(AVX2, row, field) for field in ("ours", "floor", "auto_LiRPA"))])
    return table(["work", "model", "ours", "of floor", "auto_LiRPA"], lines)


def activations() -> str:
    names = ("hardtanh", "sigmoid", "tanh", "arctan", "softplus", "elu", "silu", "gelu", "gelu_tanh")
    rows = [(name, f"lines {name} crown 1000000") for name in names]
    rows += [(f"{name}, lines of one slope", f"lines {name} parallel 1000000") for name in ("sigmoid", "gelu")]
    rows += [(f"{name}, with gradients", f"lines and gradients {name} crown 1000000") for name in ("tanh", "gelu")]
    return table(
        ["activation", "ours", "definition in torch"],
        ([name, place(LINES, row, "ours"), place(LINES, row, "definition in torch")] for name, row in rows),
    )


TEMPLATES = {
    "figures_steps": steps(),
    "figures_attacks": attacks(),
    "figures_autoattack": autoattack(),
    "figures_work": work(),
    "binary_layers": layers(),
    "binary_densities": densities(),
    "binary_resnet": whole_networks(),
    "bounds_avx2": without_avx512(),
    "bounds_activations": activations(),
}
