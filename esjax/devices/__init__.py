"""The devices of this host, and processes that compute as one."""
