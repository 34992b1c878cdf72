"""Which matrix products run in FP8, and does the banner say so?"""

from nemotron_train.plan.describe import describe
from tests.plan.small import plan_of

NANO_12B = ("model=nemotron_nano_12b_v2", "train.seq_length=8192", "train.micro_batch_size=1")


def test_nano_12b_keeps_the_first_and_last_two_layers_and_the_output_layer_in_bf16() -> None:
    """Fails if a layer moves across the border of FP8: 62 layers of two products each, four layers kept."""
    gemms = plan_of(*NANO_12B, "precision=fp8_block").gemms
    kept = [gemm.name.rsplit(".", 1)[0] for gemm in gemms if not gemm.in_fp8]
    layers = ["decoder.layers.0.mixer", "decoder.layers.1.mlp", "decoder.layers.60.mixer", "decoder.layers.61.mlp"]
    assert kept == [*(layer for layer in layers for _ in range(2)), "output_layer"]
    assert all(gemm.reason for gemm in gemms if not gemm.in_fp8)


def test_the_banner_has_every_product_with_its_shape_on_a_rank_and_the_reason() -> None:
    """Fails if the audit leaves out a kind of product, or prints the shapes of the whole model."""
    text = describe(plan_of(*NANO_12B, "precision=fp8_block", "parallel.tensor_parallel_size=2", world_size=2))
    assert "116 of 125 linear layers in fp8_block" in text
    assert "26 x mixer.in_proj: 8,192 tokens x 5,120 x 11,328, fp8_block" in text
    assert "6 x self_attention.linear_proj: 8,192 tokens x 2,560 x 5,120, fp8_block" in text
    assert "1 x output_layer: 8,192 tokens x 5,120 x 65,536, bf16: the output layer stays" in text


def test_the_banner_warns_of_tokens_that_do_not_fill_a_block() -> None:
    """Fails if the slow shape is not named."""
    slow = (*NANO_12B[:1], "train.seq_length=8240", "train.micro_batch_size=1", "precision=fp8_block")
    assert "8,240 tokens are not a multiple of the 128" in describe(plan_of(*slow))


def test_the_banner_says_what_weights_are_held_in() -> None:
    """Fails if a run does not tell that its layers have no bf16 weights, or one tells it that has them."""
    told = "116 of 125 linear layers in fp8_block, whose weights ranks hold in FP8 only, on a rank:"
    assert told in describe(plan_of(*NANO_12B, "precision=fp8_block", "precision.primary_weights=fp8"))
    assert "in FP8 only" not in describe(plan_of(*NANO_12B, "precision=fp8_block"))
