"""Hosts that train together: what they say, how it travels, and who may take part."""
