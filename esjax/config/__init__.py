"""Settings: their types, dotted names, YAML files and error messages."""
