"""Staged size xlarge: 2,079,705,088 parameters, 8192 tokens of context.

GELU with biases, RMSNorm, RoPE, tied embeddings.

Command:   python -m smallcoder_jax.main --config=configs/staged_xlarge.py --workdir=runs/staged_xlarge
           or in stages: python -m tools.run_stages --variant=staged_xlarge --no-export
Export:    none: transformers has no such architecture (tools.export says which fields differ).
Hardware:  ask --mode=preflight --topology=...; not tried on any accelerator yet.
Time:      not measured.
Expected:  not measured. The loss starts at ln(32000) = 10.4.
"""

from ml_collections import ConfigDict

from smallcoder_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "staged-xlarge"
    config.model.update(
        vocab_size=32000,
        width=2048,
        mlp_width=8192,
        layers=40,
        heads=32,
        kv_heads=32,
        head_size=64,
        context=8192,
        mlp="gelu",
        bias="all",
    )
    config.mesh.update(data=1, fsdp=-1)  # parameters and optimizer do not fit beside activations on one device
    config.compute.remat = "full"
    config.train.update(steps=20_000, batch_size=64, sequence_length=8192, microbatch_size=8)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=500)
    config.eval.update(batches=16)
    return config
