"""The coordinator as a state machine: steps, leases, audits, and the registry of hosts."""
