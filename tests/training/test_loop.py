"""The loop against a plain one written here, and what it says of bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.training import Batch, Evaluation, Loss, Method, OverfittingWarning, TrainingDiverged, loader, train


def images(n: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 4, 4, generator=g)
    return x, (x.flatten(1)[:, :3]).argmax(1)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


class Attacked(Method):
    """One step of PGD from a random start, drawn from the global random state."""

    def __init__(self, eps: float = 0.1) -> None:
        self.eps = eps

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        return fr.attacks.pgd(model, batch.x, batch.y, eps=self.eps, steps=1, check=False)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def plain_loop(
    model: nn.Module, batches: Callable[[int], Any], epochs: int, optimizer: torch.optim.Optimizer, eps: float = 0.0
) -> list[tuple[float, float]]:
    """What a user would write: mean loss and accuracy of each epoch."""
    found = []
    for epoch in range(epochs):
        losses, right, count = 0.0, 0, 0
        for x, y, *_ in batches(epoch):
            adv = fr.attacks.pgd(model, x, y, eps=eps, steps=1) if eps else x
            model.train()
            logits = model(adv)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses, right, count = (
                losses + loss.item() * len(x),
                right + int((logits.argmax(1) == y).sum()),
                count + len(x),
            )
        found.append((losses / count, right / count))
    return found


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_same_bits_as_a_plain_loop(eps: float) -> None:
    x, y = images()
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 50, 16)]
    ours, theirs = net(), net()
    torch.manual_seed(5)
    history = train(ours, batches, Attacked(eps) if eps else "plain", epochs=3)
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    expected = plain_loop(theirs, lambda _: batches, 3, optimizer, eps)
    assert equal(ours, theirs)
    assert [(r["loss"], r["accuracy"]) for r in history] == expected
    assert [r["epoch"] for r in history] == [1, 2, 3] and all(r["lr"] == 0.1 for r in history)


def test_any_loader_labels_and_dictionary_of_metrics() -> None:
    x, y = images()
    dataset = torch.utils.data.TensorDataset(x, y)

    class Soft(Method):
        needs_index = True
        seen: list[Tensor] = []

        def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
            assert (examples, epochs) == (50, 2)

        def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
            assert batch.index is not None and torch.equal(batch.x, x[batch.index])
            self.seen.append(batch.index)
            logits = model(adv)
            return Loss(F.cross_entropy(logits, batch.y), logits, {"half": 0.5, "size": torch.tensor(float(len(adv)))})

    given = torch.utils.data.DataLoader(fr.training.indexed(dataset), 20, shuffle=True)
    method = Soft()
    history = train(net(), given, method, epochs=2)
    assert history[0]["half"] == 0.5 and history[0]["size"] == pytest.approx((20 * 20 * 2 + 100) / 50)
    for epoch in (0, 1):
        assert sorted(torch.cat(method.seen[3 * epoch : 3 * epoch + 3]).tolist()) == list(range(50))
    soft = [(x, F.one_hot(y, 3).float())]
    assert (
        train(net(), soft, "plain", epochs=1)[0]["accuracy"] == train(net(), [(x, y)], "plain", epochs=1)[0]["accuracy"]
    )


def test_loader_of_tensors() -> None:
    x, y = images()

    def noise(batch: Tensor, generator: torch.Generator) -> Tensor:
        return batch + torch.rand(batch.shape, generator=generator)

    first = loader(x, y, 16, seed=3, augment=noise)
    assert len(first) == 4 and first.examples == 50
    epochs = [list(first), list(first)]
    assert not torch.equal(epochs[0][0][2], epochs[1][0][2])
    for epoch in epochs:
        numbers = torch.cat([index for *_, index in epoch])
        assert sorted(numbers.tolist()) == list(range(50))
        assert torch.equal(torch.cat([labels for _, labels, _ in epoch]), y[numbers])
    again = loader(x, y, 16, seed=3, augment=noise)
    again.set_epoch(1)
    assert all(torch.equal(a, b) for s, t in zip(again, epochs[1], strict=True) for a, b in zip(s, t, strict=True))
    assert len(loader(x, y, 16, drop_last=True)) == 3

    assert [i.tolist() for *_, i in loader(x, y, 30, shuffle=False)] == [list(range(30)), list(range(30, 50))]


@pytest.mark.parametrize("shares", ["batch", "examples"])
def test_loader_shares_among_processes(shares: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images(51)
    whole = [set(i.tolist()) for *_, i in loader(x, y, 16)]
    parts: list[list[list[int]]] = []
    for rank in range(3):
        monkeypatch.setattr("fastrobust.training.batches.rank_and_world", lambda rank=rank: (rank, 3))
        parts.append([i.tolist() for *_, i in loader(x, y, 16, shares=shares)])
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(51))
    if shares == "batch":
        assert [set(sum(some, [])) for some in zip(*parts, strict=True)] == whole
    else:
        assert all(i % 3 == rank for rank in range(3) for batch in parts[rank] for i in batch)


def test_rates() -> None:
    x, y = images()

    def run(scheduler: Any, optimizer: Any = None) -> list[float]:
        model = net()
        made = optimizer(model.parameters()) if optimizer else torch.optim.SGD(model.parameters(), 0.5)
        scheduler = scheduler(made) if getattr(scheduler, "__name__", "") == "with_optimizer" else scheduler
        seen: list[float] = []

        class Watch(Method):
            def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
                seen.append(made.param_groups[0]["lr"])
                return super().loss(model, batch, adv)

        train(model, loader(x, y, 25), Watch(), epochs=2, optimizer=made, scheduler=scheduler)
        return seen

    def with_optimizer(o: Any) -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(o, [1], gamma=0.1)

    assert run(with_optimizer) == pytest.approx([0.5, 0.5, 0.05, 0.05])
    assert run([0.3, 0.2]) == [0.3, 0.3, 0.2, 0.2]
    assert run(lambda p: 1 - p) == [1, 0.75, 0.5, 0.25]

    def with_optimizer(o: Any) -> Any:  # type: ignore[no-redef]  # noqa: F811
        return torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=4)

    assert len(set(run(with_optimizer))) > 2
    with pytest.raises(ValueError, match="scheduler: got 3 rates, expected one for each of the 2 epochs"):
        run([0.1] * 3)

    def with_optimizer(o: Any) -> Any:  # type: ignore[no-redef]  # noqa: F811
        return torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=9)

    with pytest.raises(ValueError, match="got one of 9 steps, expected 4"):
        run(with_optimizer)


def test_bad_input_moves_nothing() -> None:
    x, y = images()
    model = net()
    before = copy.deepcopy(model)

    class Stored(Method):
        needs_index = True

    def once() -> Iterator[Any]:
        yield x, y

    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        ([(x, y + 1)], "plain", {}, ValueError, "labels from 1 to 3 in batch 1, expected 0 to 2"),
        ([(x, y - 1)], "plain", {}, ValueError, "labels from -1"),
        ([(x, y)], Stored(), {}, ValueError, r"got \(images, labels\), expected \(images, labels, numbers\)"),
        ([(x, y, torch.zeros(3))], Stored(), {}, ValueError, "numbers"),
        ([], "plain", {}, ValueError, "loader: got no batch in epoch 1"),
        ([x], "plain", {}, TypeError, "loader: got torch.float32"),
        ([((255 * x).byte(), y)], "plain", {}, TypeError, "uint8 images"),
        ([(x, y[:4])], "plain", {}, ValueError, "50 images and 4 labels"),
        ([(x, y)], "plane", {}, ValueError, "did you mean 'plain'"),
        ([(x, y)], 3, {}, TypeError, "method: got int"),
        ([(x, y)], "plain", {"epochs": -1}, ValueError, "epochs: got -1"),
        ([(x, y)], "plain", {"epochs": True}, ValueError, "epochs: got True"),
        ([(x, y)], "plain", {"scheduler": 3}, TypeError, "scheduler: got int"),
        ([(x, y)], "plain", {"average": "sma"}, ValueError, "average: got 'sma'"),
        ([(x, y)], "plain", {"autocast": torch.int8}, ValueError, "autocast: got torch.int8"),
        ([(x, y)], "plain", {"evaluate": (x, y)}, ValueError, "no single eps"),
    ]
    for given, method, options, kind, text in cases:
        with pytest.raises(kind, match=text):
            train(model, given, method, **{"epochs": 1, **options})
        assert equal(model, before), text
    with pytest.raises(ValueError, match="model: got no parameter"):
        train(nn.Flatten(), [(x, y)], "plain", epochs=1)
    with pytest.raises(ValueError, match="no batch in epoch 2"):
        train(net(), once(), "plain", epochs=2)
    with pytest.raises(ValueError, match="images: got none"):
        loader(x[:0], y[:0])
    assert train(model, [(x, y)], "plain", epochs=0) == [] and equal(model, before)


class Breaks(Method):
    """NaN in one batch."""

    def __init__(self, epoch: int, step: int) -> None:
        self.at = (epoch, step)

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        found = super().loss(model, batch, adv)
        return found._replace(value=found.value * (math.nan if (batch.epoch, batch.step) == self.at else 1.0))


def test_nan_stops_and_leaves_the_last_good_checkpoint(tmp_path: Any) -> None:
    x, y = images()
    model = net()
    with pytest.raises(TrainingDiverged, match="the loss is nan in epoch 2, batch 3") as caught:
        train(model, loader(x, y, 16), Breaks(1, 2), epochs=4, checkpoint=tmp_path)
    assert (caught.value.epoch, caught.value.batch) == (2, 3)
    assert all(p.isfinite().all() for p in model.parameters())
    kept = torch.load(tmp_path / "last.pt", weights_only=True)
    good = net()
    history = train(good, loader(x, y, 16), "plain", epochs=1)
    assert len(kept["history"]) == 1 and kept["history"][0]["loss"] == history[0]["loss"]
    assert all(torch.equal(kept["model"][name], t) for name, t in good.state_dict().items())


def test_weights_that_overflow_are_not_kept(tmp_path: Any) -> None:
    x, y = images()
    with pytest.raises(TrainingDiverged, match="in epoch 1"):
        train(net(), [(x, y)], "plain", epochs=1, scheduler=lambda _: math.inf, checkpoint=tmp_path)
    assert not (tmp_path / "last.pt").exists()


def test_evaluation_against_attacks_by_hand() -> None:
    x, y = images(60)
    model = net()
    train(model, loader(x, y, 20), "plain", epochs=8)
    options: dict[str, Any] = {"eps": 0.1, "seed": 0}
    model.eval()
    right = model(x).argmax(1) == y
    one = right & (model(fr.attacks.fgsm(model, x, y, **options)).argmax(1) == y)
    many = right & (model(fr.attacks.pgd(model, x, y, steps=7, **options)).argmax(1) == y)
    expected = {name: t.double().mean().item() for name, t in (("clean", right), ("fgsm", one), ("pgd", many))}
    model.train()
    state, before = torch.get_rng_state(), copy.deepcopy(model)
    for size in (60, 7):
        found = Evaluation(x, y, eps=0.1, steps=7, batch_size=size)(model)
        assert found == pytest.approx(expected, abs=1e-12) and 0 < found["pgd"] < found["clean"]
    assert torch.equal(torch.get_rng_state(), state) and equal(model, before) and model.training


def test_evaluated_epochs_best_weights_and_callbacks(tmp_path: Any) -> None:
    x, y = images()
    held, labels = images(40, seed=9)
    seen: list[dict[str, float]] = []
    scores = iter([0.2, 0.5, 0.4, 0.5])
    kept: list[dict[str, Tensor]] = []

    def judge(model: nn.Module) -> dict[str, float]:
        kept.append(copy.deepcopy(model.state_dict()))
        return {"pgd": next(scores)}

    history = train(
        net(), loader(x, y), "plain", epochs=4, evaluate=judge, checkpoint=tmp_path,
        callbacks=[lambda _, r: seen.append(r), lambda m, _: m.eval()],
    )  # fmt: skip
    assert seen == history and [r["eval_pgd"] for r in history] == [0.2, 0.5, 0.4, 0.5]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["record"]["epoch"] == 2  # the first of equals
    assert all(torch.equal(best["model"][name], t) for name, t in kept[1].items())
    every = train(net(), loader(x, y), Attacked(), epochs=5, evaluate=Evaluation(held, labels, eps=0.1, every=2))
    assert ["eval_pgd" in r for r in every] == [False, True, False, True, True]


def test_the_best_epoch_is_never_chosen_on_images_that_are_trained_on(tmp_path: Any) -> None:
    x, y = images()
    with pytest.warns(UserWarning, match="100% of its images are trained on"):
        train(net(), loader(x, y), Attacked(), epochs=2, evaluate=(x[:20].clone(), y[:20]), checkpoint=tmp_path)
    assert (tmp_path / "last.pt").exists() and not (tmp_path / "best.pt").exists()


def test_catastrophic_overfitting_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    x, y = images()
    figures = iter([(0.5, 0.45), (0.8, 0.1), (0.9, 0.05)])

    def judge(_: nn.Module) -> dict[str, float]:
        return dict(zip(("fgsm", "pgd"), next(figures), strict=True))

    train(net(), loader(x, y), Attacked(), epochs=3, evaluate=judge)
    (said,) = [w for w in recwarn if issubclass(w.category, OverfittingWarning)]
    assert "after epoch 2 the model is right on 80.0% of the held-out images under FGSM and on 10.0% under PGD" in str(
        said.message
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_of_the_model_alone(dtype: torch.dtype) -> None:
    x, y = images()
    model = net()
    seen: set[tuple[torch.dtype, ...]] = set()
    model[4].register_forward_hook(lambda _, args, out: seen.add((args[0].dtype, out.dtype)))

    class Watch(Attacked):
        def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
            assert not torch.is_autocast_enabled("cpu") and adv.dtype == torch.float32
            found = super().loss(model, batch, adv)
            assert found.logits.dtype == found.value.dtype == torch.float32
            return found

    history = train(model, loader(x, y, 16), Watch(), epochs=12, autocast=dtype)
    assert {out for _, out in seen} == {dtype}
    assert all(p.dtype == torch.float32 for p in model.parameters()) and "forward" not in vars(model)
    exact = train(net(), loader(x, y, 16), Attacked(), epochs=12)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.2)


def test_gradients_are_clipped_together() -> None:
    x, y = images()
    model = net()
    before = copy.deepcopy(model)
    train(model, [(x, y)], "plain", epochs=1, optimizer=torch.optim.SGD(model.parameters(), 1.0), max_grad_norm=0.01)
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_methods_by_name() -> None:
    from fastrobust.training.registry import METHODS, options_of

    @fr.training.register("of this test")
    class Named(Method):
        def __init__(self, eps: float = 0.2, *, steps: int = 3) -> None:
            self.eps, self.steps = eps, steps

    try:
        assert fr.training.methods()["of this test"] is Named and Named.name == "of this test"
        made = fr.training.make("of this test", steps=5)
        assert isinstance(made, Named) and made.settings() == {"eps": 0.2, "steps": 5}
        assert options_of(Named) == {"eps": 0.2, "steps": 3}
        with pytest.raises(
            ValueError, match=r"of this test: got option 'step', expected one of its own \(eps, steps\)"
        ):
            fr.training.make("of this test", step=5)
        with pytest.raises(TypeError, match="an object and options"):
            fr.training.make(made, steps=5)
    finally:
        del METHODS["of this test"]


def test_a_masked_model_is_checkpointed(tmp_path: Any) -> None:
    """Its state holds more than tensors."""
    x, y = images()

    def masked() -> nn.Module:
        torch.manual_seed(2)
        net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
        return fr.nn.convert(net, rate=0.5, gamma=1.0)

    def run(model: nn.Module, folder: Any, stop: bool) -> nn.Module:
        def callback(_: nn.Module, record: dict[str, float]) -> None:
            if stop and record["epoch"] == 1:
                raise KeyboardInterrupt

        train(model, loader(x, y, 16), "plain", epochs=3, checkpoint=folder, resume=True, callbacks=callback)
        return model

    whole = run(masked(), tmp_path / "whole", False)
    with pytest.raises(KeyboardInterrupt):
        run(masked(), tmp_path / "parts", True)
    parts = run(masked(), tmp_path / "parts", False)
    same = zip(whole.state_dict().items(), parts.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for (_, a), b in same)
    assert torch.equal(whole.eval()(x), parts.eval()(x))
