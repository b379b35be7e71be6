"""Trains a lens: python -m lens.main --config=configs/tiny.py --workdir=runs/tiny"""

import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from lens import cli
from lens.train import Trainer

HEADLINE = ('facts_recall', 'facts_hallucinated', 'fve', 'fve_greedy', 'fve_sft', 'fve_shuffled', 'fve_no_activation')


def main(_):
    workdir = pathlib.Path(WORKDIR.value)
    trainer = Trainer(CONFIG.value, workdir)
    with jax.set_mesh(trainer.run.mesh):
        summary = trainer.train()
    print('  '.join(f'{k} {summary[k]:.3f}' for k in HEADLINE if k in summary))
    print(f'Done in {summary["wall_s"]:.0f} s. Figures: {workdir}/summary.json  Report: {workdir}/report.html')


if __name__ == '__main__':
    CONFIG = config_flags.DEFINE_config_file(
        'config', None, 'Recipe, e.g. configs/tiny.py; override keys with --config.a.b=value.'
    )
    WORKDIR = flags.DEFINE_string(
        'workdir', None, 'Folder of this run: checkpoints, metrics, summary, report. Continues if it exists.'
    )
    flags.mark_flags_as_required(['config', 'workdir'])
    cli.run(main)
