r"""Stage tools: conversations that call six functions, their calls really executed; loss on the assistant alone.

Command:   python -m smallcoder_jax.main --config=configs/stages/tools.py:small --workdir=runs/tools \
             --config.stage.start=runs/code
           or, as one of several: python -m tools.run_stages --variant=small
Hardware:  that of the variant (configs/small.py); nano: two CPU cores.
Time:      not measured but for nano (docs/benchmarks.md, "make pipeline").
Expected:  valid, right calls on held-out conversations (--mode=evaluate), from near none.
"""

from pathlib import Path

from ml_collections import ConfigDict

from smallcoder_jax.configfile import read_config_file


def get_config(variant: str = "small") -> ConfigDict:
    config = read_config_file(str(Path(__file__).parents[1] / f"{variant}.py"))
    config.name += "-tools"
    config.stage.name = "sft"
    # A small model does not copy the code that calls are about: right arguments are only shown.
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
