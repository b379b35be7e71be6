"""Generated bad flags, configurations, JSON files and arrays: each is refused with one sentence, in seconds and little
memory, or read as it is. Hypothesis makes them from a fixed seed; trying or refusing too few of them fails as well.
"""

import functools
import json
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import strategies as st
from hypothesis.strategies import sampled_from as one_of

from data_gen import generate, label, pretokenize, rollouts
from data_gen.storyworld import commands as storyworld
from lens import checkpoint, cli, commands, config, keys, lens_folder, objectives, report, tensor_files, translators
from tests import small_run, small_split, test_report
from tests.bad_inputs import HUGE, JUNK, NOT_FINITE, ODD, changed, copied, inputs, ruined
from tests.tiny_world import TINY, make_base, make_lens

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def places(tmp_path_factory, world):
    """A folder with a good thing of each kind."""
    root = tmp_path_factory.mktemp('places')
    shutil.copytree(world, root / 'world')
    small_split.write(root / 'split', **small_split.arrays())
    run = test_report.make_run(root / 'run')
    lines = (run / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (run / 'metrics.jsonl').write_text(''.join(lines[90:120]))
    for name in ('run/checkpoints/3', 'lens', 'tuned', 'out'):
        (root / name).mkdir(parents=True)
    info = {'config': {'seed': 0}, 'phase_ends': [8], 'fve': 0.5, 'checksums': {'params/a': 7}}
    sealed = {'custom_metadata': info | {'seal': checkpoint._seal(info)}}
    (run / 'checkpoints/3/_CHECKPOINT_METADATA').write_text(json.dumps(sealed))
    made, base = lens(), make_base()
    lens_folder.write(root / 'lens', made, lens_folder.describe(made, base, {'decoder': '', 'encoder': ''}, {}))
    n, d = TINY.n_layers, TINY.d_model
    zeros = {'weight': np.zeros((n, d, d), np.float32), 'bias': np.zeros((n, d), np.float32)}
    tensor_files.write(root / 'tuned/translators.safetensors', zeros)
    about = {'format': translators.FORMAT, 'subject': {'family': TINY.family, 'd_model': d, 'n_layers': n}}
    (root / 'tuned/tuned_lens.json').write_text(json.dumps(about))
    (root / 'out/settings.json').write_text('{"model": "m", "temperature": 0.5}')
    (root / 'out/data.jsonl').write_text('{"index": 0}\n')
    return root


@functools.lru_cache
def lens():
    return make_lens(make_base())


# Flags

COMMANDS = (commands.train, commands.evaluate, commands.export, commands.report, commands.draw_schedules)
COMMANDS += (commands.tuned_lens, generate.main, pretokenize.main, label.main, storyworld.storyworld)
COMMANDS += (storyworld.probe, storyworld.pretrain, storyworld.tiny_chat, storyworld.chats)
NO_NUMBER = ('nan', 'inf', '-inf', '1e999', '1e31', '', 'x', '0x1g', '1,5', 'x\0')
BAD_FLAGS = {
    'float': NO_NUMBER,
    'int': (*NO_NUMBER, '1.5', '1e3', '9' * 30, '-' + '9' * 30, '9' * 5000),
    'bool': ('maybe', '', '2', 'nan', 'x\0'),
    'string enum': ('nope', '', 'NaN', '\ud800', 'x' * 3000),
    'string': ('a\0b', '\ud800', 'x' * 200_000),
    'config object': ('/nonexistent.py', '.', '', 'x\0', 'x' * 5000, 'setup.cfg', 'configs/tiny.py:nope'),
}
STRAY = ('extra', '--nope=1', '--no-such', '-x', '--=1', '---', '--flagfile=/nonexistent', '--flagfile=.', '--\udc80=1')
STRAY += ('--' + 'x' * 3000, '--flagfile=configs/tiny_subject/model.safetensors', '--debug=1=2', '\n')


def parsed(command, *argv: str) -> list[flags.Flag]:
    """The flags of a command after its command line was parsed, as the command does it."""
    found, before = [], set(flags.FLAGS) - {'debug'}

    def run(main, about='', all_keys=cli.KEYS):
        found.extend(f for f in cli.own_flags(flags.FLAGS) if f.name not in before)
        if argv:
            cli._parse(sys.argv, about, all_keys)

    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(cli, 'run', run)
        patch.setattr(sys, 'argv', ['lens', *argv])
        command()
    return found


@inputs(refused=0.7)
def test_flags(kind, draw, root):
    command = draw(one_of(COMMANDS))
    own = {f.name: f for f in parsed(command)}
    need = {'config': '--config=configs/tiny.py', **{n: f'--{n}=x' for n in ('workdir', 'out', 'model', 'data')}}
    need = {n: text for n, text in need.items() if n in own and own[n].default is None}
    name, how = draw(one_of(sorted(own))), draw(one_of(('value', 'value', 'stray', 'odd', 'key')))
    bad, wrong = draw(one_of(STRAY)), True
    if how == 'value':
        need.pop(name, None)
        bad = f'--{name}={draw(one_of(BAD_FLAGS[own[name].flag_type()]))}'
    elif how == 'odd':
        bad, wrong = f'--{name}={draw(one_of(ODD) | st.text(max_size=20))}', False
    elif how == 'key' and 'config' in need:
        key = draw(one_of(sorted(keys.KEYS)))
        bad, wrong = f'--config.{key}={draw(one_of(BAD_FLAGS["int"]))}', isinstance(keys.KEYS[key], keys.Whole)
    argv = [*need.values(), bad]
    kind.attempt(lambda: parsed(command, *argv), (command.__name__, argv), wrong, SystemExit)


# Configurations

ALL_KEYS = keys.KEYS | {f'{phase}.{k}': kind for phase in ('sft', 'grpo') for k, kind in keys.PHASE_KEYS.items()}
NO_TEXT = (None, 3, float('nan'), True, 'x\0', '\ud800', {})
DURATION = ('x', '1.5', 'nan', '-2', '', True, 1.5, [1], {}, '9' * 40, '1e3s', '\u00b2', 'x' * 5000, *NOT_FINITE)
SCHEDULE = ('', None, True, [1], {}, 'nan', '1e999', 'linear 1', 'linear nan 1', 'cosine 1 inf', 'linear 1 0 warmup')
SCHEDULE += ('linear 1 0 over nan', 'constant 1 after 2s', 'linear 1 0 over 5s over 5s', 'x' * 5000, *NOT_FINITE)
NO_ROWS = [[]], [['(']], [['.*', 1]], [['(', None]], [['.*', float('nan'), 0, 'a', 0]], [['.*', 1, 0, 'a', 'soon']], 'x'
BAD_VALUES = {
    bool: (0, 'yes', None, float('nan'), {}),
    str: (*NO_TEXT, 'x' * 100_001),
    pathlib.Path: (*NO_TEXT, 'x' * 5000),
    keys.REGEX: (*NO_TEXT, '(', '*', '[a', '(?P<', 'a{99999999999}', '(' * 5000),
    tuple: ('sft', 3, None, ['nope'], [3], ['x\0'], [['sft']], [], {}),
    'table': (*NO_ROWS, [[3, None]], [3], None, 3, {}),
    'grad_clip': (*NOT_FINITE, None, True, 0, -1, 'x', (('nope', 1.0),), (('a',),), [], {}),
}


def bad_values(key: str) -> tuple:
    """Values that a key cannot have."""
    kind, name = ALL_KEYS[key], key.rpartition('.')[2]
    if isinstance(kind, keys.Whole | keys.Real):
        more = (1.5, *HUGE) if isinstance(kind, keys.Whole) else (1e31,)
        return (*more, *NOT_FINITE, 'x', '3', None, [1], {}, *(() if kind.least is None else (kind.least - 1,)))
    if kind is object and name not in BAD_VALUES:
        return SCHEDULE if name in objectives.KNOBS or name.startswith('learning_rate') else DURATION
    if isinstance(kind, type | str) and (kind in BAD_VALUES or name in BAD_VALUES):
        return BAD_VALUES.get(kind) or BAD_VALUES[name]
    return 'nope', '', 'x\0', None, 3, '\ud800', {}, 'x' * 3000  # one of some texts


@inputs(refused=0.7)
def test_configs(kind, draw, root):
    cfg, given, wrong = small_run.config(root / 'world'), {}, False
    for key in draw(st.lists(one_of(sorted(ALL_KEYS)), min_size=1, max_size=2, unique=True)):
        bad = draw(one_of((True, True, True, False)))
        given[key], wrong = draw(one_of(bad_values(key)) if bad else JUNK), wrong or bad
    with cfg.ignore_type():
        for key, value in given.items():
            block, _, name = key.rpartition('.')
            (cfg[block] if block else cfg)[name] = value
    run = kind.attempt(lambda: config.plan(cfg), given, wrong)
    for phase in run.phases if run else ():
        ends = [phase.knobs(t) for t in (0, phase.end - phase.start - 1)]
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(ends)), given


# JSON files

KEEP = checkpoint.Keep()
READ = {  # file -> how the folder is read that it is in
    'world/subject/config.json': lambda root: config.plan(small_run.config(root)),
    'world/subject/tokenizer.json': lambda root: config.plan(small_run.config(root)),
    'world/subject/tokenizer_config.json': lambda root: config.plan(small_run.config(root)),
    'world/data/train/meta.json': lambda root: config.plan(small_run.config(root)),
    'split/train/meta.json': lambda root: small_split.held(small_split.open_train(root / 'train')),
    **{f'run/{name}': report.write_report for name in ('config.json', 'summary.json', 'evaluation.json')},
    **{f'run/{name}': report.write_report for name in ('metrics.jsonl', 'samples.jsonl')},
    'run/checkpoints/3/_CHECKPOINT_METADATA': lambda root: checkpoint.Checkpoints(root / 'checkpoints', KEEP).info(3),
    'lens/lens.json': lambda root: lens_folder.check(root, lens()),
    'tuned/tuned_lens.json': lambda root: translators.read(root, TINY),
    'out/settings.json': lambda root: rollouts.Rows(root, None, 5, {'model': 'm', 'temperature': 0.5}, True),
}


@inputs(refused=0.6)
def test_json_files(kind, draw, root):
    name = draw(one_of(sorted(READ)))
    folder, _, file = name.partition('/')
    good, lines = (root / name).read_bytes(), name.endswith('.jsonl')  # of which damaged ones are left out
    if draw(st.booleans()):
        content, wrong = ruined(draw, good), not lines
    else:
        *others, last = good.splitlines() if lines else [good]
        new = changed(draw, json.loads(last))
        content = b'\n'.join([*others, json.dumps(new).encode(), b''])
        wrong = 'METADATA' in name and new != json.loads(last)
    with copied(root / folder, file, content) as new:
        kind.attempt(lambda: READ[name](new), (name, content), wrong)


# Arrays of a split

START = "{'descr': '<i4', 'fortran_order': False, 'shape': "
HEADERS = (START + '(-1, 13), }', START + '(10000000000000, 1000000), }', START + '(10, 13), ', START + '3}', '{' * 90)
HEADERS += (
    START.replace('<i4', '|O') + '(10, 13), }',
    "__import__('os').abort()",
    '(' * 9000,
    '',
    START + "('a', 2), }",
)
OUTSIDE = dict.fromkeys(('tokens', 'explanations'), (-1, small_split.VOCAB, 2**40, -(2**40)))
OUTSIDE |= {'lengths': (0, -1, small_split.S + 1, 2**40), 'positions': (-2, 100, 2**40), 'facts': (-2, 99, 2**40)}


def put(draw, name: str, good: np.ndarray, path: pathlib.Path) -> str:
    """Writes a damaged array, or the same one in another form; returns what was done."""
    how = draw(one_of(('same', 'type', 'shape', 'value', 'header', 'cut', 'other', 'no file')))
    x = good.astype(draw(one_of(('>i4', '>i8', '<i8', '<i2', '>i2'))))
    if how == 'type':
        x = good.astype(draw(one_of(('f4', '>f8', 'c8', 'O', 'S3', 'U4', 'm8[s]', '?'))))
    elif how == 'shape':
        x = draw(one_of((good[None], good[:-1], good[:0], good[..., None], np.array(3))))
    elif how == 'value' and name in OUTSIDE:
        x = good.astype(np.int64)
        x[tuple(draw(st.integers(0, n - 1)) for n in x.shape)] = draw(one_of(OUTSIDE[name]))
    elif how == 'no file':
        draw(one_of((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to('/dev/zero'))))()
        return how
    np.save(path, np.asfortranarray(x) if draw(st.booleans()) else x)
    if how == 'cut' or (how == 'value' and name not in OUTSIDE):
        os.truncate(path, draw(st.integers(0, path.stat().st_size - 1)))
    elif how == 'header':
        text, version = draw(one_of(HEADERS)).encode(), draw(one_of((b'\1\0', b'\2\0', b'\x09\x09')))
        path.write_bytes(b'\x93NUMPY' + version + len(text).to_bytes(2, 'little') + text + good.tobytes())
    elif how == 'other':
        with path.open('wb') as file:
            draw(one_of((lambda: np.savez(file, good), lambda: good.dump(file), lambda: file.write(b'1 2 3'))))()
    return how


@inputs(refused=0.6)
def test_arrays(kind, draw, root):
    good = small_split.arrays()
    name = draw(one_of(sorted(good)))
    with copied(root / 'split', f'train/{name}.npy') as folder:
        path = folder / f'train/{name}.npy'
        how = put(draw, name, good[name], path)
        content = path.read_bytes() if path.is_file() else path.stat().st_mode
        split = kind.attempt(lambda: small_split.open_train(folder / 'train'), (name, how, content), how != 'same')
        assert split or how != 'same', kind.said
        if split:
            assert all(np.array_equal(getattr(split, k), x) for k, x in good.items()), name
            assert small_split.held(split)['tokens'].dtype == np.int32
