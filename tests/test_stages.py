"""Stored activations as Parquet: names and order as recorded of others, extraction, stages, and back to a data folder."""

import dataclasses
import hashlib
import pathlib

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_gen import activations, import_stages, label_prompts, parquet_stages
from data_gen import extract as extracting
from data_gen.extract import ExtractOptions, extract
from data_gen.import_stages import ImportOptions, convert
from data_gen.parquet_stages import VECTOR, open_stage
from data_gen.stages import StageOptions, build
from data_gen.storyworld import world as story_world
from lens import config, data, feed, hf, rollout
from lens import files as files_of
from lens.errors import LensError
from lens.models import subject
from lens.models.rope import Rope
from lens.models.transformer import TransformerConfig
from tests import small_run
from tests.small_split import message_of
from tests.tiny_world import make_base

LAYER, D = 1, 24


def test_names_split_and_order_are_those_of_others():
    made = parquet_stages.dataset_id(
        'Qwen/Qwen2.5-7B-Instruct', 20, 'openbmb/Ultra-FineWeb', {'start': 0, 'length': 100000}
    )
    assert made == 'base_Qwen2.5-7B-Instruct_L20_945b2c81'
    dealt = parquet_stages.split_documents((f'openbmb/Ultra-FineWeb:en:{i}' for i in range(12)), (0.25, 0.3), 42)
    assert {k: [int(x.rpartition(':')[2]) for x in v] for k, v in dealt.items()} == {
        'av_sft': [5, 3, 10],
        'ar_sft': [6, 7, 4],
        'rl': [9, 11, 2, 0, 1, 8],
    }
    digests = [
        hashlib.sha256(x.encode()).hexdigest()[:12] for x in (parquet_stages.AV_TEMPLATE, parquet_stages.AR_TEMPLATE)
    ]
    assert digests == ['054c09450507', 'b2244f6d1bb9']


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """subject, a random model whose tokenizer has a marker; data, labelled stories; base.parquet, their activations."""
    root = tmp_path_factory.mktemp('stages')
    tokenizer = hf.load_tokenizer('configs/tiny_subject')
    tokenizer.add_tokens(['㈂'])
    tokenizer.save_pretrained(root / 'tokenizer')
    (root / 'tokenizer/config.json').write_bytes(pathlib.Path('configs/tiny_subject/config.json').read_bytes())
    config = TransformerConfig('llama', len(tokenizer), D, 3, 8, 4, 6, 40, 1e-5, True, 128, (Rope(10000.0),))
    hf.save_model(make_base(config), root / 'subject', source=root / 'tokenizer')
    settings = story_world.Settings(train=20, validation=4, positions=3)
    story_world.write_arrays(root / 'data', str(root / 'subject'), settings)
    extract(options(root))
    build(
        StageOptions(base=f'{root}/base.parquet', tokenizer=f'{root}/subject', out=f'{root}/stages', fractions='.3,.2')
    )
    return root


def options(root, name='base.parquet', **how) -> ExtractOptions:
    return ExtractOptions(data=f'{root}/data', subject=f'{root}/subject', layer=LAYER, out=f'{root}/{name}', **how)


def rows_of(path) -> dict:
    """(doc_id, n_raw_tokens) -> the row."""
    rows = pq.read_table(path).to_pylist()
    assert len({(r['doc_id'], r['n_raw_tokens']) for r in rows}) == len(rows)
    return {(r['doc_id'], r['n_raw_tokens']): r for r in rows}


def split_of(root, name='train', folder='data'):
    return data.open_split(root / folder, name, vocab_size=len(hf.load_tokenizer(f'{root}/subject')))


def test_a_row_is_the_stream_at_the_end_of_its_text(root):
    tokenizer, base = hf.load_tokenizer(f'{root}/subject'), hf.load_model(root / 'subject')
    found = rows_of(root / 'base.parquet')
    assert open_stage(root / 'base.parquet').columns == parquet_stages.COLUMNS['base'] and len(found) == 24 * 3
    split, row = split_of(root), 5
    for slot, p in enumerate(split.positions[row].tolist()):
        made = found[f'data_gen.storyworld:train:{split.doc_id[row]}', p + 1]
        ids = tokenizer(made['detokenized_text_truncated'])['input_ids']
        assert ids == split.tokens[row, : p + 1].tolist() and made['activation_layer'] == LAYER
        a = subject.activations(base, np.array([ids], np.int32), np.array([[p]]), LAYER)[0, 0]
        np.testing.assert_allclose(made[VECTOR], a, rtol=1e-4, atol=1e-5)
        words = split.explanations[row, slot]
        ends = np.flatnonzero(words != split.filler)[-1] + 1  # the filler stands between words, too
        assert made['api_explanation'] == tokenizer.decode(words[:ends]).strip()


@pytest.mark.slow
def test_it_goes_on_from_its_shards_and_draws_by_the_rule(root, tmp_path, monkeypatch):
    monkeypatch.setattr(extracting, 'DOCUMENTS', 8)
    for name in ('train', 'validation'):  # without labels
        folder = tmp_path / 'data' / name
        folder.mkdir(parents=True)
        for path in (root / 'data' / name).iterdir():
            if path.stem not in ('positions', 'explanations'):
                (folder / path.name).symlink_to(path)
    (tmp_path / 'subject').symlink_to(root / 'subject')
    how = {'positions': 4, 'min_position': 20, 'store': 'bfloat16', 'form': 'list'}
    read, calls = activations.Reader.__call__, []

    def killed(self, part, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, part, rows)

    monkeypatch.setattr(activations.Reader, '__call__', killed)
    with pytest.raises(KeyboardInterrupt):
        extract(options(tmp_path, **how))
    assert not (tmp_path / 'base.parquet').exists()
    extract(options(tmp_path, **how))
    assert calls == [8, 8, 4, 4, 4]  # the first two are not read again
    extract(options(tmp_path, 'again.parquet', **how | {'store': 'float32'}))
    rounded, whole = (pq.read_table(tmp_path / f'{n}.parquet') for n in ('base', 'again'))
    assert rounded.drop(VECTOR) == whole.drop(VECTOR) and pa.types.is_list(rounded.schema.field(VECTOR).type)
    a, b = (np.stack(x[VECTOR].to_pylist()).astype(np.float32) for x in (rounded, whole))
    np.testing.assert_array_equal(a, b.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith('.')) == []
    doc, split = whole['doc_id'][0].as_py(), split_of(root)
    drawn = label_prompts.draw(np.arange(20, split.lengths[0]), doc, 42, 4)
    assert [n - 1 for n in whole['n_raw_tokens'][:4].to_pylist()] == drawn.tolist()
    assert 'exists and is kept' in extract(options(tmp_path))


def test_stages_hold_the_rows_of_documents_of_their_own(root):
    base, seen = rows_of(root / 'base.parquet'), set()
    for name in parquet_stages.STAGES:
        path = root / 'stages' / f'{name}.parquet'
        stage, rows = open_stage(path), rows_of(path)
        assert stage.columns == parquet_stages.COLUMNS[name]
        meta = yaml.safe_load((root / f'stages/{name}.parquet.nla_meta.yaml').read_text('utf-8'))
        documents = {doc for doc, _ in rows}
        assert len(documents) == {'av_sft': 7, 'ar_sft': 4, 'rl': 13}[name] and not documents & seen
        seen |= documents
        for key, row in rows.items():
            assert row[VECTOR] == base[key][VECTOR]
            words = base[key]['api_explanation']
            if name == 'ar_sft':
                assert row['prompt'] == f'Summary of the following text: <text>{words}</text> <summary>'
            else:
                assert (
                    '<concept><INJECT></concept>' in row['prompt'][0]['content'] and row['prompt'][0]['role'] == 'user'
                )
            assert row.get('response') in (None, f'<explanation>\n{words}\n</explanation>')
        assert meta['row_count'] == len(rows) and list(meta)[:4] == [
            'dataset_id',
            'stage',
            'row_count',
            'extraction',
        ]
        assert (meta['tokens']['critic_suffix_ids'] is None) == (name != 'ar_sft')
        assert meta['dataset_id'].startswith(f'{name}_subject_L1_') and meta['dataset_id'].endswith('__shuf42')
    tokens = meta['tokens']
    assert (tokens['injection_char'], tokens['injection_token_id']) == (
        '㈂',
        len(hf.load_tokenizer(f'{root}/subject')) - 1,
    )
    order = [r['doc_id'] for r in pq.read_table(path, columns=['doc_id']).to_pylist()]
    assert order != sorted(order)


@pytest.mark.parametrize('vectors', [True, False])
def test_a_folder_of_them_is_the_data_they_are_of(root, tmp_path, vectors):
    files = ','.join(f'{root}/stages/{n}.parquet' for n in ('av_sft', 'ar_sft'))
    how = {'tokenizer': f'{root}/subject', 'vectors': vectors, 'validation_fraction': 0.2}
    said = convert(ImportOptions(input=files, out=f'{tmp_path}/it', **how))
    assert said.startswith('33 activations of 9 training and 2 held-out documents after block 1 of ')
    base, rows, tokenizer = rows_of(root / 'base.parquet'), {}, hf.load_tokenizer(f'{root}/subject')
    for name in ('train', 'validation'):
        source = split_of(root, name)
        for row, doc in enumerate(source.doc_id.tolist()):
            rows[import_stages.number_of(f'data_gen.storyworld:train:{doc}')] = source, row, doc
    for name in ('train', 'validation'):
        split = split_of(root, name, tmp_path / 'it')
        assert len(split) == {'train': 9, 'validation': 2}[name]
        for i, number in enumerate(split.doc_id.tolist()):
            source, row, doc = rows[number]
            where = {int(p): slot for slot, p in enumerate(source.positions[row])}
            assert sorted(split.positions[i].tolist()) == sorted(where)
            for slot, p in enumerate(split.positions[i].tolist()):
                made = base[f'data_gen.storyworld:train:{doc}', p + 1]
                words = tokenizer(made['api_explanation'], add_special_tokens=False)['input_ids']
                assert split.explanations[i, slot, : len(words)].tolist() == words
                assert (split.explanations[i, slot, len(words) :] == split.filler).all()
                if vectors:
                    np.testing.assert_array_equal(split.activations[i, slot], np.array(made[VECTOR], np.float32))
            if not vectors:
                n = split.lengths[i]
                assert split.tokens[i, :n].tolist() == source.tokens[row, :n].tolist()


def test_vectors_of_any_part_of_a_column():
    x = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    for kind in (pa.list_(pa.float32(), 3), pa.list_(pa.float64()), pa.list_(pa.float32())):
        part = pa.array(x.tolist(), kind).slice(4, 5)
        np.testing.assert_array_equal(parquet_stages.numbers_of(part, 3, 'it'), x[4:9])


@pytest.mark.parametrize(
    ('rows', 'why'),
    [
        ([[1.0, 2.0], [1.0]], 'without an activation_vector of 2'),
        ([[1.0], [1.0, 2.0, 3.0]], 'without an activation_vector of 2'),
        ([[1.0, 2.0], None], 'without an activation_vector of 2'),
        ([[1.0, float('nan')]], 'finite'),
        ([[0.0, 0.0]], 'not all 0'),
    ],
)
def test_a_bad_vector_is_refused(rows, why):
    with pytest.raises(LensError, match=why):
        parquet_stages.numbers_of(pa.array(rows, pa.list_(pa.float32())), 2, 'it')


@pytest.mark.parametrize(
    ('change', 'why'),
    [
        (lambda s: s.replace('norm: none', 'norm: whitened'), "norm='whitened'"),
        (lambda s: s.replace('d_model: 24', 'd_model: 25'), 'has no column activation_vector of lists of 25'),
        (lambda s: s.replace('kind: nla_dataset', 'kind: other'), "kind='other' is not one of"),
        (lambda s: s.replace('stage: rl', 'stage: later'), 'is no nla_dataset of a block and a stage'),
        (lambda s: s.replace('layer_index: 1', 'layer_index: one'), "layer_index='one' must be a whole"),
        (lambda s: s.replace('d_model: 24', 'd_model: -1'), 'd_model=-1 must be at least 1'),
        (None, 'cannot be read (No such file'),
    ],
)
def test_a_bad_sidecar_is_refused(root, tmp_path, change, why):
    file, side = root / 'stages/rl.parquet', root / 'stages/rl.parquet.nla_meta.yaml'
    (tmp_path / 'rl.parquet').symlink_to(file)
    if change:
        (tmp_path / side.name).write_text(change(side.read_text()))
    with pytest.raises(LensError) as error:
        open_stage(tmp_path / 'rl.parquet')
    assert why in message_of(error)


def test_what_does_not_go_together_is_refused(root, tmp_path):
    def refused(why, files, **how):
        with pytest.raises(LensError, match=why):
            convert(ImportOptions(input=files, tokenizer=f'{root}/subject', out=f'{tmp_path}/it', **how))
        assert not (tmp_path / 'it').exists()

    refused('import them as two folders', f'{root}/stages/rl.parquet,{root}/stages/av_sft.parquet')
    refused('does not exist', f'{root}/stages/none.parquet')
    with pytest.raises(LensError, match='of the stage rl'):
        build(StageOptions(base=f'{root}/stages/rl.parquet', tokenizer=f'{root}/subject', out=f'{tmp_path}/it'))
    with pytest.raises(LensError, match='more than 1 together'):
        build(
            StageOptions(
                base=f'{root}/base.parquet', tokenizer=f'{root}/subject', out=f'{tmp_path}/it', fractions='.7,.7'
            )
        )
    with pytest.raises(LensError, match='no chat template'):
        parquet_stages.token_meta(type('T', (), {'chat_template': None}))


@pytest.fixture(scope='module')
def stored(world, tmp_path_factory):
    """The data of the small run as stored activations of block 1."""
    root = tmp_path_factory.mktemp('stored')
    there = {'data': f'{world}/data', 'subject': f'{world}/subject', 'layer': LAYER, 'out': f'{root}/base.parquet'}
    extract(ExtractOptions(**there))
    length = small_run.config(world).explanation_len
    how = {'tokenizer': f'{world}/subject', 'explanation_len': length, 'validation_fraction': 0.2}
    convert(ImportOptions(input=f'{root}/base.parquet', out=f'{root}/data', **how))
    convert(ImportOptions(input=f'{root}/base.parquet', out=f'{root}/bits', store='bfloat16', **how))
    convert(ImportOptions(input=f'{root}/base.parquet', out=f'{root}/texts', vectors=False, **how))
    return root


def stored_config(world, stored, **changes):
    cfg = small_run.config(world, **{'phases': ('sft',), 'decoder__init': 'identity'} | changes)
    cfg.data.path = f'{stored}/data'
    return cfg


def test_what_is_read_of_stored_activations_is_what_the_subject_reads(world, stored):
    base, vocab = hf.load_model(world / 'subject'), len(hf.load_tokenizer(world / 'subject'))
    texts, vectors, bits = (data.open_split(stored / k, 'train', vocab_size=vocab) for k in ('texts', 'data', 'bits'))
    found = {}
    for name, split in (('texts', texts), ('vectors', vectors), ('bits', bits)):
        batch = feed.held_out(split, documents=5, vectors=3, min_pos=12, seed=0)
        assert ('tokens' in batch) == (name == 'texts') and (batch['positions'] >= 12).all()
        batch = {k: batch[k] for k in ('tokens', 'activations', 'positions', 'explanations') if k in batch}
        found[name] = batch | {'roll': rollout.read(base, batch, layer=LAYER)}
    for k in ('positions', 'explanations'):
        np.testing.assert_array_equal(found['texts'][k], found['vectors'][k])
    a, b, rounded = (np.asarray(found[k]['roll'].a_NxD) for k in ('texts', 'vectors', 'bits'))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rounded, b.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(*(found[k]['roll'].source.position_N for k in ('texts', 'vectors')))
    assert len({data.fingerprint(x) for x in (texts, vectors, bits)}) == 3
    with pytest.raises(data.DataError, match=r'activations\.npy row 0 is also'):
        data.check_disjoint(vectors, dataclasses.replace(vectors, doc_id=-vectors.doc_id))
    batches = feed.train_batches(vectors, documents=4, vectors=2, min_pos=12, labelled=True, seed=0)
    batch = next(batches)
    for i, doc in enumerate(batch['doc_id'].tolist()):
        row = vectors.doc_id.tolist().index(doc)
        for p, a in zip(batch['positions'][i], batch['activations'][i], strict=True):
            assert (a == vectors.activations[row][vectors.positions[row] == p]).all()


@pytest.mark.slow
def test_a_run_without_the_subject_s_texts(world, stored, tmp_path):
    summary = small_run.train(stored_config(world, stored, sft__steps=2), tmp_path)
    assert {'fve', 'fve_greedy', 'fve_shuffled', 'fve_given', 'cosine'} <= summary.keys() and np.isfinite(
        summary['fve']
    )
    assert not {'fve_previous_tokens', 'grounded', 'topic_recall'} & summary.keys()
    rows = [r for r in files_of.read_metrics(tmp_path / 'metrics.jsonl') if r['kind'] == 'train']
    assert len(rows) == 2 and all(np.isfinite(r['loss_encoder']) and np.isfinite(r['loss_decoder']) for r in rows)
    assert '(not stored)' in (tmp_path / 'report.html').read_text()


@pytest.mark.parametrize(
    ('change', 'why'),
    [
        ({'layer': 0}, 'was read after block 1: set layer=1'),
        ({'encoder__context_tokens': 3}, 'encoder.context_tokens=3 needs the texts'),
        ({'sft__kl_weight': 1.0}, 'sft.kl_weight=1.0 needs the texts'),
        ({'decoder__init': 'scale'}, "decoder.init='scale' needs the texts"),
        ({'data__positions': 'final'}, "data.positions='final' needs the texts"),
        ({'decoder__layers': (1,)}, 'decoder.layers=(1,) needs the texts, and'),
    ],
)
def test_what_needs_texts_is_refused(world, stored, change, why):
    with pytest.raises(LensError) as error:
        config.plan(stored_config(world, stored, **change))
    assert why in message_of(error)
