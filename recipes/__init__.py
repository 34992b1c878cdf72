"""The YAML files a run is composed from. Read by `nemotron_train.config.load` only; a folder is a group, a file one choice."""
