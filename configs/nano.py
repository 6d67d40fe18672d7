"""nano: 4,000,000 parameters for a laptop CPU; what `make pipeline` takes through all stages.

Command:   python -m smallcoder_jax.main --config=configs/nano.py --workdir=runs/nano
Hardware:  two CPU cores.
Time:      7 minutes of training on two slow cores (AMD EPYC, AVX-512), 1.4M tokens.
Expected:  1.79 bits per byte on all held-out files of Python 3.11's standard library, where xz -9e needs 2.21 file by
           file and 1.87 in one (docs/benchmarks.md). The loss starts at ln(4096) = 8.3.
"""

from ml_collections import ConfigDict

from smallcoder_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "smallcoder-nano"
    config.model.update(
        vocab_size=4096,
        width=256,
        mlp_width=704,
        layers=4,
        heads=4,
        kv_heads=2,
        head_size=64,
        context=1024,
    )
    config.compute.dtype = "float32"  # a CPU multiplies float32 as fast as bfloat16
    config.data.update(sources="stdlib", fim_rate=0.1)
    # Many small steps: at this size a step is worth more than the tokens in it. Microbatches stay in the cache.
    config.train.update(steps=700, batch_size=4, sequence_length=512, microbatch_size=2, log_every=20)
    config.optimizer.update(
        name="muon",
        learning_rate=0.01,  # of the embedding and the norms
        muon_learning_rate=0.04,
        weight_decay=0.1,
        schedule="linear",
        warmup_steps=20,
        final_ratio=0.0,
    )
    config.eval.update(every=200, batches=8, batch_size=16)
    config.checkpoint.update(every=200, keep=2)
    config.log.update(charts_every=400)
    return config
