"""Maps that jump along the flow: learnt, distilled, or made of the frozen policy itself."""

from qsteer.maps.flow_maps import EulerMap, FlowMap, MapConfig
from qsteer.maps.glass import GlassPosterior, glass_velocity
from qsteer.maps.losses import (
    adaptive,
    diagonal_loss,
    direct_loss,
    eulerian_loss,
    fmq_target,
    lagrangian_loss,
    progressive_loss,
    semigroup_loss,
    trust_radius,
)
from qsteer.maps.meta import MetaFlowMap, MetaMapConfig
from qsteer.maps.modes import Modes, measure_modes

__all__ = [
    "EulerMap",
    "FlowMap",
    "GlassPosterior",
    "MapConfig",
    "MetaFlowMap",
    "MetaMapConfig",
    "Modes",
    "adaptive",
    "diagonal_loss",
    "direct_loss",
    "eulerian_loss",
    "fmq_target",
    "glass_velocity",
    "lagrangian_loss",
    "measure_modes",
    "progressive_loss",
    "semigroup_loss",
    "trust_radius",
]
