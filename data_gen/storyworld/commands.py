"""The flags of the commands of the embedded world, apart from what they do, as in lens/commands.py."""

from absl import flags

from lens import cli

from .world import Settings

SUBJECT = 'configs/tiny_subject'
MOST_CHATS = 10**6  # they are in memory


def storyworld() -> None:
    s = Settings()
    cli.start(
        f'{__package__}.__main__',
        flags.DEFINE_string('train_tokenizer', None, 'Train the tokenizer into this folder, then stop.'),
        flags.DEFINE_string('out', 'data/storyworld', 'Folder for the arrays.'),
        flags.DEFINE_string('tokenizer', SUBJECT, 'Folder with tokenizer.json.'),
        flags.DEFINE_integer('train', s.train, 'Training stories.'),
        flags.DEFINE_integer('validation', s.validation, 'Validation stories.'),
        flags.DEFINE_integer('seed', s.seed, 'Which world.'),
        flags.DEFINE_integer('positions', s.positions, 'Labelled positions per story.'),
        flags.DEFINE_integer('seq_len', s.seq_len, 'Tokens per row, BOS included.'),
    )


def probe() -> None:
    cli.start(
        f'{__package__}.probe',
        flags.DEFINE_string('model', SUBJECT, 'Hugging Face directory of the subject.'),
        flags.DEFINE_string('baseline', None, 'The same subject pretrained without the look-ahead loss.'),
        flags.DEFINE_string('data', 'data/storyworld', 'Folder with train/ and validation/ and known facts.'),
        flags.DEFINE_integer('layer', 3, '0-based block whose output is probed.'),
        flags.DEFINE_float('floor', 0.9, 'Least accuracy of every field.'),
        flags.DEFINE_float('max_cost', 0.02, 'Largest relative increase of the LM loss over --baseline.'),
    )


def pretrain() -> None:
    config = cli.define_config('Pretraining recipe, e.g. configs/tiny_subject.py.')
    workdir = flags.DEFINE_string('workdir', None, 'Where the checkpoints and the model are written.', required=True)
    cli.start(f'{__package__}.pretrain', config, workdir, all_keys='configs/tiny_subject.py')


def tiny_chat() -> None:
    cli.start(
        f'{__package__}.tiny_chat',
        flags.DEFINE_enum('family', 'gpt_oss', ['llama', 'gpt_oss'], 'What is fitted; see the text above.'),
        flags.DEFINE_string('out', None, 'Folder of the model; must not hold anything.', required=True),
        flags.DEFINE_integer('steps', 0, 'Optimizer steps; 0: as many as the family needs.', lower_bound=0),
    )


def chats() -> None:
    cli.start(
        f'{__package__}.chats',
        flags.DEFINE_string('out', None, 'File of JSON lines.', required=True),
        flags.DEFINE_integer('rows', 64, 'Chats.', lower_bound=1, upper_bound=MOST_CHATS),
        flags.DEFINE_integer('seed', 0, 'Of the stories.', lower_bound=0),
    )


def harmony_tokenizer() -> None:
    out = 'Folder for tokenizer.json, tokenizer_config.json and chat_template.jinja.'
    cli.start(f'{__package__}.harmony_tokenizer', flags.DEFINE_string('out', None, out, required=True))
