"""What the backward pass computes again, by the value of `compute.remat`; "none" has no policy."""

from __future__ import annotations

import jax

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
