"""Which parameters decay."""

from nemotron_train.model.names import rule_for


def has_weight_decay(name: str) -> bool:
    """Matrices decay; norms, biases, A_log, D and dt_bias do not: they scale or shift, and zero is no neutral value for them."""
    return rule_for(name).decays
