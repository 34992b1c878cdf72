"""The YAML files a run is composed from. A folder is a group, a file one choice of it."""
