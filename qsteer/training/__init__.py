"""Training: data, behaviour cloning, critics, maps. The only part of qsteer that optimises anything."""

from qsteer.training.bc import PolicyTraining, train_policy
from qsteer.training.critic import CriticTraining, train_critic
from qsteer.training.data import Chunks, Episodes, Transitions
from qsteer.training.maps import (
    FlowMapTraining,
    MetaTraining,
    PosteriorError,
    distil,
    distil_flow_map,
)
from qsteer.training.policy import FlowPolicy, FlowPolicyConfig
from qsteer.training.teachers import (
    DatasetBatches,
    HostTeacher,
    SafetensorsBatches,
    StateTeacher,
    Teacher,
    lerobot_batches,
    record,
)

__all__ = [
    "Chunks",
    "CriticTraining",
    "DatasetBatches",
    "Episodes",
    "FlowMapTraining",
    "FlowPolicy",
    "FlowPolicyConfig",
    "HostTeacher",
    "MetaTraining",
    "PolicyTraining",
    "PosteriorError",
    "SafetensorsBatches",
    "StateTeacher",
    "Teacher",
    "Transitions",
    "distil",
    "distil_flow_map",
    "lerobot_batches",
    "record",
    "train_critic",
    "train_policy",
]
