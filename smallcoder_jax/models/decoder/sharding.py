"""How a decoder's parameters are split over the mesh."""

from __future__ import annotations

from jax.sharding import PartitionSpec as P

RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"position_embed/embedding", P()),
    (r"unembed/kernel", P("fsdp", "tensor")),
    (r".*(query|key|value|gate|up)/kernel", P("fsdp", "tensor")),
    (r".*(output|down)/kernel", P("tensor", "fsdp")),
    (r".*(query|key|value|gate|up)/bias", P("tensor")),
    (r".*(scale|bias)", P()),
)
