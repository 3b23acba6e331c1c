"""The fast layout of feature maps, and the plan that reads it.

A group of `lanes` images lies interleaved as [phase][channel][row][column][lane], rows `pitch` columns
apart. The columns from the width to the pitch are zero: they are the right border of their row and
the left border of the next. In this layout a masked convolution of stride 1 is a sum of shifted
contiguous runs, whatever its kernel, dilation and padding; a stride s reads s x s phases, pixel
(y, x) lying in phase (y mod s, x mod s), and is then of stride 1 as well.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import threading
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...reference.binary import PackedWeight
from .._library import require_cuda_build, stream_of
from ._activation import NONE, RELU, Act

VECTOR = 16  # floats the CPU kernels handle at once
SLACK = 64  # floats behind the last plane that a vector may read
SCRATCH_FLOATS = 1 << 21  # kept between calls, per thread and slot
REMEMBERED = (
    32  # things of one kind (plans, recipes, programs) kept with one weight: images may come in any number of sizes
)


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """Stride, padding and dilation by dimension, and groups."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @staticmethod
    def of(stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> ConvGeometry:
        """From arguments as torch.nn.functional.conv2d takes them."""
        # A compiler would look into the cache.
        if type(stride) is type(padding) is type(dilation) is type(groups) is int and not torch.compiler.is_compiling():
            return _of_ints(stride, padding, dilation, groups)
        return ConvGeometry._of(stride, padding, dilation, groups)

    @staticmethod
    def _of(stride: Any, padding: Any, dilation: Any, groups: int) -> ConvGeometry:
        groups = whole("groups", groups)
        if groups < 1:
            raise ValueError(f"groups: expected at least 1, got {groups}")
        return ConvGeometry(
            pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1), groups
        )

    def out_size(self, shape: tuple[int, ...], height: int, width: int) -> tuple[int, int]:
        """Size of the output map for a weight shape (K, C / groups, kh, kw)."""
        sizes = []
        for size, kernel, s, p, d in zip(
            (height, width), shape[2:], self.stride, self.padding, self.dilation, strict=True
        ):
            sizes.append((size + 2 * p - d * (kernel - 1) - 1) // s + 1)
        return sizes[0], sizes[1]


@functools.lru_cache(maxsize=1024)
def _of_ints(stride: int, padding: int, dilation: int, groups: int) -> ConvGeometry:
    return ConvGeometry._of(stride, padding, dilation, groups)


def whole(name: str, value: Any) -> int:
    """An int, also one of numpy's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return int(value)


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if any(isinstance(v, bool) or not isinstance(v, numbers.Integral) for v in values):
        raise TypeError(f"{name}: expected an int or two, got {value!r}")
    if len(values) != 2 or any(v < least for v in values):
        raise ValueError(f"{name}: expected one or two ints of at least {least}, got {value!r}")
    return int(values[0]), int(values[1])


LINEAR_GEOMETRY = ConvGeometry()


@dataclasses.dataclass(frozen=True)
class Maps:
    """Sizes of a batch of feature maps in the fast layout. `halo` rows of zeros lie above and below."""

    batch: int
    channels: int
    height: int
    width: int
    lanes: int
    pitch: int
    halo: int
    lead: int
    phases: tuple[int, int] = (1, 1)

    # derived
    blocks: int = dataclasses.field(init=False, compare=False)
    phase_size: tuple[int, int] = dataclasses.field(init=False, compare=False)
    origin: int = dataclasses.field(init=False, compare=False)
    plane: int = dataclasses.field(init=False, compare=False)
    block: int = dataclasses.field(init=False, compare=False)
    layout: tuple[int, ...] = dataclasses.field(init=False, compare=False)
    size: tuple[int, int, int, int] = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        rows, columns = -(-self.height // self.phases[0]), -(-self.width // self.phases[1])
        origin = (self.halo * self.pitch + self.lead) * self.lanes
        size = (self.lead + (rows + 2 * self.halo) * self.pitch) * self.lanes
        # A tail vector may overshoot the run by fifteen floats.
        plane = (size + 2 * VECTOR - 2) // VECTOR * VECTOR
        block = self.phases[0] * self.phases[1] * self.channels * plane
        derived = {
            "size": (self.batch, self.channels, self.height, self.width),
            "blocks": -(-self.batch // self.lanes),
            "phase_size": (rows, columns),
            "origin": origin,
            "plane": plane,
            "block": block,
            "layout": (
                self.lanes, block, plane, self.pitch * self.lanes, self.lanes, self.channels * plane,
                *self.phases, origin,
            ),
        }  # fmt: skip
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def empty(self, like: Tensor) -> Tensor:
        return like.new_empty(self.blocks * self.block + SLACK)


def roomy(size: int, device: torch.device) -> Tensor:
    """`size` floats of new memory, in huge pages where the system has them and the size is worth it."""
    page = _C.huge_page // 4
    with torch.inference_mode(False):
        if device.type != "cpu" or size < page // 2:
            return torch.empty(size, dtype=torch.float32, device=device)
        whole = torch.empty(size + 2 * page, dtype=torch.float32, device=device)
    start = -(whole.data_ptr() // 4) % page
    # All of the last page belongs to this tensor, so that it too may be a huge one.
    _C.prefer_huge_pages(whole.data_ptr() + 4 * start, 4 * (size + page))
    return whole[start : start + size]


_local = threading.local()


def scratch(slot: int, maps: Maps, like: Tensor) -> Tensor:
    """Working memory of this thread for maps that do not outlive the call.

    Fresh pages cost more than the convolution of a small map; CUDA has its own caching allocator.
    """
    if like.is_cuda:
        return maps.empty(like)
    size = maps.blocks * maps.block + SLACK
    buffers: dict[int, Tensor] = _local.__dict__.setdefault("buffers", {})
    found = buffers.get(slot)
    if found is None or found.numel() < size:
        found = roomy(size, like.device)
        if size <= SCRATCH_FLOATS:
            buffers[slot] = found
    return found


def plain_layout(x: Tensor) -> tuple[int, ...]:
    """The layout of an ordinary (N, C, H, W) tensor of any strides."""
    n, c, h, w = x.stride()
    return (1, n, c, h, w, 0, 1, 1, 0)


def _relayout(
    src: Tensor, dst: Tensor, source: tuple[int, ...], target: tuple[int, ...], maps: Maps, plane: int
) -> None:
    device, stream = device_of(src)
    _C.binary_relayout(
        device, stream, src.data_ptr(), dst.data_ptr(), source, target,
        maps.batch, maps.channels, maps.height, maps.width, plane,
    )  # fmt: skip


def to_maps(x: Tensor, maps: Maps, out: Tensor | None = None) -> Tensor:
    """A plain tensor (N, C, H, W) of any strides in the fast layout."""
    out = maps.empty(x) if out is None else out
    _relayout(x, out, plain_layout(x), maps.layout, maps, maps.plane)
    return out


def from_maps(data: Tensor, maps: Maps, out: Tensor) -> Tensor:
    """Write the maps into a plain tensor (N, C, H, W) of any strides."""
    _relayout(data, out, maps.layout, plain_layout(out), maps, 0)
    return out


def convert_maps(data: Tensor, source: Maps, target: Maps, out: Tensor | None = None) -> Tensor:
    """Other lanes, pitch, borders or phases of the same maps."""
    out = target.empty(data) if out is None else out
    _relayout(data, out, source.layout, target.layout, target, target.plane)
    return out


def input_maps(
    batch: int, channels: int, height: int, width: int, shape: tuple[int, ...], geometry: ConvGeometry, lanes: int
) -> Maps:
    """The smallest layout of an input from which the convolution can be read."""
    out_h, out_w = geometry.out_size(shape, height, width)
    planes = -(-height // geometry.stride[0]), -(-width // geometry.stride[1])
    top, bottom = _borders(shape[2], planes[0], out_h, geometry, 0)
    left, right = _borders(shape[3], planes[1], out_w, geometry, 1)
    lead = max(left, right)
    # In a 1 x k kernel no row above is read, so the left border of the first row is the lead alone.
    return Maps(
        batch, channels, height, width, lanes,
        max(planes[1] + lead, out_w), max(top, bottom), lead, geometry.stride,
    )  # fmt: skip


def _borders(kernel: int, size: int, out: int, geometry: ConvGeometry, dim: int) -> tuple[int, int]:
    stride, padding, dilation = geometry.stride[dim], geometry.padding[dim], geometry.dilation[dim]
    low = -padding // stride
    high = (dilation * (kernel - 1) - padding) // stride
    return max(0, -low), max(0, out - 1 + high - (size - 1))


def grad_maps(
    batch: int, height: int, width: int, shape: tuple[int, ...], geometry: ConvGeometry, lanes: int
) -> tuple[Maps, Maps]:
    """Layouts of the output gradient, from which the input gradient is read, and of the latter.

    height, width: of the convolution's input. The input gradient comes in the phases of the stride.
    """
    channels = shape[1] * geometry.groups
    out_h, out_w = geometry.out_size(shape, height, width)
    planes = -(-height // geometry.stride[0]), -(-width // geometry.stride[1])
    borders = []
    for dim, (kernel, size, out) in enumerate(zip(shape[2:], planes, (out_h, out_w), strict=True)):
        stride, padding, dilation = geometry.stride[dim], geometry.padding[dim], geometry.dilation[dim]
        low, high = -padding // stride, (dilation * (kernel - 1) - padding) // stride
        borders.append((max(0, high), max(0, size - 1 - low - (out - 1))))
    lead = max(borders[1])
    pitch = max(out_w + lead, planes[1])
    source = Maps(batch, shape[0], out_h, out_w, lanes, pitch, max(borders[0]), lead)
    target = Maps(batch, channels, height, width, lanes, pitch, 0, 0, geometry.stride)
    return source, target


class Derived(dict[Any, Any]):
    """What is derived from lists. Copies and pickles make it anew: programs and addresses belong to this process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class Recent(Derived):
    """The `REMEMBERED` things that were set or got last. What has a raw address of one must hold that one itself."""

    def get(self, key: Any, default: Any = None) -> Any:
        value = self.pop(key, default)
        if value is not default:
            super().__setitem__(key, value)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        for oldest in list(self)[:-REMEMBERED]:
            self.pop(oldest, None)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Offsets of one convolution into one layout: segments of rows of a plus and a minus list.

    values: float32, of each offset; None where they are signs.
    """

    ptr: Tensor
    offsets: Tensor
    rows: int
    segments: int = 1
    depth: int = 0  # channels read per segment
    stride: int = 1  # outputs read every such pixel and line
    values: Tensor | None = None
    order: Tensor | None = None  # of rows side by side
    bound: Recent = dataclasses.field(default_factory=Recent)

    def bind(self, source: Maps, target: Maps) -> tuple[int, ...]:
        """The arguments of a call that only the layouts decide."""
        key = (id(source), id(target))
        found: tuple[Maps, Maps, tuple[int, ...]] | None = self.bound.get(key)
        if found is None:
            # The layouts are kept too, so that their ids stay theirs.
            found = self.bound[key] = (source, target, (
                self.ptr.data_ptr(), self.offsets.data_ptr(), self.rows, self.segments, self.offsets.numel(),
                source.blocks, source.block, source.origin, target.block, target.origin, target.plane,
                *target.phase_size, target.pitch, target.lanes, self.depth, source.pitch, self.stride,
                address(self.values), address(self.order),
            ))  # fmt: skip
        return found[2]


def kept_with(packed: PackedWeight, name: str) -> Recent:
    """A bounded dictionary that lives as long as the index lists, for what is derived from them."""
    # Lists of the same mask may have other values.
    home = (packed.index if packed.values is None else packed.values).__dict__
    found: Recent | None = home.get(f"_fastrobust_{name}")
    if found is None:
        found = home[f"_fastrobust_{name}"] = Recent()
    return found


def plan(packed: PackedWeight, geometry: ConvGeometry, source: Maps, transposed: bool, cpu: bool = False) -> Plan:
    """The plan of a packed weight for maps laid out as `source`, built once. cpu: it is for the CPU alone."""
    plans = kept_with(packed, "plans")
    single = cpu and source.lanes == 1 and source.height * source.width == 1
    single = single and packed.kept > 0 and geometry.stride == (1, 1) and geometry.padding == (0, 0)
    single = single and conv_shape(packed.shape)[2:] == (1, 1)
    key = (geometry, transposed, source.lanes, source.plane, source.pitch, len(packed.shape), single)
    found: Plan | None = plans.get(key)
    if found is None:
        found = build_lists(packed, geometry, transposed, source.lanes, source.plane, source.pitch)
        found = plans[key] = side_by_side(found) if single else found
    return found


def side_by_side(lists: Plan) -> Plan:
    """The same sums in the same order for one pixel of one image, sixteen rows at a time.

    Such a row is a single number, and its many short lists end where no processor expects it. Here a row has one list,
    its signs are values, whose products are exact, and rows of like length lie side by side (`order` in args.h).
    """
    rows, entries = lists.rows, lists.ptr.diff().to(torch.int64)
    at = torch.arange(entries.numel()).repeat_interleave(entries)
    row = at % (2 * rows) // 2
    sort = row.argsort(stable=True)  # segments ascending, in each what is added before what is subtracted
    row, counts = row[sort], torch.bincount(row, minlength=rows)
    values = 1.0 - 2.0 * (at % 2).to(torch.float32) if lists.values is None else lists.values
    slices = -(-rows // VECTOR)
    order = torch.full((slices * VECTOR,), -1, dtype=torch.int64)
    order[:rows] = counts.argsort(descending=True, stable=True)
    lengths = counts[order[::VECTOR]]  # the first of a slice is the longest
    ptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    place = torch.empty(rows, dtype=torch.int64)
    place[order[:rows]] = torch.arange(rows)
    number = torch.arange(row.numel()) - (counts.cumsum(0) - counts)[row]
    target = VECTOR * (ptr[place[row] // VECTOR] + number) + place[row] % VECTOR
    wide = torch.zeros(VECTOR * int(ptr[-1]), dtype=torch.int32)
    signs = torch.zeros(wide.shape, dtype=torch.float32)
    wide[target], signs[target] = lists.offsets[sort], values[sort]
    depth = lists.depth * lists.segments
    return Plan(ptr.to(torch.int32), wide, rows, depth=depth, values=signs, order=order.to(torch.int32))


def strided_plan(packed: PackedWeight, geometry: ConvGeometry, source: Maps, out: tuple[int, int]) -> Plan | None:
    """The plan that reads every second pixel where it lies, without phases; None where the kernel cannot.

    source: maps without phases; out: size of the output maps. On the CPU, sixteen images side by side.
    """
    if geometry.stride != (2, 2) or source.lanes != VECTOR or source.phases != (1, 1) or not _C.binary_strides():
        return None
    shape = conv_shape(packed.shape)
    need = strided_room(shape, geometry, (source.height, source.width), out)
    if need[0] > source.halo or need[1] > min(source.lead, source.pitch - source.width):
        return None
    whole = plan(packed, dataclasses.replace(geometry, stride=(1, 1)), source, False)
    plans = kept_with(packed, "strided plans")
    found: tuple[Plan, Plan] | None = plans.get(id(whole))
    if found is None:
        # With the plan it was made of, whose id is the key.
        found = plans[id(whole)] = (whole, dataclasses.replace(whole, stride=2, bound=Recent()))
    return found[1]


def strided_room(
    shape: tuple[int, ...], geometry: ConvGeometry, size: tuple[int, int], out: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of zeros around maps of `size` that a convolution of stride 2 reads, by `strided_plan`."""
    room = []
    for dim in (0, 1):
        padding, reach = geometry.padding[dim], geometry.dilation[dim] * (shape[2 + dim] - 1)
        room.append(max(padding, 2 * (out[dim] - 1) + reach - padding - (size[dim] - 1)))
    return room[0], room[1]


def build_lists(
    packed: PackedWeight, geometry: ConvGeometry, transposed: bool, lanes: int, plane: int, pitch: int,
    taps: Tensor | None = None,
) -> Plan:  # fmt: skip
    """Lists for maps of which a channel takes `plane` floats and a row `pitch` times the lanes.

    taps: int16 (kept), filled with the pixel of the kernel that each entry stands for.
    """
    k, c, kh, kw = conv_shape(packed.shape)
    rows = k
    read = c
    if transposed:
        rows = c * geometry.groups * math.prod(geometry.stride)
        read = k // geometry.groups
    segment = segment_channels(packed.kept, rows, read)
    segments = -(-read // segment) if segment else 1
    host = packed.to("cpu") if packed.index.device.type != "cpu" else packed
    _check_lists(host, k, c * kh * kw)
    ptr = torch.empty(2 * segments * rows + 1, dtype=torch.int32)
    offsets = torch.empty(packed.kept, dtype=torch.int32)
    given = None if host.values is None else host.values.detach().resolve_neg().to(torch.float32)
    values = None if given is None else torch.empty_like(given)
    _C.binary_plan(
        host.ptr.data_ptr(),
        host.index.data_ptr(),
        packed.kept,
        (k, c * geometry.groups, kh, kw, geometry.groups),
        (*geometry.stride, *geometry.padding, *geometry.dilation),
        transposed,
        lanes,
        plane,
        pitch,
        segment,
        ptr.data_ptr(),
        offsets.data_ptr(),
        address(taps),
        address(given),
        address(values),
    )
    device = packed.index.device
    values = None if values is None else values.to(device)
    return Plan(ptr.to(device), offsets.to(device), rows, segments, segment or read, values=values)


def _check_lists(packed: PackedWeight, rows: int, row_size: int) -> None:
    """Lists made by hand must not send the kernel outside its memory."""
    ptr, index, values = packed.ptr, packed.index, packed.values
    good = ptr.dtype == index.dtype == torch.int32 and ptr.is_contiguous() and index.is_contiguous()
    good = good and ptr.numel() == 2 * rows + 1 and int(ptr[0]) == 0 and int(ptr[-1]) == index.numel()
    good = good and bool((ptr[1:] >= ptr[:-1]).all())
    if good and index.numel():
        least, most = (int(v) for v in torch.aminmax(index))
        good = least >= 0 and most < row_size
    if good and values is not None:
        # One list a row; where nothing is read, zeros times what is not finite would not be zero.
        good = values.shape == index.shape and values.dtype in (torch.float32, torch.float64) and values.is_contiguous()
        good = good and bool((ptr[1::2] == ptr[2::2]).all()) and bool(values.to(torch.float32).isfinite().all())
    if not good:
        raise ValueError(f"packed: expected index lists of a weight {packed.shape} as fastrobust.ops.pack makes them")


def segment_channels(kept: int, rows: int, channels: int) -> int:
    """Channels read per segment, 0 for one segment.

    Long lists are cut so that what a tile reads stays in the first cache level; a segment keeps
    about twenty-four entries per row, below which its own cost shows. Depends on the weight alone, and
    so does the order of summation.
    """
    per_channel = kept / max(1, rows * channels)
    if per_channel == 0:
        return 0
    segment = max(8, 8 * math.ceil(24 / per_channel / 8))
    return segment if 2 * segment <= channels else 0


def conv_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    return (*shape, 1, 1)[:4]  # type: ignore[return-value]


def gather(
    x: Tensor,
    source: Maps,
    target: Maps,
    lists: Plan,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: Act = NONE,
    gate: Tensor | None = None,
    gate_act: Act = RELU,
    pre: Tensor | None = None,
    slopes: Tensor | None = None,
    post: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run a plan: x laid out as `source` to a tensor laid out as `target`.

    v = sum * scale + shift + residual; slopes = act'(v); v = act(v); v = v * (what gate tells); pre = v; result v *
    post, with residual, gate, pre and slopes laid out as `target` and scale, shift and post per channel. gate holds
    such derivatives of `gate_act`, or its results or arguments where `gate_act.by_value`.
    """
    out = target.empty(x) if out is None else out
    device, stream = device_of(x)
    _C.binary_gather(
        device, stream, x.data_ptr(), out.data_ptr(), lists.bind(source, target),
        address(scale), address(shift), address(post), address(residual), address(gate), address(pre), address(slopes),
        target.channels, act.code, gate_act.code,
    )  # fmt: skip
    return out


def device_of(x: Tensor) -> tuple[int, int]:
    if not x.is_cuda:
        return -1, 0
    require_cuda_build(x.device)
    return stream_of(x.device)


def new_program() -> Any:
    """An empty sequence of gathers and copies (see `nn._schedule`)."""
    return _C.BinaryProgram()


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
