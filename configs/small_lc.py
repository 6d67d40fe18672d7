"""SmallCoder-Small-LC: 195,068,928 parameters, 8192 tokens of context, trained and evaluated at that length.

Command:   python -m smallcoder_jax.main --config=configs/small_lc.py --workdir=runs/small_lc
Hardware:  meant for a GPU or TPUs (BUILD.md), not yet tried on one. A few steps run on a CPU, to try it out.
Time:      not measured (docs/benchmarks.md has what was).
Faster:    where memory allows, --config.compute.layers=unroll --config.compute.remat=none (docs/LOG.md).
Expected:  not measured. The loss starts at ln(32768) = 10.4.

Data is bigcode/the-stack-smol; without a network: --config.data.sources=stdlib, or dir:/my/code.
"""

from ml_collections import ConfigDict

from smallcoder_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "smallcoder-small-lc"
    config.model.update(
        vocab_size=32768,
        width=1024,
        mlp_width=2432,
        layers=16,
        heads=8,
        kv_heads=2,
        head_size=128,
        context=8192,
        rope_theta=500000.0,
    )
    config.train.update(steps=20_000, batch_size=32, sequence_length=8192, microbatch_size=8)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=500)
    config.eval.update(batches=4)
    config.compute.update(layers="scan", remat="full")
    config.data.repository_order = True
    return config
