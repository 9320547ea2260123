"""The worker as a state machine, and the messages between the coordinator and the hosts."""
