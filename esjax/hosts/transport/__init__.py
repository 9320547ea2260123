"""The transport of messages over ZeroMQ: sockets, keys and limits."""
