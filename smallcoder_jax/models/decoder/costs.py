"""The computational cost of a decoder."""

from __future__ import annotations

from smallcoder_jax.config import DecoderConfig


def flops_per_token(model: DecoderConfig, sequence_length: int) -> float:
    """FLOPs of one training step per token: 6 per matrix parameter, plus causal attention, as in appendix B of the PaLM
    paper. A query in a row of one long document attends to half of the row on average.
    """
    matrices = model.parameter_count()
    if model.embeddings == "untied":
        matrices -= model.vocab_size * model.width
    if model.positions == "learned":
        matrices -= model.context * model.width
    attention = 12 * model.layers * model.heads * model.head_size * sequence_length / 2
    return 6.0 * matrices + attention
