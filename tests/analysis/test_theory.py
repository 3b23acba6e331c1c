import math

import numpy as np
import pytest
import torch

import fastrobust as fr
from fastrobust.analysis import theory as T


def separable(n=12, d=6, seed=0):
    random = np.random.default_rng(seed)
    x, w = random.standard_normal((n, d)), random.standard_normal(d)
    y = np.sign(x @ w)
    return x + 0.5 * y[:, None] * w / np.linalg.norm(w), y, w / np.linalg.norm(w)


def loss(w, x, y, eps, fixed):
    w, x, y = (torch.as_tensor(v) for v in (w, x, y))
    budget = eps if fixed else eps * w.norm()
    return torch.log1p(torch.exp(-y * (x @ w) + budget)).mean()


def test_theorem_4_1_has_autograds_hessians():
    x, y, w = separable()
    found = T.theorem_4_1(w, x, y, (0.1, 0.4))
    for side, eps in ((found.left, 0.1), (found.right, 0.4)):
        hessian = torch.autograd.functional.hessian(lambda v, e=eps: loss(v, x, y, e, True), torch.tensor(w))
        assert side == pytest.approx(torch.linalg.eigvalsh(hessian).numpy(), abs=1e-12)
    assert found.margin > 0 and (found.left <= found.right).all()
    with pytest.raises(ValueError, match="eps: got"):
        T.theorem_4_1(-w, x, y, (0.1, 0.4))
    with pytest.raises(ValueError, match="eps: got"):
        T.theorem_4_1(w, x, y, (0.4, 0.1))


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_theorem_4_2(p):
    random = np.random.default_rng(1)
    for _ in range(50):
        weights, x = random.standard_normal((4, 5)), random.standard_normal(5)
        label = int(random.integers(4))
        weights[label] += x  # often right without an attack
        bar, sides = T.theorem_4_2(weights, x, label, p=p)
        assert sides.margin >= -1e-12 and sides.left[0] == pytest.approx(math.log(4))
        d = weights - weights[label]
        step = T._steepest(d[np.linalg.norm(d, T._DUAL[p], axis=1).argmax()], p)
        assert np.linalg.norm(step, p) == pytest.approx(1)
        logits = torch.tensor(weights @ (x + bar * step))
        wanted = torch.nn.functional.cross_entropy(logits[None], torch.tensor([label]))
        assert sides.right[0] == pytest.approx(float(wanted))
    assert T.theorem_4_2(0.01 * weights, x, label, p=p)[0] > 10 * max(bar, 0.1)  # no budget for every W
    with pytest.raises(ValueError, match="p: got 3"):
        T.theorem_4_2(weights, x, label, p=3)


def test_the_adversarial_logistic_loss_is_the_maximum_and_has_autograds_gradient():
    x, y, _ = separable(seed=2)
    w = np.random.default_rng(3).standard_normal(6)
    value, grad = T.adversarial_logistic(w, x, y, 0.3)
    leaf = torch.tensor(w, requires_grad=True)
    there = loss(leaf, x, y, 0.3, False)
    there.backward()
    assert value == pytest.approx(there.item()) and grad == pytest.approx(leaf.grad.numpy())
    worst = x - 0.3 * y[:, None] * w / np.linalg.norm(w)
    assert value == pytest.approx(np.log1p(np.exp(-y * (worst @ w))).mean())
    noise = np.random.default_rng(4).standard_normal((200, *x.shape))
    noise *= 0.3 / np.linalg.norm(noise, axis=2, keepdims=True)
    assert np.log1p(np.exp(-y * ((x + noise) @ w))).mean(axis=1).max() <= value


def test_proposition_4_2():
    x, y, _ = separable(seed=5)
    random = np.random.default_rng(6)
    for scale in (1e-3, 1.0, 5.0):
        w = random.standard_normal(6)
        assert T.proposition_4_2(w, w + scale * random.standard_normal(6), x, y, 0.5).margin >= 0
    # across 0 the gradient jumps: without the second term it would not hold
    w = 1e-6 * random.standard_normal(6)
    sides = T.proposition_4_2(w, -w, x, y, 0.5)
    assert sides.margin >= 0 and sides.left[1] > 0.2


def test_max_margin_in_the_plane_is_that_of_a_search_over_angles():
    x = np.array([[2.0, 1.0], [1.0, 3.0], [-2.0, -0.5], [3.0, -1.0]])
    y = np.array([1.0, 1.0, -1.0, 1.0])
    w = T.max_margin(x, y)
    angles = np.linspace(0, 2 * np.pi, 200_001)
    units = np.stack([np.cos(angles), np.sin(angles)])
    margins = (y[:, None] * (x @ units)).min(axis=0)
    assert w / np.linalg.norm(w) == pytest.approx(units[:, margins.argmax()], abs=1e-4)
    assert 1 / np.linalg.norm(w) == pytest.approx(margins.max(), abs=1e-6)
    # under a budget: the shortest vector that meets (4.35), over lengths and angles
    eps = 0.4
    robust, sides = T.lemma_4_2(x, y, eps)
    shortest = (1 / (margins - eps))[margins > eps].min()
    assert np.linalg.norm(robust) == pytest.approx(shortest, abs=1e-5)
    assert abs(sides.margin) < 1e-8
    with pytest.raises(ValueError, match="eps: got 9"):
        T.lemma_4_2(x, y, 9.0)
    with pytest.raises(ValueError, match="x: got data without a margin"):
        T.max_margin(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([1.0, -1.0]), sweeps=100)


def test_theorem_4_4_tends_to_the_max_margin():
    x, y, _ = separable(5, 8, seed=7)
    for eps in (0.0, 0.1):
        cosines = T.theorem_4_4(x, y, eps, steps=5000)
        assert cosines[-1] > 0.97 and cosines[-1] > cosines[0] and cosines[-1] >= cosines[-3]


def test_lemma_4_3():
    eta = np.eye(5)[0]
    measured, exact, deviation = T.lemma_4_3([1.0, 0.5, 0, -0.3, 0], eta, 1.5, 0.5, draws=40_000)
    assert abs(measured - exact) < 4.5 * deviation and deviation < 0.003
    z = 1.5 / math.sqrt(1.34) - 0.5
    assert exact == pytest.approx(1 - torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(z)).item(), abs=1e-6)


def test_corollary_4_2_holds_below_the_modes_and_not_above():
    modes, shares = (2.0, 3.0, 4.0), (0.3, 0.3, 0.4)
    least = 2.0 * math.sqrt(1 - 1 / 4)
    for low, high in ((0.0, 0.5), (0.5, 1.0), (1.0, least)):
        assert T.corollary_4_2((2.0, 4.0), (low, high), modes, shares).margin > 0
    assert T.corollary_4_2((2.0, 4.0), (5.0, 7.0), modes, shares).margin < 0
    with pytest.raises(ValueError, match="r: got 0.5"):
        T.robust_error(0.5, 0.1, modes, shares, (1.0, 1.0))


def test_ratio_5_27():
    assert T.ratio_5_27([2.0, 2.0]).margin == pytest.approx(0, abs=1e-12)
    sides = T.ratio_5_27([1.0, 7.0], beta=0.75)
    assert sides.left[0] == pytest.approx(0.25**0.25 * 4 / 5) and sides.right[0] == pytest.approx(0.25**0.25)
    with pytest.raises(ValueError, match="norms"):
        T.ratio_5_27([0.0])


@pytest.mark.parametrize("p", [1.5, 2.0, 4.0, math.inf])
def test_theorem_3_1_is_the_optimum(p):
    random = np.random.default_rng(8)
    several = 0
    for _ in range(30):
        a, low, high = random.standard_normal(5), -random.random(5), random.random(5)
        b = 0.9 * random.random() * -np.minimum(a * low, a * high).sum()
        delta, iterations, sides = T.theorem_3_1(a, b, low, high, p=p)
        several += iterations > 1
        assert a @ delta + b <= 1e-12 and (delta >= low).all() and (delta <= high).all()
        assert abs(sides.margin) < 1e-9 and sides.left[0] == pytest.approx(np.linalg.norm(delta, p))
        # no shorter vector of the box reaches the plane: random ones, scaled as far as the plane lets them
        others = low + (high - low) * random.random((4000, 5))
        others = others[others @ a < 0]
        others = others * np.minimum(1.0, -b / (others @ a))[:, None]
        reached = others[others @ a + b <= 1e-12]
        assert np.linalg.norm(reached, p, axis=1).min(initial=math.inf) >= sides.left[0] - 1e-9
        if p in (2.0, math.inf):
            rows = [torch.tensor(v)[None] for v in (a, low, high)]
            kernel = fr.ops.polyhedral_distance(rows[0], torch.tensor([b]), rows[1], rows[2], p)
            assert sides.left[0] == pytest.approx(float(kernel[0]), rel=1e-6)
    assert several > 1
    assert T.theorem_3_1([1.0], -1.0, -1.0, 1.0, p=p)[2].left[0] == 0
    with pytest.raises(ValueError, match="does not reach"):
        T.theorem_3_1([1.0], 2.0, -1.0, 1.0, p=p)
    with pytest.raises(ValueError, match="p: got 1"):
        T.theorem_3_1([1.0], 0.5, -1.0, 1.0, p=1.0)


@pytest.mark.parametrize("batch", [None, 2])
def test_theorem_4_3(batch):
    x, y, _ = separable(seed=9)
    rare, mean = T.theorem_4_3(x, y, 1.5, steps=60, batch=batch, w=np.ones(6), gammas=(2.5, 5.0))
    assert rare.margin >= 0 and mean.margin > 0 and rare.right.tolist() == [1.0, 4 / 9]
    if batch is None:  # the same way by autograd
        w, reach = torch.ones(6, dtype=torch.float64), np.linalg.norm(x, axis=1).max() + 1.5
        values, norms, lengths = [], [], [0.0]
        for _ in range(60):
            leaf = w.clone().requires_grad_()
            value = loss(leaf, x, y, 1.5, False)
            (grad,) = torch.autograd.grad(value, leaf)
            values.append(value.item())
            norms.append(grad.norm().item())
            w = w - 4 / reach**2 / 60**0.5 * grad
            lengths.append(w.norm().item())
        cross, n = 1 + max(lengths) * reach / 4, np.array(norms)
        assert mean.left[0] == pytest.approx((n**2 / 2 - 3 * cross * n).mean())
        assert mean.right[0] == pytest.approx(reach**2 / 4 * values[0] / 60**0.5)
        assert rare.left[1] == (n > 7.5 * cross).mean()
    with pytest.raises(ValueError, match="gammas"):
        T.theorem_4_3(x, y, 0.3, gammas=(2.0,))


def test_4_56_solves_the_probability_of_the_proof():
    options = {
        "examples": 20_000,
        "inputs": 900,
        "parameters": 50,
        "diameter": 3.0,
        "smoothness": 7.0,
        "c": 1.3,
        "delta": 0.3,
    }
    gamma, found = 0.8, T.lipschitz_4_56(0.8, **options)
    chance = lambda lip: (  # (4.76)
        4 * math.exp(-20_000 * gamma**2 / 2**11)
        + 2 * math.exp(50 * math.log(4 * 21 / gamma) - 20_000 * 900 * gamma**2 / (2**14 * 1.3 * lip**2))
    )
    low, high = 1e-3, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) < 0.3 else (low, middle)
    assert found == pytest.approx(low, rel=1e-9)
    assert T.lipschitz_4_56(0.9, **options) > found
    assert T.lipschitz_4_56(0.8, **(options | {"examples": 100})) == 0


def test_theorem_4_6_measures_the_interpolating_model():
    sides = T.theorem_4_6(60, 150, seed=1)
    random = np.random.default_rng(1)
    x = random.standard_normal((60, 150), dtype=np.float32).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = np.where(random.random(60) < 0.5, -1.0, 1.0)
    theta = np.linalg.lstsq(x, y, rcond=None)[0]
    assert sides.right[0] == pytest.approx(np.linalg.norm(theta), rel=1e-3) and sides.left[0] == 0


@pytest.mark.thorough
def test_theorem_4_6_with_a_bound_above_0():
    sides = T.theorem_4_6()
    assert 0.1 < sides.left[0] < sides.right[0]
    assert 0 < T.theorem_4_6(eps=0.003).left[0] < sides.left[0]
