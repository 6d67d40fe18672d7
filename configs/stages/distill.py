r"""Stage distill: a smaller model learns code from a larger model's predictions in addition to the text.

Command:   python -m smallcoder_jax.main --config=configs/stages/distill.py:small --workdir=runs/distill \
             --config.distill.teacher=runs/code
           or as part of a pipeline: python -m tools.run_stages --variant=small
Hardware:  that of the variant (configs/small.py); nano: two CPU cores.
Time:      measured for nano only (docs/benchmarks.md, "make pipeline").
Expected:  fewer bits per byte than the same model without a teacher (--config.distill.alpha=1).

--config.distill.top_k=64 computes the teacher's 64 most probable tokens at every position once and stores them on disk,
at six to eight bytes each. Use it for several students of one teacher on the same batches, or for a teacher that does
not fit in memory together with the student. All other tokens count as one.

The student has the variant's shape. For nano the student has two layers instead of four and two thirds of nano's width.
"""

from pathlib import Path

from ml_collections import ConfigDict

from smallcoder_jax.configfile import read_config_file


def get_config(variant: str = "small") -> ConfigDict:
    config = read_config_file(str(Path(__file__).parents[1] / f"{variant}.py"))
    config.name += "-distill"
    config.stage.name = "distill"
    config.stage.measures = ("bits_per_byte lower",)
    config.data.max_documents = 10_000
    config.optimizer.update(learning_rate=5e-4)
    if variant == "nano":
        config.model.update(width=128, mlp_width=352, layers=2, heads=2, kv_heads=1)
        config.train.update(steps=350)
        config.data.max_documents = 0
        config.eval.update(every=350)
        config.checkpoint.update(every=175)
    return config
