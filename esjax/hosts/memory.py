"""A coordinator and a host in one process: messages are handed over as they are."""

from esjax.hosts.coordinator import Coordinator
from esjax.hosts.effects import Effect, Publish
from esjax.hosts.worker import Worker


def exchange(coordinator: Coordinator, worker: Worker, now: float) -> list[Effect]:
    """Pass messages until neither has anything to say.

    Returns:
        What else the coordinator wants done, in order.
    """
    coordinator.tick(now)
    worker.tick(now)
    others: list[Effect] = []
    while True:
        request = worker.request(now)
        if request is not None:
            worker.receive(coordinator.receive(request, now), now)
        effects = coordinator.drain()
        for effect in effects:
            if isinstance(effect, Publish):
                worker.receive(effect.envelope, now)
            else:
                others.append(effect)
        if request is None and not effects:
            return others
