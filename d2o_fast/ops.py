"""Placeholder with the final signatures: computes by way of the reference until the fused paths land."""

from d2o_fast.reference import naive_d2o_loss as fused_d2o_loss
from d2o_fast.reference import naive_linear_logprob as linear_logprob

__all__ = ["fused_d2o_loss", "linear_logprob"]
