"""Writes the golden files of `test_golden.py` again: `python -m tests.config.regenerate_golden`, then review them."""

from nemotron_train.config.load import list_choices, load_config, write_resolved
from tests.config.test_golden import GOLDEN

if __name__ == "__main__":
    for experiment in list_choices("experiment"):
        write_resolved(load_config([f"experiment={experiment}"]), GOLDEN / f"{experiment}.yaml")
