"""How messages travel: ZeroMQ, its keys and its limits, or memory."""
