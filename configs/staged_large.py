"""Staged size large: 1,034,804,800 parameters, 4096 tokens of context.

GELU with biases, RMSNorm, RoPE, tied embeddings.

Command:   python -m smallcoder_jax.main --config=configs/staged_large.py --workdir=runs/staged_large
           or in stages: python -m tools.run_stages --variant=staged_large --no-export
Export:    none: transformers has no such architecture (tools.export says which fields differ).
Hardware:  ask --mode=preflight --topology=...; not tried on any accelerator yet.
Time:      not measured.
Expected:  not measured. The loss starts at ln(32000) = 10.4.
"""

from ml_collections import ConfigDict

from smallcoder_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "staged-large"
    config.model.update(
        vocab_size=32000,
        width=1600,
        mlp_width=6400,
        layers=32,
        heads=25,
        kv_heads=25,
        head_size=64,
        context=4096,
        mlp="gelu",
        bias="all",
    )
    config.mesh.update(data=1, fsdp=-1)  # parameters and optimizer do not fit beside activations on one device
    config.compute.remat = "full"
    config.train.update(steps=20_000, batch_size=64, sequence_length=4096, microbatch_size=8)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=500)
    config.eval.update(batches=16)
    return config
