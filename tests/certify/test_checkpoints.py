"""Models from files: what is loaded is the network that was saved, or nothing."""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fastrobust import models
from fastrobust.certify.checkpoints import load, load_model

NETS = """
import torch
from torch import nn

def padded():  # shapes that other strides and paddings fit as well
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 5))

class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 5)
    def forward(self, x):
        x = x.flatten(1)
        return self.b(x + self.a(x).tanh())

def meta():
    with torch.device("meta"):
        return padded()

def broken(): raise KeyError("width")
def number(): return 3
value = 4
"""


@pytest.fixture
def nets(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    (tmp_path / "someones_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(name: str) -> nn.Module:
    space: dict[str, object] = {}
    exec(NETS, space)
    torch.manual_seed(4)
    return space[name]().eval()  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize("factory", ["someones_nets:padded", "someones_nets.py:padded"])
def test_weights_go_into_the_model_of_a_factory(nets: pathlib.Path, factory: str) -> None:
    net, x = made("padded"), torch.rand(3, 1, 8, 8)
    torch.save(net.state_dict(), nets / "w.pt")
    found = load(nets / "w.pt", factory=factory)
    assert torch.equal(found.model(x), net(x)) and not found.model.training
    assert (
        found.built
        == f"Sequential of {factory}, 4 tensors of {sum(p.numel() for p in net.parameters())} numbers loaded strictly"
    )


def test_a_factory_in_a_file_imports_its_neighbours(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "its_width.py").write_text("WIDTH = 6\n")
    (tmp_path / "wide_nets.py").write_text(
        "from torch import nn\nfrom its_width import WIDTH\ndef net(): return nn.Linear(WIDTH, 2)\n"
    )
    torch.save(nn.Linear(6, 2).state_dict(), tmp_path / "w.pt")
    assert load_model(tmp_path / "w.pt", factory=f"{tmp_path}/wide_nets.py:net").in_features == 6


@pytest.mark.parametrize("name", ["padded", "Skip"])
def test_weights_alone_are_not_guessed_at(nets: pathlib.Path, name: str) -> None:
    torch.save(made(name).state_dict(), nets / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt holds weights alone.*--factory"):
        load_model(nets / "w.pt")
    with pytest.raises(ValueError, match="layout cnn"):
        load_model(nets / "w.pt", layout="cnn")


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Flatten(), nn.Linear(9, 9), nn.Tanh(), nn.BatchNorm1d(9), nn.Linear(9, 2)],
        [nn.Flatten(), nn.Linear(9, 9), nn.Linear(9, 2)],
        [nn.Flatten(), nn.Linear(9, 9), nn.Tanh(), nn.Dropout(), nn.Linear(9, 2)],
        [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)],
        [nn.PReLU()],
    ],
)
def test_no_other_sequential_is_taken_for_a_chain(tmp_path: pathlib.Path, layers: list[nn.Module]) -> None:
    torch.save(nn.Sequential(*layers).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds weights alone"):
        load_model(tmp_path / "w.pt")


def test_linear_layers_alone_are_said_to_be_a_chain(tmp_path: pathlib.Path) -> None:
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)
    )
    torch.save(net.state_dict(), tmp_path / "w.pt")
    x = torch.rand(5, 3, 2, 2)
    with pytest.warns(UserWarning, match="taken as a chain of linear layers with ReLU"):
        found = load(tmp_path / "w.pt", shape=(3, 2, 2))
    assert torch.equal(found.model(x), net(x))
    assert found.built == "layout dense: Flatten - Linear(12, 7) - ReLU - Linear(7, 4) - ReLU - Linear(4, 3)"
    with pytest.raises(ValueError, match=r"images of shape \(3, 4, 4\)"):
        load_model(tmp_path / "w.pt", layout="dense", shape=(3, 4, 4))
    for name, kind in (("tanh", nn.Tanh), ("sigmoid", nn.Sigmoid)):
        net[2], net[4] = kind(), kind()
        assert torch.equal(load_model(tmp_path / "w.pt", activation=name)(x), net(x))


@pytest.mark.parametrize("channels", [1, 3])
def test_published_layouts(tmp_path: pathlib.Path, channels: int) -> None:
    size = 28 if channels == 1 else 32
    net = models.mnist_cnn() if channels == 1 else nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    owners = {
        "0": "conv_block.conv_layer_0.layer",
        "2": "conv_block.conv_layer_1.layer",
        "5": "fc_block.fc_layer_0.layer",
        "7": "output.layer",
    }
    x, state = torch.rand(2, channels, size, size), net.state_dict()
    torch.save({f"{owners[k[0]]}{k[1:]}": v for k, v in state.items()}, tmp_path / "published.pt")
    torch.save(state, tmp_path / "plain.pt")
    for name in ("published.pt", "plain.pt"):
        assert torch.equal(load_model(tmp_path / name, layout="cnn")(x), net(x))
    torch.save({**state, "extra.weight": torch.ones(1)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"not of layout cnn.*extra\.weight"):
        load_model(tmp_path / "more.pt", layout="cnn")
    with pytest.raises(ValueError, match="not of layout fc1"):
        load_model(tmp_path / "plain.pt", layout="fc1")


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: {"state_dict": s, "epoch": 3}, "taken from 'state_dict'"),
        (lambda s: {"state_dict": [s]}, "taken from 'state_dict', from a list of one"),
        (lambda s: {"model": s, "optimizer": {"lr": 1.0}}, "taken from 'model'"),
        (lambda s: {"epoch": 1, "net": {"state_dict": s}}, "taken from 'net', taken from 'state_dict'"),
        (lambda s: [s], "from a list of one"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "names without 'module.' (DataParallel)"),
        (lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}}, "'_orig_mod.' (torch.compile)"),
        (lambda s: {k: v.double() for k, v in s.items()}, "rounded from float64"),
    ],
)
def test_what_training_scripts_wrap_around_weights(nets: pathlib.Path, wrap: object, said: str) -> None:
    net, x = made("padded"), torch.rand(2, 1, 8, 8)
    torch.save(wrap(OrderedDict(net.state_dict())), nets / "w.pt")  # type: ignore[operator]
    found = load(nets / "w.pt", factory="someones_nets:padded")
    assert torch.equal(found.model(x), net(x)) and said in found.kind


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("someones_nets", "package.module:callable"),
        ("someones_nets:", "package.module:callable"),
        ("someones_nets:nothing", "nothing is not there in someones_nets"),
        ("someones_nets:value", "value is not callable"),
        ("someones_nets:number", "returned int"),
        ("someones_nets:broken", "KeyError: 'width'"),
        ("someones_nets:Skip", "does not fit the model of someones_nets:Skip: Missing key"),
        ("someones_nets:meta", "meta device"),
        ("no_such_nets:padded", "no_such_nets cannot be imported"),
        ("gone.py:padded", "there is no file"),
        ("spoilt.py:padded", "SyntaxError"),
    ],
)
def test_bad_factories(nets: pathlib.Path, factory: str, said: str) -> None:
    (nets / "spoilt.py").write_text("def padded(:")
    torch.save(made("padded").state_dict(), nets / "w.pt")
    with pytest.raises(ValueError) as caught:
        load_model(nets / "w.pt", factory=factory)
    assert said in str(caught.value)


def test_files_that_are_no_models(nets: pathlib.Path) -> None:
    net, x = made("padded"), torch.rand(2, 1, 8, 8)
    torch.save([net.state_dict(), net.state_dict()], nets / "two.pt")
    torch.save({"epoch": 3, "lr": 0.1}, nets / "none.pt")
    torch.save({"state_dict": net.state_dict(), "args": argparse.Namespace(lr=1)}, nets / "with_args.pt")
    torch.save(net, nets / "whole.pt")
    torch.save({}, nets / "empty_state.pt")
    torch.jit.save(torch.jit.trace(net, x), str(nets / "net.ts"))
    torch.export.save(torch.export.export(net, (x,)), nets / "net.pt2")
    (nets / "empty.pt").touch()
    (nets / "net.onnx").write_bytes(b"\x08\x07")
    whole = (nets / "whole.pt").read_bytes()
    (nets / "half.pt").write_bytes(whole[: len(whole) // 2])
    cases = {
        "two.pt": "a list of 2 entries",
        "none.pt": "a dictionary of 'epoch', 'lr'",
        "with_args.pt": "a pickle of argparse.Namespace.*--trust",
        "whole.pt": "a pickle of torch.*--trust",
        "empty_state.pt": "an empty state dictionary",
        "net.ts": "a TorchScript.*--factory",
        "net.pt2": "an exported program.*--factory",
        "empty.pt": "is empty",
        "net.onnx": "onnx2torch",
        "half.pt": "damaged",
        "gone.pt": "there is no file",
    }
    for file, said in cases.items():
        with pytest.raises(ValueError, match=said):
            load_model(nets / file, factory="someones_nets:padded")
    assert torch.equal(load_model(nets / "whole.pt", trust=True)(x), net(x))
    assert torch.equal(load_model(nets / "with_args.pt", trust=True, factory="someones_nets:padded")(x), net(x))
    with pytest.raises(ValueError, match="holds a whole module"):
        load_model(nets / "whole.pt", trust=True, factory="someones_nets:padded")


def test_options_that_contradict(tmp_path: pathlib.Path) -> None:
    for options in ({"factory": "a:b", "layout": "cnn"}, {"layout": "vgg"}, {"activation": "sine"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            load_model(tmp_path / "any.pt", **options)


def test_a_pickle_of_classes_that_are_not_here(nets: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nets / "gone_nets.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    monkeypatch.syspath_prepend(str(nets))
    torch.save(importlib.import_module("gone_nets").Net(3, 2), nets / "net.pt")
    assert load_model(nets / "net.pt", trust=True).out_features == 2
    for text in ("", None):  # the class is no more, and then the file is not
        (nets / "gone_nets.py").unlink() if text is None else (nets / "gone_nets.py").write_text(text)
        monkeypatch.delitem(sys.modules, "gone_nets", raising=False)
        importlib.invalidate_caches()
        with pytest.raises(ValueError, match="classes that cannot be imported here.*--factory"):
            load_model(nets / "net.pt", trust=True)
