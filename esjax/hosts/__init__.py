"""Training over hosts: `serve`, `join` and `status`, the protocol between them, and the transport of its messages."""
