"""What the papers saw, and how each study's numbers say whether it came out: for benchmarks.gallery."""

from __future__ import annotations

import numpy as np

from . import gallery_training as T
from .gallery_claim import Array, Arrays, Check, Claim, Study, above, listed, percent

# --- trajectory ------------------------------------------------------------------------------------------------------


def _maxima(a: Arrays) -> tuple[bool, str]:
    peaks = a["toy_peaks"]
    held = peaks[0].max() == 1 and peaks[-1].max() > 1
    return bool(held), f"maxima on the circle at scale 0.01: {listed(peaks[0])}, at scale 100: {listed(peaks[-1])}"


def _escape(a: Arrays) -> tuple[bool, str]:
    half = np.median(a["cnn_half"], axis=-1)
    held = half[0].max() < half[-1, -1] and half[-1, 0] < half[-1, -1]
    return bool(
        held
    ), f"median steps to half of the way at scale 0.1: {listed(half[0])}, at scale 1000: {listed(half[-1])}"


def _later(a: Arrays) -> tuple[bool, str]:
    half = a["epochs_half"].mean(axis=-1)
    held = (half[-1] > 1.2 * half[0]).all()
    epochs = ", ".join(str(e) for e in a["epochs"])
    return bool(
        held
    ), f"mean steps to half after {epochs} epochs, ratio 0.3: {listed(half[:, 0])}; 10: {listed(half[:, 1])}"


# --- landscape -------------------------------------------------------------------------------------------------------


def _gradients(a: Arrays) -> tuple[bool, str]:
    norms = a["gradient_norm"]
    return bool((np.diff(norms) > 0).all()), f"mean norm at eps {listed(a['eps'])}: {listed(norms)}"


def _sharp(a: Arrays) -> tuple[bool, str]:
    top, normal = a["eigenvalues"][:, 0], a["normalised"][:, 0]
    held = (np.diff(top) > 0).all() and (np.diff(normal) > 0).all()
    return bool(held), f"the largest eigenvalue at eps {listed(a['eps'])}: {listed(top)}; normalised: {listed(normal)}"


def _directions(a: Arrays) -> tuple[bool, str]:
    middle = a["surface_top"].shape[1] // 2
    rise = lambda rows: rows[:, [0, -1]].mean(axis=1) - rows[:, middle]
    top, flat = rise(a["surface_top"]), rise(a["surface_random"])
    return bool((top > 5 * np.abs(flat)).all()), f"loss gained at distance 1: {listed(top)} against {listed(flat)}"


def _turning(a: Arrays) -> tuple[bool, str]:
    top, flat = a["cosines_top"][:, 1], a["cosines_random"][:, 1]
    return bool((top < flat).all()), f"cosine at distance 0.2, eps 0.1 and 0.2: {listed(top)} against {listed(flat)}"


def _barrier(a: Arrays) -> tuple[bool, str]:
    loss = a["curve_loss"]
    over = loss.max(axis=1) - loss[:, [0, -1]].max(axis=1)
    return bool(over[-1] > over[0] + 0.05), f"largest loss on the curve over the worse end: {listed(over)}"


def _first(a: Arrays) -> tuple[bool, str]:
    errors, far = a["errors_by_tenth"], a["distances_by_tenth"]
    held = errors[0, -1] < errors[-1, -1] and far[0, -1] > far[-1, -1]
    last = f"error {percent(errors[:, -1])}, distance {listed(far[:, -1])} in the last tenth of the updates"
    return bool(held), f"eps {listed(a['eps'])}: {last}"


def _larger(a: Arrays) -> tuple[bool, str]:
    norms = a["norms_by_tenth"].mean(axis=1)
    return bool((np.diff(norms) < 0).all()), f"mean norm over the updates {listed(norms)} at eps {listed(a['eps'])}"


# --- fosc, dynamic ---------------------------------------------------------------------------------------------------


def _by_group(a: Arrays) -> tuple[bool, str]:
    success = a["ball_success"]
    return bool(success[0] > success[-1]), f"success in ten groups from the lowest FOSC on: {percent(success)}"


def _on_path(a: Arrays) -> tuple[bool, str]:
    fosc, loss = a["median_on_path"], a["loss_on_path"]
    held = fosc[-1] < fosc.max() / 2 and loss[-1] > loss[0]
    return bool(held), f"median FOSC {listed(fosc)} over ten steps, mean loss {loss[0]:.3g} to {loss[-1]:.3g}"


def _lengths(a: Arrays) -> tuple[bool, str]:
    fosc, loss = a["median_by_step"], a["loss_by_step"]
    held = int(fosc.argmin()) in (1, 2, 3) and loss.max() - loss.min() < 0.05 * loss.mean()
    over = ", ".join(f"eps/{k}" for k in a["step_eps_over"])
    return bool(held), f"median FOSC for {over}: {listed(fosc)}; mean loss {listed(loss)}"


def _numbers(a: Arrays) -> tuple[bool, str]:
    fosc = a["median_by_steps"]
    held = fosc[1] < 0.7 * fosc[0] and fosc[3] > 0.7 * fosc[1]
    return bool(held), f"median FOSC after 10, 20, 30, 40 steps: {listed(fosc)}"


def _early(a: Arrays) -> tuple[bool, str]:
    fosc = a["median_by_epoch"]
    return bool(
        (fosc[:, 0] < fosc[:, 1:].min(axis=1)).all()
    ), f"median FOSC, steps of eps/4: {listed(fosc[0])}; eps/8: {listed(fosc[1])}"


def _methods(a: Arrays, key: str) -> dict[str, Array]:
    return dict(zip(a["methods"].tolist(), a[key], strict=False))


def _fgsm_first(a: Arrays) -> tuple[bool | None, str]:
    found = _methods(a, "robust_accuracy")
    one, other = found["fgsm-pgd"][-1], found["pgd"][-1]
    return above(one - other), f"robust accuracy {percent([one, other])} with and without FGSM first"


def _fgsm_fosc(a: Arrays) -> tuple[bool, str]:
    found = _methods(a, "share_below_0.1")
    one, other = found["fgsm-pgd"][-1], found["pgd"][-1]
    return bool(one > other), f"share of FOSC below 0.1 at the end {percent([one, other])}"


def _compared(a: Arrays) -> tuple[bool | None, str]:
    found = _methods(a, "robust_accuracy")
    held = above(float(found["dynamic"][-1] - max(found["pgd"][-1], found["curriculum"][-1])))
    rows = "; ".join(f"{name} {percent(found[name])}" for name in ("pgd", "curriculum", "dynamic"))
    return held, f"at eps {listed(a['budgets'])}: {rows}"


def _trained_at(a: Arrays) -> tuple[bool | None, str]:
    found = _methods(a, "robust_accuracy_trained_at")
    gain = found["dynamic"] - found["pgd"]
    return above(
        float(gain[-1] - gain[0])
    ), f"dynamic less standard at eps {listed(a['budgets'])}: {listed(100 * gain, '+.1f')} points"


def _concentrated(a: Arrays) -> tuple[bool, str]:
    found = _methods(a, "median_fosc")
    held = found["dynamic"][-1] < found["dynamic"][0] and found["dynamic"][-1] < found["pgd"][-1]
    rows = "; ".join(f"{name} {listed(found[name])}" for name in ("pgd", "curriculum", "dynamic"))
    return bool(held), f"median FOSC at epochs {', '.join(str(e) for e in a['epochs'])}: {rows}"


# --- difficulty, overfitting -----------------------------------------------------------------------------------------


def _distance(a: Arrays) -> tuple[bool, str]:
    d = a["d_distance"]
    return bool(d.max() < 0.25), f"between plain, FGSM and PGD training, rows of the table: {listed(d)}"


def _itself(a: Arrays) -> tuple[bool, str]:
    d = a["d_distance"]
    others = d[~np.eye(len(d), dtype=bool)]
    return bool(
        np.diag(d).max() < others.min()
    ), f"with itself {listed(np.diag(d))}, with another {others.min():.3g} and more"


def _correlated(a: Arrays) -> tuple[bool, str]:
    value = float(a["correlation"])
    return value > 0.8, f"correlation {value:.3f} (thesis: 0.947)"


def _order(a: Arrays) -> tuple[bool, str]:
    bounds = a["lipschitz"]
    held = (np.diff(bounds, axis=1) < 0).all()
    rows = "; ".join(f"eps {e:g}: {listed(row)}" for e, row in zip(a["budgets"], bounds, strict=True))
    return bool(held), f"bounds after hard, random, easy thirds at {rows}"


def _row(a: Arrays, key: str, setting: str) -> Array:
    return a[key][a["settings"].tolist().index(setting)]


def _hard_fails(a: Arrays) -> tuple[bool, str]:
    last, train = _row(a, "last_test_error", "pgd 0.1"), _row(a, "last_train_error", "pgd 0.1")
    held = last[0] > last[1] and last[0] > last[2]
    return bool(held), f"test error after hard, random, easy thirds {percent(last)}, training error {percent(train)}"


def _easy_stays(a: Arrays) -> tuple[bool | None, str]:
    rise = _row(a, "last_test_error", "pgd 0.1") - _row(a, "best_test_error", "pgd 0.1")
    held = above(float(min(rise[0], rise[1]) - rise[2]))
    return held, f"last less best test error {listed(100 * rise, '.1f')} points"


def _weaker(a: Arrays) -> tuple[bool, str]:
    gap = lambda name: float(_row(a, "last_test_error", name)[0] - _row(a, "last_test_error", name)[2])
    gaps = [gap(name) for name in ("plain", "fgsm", "pgd 0.1")]
    return bool(
        gaps[2] > max(gaps[:2])
    ), f"test error after hard less easy thirds {listed(100 * np.array(gaps), '+.1f')} points"


def _grows(a: Arrays) -> tuple[bool, str]:
    gap = lambda name: float(_row(a, "last_test_error", name)[0] - _row(a, "last_test_error", name)[2])
    gaps = [gap("plain"), gap("pgd 0.025"), gap("pgd 0.1")]
    return bool(
        gaps[0] < gaps[1] < gaps[2]
    ), f"the same at eps 0, 0.025, 0.1: {listed(100 * np.array(gaps), '+.1f')} points"


def _l2(a: Arrays) -> tuple[bool, str]:
    last = _row(a, "last_test_error", "pgd l2 0.6")
    return bool(last[0] > last[2]), f"test error after hard, random, easy thirds {percent(last)}"


def _more(a: Arrays) -> tuple[bool, str]:
    best = a["growing_best_test_error"]
    return bool(
        best[-1] <= best.min() + 1e-9
    ), f"best test error with the easiest {percent(a['shares'])}: {percent(best)}"


def _features(a: Arrays) -> tuple[bool, str]:
    first, last = a["activations_first"], a["activations_last"]
    held = first[9] > first[0] and last[0] / last[9] > first[0] / first[9]
    return bool(held), f"G0 over G9 in the first epoch {first[0] / first[9]:.2f}, in the last {last[0] / last[9]:.2f}"


def _lipschitz(a: Arrays) -> tuple[bool, str]:
    bounds = a["lipschitz"]
    held = (bounds[:, -1] > bounds[:, 0]).all() and bounds[0, -1] > bounds[2, -1]
    ends = "; ".join(f"{row[0]:.3g} to {row[-1]:.3g}" for row in bounds)
    return bool(held), f"hard, random, easy: {ends}"


# --- subnetwork, initialisation --------------------------------------------------------------------------------------


def _gamma(a: Arrays) -> tuple[bool, str]:
    table, gammas = a["robust_accuracy"], a["gammas"]
    best = gammas[table.argmax(axis=1)]
    held = best[-1] < 1 and best[-1] <= best[0]
    rows = "; ".join(f"r = {r:g}: {percent(row)}" for r, row in zip(a["rates"], table, strict=True))
    return bool(held), f"best gamma {listed(best)} for r = {listed(a['rates'])}; gamma {listed(gammas)} at {rows}"


def _gathered(a: Arrays) -> tuple[bool, str]:
    ours, chance = int((a["outputs_sorted"] == 0).sum()), int((a["outputs_random"] < 0.5).sum())
    return (
        ours > chance + 2,
        f"{ours} of {len(a['outputs_sorted'])} output channels are empty, {chance} of random masks",
    )


def _meet(a: Arrays) -> tuple[bool, str]:
    _, _, both, expected = a["aligned"]
    return bool(both > expected), f"{both:.0f} channels are empty on both sides, {expected:.3g} by chance"


def _saved(a: Arrays) -> tuple[bool, str]:
    saved = a["flops_saved"]
    return bool(
        (saved > 0).all()
    ), f"{percent(saved)} in training, evaluation, backward (thesis: about 45 and 32 % for RN34)"


def _equal(a: Arrays) -> tuple[bool, str]:
    dense, best = float(a["equal_width_robust_accuracy"]), float(a["robust_accuracy"][-1].max())
    return best > dense, f"{percent([best, dense])}"


def _last_norm(a: Arrays) -> tuple[bool, str]:
    without, with_it = a["by_range"]
    held = with_it.mean() > without.mean() and np.ptp(with_it) < np.ptp(without)
    return bool(
        held
    ), f"score range {listed(a['score_ranges'])}: {percent(without)} without, {percent(with_it)} with it"


def _comparable(a: Arrays) -> tuple[bool, str]:
    constant, binary = (float(row.max()) for row in a["by_init"][1])
    return abs(constant - binary) < 0.06, f"best with the last batch norm {percent([constant, binary])}"


# --- theory ----------------------------------------------------------------------------------------------------------


def _printed(theorem: int, rows: int) -> Check:
    def check(a: Arrays) -> tuple[bool, str]:
        regret, bound = a["regret"][theorem, rows], a["bound"][theorem, rows]
        return bool(
            (regret <= bound).all()
        ), f"regret {listed(regret)} against {listed(bound)} after {listed(a['steps'])} steps"

    return check


def _derived(a: Arrays) -> tuple[bool, str]:
    regret, bound = a["regret"][:, 1], a["derived_bound"][:, 1]
    return bool((regret <= bound).all()), f"the largest regret over it {float((regret / bound).max()):.3g}"


def _wang(a: Arrays) -> tuple[bool, str]:
    left, right = a["wang_left"], a["wang_right"]
    return bool(
        (left <= right).all()
    ), f"{listed(left[:, 1])} against {listed(right[:, 1])} at FOSC {listed(a['deltas'])}"


def _wide_loss(key: str, distance: str) -> Check:
    def check(a: Arrays) -> tuple[bool, str]:
        widths = ", ".join(str(w) for w in a["widths"])
        return bool(a[key][-1] < 0.1), f"loss {listed(a[key])} and distance {listed(a[distance])} at widths {widths}"

    return check


def _linear(a: Arrays) -> tuple[bool, str]:
    gap = a["linearisation_gap"]
    return bool((np.diff(gap) < 0).all()), f"{listed(gap)}"


def _robust_costs(a: Arrays) -> tuple[bool, str]:
    plain, robust = a["plain_loss"], a["loss"]
    return bool((plain < robust).all()), f"loss after as many steps {listed(plain)} plain, {listed(robust)} robust"


def _shattered(a: Arrays) -> tuple[bool, str]:
    rows = a["shattered"]
    each = "; ".join(f"n = {int(n)}, d = {int(d)}: {int(k)}" for n, d, k, _ in rows)
    return bool((rows[:, 3] > 0).all()), f"points shattered {each}"


def _all_hold(a: Arrays) -> tuple[bool, str]:
    named = dict(zip(a["statements"].tolist(), a["margins"].tolist(), strict=True))
    least = min(named, key=lambda key: named[key])
    return named[least] > -1e-8, f"{len(named)} statements; the smallest margin is {named[least]:.2g}, of {least}"


def _max_margin(a: Arrays) -> tuple[bool, str]:
    last = a["cosines"][:, -1]
    return bool((last > 0.95).all()), f"cosine after 20 000 steps at budgets {listed(a['budgets'])}: {listed(last)}"


STUDIES: dict[str, Study] = {
    "trajectory": Study("The adversary's way over an l2 sphere (Deng et al. 2020).", (
        Claim("Figure 1", "inputs of small scale leave one maximum on the sphere, of large scale several.", _maxima),
        Claim("Figure 2", "escaping is quick at a small scale, at a large one only for a small ratio.", _escape),
        Claim("Figure 3", "escaping gets harder over the epochs of adversarial training.", _later),
    )),
    "early": Study("The first updates of a LeNet by SGD (thesis 4.2.3).", (
        Claim("Figure 4.3", "for a small eps the network leaves its start faster.", _first),
        Claim("Figure 4.3", "and gradients are the larger, the smaller eps is.", _larger),
    ), 3),
    "landscape": Study("The adversarial loss over the weights (thesis 4.2.3), by the training's eps.", (
        Claim("Figure 4.4", "gradients at the end grow with eps.", _gradients),
        Claim("Figure 4.5", "minima are sharper for larger eps.", _sharp),
        Claim("Figure 4.6", "the loss is steep along the top eigenvector and flat in a random direction.", _directions),
        Claim("Figure 4.7", "perturbations turn more along the top eigenvector than in a random direction.", _turning),
        Claim("Figure 4.8", "two minima are joined by a flat curve for small eps, not for large.", _barrier),
    )),
    "fosc": Study("How far attacks are from converged (Wang et al. 2019).", (
        Claim("Figure 1a", "success is larger where FOSC is lower.", _by_group),
        Claim("Figure 1b", "FOSC falls on the way as the loss rises.", _on_path),
        Claim("Figure 2c, 2e", "steps of eps/2 to eps/6 converge best, while losses hardly differ.", _lengths),
        Claim("Figure 2d", "more steps than reach the surface bring little.", _numbers),
        Claim("Figure 3a", "FOSC is lower early in the training.", _early),
    )),
    "dynamic": Study("Standard, curriculum and dynamic training (Wang et al. 2019).", (
        Claim("Figure 3b", "FGSM in the first epochs makes PGD training more robust.", _fgsm_first),
        Claim("Figure 3c", "and its attacks converge better.", _fgsm_fosc),
        Claim("Figure 4a", "dynamic training is the most robust against the largest eps.", _compared),
        Claim("Figure 4b", "its gain over standard training grows with the training's eps.", _trained_at),
        Claim("Figure 5", "dynamic training's FOSC falls, to below that of standard one.", _concentrated),
    )),
    "steps": Study("PGD training by the attack's steps (Wang et al. 2019).", (
        Claim("Figure 2a", "steps of eps/2 or eps/4 train best.", T.step_sizes),
        Claim("Figure 2b", "more steps than reach the surface bring little.", T.step_numbers),
    ), 3),
    "schedules": Study("Warm-up of eps (thesis 4.2.4).", (
        Claim("Figure 4.2", "the worst-case loss has a kink, and a larger one for a larger eps.", T.kink),
        Claim("Figure 4.9", "warm-up of eps does better over the rates than a constant eps.", T.by_rate),
        Claim("Figure 4.10", "warm-up of the rate does not do the same.", T.rate_warm_up),
        Claim("Figure 4.14", "warm-up of eps is better at every width.", T.by_width),
    )),
    "weights": Study("Easy and hard examples treated unlike (thesis 4.3.5).", (
        Claim("Figure 4.23b", "easier examples weigh more.", T.weights_grow),
        Claim("Figure 4.24", "a smaller beta closes the gap between training and test error.", T.by_beta),
        Claim("Figure 4.25", "so does reweighting.", T.reweighted),
        Claim("Figure 4.26", "weights and difficulty go together.", T.weight_correlation),
        Claim("Figure 4.27", "the label's share of adaptive targets and difficulty go together.", T.share_correlation),
    ), 3),
    "corruptions": Study("Difficulty of corrupted images (thesis 4.3.1).", (
        Claim("Table 4.4", "difficulty under a corruption is another than under an attack: distances are larger than "
              "within a method.", T.corrupted),
    ), 3),
    "difficulty": Study("How hard each example is (thesis 4.3).", (
        Claim("Table 4.3", "difficulty depends on the data: distances are far below 1/3.", _distance),
        Claim("Table 4.3", "a method agrees with itself better than with another.", _itself),
        Claim("Table 4.3", "nor does the architecture or the duration matter much.", T.architectures),
        Claim("Figure 4.15", "difficulty by loss and by 0-1 error go together.", _correlated),
        Claim("Table 4.5", "the Lipschitz bound is larger after harder examples.", _order),
    )),
    "overfitting": Study("Training on easy and hard examples (thesis 4.3.2, 4.3.4).", (
        Claim("Figure 4.17a", "PGD training on the hardest third fails.", _hard_fails),
        Claim("Figure 4.17a", "it does not overfit on the easiest.", _easy_stays),
        Claim("Figure 4.17b, c", "the gap between hard and easy is smaller for plain and FGSM training.", _weaker),
        Claim("Figure 4.18", "the gap grows with eps.", _grows),
        Claim("Figure 4.19", "hard is worse than easy for an l2 budget, too.", _l2),
        Claim("Figure 4.20", "with model selection, more data is better.", _more),
        Claim("Figure 4.21b", "features of easy examples grow first, those of hard ones catch up.", _features),
        Claim("Figure 4.22", "the Lipschitz bound grows in training, to more for hard examples.", _lipschitz),
    )),
    "subnetwork": Study("What robust subnetworks keep (thesis 5.1).", (
        Claim("Table 5.2", "larger pruning rates want a smaller gamma.", _gamma),
        Claim("Figure 5.2", "kept weights gather in few channels.", _gathered),
        Claim("Figure 5.4", "empty outputs are those that the next layer does not look at.", _meet),
        Claim("Table 5.1", "binary weights save operations.", _saved),
        Claim("Table 5.6", "the subnetwork is more robust than a dense network with as many weights.", _equal),
    )),
    "initialisation": Study("Scores and weights at the start (thesis 5.1.4).", (
        Claim("Table 5.3", "the last batch norm helps, and makes the range of the scores matter less.", _last_norm),
        Claim("Table 5.4", "binary weights are as good as signed Kaiming constants.", _comparable),
        Claim("Table 5.5", "both hold for plain training, too.", T.plainly),
    )),
    "theory": Study("Statements of the thesis as two sides.", (
        Claim("Chapters 3 to 5", "the statements hold on two classes of the digits.", _all_hold),
        Claim("Theorem 4.4", "adversarial logistic regression tends to the max-margin direction.", _max_margin),
    )),
    "convergence": Study("Bounds of regret on a convex-concave game (thesis 5.2.3; Wang et al.).", (
        Claim("Theorem 5.4", "(5.26) bounds the regret where all rows of the perturbations move.", _printed(0, 0)),
        Claim("Theorem 5.4", "and where one row moves, as (5.25) says.", _printed(0, 1)),
        Claim("Theorem 5.3", "(5.24) bounds the regret where all rows move.", _printed(1, 0)),
        Claim("Theorem 5.3", "and where one row moves, as (5.23) says.", _printed(1, 1)),
        Claim("Ours", "what follows for one row bounds it.", _derived),
        Claim("Wang et al., Theorem 1", "the mean squared gradient is bounded by the attack's FOSC.", _wang),
    ), 3, False),
    "overparametrized": Study("Wide networks in small (Gao et al. 2019).", (
        Claim("Theorem 4.1", "a wide deep network gets below 0.1.", _wide_loss("deep_loss", "deep_distance")),
        Claim("Theorem 5.1", "descent of a wide two-layer network gets below 0.1.", _wide_loss("loss", "distance")),
        Claim("Theorem 5.2", "a robust network exists near the start.", _wide_loss("exists_loss", "exists_distance")),
        Claim("Section 5", "the network comes nearer to its linearisation as the width grows.", _linear),
        Claim("Section 6", "robust training reaches a larger loss than plain training at equal width.", _robust_costs),
        Claim("Theorem 6.1", "a class that interpolates n points robustly shatters d n / 2 points.", _shattered),
    ), 3, False),
}  # fmt: skip
