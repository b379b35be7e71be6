"""The flags of the commands of lens, apart from what they do: --help and a misspelt flag wait for no JAX.

`python -m lens.NAME` and the console command lens-NAME are the same function here; lens-train is lens.main. Each calls
main() of its module with the values of its flags, in their order.
"""

from absl import flags

from lens import cli


def _config() -> flags.FlagHolder:
    return cli.define_config('Recipe, e.g. configs/tiny.py; override keys with --config.a.b=value.')


def _checkpoint() -> tuple[flags.FlagHolder, flags.FlagHolder]:
    return (
        flags.DEFINE_string('workdir', None, 'Folder of a run of lens.main.', required=True),
        flags.DEFINE_string('step', 'newest', 'Which checkpoint: newest, best (highest held-out FVE), or its number.'),
    )


def train() -> None:
    config = _config()
    workdir = flags.DEFINE_string(
        'workdir', None, 'Folder of this run: checkpoints, metrics, summary, report. Continues if it exists.'
    )
    profile = flags.DEFINE_string('profile', '', 'START:COUNT, steps of this process: trace them in WORKDIR/profile.')
    place = (
        flags.DEFINE_string(
            'coordinator', None, 'HOST:PORT of process 0 of several; "auto": JAX finds all of it out (TPU pods).'
        ),
        flags.DEFINE_integer('num_processes', None, 'Processes of this run, with --coordinator.'),
        flags.DEFINE_integer('process_id', None, 'Which of them this one is, from 0.'),
    )
    plan = flags.DEFINE_bool(
        'plan',
        False,
        'Print what each device would need, and what helps where it does not fit (exit code 1); no training.',
    )
    device = flags.DEFINE_string(
        'device',
        '',
        'Whose compiler --plan asks: h100, v5e or v5p, where the plugin of JAX is installed, or cpu; else the first of '
        'them that is there.',
    )
    device_gb = flags.DEFINE_float(
        'device_gb',
        None,
        'Memory of one device in 1e9 bytes, for --plan; else that of --device, 80 for cpu.',
        lower_bound=0.0,
    )
    flags.register_validator(
        'workdir', lambda x: x is not None or plan.value, 'Flag --workdir must have a value other than None.'
    )
    cli.start('lens.main', config, workdir, profile, *place, plan, device, device_gb, cli.DEBUG)


def _subject() -> flags.FlagHolder:
    return flags.DEFINE_string('subject', '', 'Where the subject is now, if not where the run found it.')


def evaluate() -> None:
    data = 'Where the data is now, if not where the run found it; its training split is not needed.'
    cli.start(
        'lens.evaluate',
        *_checkpoint(),
        flags.DEFINE_string(
            'lens', '', 'Exported lens, or name of one that ships, in place of a run: --workdir gets its figures.'
        ),
        _subject(),
        flags.DEFINE_string('data', '', data),
        flags.DEFINE_string(
            'best_of', '1,2,4,8,16,32', 'Draw so many explanations of each activation, report the best; empty: none.'
        ),
        flags.DEFINE_integer('num_vectors', 0, 'Held-out activations, whole documents of them; 0 = as in training.'),
        flags.DEFINE_bool(
            'studies',
            True,
            'Measure what lens/study.py adds, most of the time; --nostudies: the figures of training alone.',
        ),
    )


def export() -> None:
    out = flags.DEFINE_string('out', None, 'New folder for the lens.', required=True)
    form = flags.DEFINE_enum(
        'format',
        'hf',
        ['hf', 'lens', 'nla', 'peft'],
        'hf: two whole models for Hugging Face; lens: maps, prompts and adapters alone in bfloat16, megabytes, for use with '
        'the subject; nla: the models of a natural language autoencoder, for its clients; peft: adapters of it, as PEFT and '
        'EasyNLA save them.',
    )
    verify = flags.DEFINE_bool(
        'verify',
        False,
        'Write only what PyTorch, given 64 held-out activations, makes the same texts and reconstructions of; needs torch.',
    )
    cli.start('lens.export', *_checkpoint(), out, _subject(), form, verify)


def _lens() -> flags.FlagHolder:
    what = 'Workdir of a run, folder of lens.export or of others, or name of a lens that ships.'
    return flags.DEFINE_string('lens', None, what, required=True)


def explain() -> None:
    cli.start(
        'lens.explain',
        _lens(),
        flags.DEFINE_string('text', None, 'Text to read.'),
        flags.DEFINE_string('chat', None, 'JSON file of messages to read: role, content, perhaps thinking, of each.'),
        flags.DEFINE_string('file', None, 'Text file to read.'),
        flags.DEFINE_string('positions', '', 'Tokens to explain: 3,7,-1 or 10:20; default all.'),
        flags.DEFINE_integer('samples', 1, 'Explanations of each token: the most probable one, the others drawn.'),
        flags.DEFINE_integer('best_of', 0, 'Draw so many explanations of each token and show the best first.'),
        flags.DEFINE_float('temperature', 1.0, 'Of what is drawn.'),
        flags.DEFINE_integer('seed', 0, 'Of what is drawn.'),
        flags.DEFINE_string('json', '', 'File for the reading in JSON.'),
        flags.DEFINE_string('html', '', 'File for the reading as a page.'),
        _subject(),
    )


def serve() -> None:
    cli.start(
        'lens.serve',
        _lens(),
        flags.DEFINE_integer('port', 8123, 'Where it listens on 127.0.0.1; 0: a free port, which it prints.'),
        flags.DEFINE_integer('queue', 32, 'Requests that may wait or run at a time; more are refused.', lower_bound=1),
        _subject(),
        flags.DEFINE_string('question', '', 'What an activation oracle is asked; <embed> in it for each vector.'),
    )


def report() -> None:
    cli.start('lens.report', flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True))


def draw_schedules() -> None:
    cli.start(
        'lens.tools.draw_schedules',
        _config(),
        flags.DEFINE_string('out', 'schedules.png', 'PNG file that is written.'),
    )


def tuned_lens() -> None:
    cli.start(
        'lens.tools.tuned_lens',
        flags.DEFINE_string('model', None, 'Hugging Face directory or Hub id of the subject.', required=True),
        flags.DEFINE_string('data', None, 'Folder with train/ and validation/ of its tokens.', required=True),
        flags.DEFINE_string('out', None, 'New folder for the translators.', required=True),
        flags.DEFINE_integer('steps', 250, 'Updates of every layer.'),
        flags.DEFINE_integer('batch', 8, 'Documents per step; a multiple of --mesh_data.'),
        flags.DEFINE_integer('seq_len', None, 'Tokens of each document that are read; default all.'),
        flags.DEFINE_float('learning_rate', 0.3, 'Peak.'),
        flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the subject; translators are float32.'),
        flags.DEFINE_integer('mesh_data', 1, 'Devices that split the batch; -1 = all that remain.'),
        flags.DEFINE_integer('mesh_model', 1, 'Devices that split heads, feed-forward and vocabulary.'),
    )
