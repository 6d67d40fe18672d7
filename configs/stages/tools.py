r"""Stage tools: conversations whose calls of six functions are really executed, with the loss on the assistant only.

Command:   python -m smallcoder_jax.main --config=configs/stages/tools.py:small --workdir=runs/tools \
             --config.stage.start=runs/code
           or as part of a pipeline: python -m tools.run_stages --variant=small
Hardware:  that of the variant (configs/small.py); nano: two CPU cores.
Time:      measured for nano only (docs/benchmarks.md, "make pipeline").
Expected:  the share of valid and correct calls on held-out conversations (--mode=evaluate) rises from near 0.
"""

from pathlib import Path

from ml_collections import ConfigDict

from smallcoder_jax.configfile import read_config_file


def get_config(variant: str = "small") -> ConfigDict:
    config = read_config_file(str(Path(__file__).parents[1] / f"{variant}.py"))
    config.name += "-tools"
    config.stage.name = "sft"
    # A small model does not learn to copy code into its calls, so right_arguments is only shown.
    config.stage.measures = ("valid_json higher >=0.8", "right_tool higher", "right_arguments")
    config.train.update(steps=1600, batch_size=32, sequence_length=min(2048, config.model.context), microbatch_size=0)
    config.optimizer.update(learning_rate=3e-6, warmup_steps=500)
    config.eval.update(every=200, batches=0)
    if variant == "nano":
        config.dialogs.count = 1600
        config.train.update(steps=800, batch_size=4, sequence_length=512, microbatch_size=2)
        config.optimizer.update(learning_rate=0.008, muon_learning_rate=0.03, warmup_steps=20)
        config.eval.update(every=800, batches=6, batch_size=8, sample_tokens=96)
        config.checkpoint.update(every=400)
    return config
