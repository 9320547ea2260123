"""Hosts of a benchmark on real sockets: what their state machines send and receive."""

from esjax.hosts.protocol import wire
from esjax.hosts.protocol.worker import Worker
from esjax.hosts.transport.client import ClientTransport


def pass_messages(worker: Worker, transport: ClientTransport, listening: set[str], now: float) -> None:
    """Send the next request of a host, and give it what has arrived.

    Args:
        worker: The host's state machine.
        transport: Its connection.
        listening: Names of the hosts that receive broadcasts; this one is added when it has joined.
        now: Seconds of a monotonic clock.
    """
    if worker.joined and worker.name not in listening:
        listening.add(worker.name)
        transport.subscribe(worker.joined.publish_port)
    request = worker.request(now)
    if request is not None:
        transport.request(wire.encode(request))
    received = transport.poll(0.0)
    for frames in received.broadcasts:
        worker.receive(wire.decode(frames, "broadcast"), now)
    if received.reply is not None:
        worker.receive(wire.decode(received.reply, "reply"), now)
