"""An FP8 recipe as Transformer Engine takes it. Nothing is left to the environment variables it reads."""

from transformer_engine.common.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    QParams,
    Recipe,
)

from nemotron_train.precision.recipe import DELAYED_HISTORY_STEPS, Fp8Recipe, Scaling


def te_recipe(recipe: Fp8Recipe) -> Recipe:
    """Return Transformer Engine's recipe object."""
    formats = Format.HYBRID if recipe.wide_gradients else Format.E4M3
    if recipe.scaling is Scaling.delayed:
        return DelayedScaling(fp8_format=formats, amax_history_len=DELAYED_HISTORY_STEPS, amax_compute_algo="max")
    made = {Scaling.block: Float8BlockScaling, Scaling.current: Float8CurrentScaling}[recipe.scaling](
        fp8_format=formats
    )
    for tensor in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        setattr(made, tensor, QParams(power_2_scale=recipe.power_of_two))
    return made
