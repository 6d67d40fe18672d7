"""Stage language: prose, from random parameters. TinyStories; nano: the prose of this machine, without a network.

Command:   python -m smallcoder_jax.main --config=configs/stages/language.py:small --workdir=runs/language
           or as part of a pipeline: python -m tools.run_stages --variant=small
Hardware:  that of the variant (configs/small.py); nano: two CPU cores.
Time:      measured for nano only (docs/benchmarks.md, "make pipeline").
Expected:  bits per byte of held-out text fall; the loss starts at ln(vocabulary).

The steps cover the 470M tokens of TinyStories about three times, in rows of 512 tokens.
"""

from pathlib import Path

from ml_collections import ConfigDict

from smallcoder_jax.configfile import read_config_file


def get_config(variant: str = "small") -> ConfigDict:
    config = read_config_file(str(Path(__file__).parents[1] / f"{variant}.py"))
    config.name += "-language"
    config.stage.measures = ("bits_per_byte lower",)
    config.data.update(sources="hf:roneneldan/TinyStories!nofim", fim_rate=0.0)
    config.train.update(steps=43_000, batch_size=64, sequence_length=512, microbatch_size=64)
    config.optimizer.update(learning_rate=1e-4, warmup_steps=2000)
    if variant == "nano":
        config.data.update(sources="prose!nofim", max_documents=1500)
        config.train.update(steps=200, batch_size=3, sequence_length=384, microbatch_size=0)
        config.optimizer.update(learning_rate=0.01, warmup_steps=20)
        config.eval.update(every=200)
        config.checkpoint.update(every=100)
    return config
