"""Pure functions of arrays: indicators, windows, removal, responsive fields, statistics.

Nothing here knows of models, files or plots; another JAX program can `jit`, `vmap`, shard and
differentiate what it finds here. Conventionally imported as `vx`.
"""

from vit_interact.interactions.fields import ResponsiveField, responsive_field
from vit_interact.interactions.indicators import (
    INDICATORS,
    NEEDS,
    UNITS,
    Captures,
    attention,
    compute,
    dispersion,
    edge,
    gradient,
    leave_one_out,
    roll,
    rollout,
    value_norm,
)
from vit_interact.interactions.removal import received_impact, removal_order
from vit_interact.interactions.statistics import Statistics
from vit_interact.interactions.streaming import Fields, fields_of_map
from vit_interact.interactions.views import combine_layers, normalise_rows, patch_view
from vit_interact.interactions.window_masks import coverage_map, window_area, window_mask
from vit_interact.interactions.windows import smallest_windows

__all__ = [
    "INDICATORS",
    "NEEDS",
    "UNITS",
    "Captures",
    "Fields",
    "ResponsiveField",
    "Statistics",
    "attention",
    "combine_layers",
    "compute",
    "coverage_map",
    "dispersion",
    "edge",
    "fields_of_map",
    "gradient",
    "leave_one_out",
    "normalise_rows",
    "patch_view",
    "received_impact",
    "removal_order",
    "responsive_field",
    "roll",
    "rollout",
    "smallest_windows",
    "value_norm",
    "window_area",
    "window_mask",
]
