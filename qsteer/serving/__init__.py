"""Serving steered policies over openpi's websocket protocol; needs the extra ``serve``."""

from qsteer.serving.batching import Batcher, BatchLimits
from qsteer.serving.door import ServerLimits
from qsteer.serving.learning import RobotLearning
from qsteer.serving.opening import open_served, open_steering
from qsteer.serving.requests import Decision, Input, Interface, Request
from qsteer.serving.served import Served, ServedHost, ServedStates
from qsteer.serving.server import Server

__all__ = [
    "BatchLimits",
    "Batcher",
    "Decision",
    "Input",
    "Interface",
    "Request",
    "RobotLearning",
    "Served",
    "ServedHost",
    "ServedStates",
    "Server",
    "ServerLimits",
    "open_served",
    "open_steering",
]
