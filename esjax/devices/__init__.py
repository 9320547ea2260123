"""The devices of this host, and process groups that compute together."""
