"""Adversarial training and its cheaper relatives, each against its algorithm written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import data, models
from fastrobust.training import adversarial, registry
from fastrobust.training.method import Batch
from fastrobust.training.schedules import WarmUp
from method_helpers import EPS, blobs, by_hand, clipped, descend, drawn, follow, moved, net, same, slope, split


def train_on(model: nn.Module, adv: Tensor, y: Tensor) -> None:
    model.train()
    F.cross_entropy(model(adv), y).backward()


def pgd_of(model: nn.Module, x: Tensor, y: Tensor, steps: int, start: Tensor) -> Tensor:
    adv = start
    for _ in range(steps):
        adv = clipped(adv + EPS / 4 * slope(model, adv, y).sign(), x, EPS)
    return adv


def test_every_method_has_a_name() -> None:
    for name in ("pgd", "fgsm-rs", "n-fgsm", "free", "yopo", "gradalign", "curriculum", "kl-finetune"):
        method = registry.METHODS[name]()
        assert method.name == name and method.settings()["eps"] == 8 / 255


def test_pgd_is_algorithm() -> None:
    model, batches = net(), split(*blobs(), 5)

    def body(model: nn.Module, x: Tensor, y: Tensor, _: Batch) -> None:
        train_on(model, pgd_of(model, x, y, 3, drawn(x, EPS)), y)

    got = follow(adversarial.PGD(EPS, steps=3), model, batches)
    same(got, by_hand(body, model, batches))
    assert moved(got, model)


def test_curriculum_makes_more_steps_as_it_goes() -> None:
    model, batches = net(), split(*blobs(6), 3, epochs=8)
    method = adversarial.Curriculum(EPS, steps=3, grow=0.75)
    # stages of 6 / 4 epochs: 0 0 1 2 2 3, and then the strongest
    assert [method.strength(b) for b in batches[::2]] == [0, 0, 1, 2, 2, 3, 3, 3]

    def body(model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> None:
        steps = (0, 0, 1, 2, 2, 3, 3, 3)[batch.epoch]
        train_on(model, pgd_of(model, x, y, steps, drawn(x, EPS)) if steps else x, y)

    same(follow(method, model, batches), by_hand(body, model, batches))


def test_fgsm_rs_is_algorithm() -> None:
    model, batches = net(), split(*blobs(), 5)

    def body(model: nn.Module, x: Tensor, y: Tensor, _: Batch) -> None:
        start = drawn(x, EPS)
        train_on(model, clipped(start + 1.25 * EPS * slope(model, start, y).sign(), x, EPS), y)

    same(follow(adversarial.FGSMRS(EPS), model, batches), by_hand(body, model, batches))


def test_n_fgsm_is_not_cut_to_the_ball() -> None:
    model, batches = net(), split(*blobs(), 5)

    def body(model: nn.Module, x: Tensor, y: Tensor, _: Batch) -> None:
        start = drawn(x, 2 * EPS, None).clamp(0, 1)
        train_on(model, (start + EPS * slope(model, start, y).sign()).clamp(0, 1), y)

    same(follow(adversarial.NFGSM(EPS), model, batches), by_hand(body, model, batches))
    x, y = blobs(64)
    far = (adversarial.NFGSM(EPS).perturb(model, Batch(x, y)) - x).abs().amax()
    assert 2 * EPS < far <= 3 * EPS


def test_free_replays_with_one_perturbation_a_slot() -> None:
    """Shafahi et al., algorithm 1; the gradient goes through the clamp to the box, as in the authors' code."""
    model, batches, slots = net(), split(*blobs(11), 4), torch.zeros(4, 1, 4, 4, dtype=torch.float64)

    def body(model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> None:
        for replay in range(3):
            for p in model.parameters():
                p.grad = None
            delta = slots[: len(x)].clone().requires_grad_()
            F.cross_entropy(model((x + delta).clamp(0, 1)), y).backward()
            assert delta.grad is not None
            slots[: len(x)] = (slots[: len(x)] + EPS * delta.grad.sign()).clamp(-EPS, EPS)
            if replay < 2:
                descend(model)

    method = adversarial.FreeAT(EPS, replays=3)
    same(follow(method, model, batches), by_hand(body, model, batches))
    torch.testing.assert_close(method.state_dict()["slots"], slots)
    assert slots.abs().amax() == EPS


def test_free_resumes_with_its_slots() -> None:
    model, batches = net(), split(*blobs(8), 4)
    whole, first, second = (adversarial.FreeAT(EPS, replays=2) for _ in range(3))
    want = follow(whole, model, batches)
    half = follow(first, model, batches[:1])
    second.load_state_dict(first.state_dict())
    same(follow(second, half, batches[1:]), want, 0)
    with pytest.raises(ValueError, match="x: got images"):
        second.slots(torch.zeros(1, 3, 4, 4, dtype=torch.float64))


def test_free_follows_a_radius_that_shrinks() -> None:
    (x, y), model = blobs(4), net()
    method = adversarial.FreeAT(lambda progress: EPS * (1 - progress), replays=1)
    seen: list[float] = []
    model.register_forward_pre_hook(lambda _m, args: seen.append(float((args[0].detach() - x).abs().amax())))
    for epoch in range(4):
        method.step(model, Batch(x, y, None, epoch, 4), lambda loss: loss.backward())
    assert all(far <= EPS * (1 - epoch / 4) * (1 + 1e-12) for epoch, far in enumerate(seen)) and seen[1] > 0


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_yopo_is_algorithm(variant: str) -> None:
    """The net cut by hand behind its first layer: m passes through all, n steps each through f_0 alone."""
    model, batches = net(), split(*blobs(), 5)

    def body(model: nn.Sequential, x: Tensor, y: Tensor, _: Batch) -> None:  # type: ignore[type-arg]
        first, rest = model[0], model[1:]
        adv = drawn(x, EPS)
        for _m in range(2):
            out = first(adv)
            out.retain_grad()
            F.cross_entropy(rest(out), y).backward()
            p = out.grad
            for _n in range(3):
                leaf = adv.clone().requires_grad_()
                (grad,) = torch.autograd.grad((p * first(leaf)).sum(), leaf)
                adv = clipped(adv + EPS / 4 * grad.sign(), x, EPS)
            if variant == "authors":
                (p * first(adv)).sum().backward()

    method = adversarial.YOPO(EPS, full=2, inner=3, variant=variant)
    same(follow(method, model, batches), by_hand(body, model, batches))  # type: ignore[arg-type]


def test_yopo_finds_the_first_layer_that_runs_and_leaves_the_rest_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 3)  # registered first, run last
            self.norm = nn.BatchNorm2d(1)
            self.begin = nn.Linear(16, 8)
            self.act = nn.ReLU(inplace=True)  # writes into what the hook has seen
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            out = self.act(self.begin(x.flatten(1) * 2))
            self.calls += 1
            return self.last(out)

    model = Odd().double()
    x, y = blobs(6)
    method = adversarial.YOPO(EPS, full=2, inner=4)
    assert method.first_layer(model, x) is model.begin
    model.calls = 0
    follow_losses: list[float] = []
    method.first_layer = lambda *_: model.begin  # type: ignore[method-assign]
    method.step(model, Batch(x, y), lambda loss: follow_losses.append(float(loss.detach())))
    assert model.calls == 2  # the inner steps leave the model before the end
    with pytest.raises(ValueError, match="layer: got 'none'"):
        adversarial.YOPO(layer="none").first_layer(model, x)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradalign_differentiates_both_gradients(batch_norm: bool) -> None:
    model, batches = net(batch_norm), split(*blobs(), 6)

    def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf, create_graph=True)[0].flatten(1)

    def body(model: nn.Module, x: Tensor, y: Tensor, _: Batch) -> None:
        model.eval()
        torch.randint(0, 2**62, ())  # the attack draws its seed
        adv = clipped(x + EPS * slope(model, x, y).sign(), x, EPS)
        model.train()
        loss = F.cross_entropy(model(adv), y)
        norm = model[1] if batch_norm else None  # type: ignore[index]
        if norm is not None:
            norm.momentum = 0.0  # what follows moves no statistics
        near = drawn(x, EPS, None)
        a, b = gradient(model, x, y), gradient(model, near, y)
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        (loss + 0.2 * (1 - cosine.mean())).backward()
        if norm is not None:
            norm.momentum = 0.1
            norm.num_batches_tracked -= 2

    got = follow(adversarial.GradAlign(EPS), model, batches)
    same(got, by_hand(body, model, batches))
    without = follow(adversarial.GradAlign(EPS, weight=0.0), model, batches)
    assert moved(got, without)


def test_gradalign_drops_examples_without_a_gradient() -> None:
    class Gate(nn.Module):
        """No gradient for images whose first pixel is large."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (x[:, :1, 0, 0] < 5)

    model, (x, y) = Gate(), blobs(6)
    dead = x.clone()
    dead[::2, :, 0, 0] = 9.0
    method = adversarial.GradAlign(EPS, clip=None)
    torch.manual_seed(3)
    some = method.loss(model, Batch(dead, y), dead).metrics["misalignment"]
    alive = dead[1::2], y[1::2]
    torch.manual_seed(3)
    near = drawn(dead, EPS, None)[1::2]
    a, b = slope(model, *alive).flatten(1), slope(model, near, alive[1]).flatten(1)
    assert float(some) == pytest.approx(float(1 - F.cosine_similarity(a, b).mean()), rel=1e-9)
    dead[:, :, 0, 0] = 9.0
    assert float(method.loss(model, Batch(dead, y), dead).metrics["misalignment"]) == 0


@pytest.mark.parametrize("reweight", [True, False])
def test_kl_finetune_is_its_formula(reweight: bool) -> None:
    model, batches = net(), split(*blobs(), 5)

    def body(model: nn.Module, x: Tensor, y: Tensor, _: Batch) -> None:
        adv = pgd_of(model, x, y, 2, drawn(x, EPS))
        total = torch.zeros((), dtype=torch.float64)
        o, o2 = model(x).softmax(1), model(adv).softmax(1)
        right = o2.detach()[torch.arange(len(y)), y]
        for i in range(len(y)):
            w = right[i] / right.sum() if reweight else 1 / len(y)
            kl = sum(o[i, j] * (o[i, j].log() - o2[i, j].log()) for j in range(3))
            total = total + w * (-o2[i, y[i]].log() + 6 * kl)
        total.backward()

    method = adversarial.KLFinetune(EPS, steps=2, reweight=reweight)
    same(follow(method, model, batches), by_hand(body, model, batches))


def test_mixed_batches_are_half_and_half() -> None:
    own = [
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)),
        (torch.full((2, 1), 2.0), torch.zeros(2, dtype=torch.long)),
    ]
    extra = [(torch.ones(2, 1), torch.ones(2, dtype=torch.long))] * 3
    loader = adversarial.Mixed(own, extra)
    found = list(loader)
    assert len(loader) == len(found) == 3
    assert [x[:, 0].tolist() for x, _ in found] == [[0, 0, 1, 1], [2, 2, 1, 1], [0, 0, 1, 1]]
    assert [y.tolist() for _, y in found] == [[0, 0, 1, 1]] * 3
    with pytest.raises(ValueError, match="loader: got no batch"):
        list(adversarial.Mixed([], extra))


METHODS = {
    "pgd": adversarial.PGD(EPS, steps=2), "fgsm-rs": adversarial.FGSMRS(EPS), "n-fgsm": adversarial.NFGSM(EPS),
    "gradalign": adversarial.GradAlign(EPS),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("came", [True, False])
def test_an_attack_leaves_no_trace(name: str, mode: str, came: bool) -> None:
    """The traps of public code: statistics moved by attacks, a mode that depends on who came before, gradients left."""
    method, model = METHODS[name], net(batch_norm=True)
    method.attack_mode = mode
    model.train(came)
    model[3].train(not came)  # a flag of its own
    flags, before = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    x, y = blobs(8)
    torch.manual_seed(5)
    adv = method.perturb(model, Batch(x, y))
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not adv.requires_grad
    model.train(not came)
    torch.manual_seed(5)
    assert torch.equal(adv, method.perturb(model, Batch(x, y)))  # the mode it came in says nothing
    model.train(mode == "train")
    other = {"eval": "train", "train": "eval"}[mode]
    method.attack_mode = other
    torch.manual_seed(5)
    assert not torch.equal(adv, method.perturb(model, Batch(x, y)))
    method.attack_mode = "eval"


@pytest.mark.parametrize("name", ["pgd", "fgsm-rs", "n-fgsm"])
def test_noise_follows_the_numbers_of_the_examples(name: str) -> None:
    """Two processes that share a batch make the examples that one makes."""
    method, model = METHODS[name], net()
    x, y = blobs(8)
    index = torch.tensor([5, 6, 2, 40, 41, 0, 9, 10])
    torch.manual_seed(5)
    whole = method.perturb(model, Batch(x, y, index))
    for part in (slice(0, 3), slice(3, 8)):
        torch.manual_seed(5)
        assert torch.equal(whole[part], method.perturb(model, Batch(x[part], y[part], index[part])))


def test_a_schedule_moves_radius_and_step_together() -> None:
    model, (x, y) = net(), blobs(8)
    method = adversarial.PGD(WarmUp(EPS, "linear"), steps=1, random_start=False)
    for epoch, share in ((0, 0.0), (1, 0.4), (4, 1.0)):
        adv = method.perturb(model, Batch(x, y, None, epoch, 5))
        assert float((adv - x).abs().amax()) == pytest.approx(EPS / 4 * share, abs=1e-12)
    assert "WarmUp" in method.settings()["eps"]


def test_a_radius_for_each_epoch() -> None:
    model, batches = net(), split(*blobs(6), 3, epochs=3)
    method = adversarial.PGD([0.1, 0.0, 0.3], steps=1)
    assert [method.radius(b) for b in batches] == [0.1, 0.1, 0.0, 0.0, 0.3, 0.3]
    follow(method, model, batches)
    with pytest.raises(ValueError, match="eps: got 3 radii, expected one for each of the 4 epochs"):
        registry.make("pgd", eps=(0.1, 0.0, 0.3)).begin(model, None, 4)
    with pytest.raises(ValueError, match="eps: got -1"):
        adversarial.PGD([0.1, -1.0])


def test_a_prepared_attack_makes_the_same_examples() -> None:
    torch.manual_seed(0)
    model = models.digits_cnn().train()
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    found = []
    for prepare in (False, True):
        for moved_by in (0.0, 0.05):  # the weights move between two attacks, and are followed
            with torch.no_grad():
                model[0].weight += moved_by
            torch.manual_seed(3)
            found.append(adversarial.PGD(EPS, steps=3, prepare=prepare).perturb(model, Batch(x, y)))
            with torch.no_grad():
                model[0].weight -= moved_by
    # where rounding decides the sign of a gradient a pixel may go elsewhere
    apart = [(a - b).abs().gt(1e-6).double().mean().item() for a, b in zip(found[:2], found[2:], strict=True)]
    assert max(apart) < 0.01 and not torch.equal(found[0], found[1]) and model.training
    with pytest.raises(ValueError, match="prepare: got True with attack_mode='train'"):
        adversarial.PGD(EPS, prepare=True, attack_mode="train")


def test_other_norms_stay_in_their_balls() -> None:
    model, (x, y) = net(), blobs(8)
    for norm in (1, 2):
        for method in (adversarial.PGD(EPS, norm=norm), adversarial.FGSMRS(EPS, norm=norm)):
            moved_by = (method.perturb(model, Batch(x, y)) - x).flatten(1).norm(norm, 1)
            assert 0 < float(moved_by.max()) <= EPS


def test_bad_arguments() -> None:
    for make, words in (
        (lambda: adversarial.PGD(-1), "eps: got -1"),
        (lambda: adversarial.PGD(steps=-1), "steps: got -1, expected at least 0"),
        (lambda: adversarial.PGD(step_size=math.nan), "step_size: got nan"),
        (lambda: adversarial.PGD(attack_mode="test"), "attack_mode: got 'test', expected 'eval' or 'train'"),
        (lambda: adversarial.PGD(norm=3), "norm: got int 3"),
        (lambda: adversarial.PGD(clip=(1, 0)), "clip: got"),
        (lambda: adversarial.FreeAT(replays=0), "replays: got 0"),
        (lambda: adversarial.YOPO(full=0), "full: got 0"),
        (lambda: adversarial.YOPO(variant="mine"), "variant: got 'mine'"),
        (lambda: adversarial.Curriculum(grow=0), "grow: got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_float32_training_learns_robustness() -> None:
    """The fused ops in the loop, on the digits."""
    train, test = data.load("digits", "train", limit=600), data.load("digits", "test", limit=200)
    torch.manual_seed(0)
    model = models.digits_cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    batches = list(zip(train.images.split(100), train.labels.split(100), strict=True))
    fr.training.train(model, batches, adversarial.FGSMRS(0.1), epochs=10, optimizer=optimizer)
    model.eval()
    adv = fr.attacks.pgd(model, test.images, test.labels, eps=0.1, seed=0)
    assert float((model(adv).argmax(1) == test.labels).double().mean()) > 0.6
