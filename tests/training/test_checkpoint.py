"""A training that was stopped ends with the bits of one that was not, whenever and however it was stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.training import Batch, Method, loader, train

EPOCHS = 4


class Restless(Method):
    """Keeps a tensor between batches, and draws from every global random state."""

    def __init__(self, eps: float = 0.1) -> None:
        self.eps = eps

    def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
        self._kept = torch.rand(1)

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        self._kept = 0.5 * self._kept + float(batch.x.mean()) + random.random() + float(np.random.rand())  # noqa: NPY002
        adv = fr.attacks.pgd(model, batch.x, batch.y, eps=self.eps, steps=2)
        return adv + 0.01 * float(self._kept) * torch.rand_like(adv)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = state["kept"]


class Stop(Exception):
    pass


def images(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 4, 4, generator=g)
    return x, x.flatten(1)[:, :3].argmax(1)


def run(folder: Path | None, kind: str = "tensors", average: str | None = "ema", stop: int = 0, **other: Any) -> Any:
    """(model, history) of a training that is stopped after epoch ``stop``."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7)
    x, y = images()
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3)
    )
    optimizer: Any = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler: Any = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], 0.3)
    given: Any = loader(x, y, 16, seed=2)
    if kind != "tensors":
        own = torch.Generator().manual_seed(3) if kind == "generator" else None
        dataset = torch.utils.data.TensorDataset(x, y)
        given = torch.utils.data.DataLoader(dataset, 16, shuffle=True, generator=own)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)

    def callback(_: nn.Module, record: dict[str, float]) -> None:
        if record["epoch"] == stop:
            raise Stop

    options: dict[str, Any] = {
        "epochs": EPOCHS, "evaluate": images(20, 1), "resume": True, "average": average, "optimizer": optimizer,
        "scheduler": scheduler, "callbacks": callback, "checkpoint": folder,
    }  # fmt: skip
    history = train(model, given, other.pop("method", None) or Restless(), **{**options, **other})
    return model, history


def same(a: Any, b: Any) -> bool:
    (model, history), (other, records) = a, b
    bits = all(torch.equal(s, t) for s, t in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    strip = lambda record: {name: value for name, value in record.items() if name != "seconds"}
    return bits and list(map(strip, history)) == list(map(strip, records))


@pytest.mark.parametrize("kind", ["tensors", "generator", "global"])
@pytest.mark.parametrize("average", [None, "ema", "swa"])
def test_resumed_equals_uninterrupted(tmp_path: Path, kind: str, average: str | None) -> None:
    whole = run(tmp_path / "whole", kind, average)
    for stop in (1, 3):
        with pytest.raises(Stop):
            run(tmp_path / "parts", kind, average, stop)
        random.seed(99)  # nothing may be left to what the process happens to be in
        torch.manual_seed(99)
    assert same(run(tmp_path / "parts", kind, average), whole)
    a, b = (torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    # one that is done already trains nothing, and hands out the same
    assert same(run(tmp_path / "parts", kind, average), whole)
    assert same(run(None, kind, average), whole)


CHILD = """
import importlib.util, os, signal, sys
from pathlib import Path
import torch
spec = importlib.util.spec_from_file_location("restless", {test!r})
module = importlib.util.module_from_spec(spec)
sys.modules["restless"] = module
spec.loader.exec_module(module)
from fastrobust.training import checkpoint
calls = 0
real_save, real_replace = torch.save, os.replace

def half(content, file):  # of the checkpoint after epoch 3
    if "processes" in content and len(content["history"]) == 3:
        import io
        whole = io.BytesIO()
        real_save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real_save(content, file)

def between(source, target):  # the old one moved away, the new one not yet in its place
    global calls
    real_replace(source, target)
    if str(target).endswith("previous.pt"):
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)

if {moment!r} == "writing":
    torch.save = half
elif {moment!r} == "moving":
    os.replace = between

class Killed(module.Restless):
    def perturb(self, model, batch):
        if {moment!r} == "training" and (batch.epoch, batch.step) == (2, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().perturb(model, batch)

Killed.name = "Restless"
module.run(Path({folder!r}), method=Killed())
"""


@pytest.mark.parametrize("moment", ["writing", "moving", "training"])
def test_a_kill_loses_nothing_but_that_epoch(tmp_path: Path, moment: str) -> None:
    code = CHILD.format(test=__file__, moment=moment, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = "previous.pt" if moment == "moving" else "last.pt"
    assert len(torch.load(tmp_path / kept, weights_only=True)["history"]) == 2
    resumed: list[float] = []
    last = run(tmp_path, callbacks=lambda _, r: resumed.append(r["epoch"]))
    assert resumed == [3, 4] and same(last, run(None))
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_leaves_the_checkpoint_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stop):
        run(tmp_path, stop=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = torch.save

    def full(content: Any, file: Any) -> None:
        if "processes" in content:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "best.pt"} == {
        name: content for name, content in before.items() if name != "best.pt"
    }
    monkeypatch.undo()
    assert same(run(tmp_path), run(None))


def test_a_damaged_file_falls_back_to_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path, stop=3)
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 3])
    with pytest.warns(UserWarning, match="going on from .*previous.pt"):
        last = run(tmp_path)
    assert same(last, run(None))
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="whose files cannot be read"):
        run(tmp_path)
    torch.save({"weights": 1}, tmp_path / "last.pt")
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(ValueError, match="it is no checkpoint of a training"):
        run(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path, stop=1)
    before = (tmp_path / "last.pt").read_bytes()
    x, y = images()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": Restless(0.2)}, "method.eps 0.1 in the checkpoint, 0.2 now"),
        ({"method": "plain", "evaluate": None}, "method 'Restless' in the checkpoint, 'plain' now"),
        ({"epochs": 5}, "epochs 4 in the checkpoint, 5 now"),
        ({"average": "swa"}, "average"),
        ({"kind": "global"}, "optimizer"),
        ({"max_grad_norm": 1.0}, "max_grad_norm None in the checkpoint, 1.0 now"),
        ({"autocast": torch.bfloat16}, "autocast 'None' in the checkpoint, 'torch.bfloat16' now"),
        ({"resume": False}, "which holds a training already; pass resume=True"),
    ]
    for options, text in cases:
        with pytest.raises(ValueError, match=text):
            run(tmp_path, **options)
        assert (tmp_path / "last.pt").read_bytes() == before
    with pytest.raises(ValueError, match="model"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), loader(x, y, 16), "plain", epochs=4, checkpoint=tmp_path,
              resume=True)  # fmt: skip


def plain_average(average: str, start: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and the average of its weights as the definition says, from the weights after each step and epoch."""
    x, y = images()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    steps: list[tuple[float, dict[str, Tensor]]] = []
    ends: list[tuple[float, dict[str, Tensor]]] = []

    def weights() -> dict[str, Tensor]:
        return {k: v.detach().double().clone() for k, v in model.state_dict().items() if v.is_floating_point()}

    class Watch(Method):
        def step(self, model: nn.Module, batch: Batch, update: Any) -> Any:
            found = super().step(model, batch, update)
            steps.append((batch.progress, weights()))
            return found

    def end(_: nn.Module, record: dict[str, float]) -> None:
        ends.append((record["epoch"] / EPOCHS, weights()))

    how = fr.training.Averaging(average, 0.9, start)  # type: ignore[arg-type]
    train(model, loader(x, y, 16), Watch(), epochs=EPOCHS, average=how, callbacks=end)
    if average == "swa":
        some = [w for at, w in ends if at > start]
        return model, {k: sum(w[k] for w in some) / len(some) for k in some[0]}  # type: ignore[misc]
    mean: dict[str, Tensor] = {}
    for t, w in enumerate([w for at, w in steps if at >= start]):
        d = min(0.9, (1 + t) / (10 + t)) if t else 0.0
        mean = {k: d * mean[k] + (1 - d) * w[k] if t else w[k] for k in w}
    return model, mean


@pytest.mark.parametrize(("average", "start"), [("ema", 0.0), ("ema", 0.5), ("swa", 0.0), ("swa", 0.5)])
def test_averages_by_their_definition(average: str, start: float) -> None:
    model, expected = plain_average(average, start)
    statistics = {k for k in expected if "running" in k}
    for name, t in model.state_dict().items():
        if name in expected and (average == "ema" or name not in statistics):
            torch.testing.assert_close(t.double(), expected[name], rtol=1e-5, atol=1e-6)
    if average == "swa":  # statistics of the averaged weights, as the mean over the first epoch's batches
        x, y = images()
        first = model[1](torch.flatten(x, 1))
        batches = [i for *_, i in loader(x, y, 16)]
        mean = torch.stack([first[i].mean(0) for i in batches]).mean(0)
        torch.testing.assert_close(model[2].running_mean, mean, rtol=1e-4, atol=1e-6)  # type: ignore[index]
        assert model[2].momentum == 0.1 and int(model[2].num_batches_tracked) == len(batches)  # type: ignore[index]


def test_the_average_is_judged_and_the_weights_go_on() -> None:
    x, y = images()
    judged: list[Tensor] = []
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    def judge(m: nn.Module) -> dict[str, float]:
        judged.append(m[1].weight.detach().clone())  # type: ignore[index]
        return {"clean": 0.5}

    live: list[Tensor] = []
    train(models[0], loader(x, y, 16), "plain", epochs=3, average="ema", evaluate=judge,
          callbacks=lambda m, _: live.append(m[1].weight.detach().clone()))  # fmt: skip
    alone: list[Tensor] = []
    train(
        models[1],
        loader(x, y, 16),
        "plain",
        epochs=3,
        callbacks=lambda m, _: alone.append(m[1].weight.detach().clone()),
    )
    assert all(torch.equal(a, b) for a, b in zip(live, alone, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(live, judged, strict=True))
    assert torch.equal(judged[-1], models[0][1].weight)


WORKER = """
import json, os, sys, warnings
import torch
from torch import nn
import fastrobust as fr
from fastrobust import data, models
from fastrobust.training import distributed
warnings.simplefilter("error")

class Attacked(fr.training.Method):
    def __init__(self):
        self.eps = 0.1
    def perturb(self, model, batch):  # from the image itself: no random number depends on the process
        return fr.attacks.pgd(model, batch.x, batch.y, eps=1.0, norm=2, steps=2, random_start=False)
    def state_dict(self):
        return {"rank": torch.tensor(distributed.rank_and_world()[0])}
    def load_state_dict(self, state):
        assert int(state["rank"]) == distributed.rank_and_world()[0]

folder, epochs_before_stop = sys.argv[1], int(sys.argv[2])
with distributed.join(torch.device("cpu")):
    rank, world = distributed.rank_and_world()
    torch.manual_seed(rank)  # the first process' weights are everybody's
    model = models.digits_cnn()
    x, y, _ = data.load("digits", "train", limit=303)  # a last batch of three: two examples for one process, one for the other
    held = data.load("digits", "test", limit=101)
    def stop(_, record):
        if record["epoch"] == epochs_before_stop:
            raise KeyboardInterrupt
    options = dict(epochs=3, evaluate=(held.images, held.labels), average="ema", checkpoint=folder, resume=True, callbacks=stop)
    for attempt in range(2):
        try:
            history = fr.training.train(model, fr.training.loader(x, y, 60), Attacked(), **options)
        except KeyboardInterrupt:
            epochs_before_stop = 0
            torch.manual_seed(100 + rank)
            model = models.digits_cnn()
    torch.save({"history": history, "model": model.state_dict()}, f"{folder}/{rank}.out")
"""


def test_two_processes_train_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")

    def go(world: int, stop: int) -> list[Any]:
        folder = tmp_path / f"{world}-{stop}"
        folder.mkdir()
        free = str(29500 + random.Random(os.getpid()).randrange(2000))
        workers = []
        for rank in range(world):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            command = [sys.executable, "-c", WORKER, str(folder), str(stop)]
            workers.append(subprocess.Popen(command, env={**os.environ, **place, "MASTER_PORT": free}))
        assert [w.wait(120) for w in workers] == [0] * world
        return [torch.load(folder / f"{rank}.out", weights_only=True) for rank in range(world)]

    two = go(2, 2)  # stopped and resumed, each process with a state of its own
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "0"])
    with warnings.catch_warnings():
        exec(WORKER, {})
    one = torch.load(tmp_path / "0.out", weights_only=True)
    assert all(torch.equal(two[0]["model"][k], two[1]["model"][k]) for k in one["model"])
    for k, t in one["model"].items():
        torch.testing.assert_close(two[0]["model"][k], t, rtol=1e-3, atol=1e-4)
    for a, b in zip(one["history"], two[0]["history"], strict=True):
        for name in ("loss", "accuracy", "eval_clean", "eval_fgsm", "eval_pgd"):
            assert a[name] == pytest.approx(b[name], abs=0.011), name


def test_the_files_are_plain(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "previous.pt"]
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert json.loads(json.dumps(content["history"])) == content["history"] and len(content["history"]) == EPOCHS
