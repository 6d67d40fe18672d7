r"""Stage code: source code with fill-in-the-middle, starting from the language stage's model.

Command:   python -m smallcoder_jax.main --config=configs/stages/code.py:small --workdir=runs/code \
             --config.stage.start=runs/language
           or as part of a pipeline: python -m tools.run_stages --variant=small
Hardware:  that of the variant (configs/small.py); nano: two CPU cores.
Time:      measured for nano only (docs/benchmarks.md, "make pipeline").
Expected:  bits per byte of held-out code fall from those of a model that was trained on prose.

The learning rate is meant for continued training. To train from random parameters, use the variant's own config.
"""

from pathlib import Path

from ml_collections import ConfigDict

from smallcoder_jax.configfile import read_config_file


def get_config(variant: str = "small") -> ConfigDict:
    config = read_config_file(str(Path(__file__).parents[1] / f"{variant}.py"))
    config.name += "-code"
    config.stage.measures = ("bits_per_byte lower",)
    config.optimizer.update(learning_rate=1e-5, warmup_steps=1000)
    if variant == "nano":
        config.train.update(steps=1500)
        config.optimizer.update(learning_rate=0.008, muon_learning_rate=0.03, warmup_steps=20)
        config.eval.update(every=1500)
        config.checkpoint.update(every=750)
    return config
