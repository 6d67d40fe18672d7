r"""Stage reward: trains a head that scores answers on pairs of a better and a worse answer (Bradley-Terry).

Command:   python -m smallcoder_jax.main --config=configs/stages/reward.py:small --workdir=runs/reward \
             --config.stage.start=runs/tools
           or as part of a pipeline: python -m tools.run_stages --variant=small
Hardware:  that of the variant (configs/small.py); nano: two CPU cores.
Time:      measured for nano only (docs/benchmarks.md, "make pipeline").
Expected:  the better answer scores higher in more than 80% of held-out pairs.
"""

from pathlib import Path

from ml_collections import ConfigDict

from smallcoder_jax.configfile import read_config_file


def get_config(variant: str = "small") -> ConfigDict:
    config = read_config_file(str(Path(__file__).parents[1] / f"{variant}.py"))
    config.name += "-reward"
    config.stage.name = "reward"
    config.stage.measures = ("accuracy higher >=0.8",)
    config.train.update(steps=1500, batch_size=8, sequence_length=min(1024, config.model.context), microbatch_size=0)
    config.optimizer.update(name="adamw", learning_rate=1e-5, warmup_steps=100)
    config.eval.update(batches=0, every=250, sample_tokens=0)
    if variant == "nano":
        config.preferences.count = 3000
        config.train.update(steps=280, batch_size=4, sequence_length=384, microbatch_size=2)
        config.optimizer.update(name="muon", learning_rate=2e-3, muon_learning_rate=0.01, warmup_steps=10)
        config.eval.update(every=280, batches=0, batch_size=16)
        config.checkpoint.update(every=140)
    return config
