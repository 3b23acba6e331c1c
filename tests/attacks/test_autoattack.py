"""The evaluation by several attacks: verdicts, reports, resuming, certified examples, few classes, doubts."""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks import AttackWarning, EvaluationReport, _state
from fastrobust.attacks._versions import planned

SHORT: list[Any] = [
    ("apgd-ce", {"steps": 6}), ("apgd-t", {"steps": 5, "targets": 2}), ("fab-t", {"steps": 5, "targets": 2}),
    ("square", {"queries": 30}),
]  # fmt: skip


def _call(n: int = 30, **options: Any) -> Any:
    x, y = h.digits_batch(n)
    model = options.pop("model", h.digits_model())
    return fr.attacks.autoattack(
        model, x, y, **{"eps": 0.08, "version": SHORT, "seed": 3, "return_details": True, "check": False, **options}
    )


@pytest.mark.parametrize("norm", h.NORMS)
def test_verdicts_and_report(norm: float) -> None:
    x, y = h.digits_batch(30)
    model = h.digits_model()
    eps = h.RADIUS[norm] * torch.tensor([0, 0.3, 0.6, 0.8, 1] * 6, dtype=torch.float64)
    found = _call(eps=eps, norm=norm, batch_size=13)
    h.assert_inside(found.adv, x, eps, norm)
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    clean = model(x).argmax(1) == y
    assert torch.equal(found.adv[~found.fooled], x[~found.fooled]) and torch.equal(found.adv[~clean], x[~clean])
    report = found.report
    assert report.clean_accuracy == pytest.approx(clean.double().mean().item())
    assert report.robust_accuracy == pytest.approx((~found.fooled).double().mean().item())
    assert [a.name for a in report.attacks] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    left = int(clean.sum())
    for entry in report.attacks:
        assert entry.attacked == left
        left -= entry.broken
        assert entry.robust_accuracy == pytest.approx(left / 30)
    assert report.attacks[-1].backwards == 0 and all(a.backwards > 0 for a in report.attacks[:-1])
    assert report.eps is None and report.norm == {"inf": "Linf", "2": "L2", "1": "L1"}[str(norm)]


def test_every_pass_is_counted() -> None:
    """forwards are the images that the model saw."""
    watch = h.Watch(h.digits_model())
    report = _call(model=watch, version=SHORT[:2]).report
    assert sum(watch.sizes) - 1 == report.forwards  # one image tells the number of classes


def test_a_report_is_json_and_a_table() -> None:
    report = _call().report
    assert EvaluationReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["attacks"][0]["name"] == "apgd-ce"
    lines = str(report).splitlines()
    assert lines[1].split()[:4] == ["attack", "attacked", "broken", "robust"]
    assert any(line.startswith("fab-t") for line in lines) and f"{100 * report.robust_accuracy:.2f} %" in lines[-1]


def test_calls_leave_nothing_that_changes_the_next() -> None:
    versions = copy.deepcopy(SHORT)
    first, second = _call(version=versions), _call(version=versions)
    assert torch.equal(first.adv, second.adv) and versions == SHORT
    assert planned("plus", h.INF) == planned("plus", h.INF)
    assert {one.name: one.options.get("restarts", 1) for one in planned("plus", h.INF)} == {
        "apgd-ce": 5, "apgd-dlr": 5, "fab": 5, "square": 1, "apgd-t": 1, "fab-t": 1
    }  # fmt: skip


def test_versions_are_the_papers() -> None:
    standard = planned("standard", 2.0)
    assert [one.name for one in standard] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [one.options.get("targets") for one in standard] == [None, 9, 9, None]
    sparse = planned("standard", 1.0)
    assert sparse[0].options == {"loss": "ce", "restarts": 5, "large_radii": True}
    assert sparse[1].options == {"loss": "dlr", "targets": 5, "large_radii": True} and sparse[2].options["targets"] == 9
    assert all(one.options["eot_samples"] == 20 for one in planned("rand", h.INF))


class _Stops(nn.Module):
    """Stops, as kill does, in a pass that is chosen."""

    def __init__(self, passes: float) -> None:
        super().__init__()
        self.body, self.left = h.digits_model(), passes

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        found: Tensor = self.body(x)
        return found


@pytest.mark.parametrize("passes", [4, 12, 30, 60, 90, 140])
def test_resumes_with_the_same_bits(tmp_path: Path, passes: int) -> None:
    wanted = _call(batch_size=8, model=_Stops(math.inf))
    file = tmp_path / "state.npz"
    stops = 0
    while True:
        try:
            found = _call(batch_size=8, model=_Stops(passes + 40 * stops), state=file)
            break
        except KeyboardInterrupt:
            stops += 1
        assert {p.name for p in tmp_path.iterdir()} <= {"state.npz"}  # no half-written file
    assert stops > 0
    assert torch.equal(found.adv, wanted.adv) and torch.equal(found.fooled, wanted.fooled)
    for ours, theirs in zip(found.report.attacks, wanted.report.attacks, strict=True):
        assert (ours.attacked, ours.broken, ours.forwards, ours.backwards) == (
            theirs.attacked, theirs.broken, theirs.forwards, theirs.backwards
        )  # fmt: skip
    model = _Stops(1)  # done: what there is to know is in the file
    again = _call(batch_size=8, model=model, state=file)
    assert torch.equal(again.adv, wanted.adv) and model.left == 0


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.npz"
    _call(state=file)
    other = copy.deepcopy(h.digits_model())
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    for bad, what in (
        ({"eps": 0.09}, "eps differ"), ({"seed": 4}, "seed differ"), ({"version": SHORT[:2]}, "attacks differ"),
        ({"n": 29}, "x, y differ"), ({"model": other}, "model differ"), ({"batch_size": 7}, "batch_size differ"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"state: got .*{what}"):
            _call(**{"state": file, **bad})  # type: ignore[arg-type]
    file.write_bytes(b"no state")
    with pytest.raises(ValueError, match="no state of an evaluation"):
        _call(state=file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_and_their_state(tmp_path: Path, dtype: torch.dtype) -> None:
    x, y = h.digits_batch(20)
    model, half = h.digits_model(), x.to(dtype)
    call = lambda: fr.attacks.autoattack(
        model, half, y, eps=0.1, version=SHORT, return_details=True, state=tmp_path / "s.npz", check=False
    )
    found = call()
    h.assert_inside(found.adv, half, 0.1, h.INF)
    assert torch.equal(found.fooled, model(found.adv.float()).argmax(1) != y)
    assert torch.equal(call().adv, found.adv)


def test_a_failed_write_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.npz"
    _call(state=file)
    before = file.read_bytes()
    progress = _state.Progress(
        torch.zeros(2), *[torch.zeros(2, dtype=torch.bool)] * 3, EvaluationReport("", "", 0.1, 2, 0)
    )
    monkeypatch.setattr(_state.os, "fsync", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        _state.save(file, {}, progress)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_proven_examples_are_not_attacked() -> None:
    x, y = h.digits_batch(40)
    torch.manual_seed(0)
    train_x, train_y = h.digits()
    model = h.train(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10)),
        train_x[:1500],
        train_y[:1500],
        150,
    )
    eps = 0.03 * torch.tensor([0.2, 0.5, 1, 2] * 10, dtype=torch.float64)
    call = lambda first: fr.attacks.autoattack(
        model, x, y, eps=eps, version=SHORT, certify_first=first, return_details=True, check=False
    )
    plain = call(False)
    for method in (True, "crown"):
        found = call(method)
        report = found.report
        assert report.certified is not None and 5 < report.certified < 40 and plain.report.certified is None
        assert report.certified / 40 <= report.robust_accuracy
        clean, first, then = round(report.clean_accuracy * 40), *report.attacks[:2]
        assert then.attacked == clean - first.broken - report.certified
        # a method by name proves at once; else tighter bounds see what the first attack left
        assert first.attacked == clean - report.certified if method == "crown" else first.attacked < clean
        assert report.robust_accuracy == plain.report.robust_accuracy
        assert "proven" in str(report)


def test_models_that_bounds_cannot_read_are_attacked_all_the_same() -> None:
    model = h.digits_model()
    with pytest.warns(AttackWarning, match="certify_first: no example could be proven"):
        found = _call(model=lambda z: model(z), certify_first=True)
    assert found.report.certified == 0 and any("certify_first" in note for note in found.report.notes)
    assert found.report.robust_accuracy == _call().report.robust_accuracy


def test_models_that_end_in_log_softmax_are_proven_as_their_logits() -> None:
    x, y = h.digits_batch(30)
    logits = h.digits_model()
    options = {"eps": 0.01, "version": SHORT[:1], "certify_first": True, "return_details": True, "check": False}
    found, want = (
        fr.attacks.autoattack(m, x, y, **options).report
        for m in (nn.Sequential(logits, nn.LogSoftmax(1)).eval(), logits)
    )
    assert want.certified is not None and want.certified > 5
    assert found.certified is not None and want.certified - 1 <= found.certified <= want.certified


def test_normalised_models_are_proven_as_they_are_attacked() -> None:
    x, y = h.digits_batch(30)
    torch.manual_seed(0)
    train_x, train_y = h.digits()
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    model = h.train(body, (train_x[:1500] - 0.3) / 0.4, train_y[:1500], 150)
    found = fr.attacks.autoattack(
        model, x, y, eps=0.01, version=SHORT[:1], certify_first=True, normalize=([0.3], [0.4]), return_details=True,
        check=False,
    )  # fmt: skip
    assert found.report.certified is not None and found.report.certified > 5
    wrapped = fr.bounds.compute_bounds(
        body, ((x - 0.3) / 0.4), 0.01 / 0.4, labels=y, method="crown-ibp", clip=(-0.75, 1.75)
    ).lower  # fmt: skip
    assert abs(int((wrapped > 0).all(1).sum()) - found.report.certified) <= 1


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("version", ["standard", "plus", "fast"])
def test_few_classes(classes: int, version: str) -> None:
    x, y = h.small_batch(6, classes=classes)
    short: list[Any] = [(one.name, {"steps": 4}) for one in planned(version, h.INF) if one.attack != "square"]
    model = h.small_model(classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fr.attacks.autoattack(
            model, x, y, eps=0.2, version=[*short, ("square", {"queries": 20})], return_details=True
        )
    h.assert_inside(found.adv, x, 0.2, h.INF)
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    few = classes < 4 or version != "fast"  # its three targets are all that four classes have
    assert any("other classes" in note for note in found.report.notes) == few


def test_one_example_none_and_all_wrong() -> None:
    x, y = h.digits_batch(5)
    model = h.digits_model()
    call = lambda a, b: fr.attacks.autoattack(model, a, b, eps=0.1, version=SHORT, return_details=True)
    one = call(x[:1], y[:1])
    assert one.adv.shape == (1, 1, 8, 8)
    none = call(x[:0], y[:0])
    assert none.adv.shape == (0, 1, 8, 8) and none.report.robust_accuracy == 0
    wrong = call(x, (model(x).argmax(1) + 1) % 10)
    assert torch.equal(wrong.adv, x) and bool(wrong.fooled.all()) and wrong.report.attacks[0].attacked == 0


class _Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = h.digits_model()(x + 0.2 * torch.randn_like(x))
        return found


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (_Noisy(), "randomised"), (lambda x: h.digits_model()(x).softmax(1), "softmax"),
        (lambda x: h.digits_model()(x).roll(1, 1), "chance"),
        (lambda x: h.digits_model()((x * 3).round() / 3 + 0 * x), "zero or NaN"),
    ],
    ids=["randomised", "softmax", "chance", "zero gradient"],
)  # fmt: skip
def test_doubts_are_said_in_plain_words(model: Any, text: str) -> None:
    with pytest.warns(AttackWarning) as caught:
        found = _call(model=model, check=True, version=SHORT[:1])
    assert any(text in str(w.message) for w in caught)
    assert any(text in note for note in found.report.notes)


def test_square_better_than_gradients() -> None:
    """Steps hide the gradient from APGD, not from Square."""
    model = lambda x: h.digits_model()((x * 4).round() / 4 + 0 * x)
    with pytest.warns(AttackWarning, match="square broke"):
        _call(model=model, check=True, eps=0.2, version=[("apgd-ce", {"steps": 3}), ("square", {"queries": 200})])


def test_a_sound_model_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _call(check=True, version=SHORT[:3])


def test_randomised_models_are_judged_by_means() -> None:
    """One unlucky pass does not break an example."""
    torch.manual_seed(0)
    x, y = h.digits_batch(40)
    call = lambda version: fr.attacks.autoattack(
        _Noisy(), x, y, eps=0.0, version=version, return_details=True, check=False
    )
    mean = call([("apgd-ce", {"steps": 2, "eot_samples": 20})]).report
    assert mean.robust_accuracy >= mean.clean_accuracy - 0.05


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"version": "best"}, ValueError, "version: got 'best'"),
        ({"version": 3}, TypeError, "version: got"),
        ({"version": ["pgd"]}, ValueError, "version: got attack 'pgd'"),
        ({"version": [("square", {"steps": 3})]}, ValueError, "version: got square with steps"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"seed": None}, TypeError, "seed: got None"),
        ({"certify_first": 2}, TypeError, "certify_first: got"),
        ({"eps": -1}, ValueError, "eps: got -1"),
        ({"norm": 0}, ValueError, "norm: got"),
    ],
    ids=str,
)
def test_bad_input(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        _call(**bad)


def test_parts_of_a_set_give_what_the_whole_gives() -> None:
    whole = _call(n=23, batch_size=8)
    x, y = h.digits_batch(23)
    parts = [
        fr.attacks.autoattack(
            h.digits_model(), x[a:b], y[a:b], eps=0.08, version=SHORT, seed=3, first_example=a, return_details=True,
            check=False,
        )
        for a, b in ((0, 8), (8, 16), (16, 23))
    ]  # fmt: skip
    assert torch.equal(torch.cat([p.fooled for p in parts]), whole.fooled)
    torch.testing.assert_close(torch.cat([p.adv for p in parts]), whole.adv, rtol=0, atol=1e-5)
    elsewhere = fr.attacks.autoattack(h.digits_model(), x[8:16], y[8:16], eps=0.08, version=SHORT, seed=3, check=False)
    assert not torch.equal(elsewhere, parts[1].adv)
    report = EvaluationReport.of_parts([p.report for p in parts])
    assert report.examples == 23 and report.robust_accuracy == pytest.approx(whole.report.robust_accuracy)
    assert report.clean_accuracy == pytest.approx(whole.report.clean_accuracy) and report.certified is None
    for ours, theirs in zip(report.attacks, whole.report.attacks, strict=True):
        assert (ours.name, ours.attacked, ours.broken) == (theirs.name, theirs.attacked, theirs.broken)
        assert ours.robust_accuracy == pytest.approx(theirs.robust_accuracy)
    assert report.seconds == pytest.approx(sum(p.report.seconds for p in parts))
    with pytest.raises(ValueError, match="parts: got none"):
        EvaluationReport.of_parts([])


def test_curves_rise_to_what_was_broken() -> None:
    report = EvaluationReport.from_json(_call(batch_size=9).report.to_json())
    assert report.attacks[0].curve
    for entry in report.attacks:
        seconds, broken = zip(*entry.curve, strict=True) if entry.curve else ((0.0,), (0,))
        assert list(seconds) == sorted(seconds) and list(broken) == sorted(set(broken))
        assert broken[-1] == entry.broken and seconds[-1] <= entry.seconds + 1e-3
    one = _call(batch_size=30, eps=0.12).report.attacks[0]
    assert len(one.curve) > 1 and one.curve[0][1] < one.broken  # examples leave at steps of their own


def test_zero_gradients_are_counted_across_a_stop(tmp_path: Path) -> None:
    model = lambda z: h.digits_model()((z * 3).round() / 3 + 0 * z)
    options: dict[str, Any] = {"version": SHORT[:1], "batch_size": 8, "check": True}
    with pytest.warns(AttackWarning, match="zero or NaN"):
        wanted = _call(model=model, **options).report
    assert wanted.attacks[0].still > 8

    def stops(z: Tensor) -> Tensor:
        stops.left -= 1  # type: ignore[attr-defined]
        if stops.left < 0:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return model(z)

    stops.left = 6 + 20  # type: ignore[attr-defined]  # in the third batch of the attack
    with pytest.raises(KeyboardInterrupt):
        _call(model=stops, state=tmp_path / "s.npz", **options)
    with pytest.warns(AttackWarning, match=f"gradient of {wanted.attacks[0].still} examples"):
        found = _call(model=model, state=tmp_path / "s.npz", **options).report
    assert found.attacks[0].still == wanted.attacks[0].still


class _Adapts(nn.Module):
    """Moves its weights as it answers: in place, behind autograd's back, or by putting others in their place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how, self.steps = copy.deepcopy(h.digits_model()), how, 0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body[0].weight
        with torch.no_grad():
            if self.how == "in place":
                weight.add_(1e-9)
            elif self.how == "data":
                weight.data[0, 0, 0, 0] += 1e-3
            else:
                self.body[0].weight = nn.Parameter(weight.clone())
        found: Tensor = self.body(x)
        return found


@pytest.mark.parametrize("how", ["in place", "data", "replaced"])
def test_models_that_change_as_they_answer(how: str) -> None:
    with pytest.warns(AttackWarning, match=r"changes as it answers \(body.0.weight\)"):
        found = _call(model=_Adapts(how), check=True, version=SHORT[:1])
    assert any("changes as it answers" in note for note in found.report.notes)


def _purifies(x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        loss = h.digits_model()(z).logsumexp(1).sum()
        (grad,) = torch.autograd.grad(loss, z)
    return h.digits_model()(x + 0.01 * grad)


def _whitened(x: Tensor) -> Tensor:
    return h.digits_model()(x) - h.digits_model()(x).mean(0)


@pytest.mark.parametrize(("model", "text"), [(_purifies, "computes gradients"), (_whitened, "others in its batch")])
def test_dynamic_models(model: Any, text: str) -> None:
    trace = sys.gettrace()
    with pytest.warns(AttackWarning) as caught:
        found = _call(model=model, check=True, version=SHORT[:1])
    assert [text in note for note in found.report.notes].count(True) == 1
    assert any(text in str(w.message) for w in caught) and sys.gettrace() is trace


def test_compiled_and_traced_models_are_watched_without_hooks() -> None:
    """Neither may fail; a transform of torch.func refuses the hooks that watch for gradients."""
    x, _ = h.digits_batch(4)

    def jacobian(z: Tensor) -> Tensor:
        torch.func.vmap(torch.func.grad(lambda v: h.digits_model()(v[None]).sum()))(z.detach())
        return h.digits_model()(z)

    for model in (torch.jit.trace(h.digits_model(), x), jacobian):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _call(model=model, check=True, version=SHORT[:1])


def test_tighter_bounds_prove_what_the_first_attack_left(tmp_path: Path) -> None:
    """Two hidden layers, where bounds differ; the proofs are taken up from a state, too."""
    x, y = h.digits_batch(40)
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))
    train_x, train_y = h.digits()
    model = h.train(nn.Sequential(*layers), train_x[:1500], train_y[:1500], 150)
    call = lambda first, **more: fr.attacks.autoattack(
        model,
        x,
        y,
        eps=0.05,
        version=SHORT,
        certify_first=first,
        return_details=True,
        check=False,
        batch_size=9,
        **more,
    )
    quick, both = call("crown-ibp"), call(True, state=tmp_path / "s.npz")
    assert quick.report.certified is not None and both.report.certified is not None
    assert both.report.certified > quick.report.certified
    assert both.report.robust_accuracy == quick.report.robust_accuracy == call(False).report.robust_accuracy
    assert both.report.attacks[0].attacked == quick.report.attacks[0].attacked
    assert both.report.attacks[1].attacked < quick.report.attacks[1].attacked
    again = call(True, state=tmp_path / "s.npz")
    assert torch.equal(again.adv, both.adv) and again.report.certified == both.report.certified
