"""Training: data, cloning, critics, maps, online. The only part of qsteer that optimises anything."""

from qsteer.training.actors import Actor, HostActor, StateActor
from qsteer.training.bc import PolicyTraining, train_policy
from qsteer.training.critic import CriticTraining, train_critic
from qsteer.training.data import Chunks, Episodes, Transitions
from qsteer.training.health import Health
from qsteer.training.maps import (
    FlowMapTraining,
    MetaTraining,
    PosteriorError,
    distil,
    distil_flow_map,
)
from qsteer.training.online import OnlineTraining, train_online
from qsteer.training.policy import FlowPolicy, FlowPolicyConfig
from qsteer.training.replay import Layout, Mixed, Replay
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
    "Actor",
    "Chunks",
    "CriticTraining",
    "DatasetBatches",
    "Episodes",
    "FlowMapTraining",
    "FlowPolicy",
    "FlowPolicyConfig",
    "Health",
    "HostActor",
    "HostTeacher",
    "Layout",
    "MetaTraining",
    "Mixed",
    "OnlineTraining",
    "PolicyTraining",
    "PosteriorError",
    "Replay",
    "SafetensorsBatches",
    "StateActor",
    "StateTeacher",
    "Teacher",
    "Transitions",
    "distil",
    "distil_flow_map",
    "lerobot_batches",
    "record",
    "train_critic",
    "train_online",
    "train_policy",
]
