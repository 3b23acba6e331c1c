"""Whether the thesis' and Wang et al.'s observations on schedules, steps, weights and corruptions came out."""

from __future__ import annotations

import numpy as np

from .gallery_claim import Arrays, above, listed, percent


def step_sizes(a: Arrays) -> tuple[bool | None, str]:
    mean = a["accuracy_by_step"].mean(axis=1)
    over = ", ".join(f"eps/{k}" for k in a["step_eps_over"])
    inner, outer = mean[1:3].max(), np.delete(mean, (1, 2)).max()
    return above(float(inner - outer)), f"mean accuracy under three attacks, trained with {over}: {percent(mean)}"


def step_numbers(a: Arrays) -> tuple[bool | None, str]:
    mean = a["accuracy_by_steps"].mean(axis=1)
    gain = above(float(mean[2:].max() - mean[1]))
    return not gain, f"after {listed(a['steps'])} steps: {percent(mean)}"


def kink(a: Arrays) -> tuple[bool, str]:
    jump = a["sketch_jump"]
    return bool(jump[1] > jump[0] > 0), f"the slope jumps by {listed(jump)} at eps {listed(a['sketch_eps'])}"


def by_rate(a: Arrays) -> tuple[bool | None, str]:
    constant, *warm = a["error_by_rate"].mean(axis=1)
    rows = "; ".join(f"{k}: {percent(row)}" for k, row in zip(a["kinds"], a["error_by_rate"], strict=True))
    return above(float(constant - max(warm))), f"robust error at rates {listed(a['rates'])}: {rows}"


def rate_warm_up(a: Arrays) -> tuple[bool | None, str]:
    best = a["error_by_rate"][1:].min()
    return above(float(a["error_rate_warm_up"].min() - best)), (
        f"robust error {percent(a['error_rate_warm_up'])} over the rates, best with warm-up of eps {percent(best)}"
    )


def by_width(a: Arrays) -> tuple[bool | None, str]:
    constant, *warm = a["error_by_width"]
    rows = "; ".join(f"{k}: {percent(row)}" for k, row in zip(a["kinds"], a["error_by_width"], strict=True))
    return above(float((constant - np.array(warm)).min())), f"robust error at widths {listed(a['widths'])}: {rows}"


def weights_grow(a: Arrays) -> tuple[bool, str]:
    groups = a["weight_by_group"]
    held = groups[:3].mean() < groups[3:7].mean() < groups[7:].mean()
    return bool(held), f"relative weight of ten groups, the hardest first: {listed(groups)}"


def _gaps(a: Arrays) -> dict[str, float]:
    gaps = a["last_test_error"] - a["last_train_error"]
    return dict(zip(a["settings"].tolist(), gaps.tolist(), strict=True))


def by_beta(a: Arrays) -> tuple[bool, str]:
    gaps = {k: v for k, v in _gaps(a).items() if k.startswith("beta")}
    values = np.array(list(gaps.values()))
    errors = a["last_test_error"][[k.startswith("beta") for k in a["settings"].tolist()]]
    return bool((np.diff(values) > 0).all()), (
        f"gap for {', '.join(gaps)}: {listed(100 * values, '+.1f')} points, test error {percent(errors)}"
    )


def reweighted(a: Arrays) -> tuple[bool, str]:
    gaps = _gaps(a)
    both = np.array([gaps["reweighting"], gaps["ATTA"]])
    return bool(both[0] < both[1]), (
        f"gap with and without {listed(100 * both, '+.1f')} points, test error {percent(a['last_test_error'][[1, 0]])}"
    )


def weight_correlation(a: Arrays) -> tuple[bool, str]:
    return bool(a["weight_correlation"] > 0.6), f"correlation {float(a['weight_correlation']):.3f} (thesis: 0.890)"


def share_correlation(a: Arrays) -> tuple[bool, str]:
    return bool(a["share_correlation"] > 0.6), f"correlation {float(a['share_correlation']):.3f} (thesis: 0.960)"


def corrupted(a: Arrays) -> tuple[bool, str]:
    own = float(np.diag(a["between_methods"]).max())
    table = a["d_distance"]
    near, far = table.mean(axis=0).argmin(), table.mean(axis=0).argmax()
    names = a["corruptions"]
    return bool((table > own).all()), (
        f"within a method at most {own:.3f}; of {names.size} corruptions from {table.mean(axis=0).min():.3f} "
        f"({names[near]}) to {table.mean(axis=0).max():.3f} ({names[far]})"
    )


def architectures(a: Arrays) -> tuple[bool, str]:
    table = a["d_distance_architectures"]
    rest = table[0, 1:]
    return bool(
        (rest < 1 / 6).all()
    ), f"from {a['architectures'][0]} to {'; '.join(a['architectures'][1:])}: {listed(rest)}"


def plainly(a: Arrays) -> tuple[bool, str]:
    without, with_it = a["plain_by_init"]
    best = with_it.max(axis=1)
    held = abs(best[0] - best[1]) < 0.06 and with_it[0].max() > without[0].max()
    rows = "; ".join(
        f"{name.replace('_', ' ')}, gamma {listed(a['gammas'])}: {percent(w)} without, {percent(v)} with the last norm"
        for name, w, v in zip(a["inits"].tolist(), without, with_it, strict=True)
    )
    return bool(held), rows
