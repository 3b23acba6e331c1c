"""Calls one kernel of the compiled module without torch: a step on sixteen numbers held by the array module."""

import array
import platform

import _C

x = array.array("f", [0.5] * 16)
grad = array.array("f", [1.0, -1.0, 0.0, float("nan")] * 4)
out = array.array("f", [0.0] * 16)
address = lambda a: a.buffer_info()[0]
_C.pgd_simple_step(address(x), address(x), address(grad), address(out), 16, 1, 0, 0.25, 0.125, 0.0, 1.0)
assert list(out) == [0.625, 0.375, 0.5, 0.5] * 4, list(out)
try:
    _C.pgd_simple_step(0, address(x), address(grad), address(out), 16, 1, 0, 0.25, 0.125, 0.0, 1.0)
except ValueError as error:
    assert "x" in str(error)
else:
    raise AssertionError("a null pointer was accepted")
print(f"python {platform.python_version()}: _C {_C.__version__}, {_C.cpu_variant()}, {_C.thread_backend()}, ok")
