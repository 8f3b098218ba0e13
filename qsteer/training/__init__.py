"""Training on recorded data: policies, critics and maps, by one resumable loop."""

from qsteer.data.batches import DatasetBatches, SafetensorsBatches, lerobot_batches, record
from qsteer.training.cloning import CloningTraining, clone
from qsteer.training.critic import CriticTraining, train_critic
from qsteer.training.dataset import Ranking, train_from_dataset
from qsteer.training.maps import (
    FlowMapTraining,
    JumpError,
    MetaTraining,
    PosteriorError,
    distil,
    distil_flow_map,
)
from qsteer.training.policy import PolicyTraining, train_policy
from qsteer.training.teachers import HostTeacher, StateTeacher, Teacher

__all__ = [
    "CloningTraining",
    "CriticTraining",
    "DatasetBatches",
    "FlowMapTraining",
    "HostTeacher",
    "JumpError",
    "MetaTraining",
    "PolicyTraining",
    "PosteriorError",
    "Ranking",
    "SafetensorsBatches",
    "StateTeacher",
    "Teacher",
    "clone",
    "distil",
    "distil_flow_map",
    "lerobot_batches",
    "record",
    "train_critic",
    "train_from_dataset",
    "train_policy",
]
