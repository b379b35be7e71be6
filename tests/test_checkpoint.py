"""Checkpoints: which are kept, what happens to damaged ones, and when the disk is full."""

import contextlib
import errno
import os
import resource
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from lens import places
from lens.checkpoint import Checkpoints, DamagedError, Keep, check_disk, size
from lens.errors import LensError

LIMIT = 20_000  # bytes of a file on the full disk; the state below needs more, Orbax's descriptions less


def state_of(step):
    """64 kB that do not compress."""
    return {'params': {'w': jax.random.normal(jax.random.key(step), (128, 125))}, 'step': jnp.asarray(step)}


def save(checkpoints, step, fve=None):
    checkpoints.save(step, state_of(step), {'data': {'next_index': step}}, fve)


@pytest.fixture
def said():
    return []


@pytest.fixture
def folder(tmp_path, said):
    """Checkpoints of steps 1, 2 and 3."""
    with Checkpoints(tmp_path / 'c', Keep(3), say=said.append) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step)
    return tmp_path / 'c'


def read_all(checkpoints):
    return checkpoints.newest(lambda step: (checkpoints.info(step), checkpoints.restore(step, state_of(0))))


def largest_file(folder):
    return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def test_kept_are_the_newest_the_best_and_every_nth(tmp_path):
    fve = {1: 0.1, 2: 0.9, 3: None, 4: 0.3, 5: 0.2, 6: 0.8, 7: None, 8: 0.1, 9: None}
    with Checkpoints(tmp_path / 'c', Keep(2, 2), always=lambda step: step % 4 == 0) as checkpoints:
        for step, value in fve.items():
            save(checkpoints, step, value)
        checkpoints.wait()
        assert checkpoints.steps == [2, 4, 6, 8, 9]  # best 2 and 6, newest 8 and 9, multiples of 4
        assert (checkpoints.best_step, checkpoints.latest_step) == (2, 9)
        assert checkpoints.is_best(0.91) and not checkpoints.is_best(0.9) and not checkpoints.is_best(None)
    with Checkpoints(tmp_path / 'c', Keep(2, 2), always=lambda step: step % 4 == 0) as again:
        assert (again.steps, again.best_step) == ([2, 4, 6, 8, 9], 2)


def test_saving_a_step_twice_keeps_the_first(folder, said):
    with Checkpoints(folder, Keep(3), say=said.append) as checkpoints:
        checkpoints.save(3, state_of(99), {})
        assert read_all(checkpoints)[1][1]['step'] == 3
    assert not said


@pytest.mark.parametrize('damage', ['array', 'bit', 'description', 'tree', 'info'])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, said, damage):
    file = {
        'array': largest_file(folder / '3'),
        'bit': largest_file(folder / '3'),
        'description': folder / '3/state/array_metadatas/process_0',
        'tree': folder / '3/state/_METADATA',
        'info': folder / '3/_CHECKPOINT_METADATA',
    }[damage]
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(flipped(content, middle) if damage == 'bit' else content[:middle])
    with Checkpoints(folder, Keep(3), say=said.append) as checkpoints:
        step, (info, state) = read_all(checkpoints)
        assert (step, info['data']['next_index']) == (2, 2)
        np.testing.assert_array_equal(state['params']['w'], state_of(2)['params']['w'])
        assert len(said) == 1 and f'{folder}/3 is damaged' in said[0]
        checkpoints.set_aside(after=2)
        assert checkpoints.steps == [1, 2] and (folder.with_name('c-damaged') / '3').is_dir()
        save(checkpoints, 3)  # the run makes it again
        checkpoints.wait()
        assert checkpoints.steps == [1, 2, 3] and read_all(checkpoints)[0] == 3


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


DAMAGES = {
    'empty': lambda path, content: path.write_bytes(b''),
    'garbage': lambda path, content: path.write_bytes(b'\0\xffgarbage'),
    'list': lambda path, content: path.write_bytes(b'[1]'),
    'deep': lambda path, content: path.write_bytes(b'[' * 100_000),
    'flip': lambda path, content: path.write_bytes(flipped(content, len(content) // 2)),
    'gone': lambda path, content: path.unlink(),
}


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
    """Checkpoints of steps 1 and 2 with figures."""
    folder = tmp_path_factory.mktemp('two') / 'c'
    with Checkpoints(folder, Keep(2)) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, step / 10)
    return folder


def damaged_copies(folder, step, tmp_path, damage):
    """(the damaged file, the folder) for every file of a checkpoint."""
    for n, file in enumerate(sorted(p for p in (folder / str(step)).rglob('*') if p.is_file())):
        copy = tmp_path / str(n) / 'c'
        shutil.copytree(folder, copy)
        path = copy / file.relative_to(folder)
        DAMAGES[damage](path, path.read_bytes())
        yield file.relative_to(folder), copy


@pytest.mark.parametrize('damage', DAMAGES)
def test_every_file_of_a_checkpoint_may_be_damaged(two_steps, tmp_path, damage):
    """What is read is what was saved, of the damaged checkpoint or, as is said, of the one before; reading moves nothing."""
    for file, copy in damaged_copies(two_steps, 2, tmp_path, damage):
        said = []
        checkpoints = Checkpoints(copy, Keep(), say=said.append)
        step, (info, state) = read_all(checkpoints)
        assert info['data'] == {'next_index': step} and info['fve'] == step / 10, file
        np.testing.assert_array_equal(state['params']['w'], state_of(step)['params']['w'], str(file))
        assert (step, len(said)) in ((2, 0), (1, 1)), (file, said)
        assert step == 2 or (f'{copy}/2 is damaged (' in said[0] and '\n' not in said[0])
        assert checkpoints.steps == [1, 2] and checkpoints.best_step in (1, 2)
        assert [p.name for p in copy.parent.glob('*damaged')] == []


@pytest.mark.parametrize('damage', ['empty', 'list', 'deep', 'gone'])
def test_a_run_goes_on_beside_old_checkpoints_that_are_damaged(two_steps, tmp_path, damage):
    """Whatever Orbax reads of them when it begins to write."""
    for file, copy in damaged_copies(two_steps, 1, tmp_path, damage):
        if file.name not in ('_CHECKPOINT_METADATA', 'metrics'):
            continue
        said = []
        with Checkpoints(copy, Keep(1, 1), say=said.append) as checkpoints:
            save(checkpoints, 3, 0.05)
            checkpoints.wait()
            assert checkpoints.steps == [2, 3] and checkpoints.best_step == 2
        assert '1 is damaged' in said[0] or '1/metrics is damaged' in said[0]


def test_damaged_figures_are_written_again(two_steps, tmp_path):
    for file, copy in damaged_copies(two_steps, 2, tmp_path, 'flip'):
        if file.name != 'metrics':
            continue
        copy.joinpath(file).write_text('{"fve": -0.2}')  # a good file of a wrong number
        said = []
        with Checkpoints(copy, Keep(2, 1), say=said.append) as checkpoints:
            for step in (3, 4):
                save(checkpoints, step, 0.15)
            checkpoints.wait()
            assert checkpoints.steps == [2, 3, 4] and checkpoints.best_step == 2
        assert len(said) == 1 and f'{copy}/2/metrics is damaged' in said[0]


def test_no_flipped_bit_of_a_description_is_believed(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / 'c')
    checkpoints, file = Checkpoints(tmp_path / 'c', Keep()), tmp_path / 'c/2/_CHECKPOINT_METADATA'
    content, wanted, damaged = file.read_bytes(), checkpoints.info(2), 0
    start = content.index(b'"custom_metadata"')
    for at in range(start, len(content), 5):
        file.write_bytes(flipped(content, at))
        try:
            assert checkpoints.info(2) == wanted
        except DamagedError:
            damaged += 1
    assert damaged > (len(content) - start) / 5 * 0.9


def test_when_none_can_be_read_it_says_so(folder, said, monkeypatch):
    monkeypatch.setattr(places, 'check_identity', lambda *identities: None)
    for step in (1, 2, 3):
        largest_file(folder / str(step)).write_bytes(b'')
    with (
        Checkpoints(folder, Keep(3), say=said.append) as checkpoints,
        pytest.raises(
            LensError, match=r'1 is damaged .+ None of the others can be read either: start in another --work'
        ) as e,
    ):
        checkpoints.resume({}, state_of)
    assert not isinstance(e.value, DamagedError) and len(said) == 3
    assert sorted(p.name for p in folder.parent.iterdir()) == ['c'], 'nothing was moved'


def test_other_shapes_are_named_and_nothing_is_skipped(folder, said):
    other = {'params': {'w': jnp.zeros((128, 7)), 'b': jnp.zeros(3)}, 'step': jnp.asarray(0)}
    with Checkpoints(folder, Keep(3), say=said.append) as checkpoints:
        with pytest.raises(LensError, match=r'params/b none instead of \(3,\); params/w \(128, 125\) instead of') as e:
            checkpoints.newest(lambda step: checkpoints.restore(step, other))
        assert not isinstance(e.value, DamagedError) and not said


def test_weights_alone(folder):
    with Checkpoints(folder, Keep(3)) as checkpoints:
        got = checkpoints.restore(2, {'params': state_of(0)['params']})
    assert got.keys() == {'params'}
    np.testing.assert_array_equal(got['params']['w'], state_of(2)['params']['w'])


def test_a_full_disk_costs_one_checkpoint(folder, said):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(folder, Keep(2), say=said.append) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
        try:
            save(checkpoints, 4)
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert len(said) == 1 and 'the checkpoint of step 4 could not be written' in said[0], said
        assert 'the last good one is step 3' in said[0]
        assert checkpoints.steps[-1] == 3 and read_all(checkpoints)[0] == 3
        save(checkpoints, 5)
        checkpoints.wait()
        assert checkpoints.latest_step == 5 and len(said) == 1
    assert not list(folder.glob('*tmp*'))


def test_a_run_does_not_end_well_without_its_last_checkpoint(folder, said):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(folder, Keep(2), say=said.append) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
        try:
            with pytest.raises(
                LensError, match=r'of step 4 could not be written to .* \(File too large\).*step 3: free'
            ) as e:
                checkpoints.save(4, state_of(4), {}, None, True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert '\n' not in str(e.value) and not said and checkpoints.steps[-1] == 3
        checkpoints.save(5, state_of(5), {}, None, True)
        assert (folder / '5').is_dir(), 'complete when it returns'


def test_the_end_of_orbax_hides_no_lost_checkpoint(folder, monkeypatch):
    def full(checkpointer):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.training.Checkpointer, 'close', full)  # it raises again what its writes have raised
    with pytest.raises(LensError, match='step 4'), Checkpoints(folder, Keep(2)) as checkpoints:
        checkpoints.save(4, state_of(4), {}, None, True)
        raise LensError('the checkpoint of step 4 could not be written')


@pytest.mark.parametrize(
    ('free', 'begun', 'said'),
    [
        (99, False, 'refused'),
        (99, True, 'refused'),
        (150, False, 'warned'),
        (150, True, ''),
        (200, False, ''),
        (0, 0, ''),
    ],
)
def test_the_disk_has_room_for_a_checkpoint(tmp_path, monkeypatch, free, begun, said):
    """Free of 1000 bytes, of a disk that tells nothing in the last case."""
    if begun:
        (tmp_path / 'checkpoints/7').mkdir(parents=True)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: types.SimpleNamespace(total=1000 * bool(free), free=free))
    state, heard = {'a': jax.ShapeDtypeStruct((5, 4), jnp.float32), 'b': jnp.zeros(10, jnp.bfloat16)}, []
    with (
        contextlib.nullcontext() if said != 'refused' else pytest.raises(LensError, match=f'the disk of {tmp_path} has')
    ):
        check_disk(tmp_path, size(state), heard.append)
    assert [x.split(':')[0] for x in heard] == ['warning'] * (said == 'warned')


def test_what_a_killed_write_left_is_removed(folder):
    rest = folder / '4.orbax-checkpoint-tmp'
    rest.mkdir()
    (rest / 'half').write_text('x')
    with Checkpoints(folder, Keep(3)) as checkpoints:
        assert checkpoints.steps == [1, 2, 3]
        checkpoints.clean()
    assert not rest.exists()
