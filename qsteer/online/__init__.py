"""Learning while acting: actors, collection, health checks, the loop, and FMQ's adaptation."""

from qsteer.online.actors import Actor, HostActor, StateActor
from qsteer.online.health import Health
from qsteer.online.loop import OnlineTraining, train_online

__all__ = ["Actor", "Health", "HostActor", "OnlineTraining", "StateActor", "train_online"]
