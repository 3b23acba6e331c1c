"""The adapters: missing and broken libraries, the eager formulas against float64 oracles, and equal attacks."""

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrobust.benchmarks import models, peers
from fastrobust.benchmarks.case import Context, Unavailable
from fastrobust.benchmarks.peers import eager, inductor


def test_a_missing_library_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(peers, "_SEEN", {})
    for _ in range(2):  # the second answer is the remembered one
        with pytest.raises(Unavailable, match=r"^not installed \(pip install some-package\)$"):
            peers.require("fastrobust_no_such_library", "some-package")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import fastrobust_no_such_library", "installed, but its import fails (No module named 'fastrobust_no_such"),
        ("raise RuntimeError('too old')", "installed, but its import fails (RuntimeError: too old)"),
    ],
)
def test_a_library_that_cannot_be_imported_says_why(monkeypatch, tmp_path, source, reason):
    monkeypatch.setattr(peers, "_SEEN", {})
    (tmp_path / "broken_peer_library.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Unavailable) as raised:
        peers.require("broken_peer_library")
    assert str(raised.value).startswith(reason)


def test_without_a_compiler_torch_compile_is_skipped_with_a_line(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no C++ compiler\nlong trace")

    monkeypatch.setattr(inductor, "_BROKEN", {})
    monkeypatch.setattr(torch, "compile", fails)
    for _ in range(2):  # the second answer is the remembered one
        with pytest.raises(Unavailable, match=r"^torch.compile does not work here \(no C\+\+ compiler\)$"):
            inductor.compiled(lambda x: x, torch.zeros(1))


def inputs(seed, batch=3, n=20):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(batch, 1, 4, n // 4, generator=generator, dtype=torch.float64)
    x = (x0 + 0.3 * torch.randn(x0.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return x, x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64)


@given(st.integers(0, 1000), st.floats(0.01, 30))
def test_l1_projection_is_the_nearest_point_of_ball_and_box(seed, eps):
    """Against bisection on the threshold, which needs no sorting."""
    x, x0, grad = inputs(seed)
    d, room = (x + grad - x0).flatten(1), torch.where(x + grad > x0, 1 - x0, x0).flatten(1)
    got = eager.l1_project(d, room, eps)
    low, high = torch.zeros(len(d), 1, dtype=d.dtype), d.abs().amax(1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        above = torch.minimum((d.abs() - middle).clamp_min(0), room).sum(1, keepdim=True) > eps
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    threshold = torch.where(torch.minimum(d.abs(), room).sum(1, keepdim=True) <= eps, torch.zeros_like(high), high)
    want = d.sign() * torch.minimum((d.abs() - threshold).clamp_min(0), room)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@given(st.integers(0, 1000), st.floats(0, 15))
def test_knapsack_reaches_the_linear_programs_value(seed, budget):
    linprog = pytest.importorskip("scipy.optimize").linprog
    generator = torch.Generator().manual_seed(seed)
    gain, room = torch.rand(2, 1, 9, generator=generator, dtype=torch.float64)
    got = eager.knapsack(gain, room, budget)
    assert bool((got >= 0).all()) and bool((got <= room).all()) and float(got.sum()) <= budget + 1e-12
    best = linprog(
        -gain[0].numpy(),
        A_ub=torch.ones(1, 9).numpy(),
        b_ub=[budget],
        bounds=[(0, float(r)) for r in room[0]],
    )
    assert float((gain * got).sum()) == pytest.approx(-best.fun, abs=1e-9)


@pytest.mark.parametrize("norm", [math.inf, 2])
def test_tuned_steps_are_the_usual_steps(norm):
    x, x0, grad = inputs(0)
    usual, tuned = {
        math.inf: (eager.linf_step, eager.tuned_linf_step),
        2: (eager.l2_step, eager.tuned_l2_step),
    }[norm]
    before = [value.clone() for value in (x, x0, grad)]
    out = torch.empty_like(x)
    got = tuned(x0, 0.05, 0.2)(x, grad, out)
    assert got.data_ptr() == out.data_ptr()
    torch.testing.assert_close(got, usual(x, x0, grad, 0.05, 0.2), rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, x0, grad), strict=True))


def test_losses_come_with_their_gradient():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]], dtype=torch.float64)
    value, gradient = eager.with_gradient(eager.margin, logits, torch.tensor([2]))()
    assert value.item() == 1.0
    assert gradient.tolist() == [[0.0, 1.0, -1.0, 0.0]]
    value, _ = eager.with_gradient(eager.dlr, logits, torch.tensor([1]))()
    assert value.item() == pytest.approx(-(3.0 - 2.0) / (3.0 - 1.0))
    value, gradient = eager.with_gradient(eager.kl, logits, logits)()
    assert value.item() == pytest.approx(0.0, abs=1e-12) and gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["torchattacks", "foolbox", "art"])
@pytest.mark.parametrize(("norm", "eps", "step_size"), [(math.inf, 0.1, 0.025), (2.0, 1.5, 0.375)])
def test_the_libraries_run_the_same_attack(name, norm, eps, step_size):
    context = Context()
    model = models.frozen(models.small_cnn())
    images, labels = models.random_batch(context, 4)
    settings = {"norm": norm, "eps": eps, "step_size": step_size, "steps": 3}
    adapter = importlib.import_module(f"fastrobust.benchmarks.peers.{name}")
    try:
        got = adapter.pgd(model, images, labels, **settings)()
    except Unavailable as missing:
        pytest.skip(f"{name}: {missing}")
    want = eager.pgd(model, images, labels, **settings)()
    if name == "art" and norm == 2:  # clips to the box before it shrinks to the ball
        assert float((got - images).flatten(1).norm(dim=1).max()) <= eps * (1 + 1e-5)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_models_are_the_same_each_time_and_leave_the_global_seed_alone():
    state = torch.random.get_rng_state()
    first, second = models.small_cnn(seed=1), models.small_cnn(seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not first.training
    assert first(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_a_few_epochs_learn_the_digits():
    pytest.importorskip("sklearn")
    images, labels = models.digits()
    assert images.shape == (1797, 1, 28, 28)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    model = models.trained_cnn(images[256:], labels[256:])
    with torch.no_grad():
        assert float((model(images[:256]).argmax(1) == labels[:256]).double().mean()) > 0.85
