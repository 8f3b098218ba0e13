"""Training: offline data, behaviour cloning, critics. The only part of qsteer that optimises anything."""

from qsteer.training.bc import PolicyTraining, train_policy
from qsteer.training.critic import CriticTraining, train_critic
from qsteer.training.data import Chunks, Episodes, Transitions
from qsteer.training.policy import FlowPolicy, FlowPolicyConfig

__all__ = [
    "Chunks",
    "CriticTraining",
    "Episodes",
    "FlowPolicy",
    "FlowPolicyConfig",
    "PolicyTraining",
    "Transitions",
    "train_critic",
    "train_policy",
]
