"""The compiled module: every entry with the names its binding gives the arguments, by family, in the order of the
alphabet.

Addresses are those of the first number (``Tensor.data_ptr()``), 0 where there is none; streams are CUDA's, 0 on the
CPU. What each entry computes is said in csrc, at its declaration. Arguments before a bare ``/`` have no keyword.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

_Address: TypeAlias = int
_Activation: TypeAlias = tuple[int, float, float]  # kind and its two parameters
_Layout: TypeAlias = Sequence[int]  # nine numbers: planes, strides and phases
_Apart: TypeAlias = Sequence[int]  # of a convolution: vertical and horizontal dilation, groups
_Pair: TypeAlias = Sequence[int]  # of height and width

# -- the module --------------------------------------------------------------------------------------------------------
__version__: str
compiler: str
cpu_variants: str
cuda_architectures: str
cuda_toolkit: str
huge_page: int

def all_finite(numbers: int, count: int, /) -> bool: ...
def cpu_variant() -> str: ...
def cpu_variant_reason() -> str: ...
def cuda_devices() -> tuple[list[str], str]: ...
def digest(address: _Address, bytes: int, /) -> int: ...
def learn_tensor_type(type: Any, /) -> bool: ...
def num_threads() -> int: ...
def prefer_huge_pages(address: _Address, size: int, /) -> None: ...
def thread_backend() -> str: ...

# -- pgd ---------------------------------------------------------------------------------------------------------------
def pgd_agrees(
    device: int, stream: int, logits: int, labels: int, wanted: bool, out: int, batch: int, classes: int, /
) -> None: ...
def pgd_ascent(
    device: int,
    stream: int,
    value: int,
    score: int,
    sign: float,
    left: int,
    left_grad: int,
    state: tuple[Any, ...],
    batch: int,
    n: int,
    workspace: int,
    /,
) -> None: ...
def pgd_ascent_check(
    device: int, stream: int, state: tuple[Any, ...], needed: float, batch: int, n: int, workspace: int, /
) -> None: ...
def pgd_loss(
    device: int,
    stream: int,
    kind: int,
    logits: int,
    reference: int,
    labels: int,
    targets: int,
    value: int,
    grad: int,
    batch: int,
    classes: int,
    /,
) -> None: ...
def pgd_quick_apgd(
    x: Any,
    previous: Any,
    x0: Any,
    grad: Any,
    length: Any,
    out: Any,
    norm: int,
    eps: float,
    lo: float,
    hi: float,
    momentum: float,
    /,
) -> bool: ...
def pgd_quick_step(
    x: Any, x0: Any, grad: Any, out: Any, norm: int, step_size: float, eps: float, lo: float, hi: float, /
) -> bool: ...
def pgd_random_start(
    device: int,
    stream: int,
    x0: int,
    out: int,
    batch: int,
    n: int,
    norm: int,
    eps: tuple[Any, ...],
    lo: float,
    hi: float,
    seed: int,
    first_example: int,
    numbers: int,
    workspace: int,
    /,
) -> None: ...
def pgd_simple_step(
    x: int,
    x0: int,
    grad: int,
    out: int,
    elements: int,
    batch: int,
    norm: int,
    step_size: float,
    eps: float,
    lo: float,
    hi: float,
    /,
) -> None: ...
def pgd_square(
    device: int,
    stream: int,
    x: int,
    next: int,
    low: int,
    high: int,
    numbers: int,
    sizes: tuple[Any, ...],
    seed: int,
    last: tuple[Any, ...],
    window: tuple[Any, ...],
    settled: Any,
    /,
) -> None: ...
def pgd_square_move(
    device: int,
    stream: int,
    x: int,
    next: int,
    x0: int,
    numbers: int,
    sizes: tuple[Any, ...],
    seed: int,
    window: tuple[Any, ...],
    norm: int,
    eps: tuple[Any, ...],
    pattern: int,
    settled: Any,
    /,
) -> None: ...
def pgd_step(
    device: int,
    stream: int,
    x: int,
    x0: int,
    grad: int,
    out: int,
    batch: int,
    n: int,
    norm: int,
    grad_type: int,
    step_size: tuple[Any, ...],
    eps: tuple[Any, ...],
    lo: float,
    hi: float,
    active: int,
    normalize: bool,
    fosc: Any,
    atas: Any,
    apgd: Any,
    workspace: int,
    /,
) -> None: ...
def pgd_workspace_doubles(batch: int, n: int, /) -> int: ...

# -- polyhedron --------------------------------------------------------------------------------------------------------
def polyhedral_distance(
    device: int,
    stream: int,
    a: int,
    b: int,
    lower: tuple[Any, ...],
    upper: tuple[Any, ...],
    sizes: Sequence[int],
    m: int,
    p: float,
    is_signed: bool,
    out: int,
    multiplier: int,
    point: int,
    /,
) -> bool: ...

# -- store -------------------------------------------------------------------------------------------------------------
def store_gather(
    device: int,
    stream: int,
    store: int,
    half: bool,
    index: int,
    sizes: Sequence[int],
    low: bool,
    inverse: bool,
    offsets: int,
    flips: int,
    x: int,
    out: int,
    eps_each: int,
    eps: float,
    lo: float,
    hi: float,
    /,
) -> None: ...
def store_scatter(
    device: int,
    stream: int,
    store: int,
    half: bool,
    index: int,
    sizes: Sequence[int],
    low: bool,
    offsets: int,
    flips: int,
    adv: int,
    x: int,
    /,
) -> None: ...

# -- bounds ------------------------------------------------------------------------------------------------------------
class LinkKind:
    conv: LinkKind
    identity: LinkKind
    pick: LinkKind
    def __init__(self, value: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class GraphLink:
    def __init__(
        self,
        source: int,
        kind: LinkKind,
        sign: float = 1.0,
        weight: _Address = 0,
        kernel: _Pair = ...,
        stride: _Pair = ...,
        padding: _Pair = ...,
        dilation: _Pair = ...,
        groups: int = 1,
        lanes: int = 0,
        index: _Address = 0,
    ) -> None: ...
    @property
    def kind(self) -> LinkKind: ...
    @property
    def lanes(self) -> int: ...

class GraphStage:
    def __init__(
        self,
        map: Sequence[int],
        first: int,
        links: int,
        slopes: _Address = 0,
        slope_sides: int = 1,
        intercepts: _Address = 0,
        shared: bool = False,
        entry: int = -1,
        kept_in: _Address = 0,
        kept_out: _Address = 0,
    ) -> None: ...
    @property
    def entry(self) -> int: ...
    @property
    def shared(self) -> bool: ...
    @property
    def slope_sides(self) -> int: ...

class GraphEntry:
    def __init__(self, a: _Address, side_stride: int = 0, pick: _Address = 0, minus: _Address = 0) -> None: ...

class Graph:
    def __init__(
        self,
        stages: Sequence[GraphStage],
        links: Sequence[GraphLink],
        entries: Sequence[GraphEntry],
        examples: int,
        rows: int,
        sides: int,
        center: _Address = 0,
        radius: _Address = 0,
        x: _Address = 0,
        eps: _Address = 0,
        dual: int = 0,
    ) -> None: ...

class Groups:
    def __init__(
        self,
        count: int,
        starts: _Address,
        order: _Address,
        example: _Address,
        y: _Address = 0,
        x: _Address = 0,
        channel: _Address = 0,
        channels: int = 0,
    ) -> None: ...

def bounds_back(
    device: int,
    stream: int,
    rows: tuple[Any, ...],
    slopes: int,
    slope_sides: int,
    intercepts: int,
    examples: int,
    b: int,
    b_out: int,
    out: int,
    sides_out: int,
    /,
) -> None: ...
def bounds_back_grad(
    device: int,
    stream: int,
    rows: tuple[Any, ...],
    slopes: int,
    slope_sides: int,
    intercepts: int,
    examples: int,
    from_out: int,
    sides_out: int,
    from_b: int,
    starts: int,
    order: int,
    to_a: int,
    to_slopes: int,
    to_intercepts: int,
    /,
) -> None: ...
def bounds_chain(
    rows: tuple[Any, ...],
    steps: Sequence[Sequence[int]],
    examples: int,
    center: int,
    radius: int,
    x: int,
    eps: int,
    dual: int,
    b: int,
    out: int,
    starts: int,
    order: int,
    /,
) -> None: ...
def bounds_chain_grad(
    rows: tuple[Any, ...],
    steps: Sequence[Sequence[int]],
    grads: Sequence[Sequence[int]],
    examples: int,
    center: int,
    radius: int,
    from_: int,
    starts: int,
    order: int,
    to_a: int,
    to_center: int,
    to_radius: int,
    living: bool,
    /,
) -> None: ...
def bounds_concretize(
    device: int,
    stream: int,
    rows: tuple[Any, ...],
    center: int,
    radius: int,
    x: int,
    eps: int,
    dual: int,
    b: int,
    out: int,
    /,
) -> None: ...
def bounds_concretize_grad(
    device: int,
    stream: int,
    rows: tuple[Any, ...],
    center: int,
    radius: int,
    examples: int,
    from_: int,
    starts: int,
    order: int,
    to_a: int,
    to_center: int,
    to_radius: int,
    /,
) -> None: ...
def bounds_conv_grad(
    sizes: Sequence[int],
    x: int,
    a: int,
    out: int,
    weight: int,
    radius: int,
    radius_a: int,
    radius_count: int,
    apart: _Apart = ...,
) -> None: ...
def bounds_interval(
    device: int,
    stream: int,
    center: int,
    radius: int,
    weight: int,
    bias: int,
    out_a: int,
    out_b: int,
    batch: int,
    n: int,
    m: int,
    finish: int,
    shared: bool,
    /,
) -> None: ...
def bounds_interval_chain(
    layers: Sequence[Sequence[int]],
    addresses: Sequence[int],
    x: int,
    batch: int,
    numbers: int,
    eps: float,
    low: float,
    high: float,
    labels: int,
    classes: int,
    work: int,
    out: int,
    sides: int,
    /,
) -> int: ...
def bounds_interval_conv(
    sizes: Sequence[int],
    center_stride: Sequence[int],
    radius_stride: Sequence[int],
    center: int,
    radius: int,
    weight: int,
    bias: int,
    work: int,
    out_a: int,
    out_b: int,
    finish: int,
    apart: _Apart = ...,
) -> int: ...
def bounds_interval_grad(
    center: int,
    radius: int,
    weight: int,
    from_center: int,
    from_radius: int,
    to_weight: int,
    to_center: int,
    to_radius: int,
    batch: int,
    radius_batch: int,
    n: int,
    m: int,
    /,
) -> None: ...
def bounds_interval_step(
    device: int,
    stream: int,
    a: int,
    b: int,
    out_a: int,
    out_b: int,
    count: int,
    step: int,
    eps: float,
    lo: float,
    hi: float,
    /,
) -> None: ...
def bounds_lines(
    device: int,
    stream: int,
    wide: bool,
    lower: int,
    upper: int,
    slopes: int,
    intercepts: int,
    count: int,
    activation: int,
    p0: float,
    p1: float,
    adaptive: bool,
    bias: int,
    period: int,
    /,
) -> None: ...
def bounds_lines_grad(
    device: int,
    stream: int,
    wide: bool,
    tensors: Sequence[int],
    count: int,
    activation: int,
    p0: float,
    p1: float,
    adaptive: bool,
    /,
) -> None: ...
def bounds_live_grad(
    step: Sequence[int], rows: tuple[Any, ...], examples: int, matrices: int, picked: int, tensors: Sequence[int], /
) -> None: ...
def bounds_live_graph(
    graph: Graph,
    groups: Groups,
    b: _Address,
    out: _Address,
    map: _Address = 0,
    offset: _Address = 0,
    window: _Pair = ...,
    corner_y: _Address = 0,
    corner_x: _Address = 0,
) -> None: ...
def bounds_live_graph_window(graph: Graph, groups: Groups) -> list[int]: ...
def bounds_margin_rows(labels: int, batch: int, classes: int, out: int, /) -> bool: ...
def bounds_pick_grad(
    device: int, stream: int, from_: int, pick: int, minus: int, out: int, count: int, length: int, rows: int, /
) -> None: ...
def bounds_pool_picks(
    is_double: bool,
    lower: int,
    upper: int,
    source: int,
    rival: int,
    planes: int,
    size: Sequence[int],
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None: ...
def bounds_product(
    a: int, b: int, out: int, rows: int, count: int, columns: int, strides: Sequence[int], /
) -> None: ...
def bounds_range(
    device: int,
    stream: int,
    lower: int,
    upper: int,
    out_lower: int,
    out_upper: int,
    count: int,
    activation: int,
    p0: float,
    p1: float,
    /,
) -> None: ...
def bounds_relu_box(
    device: int,
    stream: int,
    center: int,
    radius: int,
    shared: bool,
    bias: int,
    period: int,
    batch: int,
    n: int,
    adaptive: bool,
    slopes: int,
    intercepts: int,
    next_center: int,
    next_radius: int,
    /,
) -> int: ...
def bounds_relu_box_grad(
    device: int,
    stream: int,
    center: int,
    radius: int,
    shared: bool,
    bias: int,
    period: int,
    batch: int,
    n: int,
    adaptive: bool,
    from_: Sequence[int],
    to_center: int,
    to_radius: int,
    to_bias: int,
    work: int,
    /,
) -> None: ...
def bounds_sign_product(
    x: int,
    b: int,
    b_scale: int,
    scale: int,
    base: Sequence[int],
    out: int,
    rows: int,
    count: int,
    columns: int,
    strides: Sequence[int],
    /,
) -> bool: ...
def bounds_spread(a: int, weight: int, out: int, sizes: tuple[Any, ...], apart: _Apart = ...) -> None: ...
def bounds_stage_grad(
    graph: Graph,
    example: _Address,
    starts: _Address,
    from_: _Address,
    to_stages: Sequence[Sequence[_Address]],
    to_weights: Sequence[_Address],
    to_center: _Address,
    to_radius: _Address,
    from_map: _Address = 0,
) -> None: ...
def bounds_stage_rows(
    graph: Graph,
    example: _Address,
    b: _Address,
    out: _Address,
    offset: _Address = 0,
) -> None: ...
def bounds_support(
    device: int,
    stream: int,
    wide: bool,
    tensors: Sequence[int],
    count: int,
    activation: int,
    p0: float,
    p1: float,
    above: bool,
    /,
) -> None: ...
def bounds_turn(from_: int, to: int, count: int, rows: int, columns: int, /) -> None: ...

# -- binary ------------------------------------------------------------------------------------------------------------
class BinaryProgram:
    def __init__(self) -> None: ...
    def direct(
        self,
        x: _Address,
        out: _Address,
        shape: Sequence[int],
        scale: _Address,
        shift: _Address,
        residual: _Address,
        relu: bool,
        /,
    ) -> None: ...
    def gather(
        self,
        x: _Address,
        out: _Address,
        shape: Sequence[int],
        scale: _Address,
        shift: _Address,
        post: _Address,
        residual: _Address,
        gate: _Address,
        pre: _Address,
        passed: _Address,
        open: _Address,
        slopes: _Address,
        channels: int,
        act: _Activation,
        gate_act: _Activation,
        borders: bool,
        /,
    ) -> None: ...
    def max_pool(
        self,
        x: _Address,
        out: _Address,
        where: _Address,
        from_: _Layout,
        to: _Layout,
        batch: int,
        channels: int,
        sizes: Sequence[int],
        window: Sequence[int],
        plane: int,
        /,
    ) -> None: ...
    def max_pool_grad(
        self,
        grad: _Address,
        where: _Address,
        dx: _Address,
        from_: _Layout,
        to: _Layout,
        batch: int,
        channels: int,
        sizes: Sequence[int],
        window: Sequence[int],
        plane: int,
        /,
    ) -> None: ...
    def relayout(
        self,
        src: _Address,
        dst: _Address,
        from_: _Layout,
        to: _Layout,
        batch: int,
        channels: int,
        height: int,
        width: int,
        plane: int,
        /,
    ) -> None: ...
    def run(self, device: int, stream: _Address, bases: Sequence[_Address], /) -> None: ...

def binary_decode(bytes: _Address, size: int, mask: _Address, n: int, kept: int, /) -> None: ...
def binary_encode(mask: _Address, n: int, kept: int, bytes: _Address, /) -> int: ...
def binary_gather(
    device: int,
    stream: _Address,
    x: _Address,
    out: _Address,
    shape: Sequence[int],
    scale: _Address,
    shift: _Address,
    post: _Address,
    residual: _Address,
    gate: _Address,
    pre: _Address,
    slopes: _Address,
    channels: int,
    act: _Activation,
    gate_act: _Activation,
    /,
) -> None: ...
def binary_pack(
    weight: _Address, rows: int, row_size: int, ptr: _Address, index: _Address, values: _Address, counting: bool, /
) -> int: ...
def binary_plan(
    ptr: _Address,
    index: _Address,
    kept: int,
    shape: Sequence[int],
    geometry: Sequence[int],
    transposed: bool,
    lanes: int,
    plane: int,
    pitch: int,
    segment: int,
    out_ptr: _Address,
    offsets: _Address,
    taps: _Address,
    values: _Address,
    out_values: _Address,
    /,
) -> None: ...
def binary_relayout(
    device: int,
    stream: _Address,
    src: _Address,
    dst: _Address,
    from_: _Layout,
    to: _Layout,
    batch: int,
    channels: int,
    height: int,
    width: int,
    plane: int,
    /,
) -> None: ...
def binary_strides() -> bool: ...
def binary_topk(
    device: int, stream: _Address, scores: _Address, mask: _Address, n: int, keep: int, workspace: _Address, /
) -> bool: ...
def binary_topk_workspace(n: int, /) -> int: ...
