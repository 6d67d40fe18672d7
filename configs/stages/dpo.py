r"""Stage dpo: makes better answers more probable, relative to worse ones, than at the start (arXiv 2305.18290).

Command:   python -m smallcoder_jax.main --config=configs/stages/dpo.py:small --workdir=runs/dpo \
             --config.stage.start=runs/tools
           or as part of a pipeline: python -m tools.run_stages --variant=small
Hardware:  that of the variant (configs/small.py); nano: two CPU cores.
Time:      measured for nano only (docs/benchmarks.md, "make pipeline").
Expected:  the margin of held-out pairs rises from 0.
"""

from pathlib import Path

from ml_collections import ConfigDict

from smallcoder_jax.configfile import read_config_file


def get_config(variant: str = "small") -> ConfigDict:
    config = read_config_file(str(Path(__file__).parents[1] / f"{variant}.py"))
    config.name += "-dpo"
    config.stage.name = "dpo"
    config.stage.measures = ("margin higher", "accuracy higher")
    config.train.update(steps=1000, batch_size=8, sequence_length=min(1024, config.model.context), microbatch_size=0)
    config.optimizer.update(name="adamw", learning_rate=1e-6, warmup_steps=100)
    config.eval.update(batches=0, every=250)
    if variant == "nano":
        config.preferences.count = 400
        config.train.update(steps=80, batch_size=4, sequence_length=384, microbatch_size=2)
        config.optimizer.update(learning_rate=2e-5, warmup_steps=6, weight_decay=0.0)
        config.eval.update(every=80, batches=0, batch_size=16)
        config.checkpoint.update(every=80)
    return config
