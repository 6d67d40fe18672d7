"""SmallCoder-Tiny: 100,682,496 parameters, 2048 tokens of context.

Command:   python -m smallcoder_jax.main --config=configs/tiny.py --workdir=runs/tiny
Hardware:  meant for a GPU or TPUs (BUILD.md), not yet tried on one. A few steps run on a CPU, to try it out.
Time:      not measured (docs/benchmarks.md has what was).
Expected:  not measured. The loss starts at ln(32768) = 10.4.

Data is bigcode/the-stack-smol; without a network: --config.data.sources=stdlib, or dir:/my/code.
"""

from ml_collections import ConfigDict

from smallcoder_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "smallcoder-tiny"
    config.model.update(
        vocab_size=32768,
        width=768,
        mlp_width=2048,
        layers=12,
        heads=6,
        kv_heads=2,
        head_size=128,
        context=2048,
        rope_theta=10000.0,
    )
    config.train.update(steps=20_000, batch_size=128, sequence_length=2048, microbatch_size=8)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=500)
    config.eval.update(batches=16)
    return config
