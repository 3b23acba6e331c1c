"""info, bench, and what every command shares."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

import fastrobust
from cli_helpers import Run
from fastrobust import cli


def test_info_text_says_what_is_used(run: Run) -> None:
    status, out, err = run("info")
    info = fastrobust.build_info()
    assert status == 0 and err == ""
    assert f"fastrobust {fastrobust.__version__}" in out
    assert f"{info['cpu_variant']} in use ({info['cpu_variant_reason']})" in out
    assert f"{info['threads']}, run by {info['thread_backend']}" in out
    assert torch.__version__ in out
    for device in info["devices"]:
        assert str(device) in out
    if not info["devices"]:
        assert "none, the CPU kernels serve" in out and info["device_error"] in out


def test_info_json(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    status, out, _ = run("info", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["data"] == {"folder": str(tmp_path), "found": {"mnist": False, "cifar10": False}}
    assert {k: found[k] for k in fastrobust.build_info()} == fastrobust.build_info()


def test_info_says_which_path_each_layer_takes(run: Run) -> None:
    status, out, err = run("info", "--paths", "0.99", "0.1", "16")
    lines = out.splitlines()
    assert status == 0 and err == "" and len(lines) == 39  # 37 layers, the mean of the maps, and what ended the region
    assert all(" sparse " in line or " dense " in line for line in lines[:-1])
    assert lines[-1] == "region 1, in groups of 16 images, ends at the end of the model"
    assert "layer4.2.conv2" in out and "us sparse" in lines[0] and "us dense" in lines[0]
    for bad, text in ((("2", "0.1", "16"), "rate"), (("0.9", "x", "16"), "float"), (("0.9", "0", "0"), "batch")):
        status, _, err = run("info", "--paths", *bad)
        assert status == 2 and "--paths" in err and text in err


def test_info_follows_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTROBUST_DATA", raising=False)
    assert "set FASTROBUST_DATA" in run("info")[1]


def test_info_names_missing_extras(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "matplotlib":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (line,) = [line for line in run("info")[1].splitlines() if "matplotlib" in line]
    assert "missing" in line and "pip install matplotlib" in line
    assert json.loads(run("info", "--json")[1])["extras"]["matplotlib"] is None


def test_subprocess() -> None:
    done = subprocess.run([sys.executable, "-m", "fastrobust", "info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["version"] == fastrobust.__version__
    bad = subprocess.run([sys.executable, "-m", "fastrobust", "attack", "--eps", "x"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stdout == "" and len(bad.stderr.splitlines()) == 1 and "--eps" in bad.stderr


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "COMMAND"),
        (["fly"], "'fly'"),
        (["info", "--yaml"], "--yaml"),
        (["info", "--js"], "--js"),  # no abbreviations
    ],
)
def test_bad_commands(run: Run, argv: list[str], named: str) -> None:
    status, out, err = run(*argv)
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and named in err


def test_debug_shows_the_traceback(run: Run) -> None:
    with pytest.raises(ValueError, match="nothing-here"):
        run("attack", "--data", "nothing-here", "--debug")
    assert run("attack", "--data", "nothing-here")[0] == 2


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_of_every_command(run: Run, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as done:
        run(name, "--help")
    assert done.value.code == 0 and f"fastrobust {name}" in capsys.readouterr().out


def test_bench_lists_its_suites(run: Run) -> None:
    status, out, _ = run("bench", "--list")
    assert status == 0 and "pgd" in out
    status, _, err = run("bench", "no-such-suite")
    assert status == 2 and "no-such-suite" in err


def test_bench_without_the_suites(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("fastrobust.benchmarks")]:
        monkeypatch.delitem(sys.modules, name)
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> object:
        if name.startswith("fastrobust.benchmarks"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="fastrobust.benchmarks")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    status, _, err = run("bench")
    assert status == 2 and "not part of this installation" in err and len(err.splitlines()) == 1


def test_an_interrupt_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastrobust.cli.info.gather", stop)
    assert run("info") == (130, "", "fastrobust: interrupted\n")


def test_a_fault_of_ours_is_one_line_that_names_its_kind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault() -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("fastrobust.cli.info.gather", fault)
    assert run("info") == (2, "", "fastrobust: error: RuntimeError: first second\n")
    with pytest.raises(RuntimeError):
        run("info", "--debug")


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "fastrobust", "info"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "fastrobust", "info"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
