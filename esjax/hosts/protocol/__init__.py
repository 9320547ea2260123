"""Coordinator and worker as state machines, and the messages between them."""
