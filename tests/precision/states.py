"""Comparing what delayed scaling keeps."""

import torch

from nemotron_train.precision.delayed_scaling import DelayedScales


def same(one: DelayedScales, other: DelayedScales) -> bool:
    pairs = ((one.forward, other.forward), (one.backward, other.backward))
    return all(torch.equal(a.scale_Q, b.scale_Q) and torch.equal(a.amax_LQ, b.amax_LQ) for a, b in pairs)
