"""How the parameters of a byte-level model are split over the mesh."""

from __future__ import annotations

from jax.sharding import PartitionSpec as P

RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"head/kernel", P("fsdp", "tensor")),
    (r".*(forget|value|gate|up)/kernel", P("fsdp", "tensor")),
    (r".*(output|down)/kernel", P("tensor", "fsdp")),
    (r".*router/(query|key)", P("fsdp", None)),
    (r".*residual/kernel", P("fsdp", None)),
    (r".*mixer/attention/(query|key|value)/kernel", P("fsdp", "tensor")),
    (r".*conv/taps", P(None, "tensor")),
    (r".*(scale|bias|gain|wider)", P()),
)
