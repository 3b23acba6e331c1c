""".ci/check-sass on small samples of what the disassembler prints: what it counts, and that it tells what falls
short."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pathlib
import shutil
import subprocess
import sys
from types import ModuleType

import pytest

CI = pathlib.Path(__file__).parents[1] / ".ci"


def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("check_sass", str(CI / "check-sass"))
    spec = importlib.util.spec_from_loader("check_sass", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_sass"] = module  # dataclasses look there
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


check = script()

# A row loop around a loop of four neighbours, with the rest of the row by one behind it.
BODY = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000ff00000000800 */
        /*0010*/                   LDG.E R9, desc[UR4][R2.64] ;              /* 0x00000004020b7981 */
        /*0020*/              @!P1 LDG.E.EF.128 R4, desc[UR4][R2.64] ;       /* 0x0000000402047981 */
        /*0030*/                   {load} ;
        /*0040*/                   {store} ;
        /*0050*/               @P0 BRA 0x20 ;                                /* 0xfffffffc00000947 */
        /*0060*/               @P2 LDG.E.64 R6, desc[UR4][R8.64] ;           /* 0x0000000406087981 */
        /*0070*/               @P2 STG.E desc[UR4][R8.64], R6 ;              /* 0x0000000406087981 */
        /*0080*/               @P3 BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""
GOOD = {"load": "LDG.E.128.CONSTANT R12, desc[UR4][R8.64]", "store": "STG.E.EF.128 desc[UR4][R10.64], R12"}


def sass(**kernels: dict[str, str]) -> str:
    parts = ["Fatbin elf code:\n================\narch = sm_90\n\n\tcode for sm_90\n\t\t.target\tsm_90\n"]
    for name, changes in kernels.items():
        parts.append(
            f'\t\tFunction : {name}\n\t.headerflags\t@"EF_CUDA_SM90"{BODY.format(**(GOOD | changes))}\t\t.........\n'
        )
    return "\n".join(parts)


def usage(registers: int = 40, stack: int = 0, name: str = "good") -> str:
    return f"Resource usage:\n Common:\n  GLOBAL:0\n Function {name}:\n  REG:{registers} STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:704\n"


def row(**changes: int) -> object:
    return check.Row(
        **({"name": "good", "wide_loads": 2, "wide_stores": 1, "loads": 0, "stores": 0, "registers": 48} | changes)
    )


def test_counts_of_the_main_loop():
    (kernel,) = check.parse(sass(good={}), usage(), arch="")
    assert (kernel.name, kernel.arch, len(kernel.code)) == ("good", "sm_90", 11)
    assert check.count(kernel) == check.Counts(2, 1, 0, 0, 0, 40)
    assert check.faults([kernel], [row()]) == []


def test_a_store_that_was_taken_apart():
    scalar = "STG.E desc[UR4][R10.64], R12"
    (kernel,) = check.parse(sass(good={"store": scalar}), usage())
    assert check.faults([kernel], [row()]) == [
        "good (sm_90): 16-byte stores: got 0, expected at least 1",
        "good (sm_90): narrow stores in its main loops: got 1, expected at most 0",
    ]


@pytest.mark.parametrize(
    ("changes", "used", "expected"),
    [
        (
            {"load": "LDG.E.64 R12, desc[UR4][R8.64]"},
            usage(),
            ["16-byte loads: got 1, expected at least 2", "narrow loads in its main loops: got 1, expected at most 0"],
        ),
        (
            {"load": "LDL.LU R12, [R1+0x8]"},
            usage(),
            ["16-byte loads: got 1, expected at least 2", "local memory: got 1, expected at most 0"],
        ),
        ({}, usage(stack=24), ["local memory: got 24, expected at most 0"]),
        ({}, usage(registers=49), ["registers: got 49, expected at most 48"]),
    ],
)
def test_what_else_falls_short(changes, used, expected):
    (kernel,) = check.parse(sass(good=changes), used)
    assert check.faults([kernel], [row()]) == [f"good (sm_90): {line}" for line in expected]


def test_a_kernel_without_a_wide_access_is_looked_at_whole():
    narrow = {"load": "LDG.E R12, desc[UR4][R8.64]", "store": "STG.E.U8 desc[UR4][R10.64], R12"}
    text = sass(good=narrow).replace("LDG.E.EF.128", "LDG.E")
    (kernel,) = check.parse(text, usage())
    counts = check.count(kernel)
    assert (counts.wide_loads, counts.wide_stores, counts.loads, counts.stores) == (0, 0, 4, 2)


def test_the_table_and_the_kernels_must_name_each_other():
    kernels = check.parse(sass(good={}, other={}), usage() + usage(name="other"))
    assert check.faults(kernels, [row(), row(name="gone<*>")]) == [
        "other (sm_90): no row in .ci/sass_table.py",
        "gone<*>: a row of .ci/sass_table.py without a kernel",
    ]


def test_names_without_namespaces_arguments_and_casts():
    cases = {
        "void fastrobust::isa_cuda::(anonymous namespace)::linf_kernel<(fastrobust::GradType)1, true>(fastrobust::StepArgs, int)": "linf_kernel<1, true>",
        "fastrobust::isa_cuda::_GLOBAL__N__5c3fd2de_12_linf_cuda_cu_352ffc3f::atas_kernel(fastrobust::StepArgs, long, double const*)": "atas_kernel",
        "void (anonymous namespace)::lines_kernel<(Activation)7, false, double>(Map<double, 3, 4>)": "lines_kernel<7, false, double>",
    }
    for name, expected in cases.items():
        assert check.without_arguments(name) == expected


def test_every_row_of_the_table_is_met_by_itself_first():
    names = [r.name for r in check.ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_kernel_from_the_compiler(tmp_path):
    if check.tool("cuobjdump") is None or check.tool("nvdisasm") is None:
        pytest.skip("needs cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    source = tmp_path / "sample.cu"
    source.write_text(
        '#include "runtime/wide_cuda.h"\n'
        "__global__ void copy(float* to, const float* from) {\n"
        "  fastrobust::store_wide<4>(to + 4 * threadIdx.x, fastrobust::load_wide<4>(from + 4 * threadIdx.x));\n"
        "}\n"
        "__global__ void spills(float* to, const float* from, int k) {\n"
        "  float kept[64], sum = 0.f;\n"
        "  for (int i = 0; i < 64; ++i) kept[i * k % 64] = from[i];\n"
        "  for (int i = 0; i < 64; ++i) sum = sum * kept[(i + k) % 64] + 1.f;\n"
        "  to[0] = sum;\n"
        "}\n"
    )
    cubin = tmp_path / "sample.cubin"
    flags = ["-std=c++17", "-arch=sm_90", f"-I{CI.parent / 'csrc'}", "--expt-relaxed-constexpr", "-cubin"]
    subprocess.run(["nvcc", *flags, "-o", str(cubin), str(source)], check=True, capture_output=True)
    found = {k.name: check.count(k) for k in check.read(str(cubin), "sm_90")}
    assert (found["copy"].wide_loads, found["copy"].wide_stores, found["copy"].local) == (1, 1, 0)
    assert found["copy"].registers > 0
    assert found["spills"].local > 0
