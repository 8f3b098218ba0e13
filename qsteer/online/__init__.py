"""Learning while acting: actors, collection, health checks, the loop, and FMQ's adaptation."""

from qsteer.online.actors import Actor, HostActor, StateActor
from qsteer.online.health import Health
from qsteer.online.run import train_online
from qsteer.online.settings import OnlineTraining

__all__ = ["Actor", "Health", "HostActor", "OnlineTraining", "StateActor", "train_online"]
