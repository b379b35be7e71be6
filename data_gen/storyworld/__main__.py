"""Stories whose facts are known at every token, as labelled token arrays; and the tokenizer of these stories.

    python -m data_gen.storyworld --tokenizer=configs/tiny_subject --out=data/storyworld
    python -m data_gen.storyworld --train_tokenizer=DIR

Arrays that are there already with the same settings are kept. The layout is that of lens/data.py.
"""

from absl import flags

from data_gen.storyworld import world
from lens import cli

FLAGS = flags.FLAGS
HELP = {
    'train': 'Training stories.',
    'validation': 'Validation stories.',
    'seed': 'Which world.',
    'positions': 'Labelled positions per story.',
    'seq_len': 'Tokens per row, BOS included.',
}


def main(_):
    if FLAGS.train_tokenizer:
        tokenizer = world.train_tokenizer(FLAGS.train_tokenizer)
        print(f'Tokenizer with {len(tokenizer)} entries: {FLAGS.train_tokenizer}')
        return
    s = world.Settings(*(FLAGS[name].value for name in world.Settings._fields))
    print(f'Storyworld: {s.train} training and {s.validation} validation stories, seed {s.seed} ...', flush=True)
    written = world.write_arrays(FLAGS.out, FLAGS.tokenizer, s)
    print(
        f'Arrays written: {FLAGS.out}' if written else f'Nothing to do, these settings are there already: {FLAGS.out}'
    )


if __name__ == '__main__':
    flags.DEFINE_string('train_tokenizer', None, 'Train the tokenizer into this folder, then stop.')
    flags.DEFINE_string('out', 'data/storyworld', 'Folder for the arrays.')
    flags.DEFINE_string('tokenizer', 'configs/tiny_subject', 'Folder with tokenizer.json.')
    for name, text in HELP.items():
        flags.DEFINE_integer(name, world.Settings._field_defaults[name], text)
    cli.run(main)
