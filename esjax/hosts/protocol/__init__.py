"""The coordinator and its hosts as state machines, and the messages between them."""
