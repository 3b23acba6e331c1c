"""Interval and linear bound propagation: the ops that :mod:`fastrobust.bounds` is made of."""

from ...reference.bounds import Clip, Window
from ._chain import ConvStep, concretize_through, recordable
from ._graph import MOST_ROWS, GraphLink, GraphStage, Unit, concretize_graph, graph_maps
from ._lines import interval_activation, relax, relax_behind, support
from ._live import LiveStep, concretize_live, leaving_out_pays
from ._pool import PoolLines, PoolWindow, above_level, relax_max_pool
from ._product import product, product_with_transpose
from ._rows import finite, margin_rows, native, spread_lanes
from .intervals import (
    CENTER,
    ENDS,
    RELU,
    box_center,
    center_conv2d,
    center_linear,
    from_center,
    interval_ball_conv2d,
    interval_ball_linear,
    interval_conv2d,
    interval_linear,
    relu_center,
    spread,
    to_center,
)
from .linear import (
    broadcasts,
    check_eps,
    check_norm,
    concretize,
    concretize_rows,
    direct,
    linear_back_step,
    needs_grad,
)

__all__ = [
    "CENTER",
    "ENDS",
    "MOST_ROWS",
    "RELU",
    "Clip",
    "ConvStep",
    "GraphLink",
    "GraphStage",
    "LiveStep",
    "PoolLines",
    "PoolWindow",
    "Unit",
    "Window",
    "above_level",
    "box_center",
    "broadcasts",
    "center_conv2d",
    "center_linear",
    "check_eps",
    "check_norm",
    "concretize",
    "concretize_graph",
    "concretize_live",
    "concretize_rows",
    "concretize_through",
    "direct",
    "finite",
    "from_center",
    "graph_maps",
    "interval_activation",
    "interval_ball_conv2d",
    "interval_ball_linear",
    "interval_conv2d",
    "interval_linear",
    "leaving_out_pays",
    "linear_back_step",
    "margin_rows",
    "native",
    "needs_grad",
    "product",
    "product_with_transpose",
    "recordable",
    "relax",
    "relax_behind",
    "relax_max_pool",
    "relu_center",
    "spread",
    "spread_lanes",
    "support",
    "to_center",
]
