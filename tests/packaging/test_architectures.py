"""For which GPUs a build compiles where nobody says it: those of the machine, or all."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = "75-real;80-real;86-real;89-real;90-real;100-real;120"
SCRIPT = """
include("{file}")
fastrobust_architectures(found)
message(STATUS "found=${{found}}")
fastrobust_say_how_long("${{found}}")
"""


def configured(tmp_path, smi: str | None) -> str:
    """What CMake says where `nvidia-smi` is that shell script."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("there is no cmake")
    script = tmp_path / "script.cmake"
    script.write_text(SCRIPT.format(file=(ROOT / "csrc/runtime/architectures.cmake").as_posix()))
    tool = tmp_path / "nvidia-smi"
    if smi is not None:
        tool.write_text(f"#!/bin/sh\n{smi}\n")
        tool.chmod(0o755)
    given = tool if smi is not None else "FASTROBUST_NVIDIA_SMI-NOTFOUND"
    done = subprocess.run(
        [cmake, f"-DFASTROBUST_NVIDIA_SMI={given}", "-P", script], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("smi", "found"),
    [
        ("printf '9.0\\n9.0\\n12.0\\n'", "90-real;120-real"),
        ("echo 7.0", SHIPPED),  # older than the kernels: nothing to compile for
        ("echo 'no devices were found'; exit 6", SHIPPED),
        ("echo 9.0; exit 9", SHIPPED),
    ],
)
def test_the_machines_own_gpus(tmp_path, smi, found):
    said = configured(tmp_path, smi)
    assert f"found={found}\n" in said
    assert ("for this machine's GPUs alone" in said) == (found != SHIPPED)
    assert re.search(r"the build takes about \d+ min on \d+ cores \(pip install -v shows its progress\)", said)


def test_the_wheel_script_and_its_check_know_what_is_shipped():
    assert f"CUDAARCHS:-{SHIPPED}" in (ROOT / ".ci" / "wheel").read_text()
    assert SHIPPED.replace(";", ",") in (ROOT / ".ci" / "check_wheel.py").read_text()
    assert SHIPPED.replace(";", " ") in (ROOT / "csrc" / "runtime" / "architectures.cmake").read_text()
