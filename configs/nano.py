"""nano: 1,967,808 parameters for a laptop CPU; what `make quickstart` and `make pipeline` train.

Command:   python -m smallcoder_jax.main --config=configs/nano.py --workdir=runs/nano
Hardware:  two CPU cores.
Time:      four minutes of training on two cores of a Xeon with AMX, 2.5M tokens; less than six from a fresh clone.
Expected:  1.39 to 1.44 bits per byte (three seeds) on all held-out files of Python 3.11's standard library, where
           xz -9e needs 2.21 file by file and 1.87 in one (docs/benchmarks.md). The loss starts at ln(2048) = 7.6.

As small as this, because in a few minutes a larger model does not get as far: this one passes the point at which models
begin to copy from their context (docs/LOG.md).
"""

from ml_collections import ConfigDict

from smallcoder_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "smallcoder-nano"
    config.model.update(
        vocab_size=2048,
        width=192,
        mlp_width=512,
        layers=4,
        heads=3,
        kv_heads=1,
        head_size=64,
        context=512,
    )
    config.compute.update(dtype="float32", matmul="auto")  # bfloat16 activations are slower on a CPU
    config.data.update(sources="stdlib", fim_rate=0.1)
    # Many small steps: at this size a step is worth more than the tokens in it.
    config.train.update(steps=2200, batch_size=3, sequence_length=384, log_every=50)
    config.optimizer.update(
        name="muon",
        learning_rate=0.01,  # of the embedding and the norms
        muon_learning_rate=0.03,
        weight_decay=0.1,
        schedule="linear",
        warmup_steps=20,
        final_ratio=0.0,
    )
    # Often, so that what it writes is seen to get better.
    config.eval.update(every=400, batches=4, batch_size=16, sample_tokens=48, sample_temperature=0.0)
    config.eval.sample_prompts = ("def read_lines(path):\n    with open(",)
    config.checkpoint.update(every=400, keep=2)
    config.log.update(charts_every=0)
    return config
