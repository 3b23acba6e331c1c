"""torchattacks' classes: the same calls give what torchattacks gives, but for its silent faults."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks import classes as ours

COVERED = [n for n in ours.__all__ if n not in ("Attack", "IFGSM")]


@pytest.fixture(scope="module")
def ta() -> Any:
    return pytest.importorskip("torchattacks")


def _model() -> nn.Module:
    return copy.deepcopy(h.digits_model())


def _mild() -> nn.Module:
    """Logits a tenth as large: where p_y rounds to 1, torch's cross-entropy gives half of a gradient's signs at random,
    and ours, whose p_y - 1 is the sum of the others, does not."""
    model = _model()
    model[-1].weight.data *= 0.1  # type: ignore[union-attr]
    model[-1].bias.data *= 0.1  # type: ignore[union-attr]
    return model


def _wrong(model: nn.Module, adv: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(adv).argmax(1) != y


def _make(name: str, model: Any, module: Any = ours) -> Any:
    if name == "MultiAttack":
        return module.MultiAttack([module.FGSM(model, eps=0.05), module.PGD(model, eps=0.1, steps=3)])
    options: dict[str, Any] = {
        "FAB": {"eps": 0.1, "n_classes": 4},
        "Square": {"n_queries": 30, "eps": 0.1},
        "APGDT": {"n_classes": 4, "steps": 5},
        "AutoAttack": {"version": "fast", "eps": 0.1},
        "TPGD": {"eps": 0.15, "alpha": 0.04},
        "PGD": {"eps": 0.15, "alpha": 0.04},
    }.get(name, {})
    return getattr(module, name)(model, **options)


# ---- the same interface ----


@pytest.mark.parametrize("name", COVERED)
def test_constructors_are_torchattacks(name: str, ta: Any) -> None:
    theirs, mine = (inspect.signature(getattr(m, name).__init__).parameters for m in (ta, ours))
    assert list(mine) == list(theirs)
    assert [p.default for p in mine.values()] == [p.default for p in theirs.values()]


def test_methods_are_torchattacks(ta: Any) -> None:
    for name, method in vars(ta.attack.Attack).items():
        if name.startswith("_") or not callable(getattr(ta.attack.Attack, name)):
            continue
        mine = inspect.signature(getattr(ours.Attack, name)).parameters
        wrapped = getattr(method, "__closure__", None)  # torchattacks' setters are wrapped
        inner = wrapped[0].cell_contents if wrapped and callable(wrapped[0].cell_contents) else method
        theirs = inspect.signature(inner.__func__ if isinstance(inner, staticmethod) else inner).parameters
        assert list(mine)[: len(theirs)] == [n for n in theirs if n not in ("args", "kwargs")], name


def test_what_is_not_covered_says_so(ta: Any) -> None:
    for name in ta.__all__:
        if name in ours.__all__:
            continue
        with pytest.raises(ImportError, match=f"{name}: not covered; covered: APGD, APGDT"):
            getattr(ours, name)
    with pytest.raises(ImportError, match="NIFGSM: not covered; covered"):
        from fastrobust.attacks.classes import NIFGSM  # noqa: F401
    for name in COVERED:
        if name != "AutoAttack":  # there it is the public AutoAttack's interface
            assert getattr(fr.attacks.compat, name) is getattr(ours, name)
    with pytest.raises(ImportError, match="MIFGSM: not covered; covered"):
        from fastrobust.attacks.compat import MIFGSM  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'; covered"):
        _ = ours.Nonsense
    assert not hasattr(ours, "__path__")
    with pytest.raises(ValueError, match="version: got 'best'"):
        ours.AutoAttack(_model(), version="best")
    with pytest.raises(ValueError, match="DeepFool: targeted mode is not supported"):
        ours.DeepFool(_model()).set_mode_targeted_by_label()


# ---- the same points ----


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_points_of_gradient_attacks(ta: Any, targeted: bool, normalised: bool) -> None:
    x, y = h.digits_batch(64)
    model = _mild()
    inputs = (x - 0.3) / 0.5 if normalised else x
    for name, options in (
        ("FGSM", {"eps": 0.1}), ("PGD", {"eps": 0.1, "alpha": 0.02, "random_start": False}),
        ("BIM", {"eps": 0.1, "alpha": 0.02}), ("BIM", {"eps": 4 / 255, "steps": 0}),
        ("PGDL2", {"eps": 0.6, "alpha": 0.1, "random_start": False}),
        ("EOTPGD", {"eps": 0.1, "random_start": False}), ("VANILA", {}),
    ):  # fmt: skip
        pair = [getattr(m, name)(model, **options) for m in (ours, ta)]
        for atk in pair:
            if targeted and name != "VANILA":
                atk.set_mode_targeted_by_label(quiet=True)
            if normalised:
                atk.set_normalization_used(mean=[0.3], std=[0.5])
        goal = (y + 1) % 10 if targeted else y
        mine, theirs = (atk(inputs, goal) for atk in pair)
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        if name == "VANILA":
            assert torch.equal(mine, inputs)
        # an ulp, but where rounding turned the sign of a gradient that is nearly zero
        close = (mine - theirs).abs() <= 4e-6
        assert close.flatten(1).all(1).double().mean() >= 0.9, name
        assert abs(int(_wrong(model, mine, y).sum()) - int(_wrong(model, theirs, y).sum())) <= 1


def test_pgd_linf_is_theirs_to_an_ulp(ta: Any) -> None:
    x, y = h.digits_batch(64)
    model = _mild()
    mine, theirs = (m.PGD(model, eps=0.1, alpha=0.02, steps=10, random_start=False)(x, y) for m in (ours, ta))
    same = ((mine - theirs).abs() <= 6e-8).flatten(1).all(1)
    assert same.double().mean() >= 0.95
    h.assert_inside(mine, x, 0.1, h.INF)


@pytest.mark.parametrize(
    ("name", "options", "slack"),
    [
        ("PGD", {"eps": 0.08, "alpha": 0.02}, 2), ("PGDL2", {"eps": 0.5, "alpha": 0.1}, 2), ("TPGD", {"eps": 0.08}, 2),
        ("FFGSM", {"eps": 0.08, "alpha": 0.1}, 3), ("APGD", {"eps": 0.08}, 2), ("APGDT", {"eps": 0.08}, 2),
        ("APGD", {"eps": 0.5, "norm": "L2", "loss": "dlr"}, 4), ("FAB", {"eps": 0.08}, 3),
        ("FAB", {"eps": 0.5, "norm": "L2", "multi_targeted": True}, 2), ("Square", {"eps": 0.08, "n_queries": 150}, 6),
    ],
)  # fmt: skip
def test_robust_accuracy(ta: Any, name: str, options: dict[str, Any], slack: int) -> None:
    x, y = h.digits_batch(80)
    model = _model()
    torch.manual_seed(0)
    mine, theirs = (int(_wrong(model, getattr(m, name)(model, **options)(x, y), y).sum()) for m in (ours, ta))
    assert mine >= theirs - slack and mine > int(_wrong(model, x, y).sum())


# ---- modes ----


def test_modes(ta: Any, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = h.digits_batch(30)
    model = _mild()
    pair = [m.PGD(model, eps=0.2, alpha=0.05, random_start=False) for m in (ours, ta)]
    mine, theirs = pair
    seen: list[Tensor] = []

    def after(images: Tensor, labels: Tensor) -> Tensor:
        seen.append(images)
        return (labels + 3) % 10

    for call in (
        lambda a: a.set_mode_targeted_by_function(after), lambda a: a.set_mode_targeted_least_likely(),
        lambda a: a.set_mode_targeted_least_likely(3), lambda a: a.set_mode_targeted_by_label(quiet=True),
        lambda a: a.set_mode_targeted_random(quiet=True), lambda a: a.set_mode_default(),
    ):  # fmt: skip
        for atk in pair:
            call(atk)
        assert mine.get_mode() == theirs.get_mode() and mine.targeted == theirs.targeted
        if mine.get_mode() not in ("targeted(random)", "default"):
            a, b = mine.get_target_label(x, y), theirs.get_target_label(x, y)
            assert torch.equal(a, b), mine.get_mode()
            assert ((mine(x, y) - theirs(x, y)).abs() <= 4e-6).flatten(1).all(1).double().mean() >= 0.9
    said = capsys.readouterr().out.splitlines()
    assert said[0::2] == said[1::2] and "Attack mode is changed to 'targeted(custom)'." in said
    assert torch.equal(seen[0], x)
    with pytest.raises(ValueError, match="kth_min: got 0"):
        mine.set_mode_targeted_least_likely(0)
    mine.set_mode_targeted_least_likely(10, quiet=True)
    with pytest.raises(ValueError, match="kth_min: got 10, expected at most 9"):
        mine(x, y)


def test_random_targets_are_fair_and_never_the_label() -> None:
    x, y = h.digits_batch(200)
    atk = ours.PGD(_model())
    atk.set_mode_targeted_random(quiet=True)
    torch.manual_seed(0)
    drawn = torch.stack([atk.get_target_label(x, y) for _ in range(20)])
    assert not bool((drawn == y).any())
    counts = torch.bincount(((drawn - y) % 10).flatten(), minlength=10)
    assert counts[0] == 0 and counts[1:].min().item() > 350  # of 4000 / 9 = 444


def test_targeted_fab_reaches_for_the_target() -> None:
    x, y = h.digits_batch(20)
    model = _model()
    atk = ours.FAB(model, eps=0.3, steps=20)
    atk.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10, quiet=True)
    found = fr.attacks.fab(model, x, y, eps=0.3, steps=20, targets=((y + 1) % 10)[:, None], seed=0)
    assert torch.equal(atk(x, y), found)


# ---- normalisation, models' modes, exceptions ----


def test_normalised_models(ta: Any) -> None:
    class Normalised(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x * 0.5 + 0.3)

    x, y = h.digits_batch(32)
    inputs, model = (x - 0.3) / 0.5, Normalised(_model()).eval()
    y[:2] = (y[:2] + 1) % 10
    for name in ("PGD", "CW", "DeepFool", "FAB", "Square", "AutoAttack", "MultiAttack", "APGDT", "TPGD"):
        atk = _make(name, model)
        atk.set_normalization_used(mean=[0.3], std=[0.5])
        adv = atk(inputs, y)
        images = adv * 0.5 + 0.3
        assert images.min().item() >= -1e-6 and images.max().item() <= 1 + 1e-6
        assert int(_wrong(model, adv, y).sum()) > int(_wrong(model, inputs, y).sum()), name
        if name in ("CW", "FAB", "MultiAttack"):  # wrong already, or never fooled: bit for bit
            still = ~_wrong(model, adv, y) if name == "MultiAttack" else _wrong(model, inputs, y)
            assert bool(still.any()) and torch.equal(adv[still], inputs[still])
    half = ours.PGD(model)
    half.set_normalization_used(mean=[0.3], std=[0.5])
    assert half(inputs.half(), y).dtype == torch.float16
    with pytest.raises(ValueError, match="std: got"):
        half.set_normalization_used(mean=[0.3], std=[0.0])
    with pytest.raises(ValueError, match="x: got values from"):
        ours.PGD(model)(inputs, y)


@pytest.mark.parametrize("name", COVERED)
def test_an_exception_leaves_everything_as_it_was(name: str) -> None:
    """torchattacks stays in eval mode, with the normalisation switched off."""

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.breaks = _model(), True

        def forward(self, x: Tensor) -> Tensor:
            if self.breaks:
                raise RuntimeError("broken on purpose")
            return self.model(x)

    model, (x, y) = Breaks().train(), h.digits_batch(6)
    model.model[1].eval()
    flags = [m.training for m in model.modules()]
    atk = _make(name, model)
    if name == "VANILA":
        atk.set_model_training_mode(True)
    atk.set_normalization_used(mean=[0.0], std=[1.0])
    before = repr(atk)
    if name != "VANILA":
        with pytest.raises(RuntimeError, match="broken on purpose"):
            atk(x, y)
    assert [m.training for m in model.modules()] == flags and repr(atk) == before
    model.breaks = False
    fine = atk(x, y)
    assert [m.training for m in model.modules()] == flags and fine.shape == x.shape
    assert all(p.grad is None for p in model.parameters())


def test_model_training_mode() -> None:
    class Flags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.drop = _model(), nn.Dropout(0.5)
            self.seen: set[tuple[bool, ...]] = set()

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add((self.training, self.model[1].training, self.drop.training))
            return self.drop(self.model(x))

    x, y = h.digits_batch(8)
    model = Flags().eval()
    buffers = copy.deepcopy(model.state_dict())
    atk = ours.PGD(model, steps=2)
    for wanted in ((False, False, False), (True, False, False), (True, True, False), (True, False, True)):
        atk.set_model_training_mode(*wanted)
        model.seen.clear()
        atk(x, y)
        assert model.seen == {wanted} and not any(m.training for m in model.modules())
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())


# ---- silent faults of torchattacks ----


def test_autoattack_makes_a_hundred_steps(ta: Any) -> None:
    """torchattacks' makes 10, without a word."""
    x, y = h.digits_batch(3)
    watch = h.Watch(_model()).eval()
    atk = ours.AutoAttack(watch, eps=1e-4, seed=0, n_classes=4)
    right = ~_wrong(watch.model, x, y)
    watch.sizes.clear()
    plan = atk._plan()
    assert plan == ["apgd-ce", ("apgd-t", {"targets": 3}), ("fab-t", {"targets": 3}), "square"]
    atk._plan = lambda: plan[:2]
    atk(x[right], y[right])
    assert 200 < len(watch.sizes) < 220  # the three targets at once, and a few beside them
    assert [a.steps for a in ta.AutoAttack(watch.model)._autoattack.attacks[:3]] == [10, 10, 10]


def test_autoattack_is_autoattack() -> None:
    x, y = h.digits_batch(12)
    model = _model()
    atk = ours.AutoAttack(model, norm="L2", eps=0.5, n_classes=3, seed=7, version="fast")
    assert torch.equal(atk(x, y), fr.attacks.autoattack(model, x, y, eps=0.5, norm=2, version="fast", seed=7))


def test_cw_moves_black_and_white_pixels_and_looks_at_each_example(ta: Any) -> None:
    x, y = h.digits_batch(60)
    model = _model()
    mine, theirs = (m.CW(model, c=1, steps=100)(x, y) for m in (ours, ta))
    assert int(_wrong(model, mine, y).sum()) >= int(_wrong(model, theirs, y).sum())
    edges = (x == 0) | (x == 1)
    assert torch.equal(mine[~_wrong(model, mine, y)], x[~_wrong(model, mine, y)])
    assert bool((mine != x)[edges].any()) and not bool((theirs != x)[edges].any())
    both = _wrong(model, mine, y) & _wrong(model, theirs, y) & ~_wrong(model, x, y)
    lengths = [h.distance(a[both], x[both], 2).mean().item() for a in (mine, theirs)]
    assert int(both.sum()) > 5 and lengths[0] < lengths[1]


def test_deepfool_fools(ta: Any) -> None:
    x, y = h.digits_batch(24)
    model = _model()
    atk = ours.DeepFool(model)
    adv = atk(x, y)
    assert bool(_wrong(model, adv, y).all())
    again, said = atk.forward_return_target_labels(x, y)
    assert torch.equal(again, adv) and torch.equal(said, model(adv).argmax(1))


def test_save_writes_once_and_load_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchattacks joins and writes all batches so far after each batch."""
    x, y = h.digits_batch(25)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    model = _model()
    atk = ours.PGD(model, eps=0.1, alpha=0.02, random_start=False)
    written: list[int] = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, path: (written.append(1), save(content, path))[1])
    file = tmp_path / "adv.pt"
    acc, l2, seconds = atk.save(
        loader, file, return_verbose=True, save_predictions=True, save_clean_inputs=True, verbose=True
    )
    assert written == [1] and seconds > 0 and "Save progress: 100.00 %" in capsys.readouterr().out
    adv = atk(x, y)
    fooled = _wrong(model, adv, y)
    assert acc == pytest.approx(100 * (1 - fooled.double().mean().item()))
    assert l2 == pytest.approx(h.distance(adv[fooled], x[fooled], 2).mean().item(), rel=1e-5)
    found = ours.PGD.load(file, load_predictions=True, load_clean_inputs=True)
    parts = [torch.cat(p) for p in zip(*found, strict=True)]
    assert torch.allclose(parts[0], adv, atol=1e-6) and torch.equal(parts[1], y) and torch.equal(parts[3], x)
    assert torch.equal(parts[2], model(parts[0]).argmax(1))
    again = torch.cat([p[0] for p in ours.Attack.load(file, normalize={"mean": [0.3], "std": [0.5]})])
    assert torch.allclose(again, (parts[0] - 0.3) / 0.5, atol=1e-6)
    atk.save(loader, file, verbose=False)
    with pytest.raises(ValueError, match="got no preds"):
        ours.Attack.load(file, load_predictions=True)


def test_save_keeps_what_was_done_and_rounds_pixels(tmp_path: Path) -> None:
    x, y = h.digits_batch(12)
    x = (x * 255).round() / 255
    file = tmp_path / "adv.pt"

    def batches() -> Any:
        yield x[:5], y[:5]
        yield x[5:10], y[5:10]
        raise KeyboardInterrupt

    atk = ours.FGSM(_model(), eps=8 / 255)
    with pytest.raises(KeyboardInterrupt):
        atk.save(batches(), file, verbose=False, save_type="int")
    content = torch.load(file, weights_only=True)
    assert content["adv_inputs"].dtype == torch.uint8 and len(content["adv_inputs"]) == 10
    moved = (content["adv_inputs"].int() - (x[:10] * 255).round().int()).abs()
    assert moved.max().item() == 8  # cutting off makes most of them 7
    steps = (atk(x[:10], y[:10]) - x[:10]).abs() > 7.9 / 255
    assert bool((moved[steps] == 8).all())
    with pytest.raises(ValueError, match="save_type: got 'half'"):
        atk.save([], save_type="half")


def test_multiattack(ta: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = h.digits_batch(40)
    model = _model()
    watch = h.Watch(model).eval()
    build = lambda m, net: m.MultiAttack(
        [m.FGSM(net, eps=0.05), m.PGD(net, eps=0.08, alpha=0.02, random_start=False)], verbose=True
    )
    mine = build(ours, watch)
    adv = mine(x, y)
    theirs = build(ta, model)(x, y)
    assert abs(int(_wrong(model, adv, y).sum()) - int(_wrong(model, theirs, y).sum())) <= 1
    left = mine._records
    assert left[0] == 40 and left[2] == 40 - int(_wrong(model, adv, y).sum()) and left[1] in watch.sizes
    held = ~_wrong(model, adv, y)
    assert torch.equal(adv[held], x[held])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Attack success rate: ") and len(lines) == 2
    mine.verbose = False
    acc, rates, _, _ = mine.save(DataLoader(TensorDataset(x, y), batch_size=15), return_verbose=True, verbose=False)
    assert rates[-1] == pytest.approx(100 - acc) and rates[0] == pytest.approx(100 * (1 - left[1] / 40), abs=2.6)
    mine.set_normalization_used([0.0], [1.0])
    mine.set_device("cpu")
    assert all(a.normalization_used is not None and a.device == "cpu" for a in mine.attacks)
    with pytest.raises(ValueError, match="attacks: got 1"):
        ours.MultiAttack([ours.FGSM(model)])
    with pytest.raises(ValueError, match="several models"):
        ours.MultiAttack([ours.FGSM(model), ours.FGSM(watch)])
    with pytest.raises(ValueError, match="labels: got None"):
        mine(x)


@pytest.mark.filterwarnings("ignore::fastrobust.attacks.AttackWarning")
@pytest.mark.parametrize("name", [n for n in COVERED if n != "MultiAttack"])
def test_few_classes_no_room_and_all_wrong_already(name: str) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    x, _ = h.digits_batch(9)
    y = model(x).argmax(1)
    atk = _make(name, model)
    for setting in ("n_classes", "n_target_classes"):
        if hasattr(atk, setting):
            setattr(atk, setting, 2 if setting == "n_classes" else 1)
    if name == "APGDT":  # which looks at n_classes when it is made
        atk = ours.APGDT(model, n_classes=2)
    if hasattr(atk, "eps"):
        atk.eps = 0.4 if name != "PGDL2" else 2.0
    if name in ("BIM", "PGD", "EOTPGD", "FFGSM"):
        atk.alpha = 0.1 if name != "FFGSM" else 0.5
    for rows in (slice(0, 9), slice(0, 1), slice(0, 0)):
        adv = atk(x[rows], y[rows])
        assert adv.shape == x[rows].shape and bool(((adv >= 0) & (adv <= 1)).all())
    if name not in ("VANILA", "TPGD"):
        assert bool(_wrong(model, atk(x, y), y).any())
    wrong = atk(x, 1 - y)
    if name != "TPGD":  # which does not look at labels
        assert bool(_wrong(model, wrong, 1 - y).all())
    if hasattr(atk, "eps"):  # torchattacks' eps=0 perturbs (#172)
        atk.eps = 0.0
        assert torch.equal(atk(x, y), x)


def test_balls_hold_exactly() -> None:
    """torchattacks' L2 attacks leave the ball by rounding, and l-inf by an ulp."""
    x, y = h.digits_batch(40)
    model = _model()
    for name, norm, eps in (
        ("FGSM", h.INF, 8 / 255), ("FFGSM", h.INF, 8 / 255), ("BIM", h.INF, 8 / 255), ("PGD", h.INF, 8 / 255),
        ("TPGD", h.INF, 8 / 255), ("EOTPGD", h.INF, 8 / 255), ("PGDL2", 2, 0.3), ("APGD", h.INF, 0.1),
        ("FAB", h.INF, 0.1), ("Square", h.INF, 0.1),
    ):  # fmt: skip
        atk = _make(name, model)
        atk.eps = eps
        h.assert_inside(atk(x, y), x, eps, norm)


def test_attacks_of_ones_own() -> None:
    class Noise(ours.Attack):
        def __init__(self, model: nn.Module) -> None:
            super().__init__("Noise", model, targeted=True)

        def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
            assert self.get_logits(inputs).shape == (len(inputs), 10)
            return (inputs + 0.5).clamp(0, 1)

    x, y = h.digits_batch(4)
    atk = Noise(_model())
    atk.set_normalization_used([0.5], [0.25])
    assert torch.allclose(atk((x - 0.5) / 0.25, y), ((x + 0.5).clamp(0, 1) - 0.5) / 0.25, atol=1e-5)
    assert repr(atk).startswith("Noise(model_name=Sequential, device=cpu, attack_mode=default, targeted=False")


def test_callables_and_labels_left_out() -> None:
    x, _ = h.digits_batch(8)
    model = _model()
    call: Callable[[Tensor], Tensor] = lambda t: model(t)
    atk = ours.PGD(call, random_start=False)
    assert atk.device is None
    assert torch.equal(atk(x), ours.PGD(model, random_start=False)(x, model(x).argmax(1)))
