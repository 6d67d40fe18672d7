"""Staged size tiny: 11,349,248 parameters, 512 tokens of context. GELU with biases, RMSNorm, RoPE, tied embeddings.

Command:   python -m smallcoder_jax.main --config=configs/staged_tiny.py --workdir=runs/staged_tiny
           or in stages: python -m tools.run_stages --variant=staged_tiny --no-export
Export:    none: transformers has no such architecture (tools.export says which fields differ).
Hardware:  ask --mode=preflight --topology=...; not tried on any accelerator yet.
Time:      not measured.
Expected:  not measured. The loss starts at ln(32000) = 10.4.
"""

from ml_collections import ConfigDict

from smallcoder_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "staged-tiny"
    config.model.update(
        vocab_size=32000,
        width=256,
        mlp_width=1024,
        layers=4,
        heads=4,
        kv_heads=4,
        head_size=64,
        context=512,
        mlp="gelu",
        bias="all",
    )
    config.train.update(steps=20_000, batch_size=64, sequence_length=512, microbatch_size=0)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=500)
    config.eval.update(batches=16)
    return config
