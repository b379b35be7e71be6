"""Files of every suffix, packing, encoding and layout give the same rows, or one sentence that says why not."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import zipfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_gen import readers, tables
from lens.errors import LensError

ROWS = [{'text': f'Story é {i}: "once"\nthere was a fox, 2020-01-0{i % 9 + 1}', 'id': str(i)} for i in range(40)]
OBJECTS = [json.dumps(r, ensure_ascii=False) for r in ROWS]
LINES = ''.join(line + '\n' for line in OBJECTS)


def comma_separated(delimiter=','):
    out = io.StringIO(newline='')
    writer = csv.DictWriter(out, ['text', 'id'], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


def zipped(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        for name, content in members.items():
            archive.writestr(name.replace('_', '.'), content)
    return out.getvalue()


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, 'zstd') as f:
        f.write(content)
    return sink.getvalue().to_pybytes()


def parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=7)
    return out.getvalue()


GOOD = {
    'a.jsonl': LINES,
    'A.JSONL': LINES,
    'a.ndjson': LINES.replace('\n', '\n\n'),
    'windows.jsonl': LINES.replace('\n', '\r\n'),
    'bom.jsonl': LINES.encode('utf-8-sig'),
    'utf16.jsonl': LINES.encode('utf-16'),
    'utf32.csv': comma_separated().encode('utf-32'),
    'a.jsonl.gz': gzip.compress(LINES.encode()),
    'a.JSONL.BZ2': bz2.compress(LINES.encode()),
    'a.json.xz': lzma.compress(LINES.encode()),
    'a.jsonl.zst': zstandard(LINES.encode()),
    'a.zip': zipped(a_jsonl=LINES),
    'a.csv': comma_separated(),
    'a.csv.gz': gzip.compress(comma_separated().encode()),
    'a.TSV': comma_separated('\t'),
    'a.Parquet': parquet(ROWS),
    'array.json': json.dumps(ROWS),
    'indented.json': json.dumps(ROWS, indent=2),
    'array_of_lines.json': '[\n' + ',\n'.join(OBJECTS) + '\n]\n',
    'spread.json': '\n'.join(json.dumps(r, indent=1) for r in ROWS),
    'side_by_side.json': ' '.join(OBJECTS),
    'field.json': json.dumps({'version': 1, 'data': ROWS}),
    'indented_field.json': json.dumps({'version': 1, 'data': ROWS}, indent=2),
    'field_of_lines.json': '{"version": 1, "data": [\n' + ',\n'.join(OBJECTS) + '\n]}',
}


def put(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize('name', GOOD)
@pytest.mark.parametrize('head', [readers.HEAD, 150])
def test_every_suffix_packing_encoding_and_layout(tmp_path, monkeypatch, name, head):
    monkeypatch.setattr(readers, 'HEAD', head)  # a file of many times what is read at a time
    table = tables.open_table(put(tmp_path / name, GOOD[name]))
    assert table.count == 40 and set(table.columns) == {'text', 'id'}
    for start in (0, 11, 39, 40):
        assert list(table.rows(start)) == list(enumerate(ROWS))[start:]


def test_rows_that_are_no_objects(tmp_path):
    chat = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    bare = tables.open_table(put(tmp_path / 'a.jsonl', f'{json.dumps(chat)}\n"a text"\n{{torn\n3\n'))
    assert [row for _, row in bare.rows(0)] == [{'messages': chat}, {'text': 'a text'}, None, None]
    nested = tables.open_table(put(tmp_path / 'a.json', json.dumps([chat, chat])))
    assert [row for _, row in nested.rows(0)] == [{'messages': chat}] * 2
    one = tables.open_table(put(tmp_path / 'one.json', json.dumps({'messages': chat})))  # a chat, no list of rows
    assert [row for _, row in one.rows(0)] == [{'messages': chat}]
    torn = tables.open_table(put(tmp_path / 'torn.jsonl', '{"text": "torn\n' + LINES))
    assert torn.count == 41 and list(torn.rows(0))[:2] == [(0, None), (1, ROWS[0])]
    text = tables.open_table(put(tmp_path / 'a.txt', 'one\n\ntwo\r\n'))
    assert [row for _, row in text.rows(0)] == [{'text': 'one'}, {'text': 'two'}]


BAD = {
    'latin.jsonl': (LINES.encode('latin-1'), 'is no UTF-8 text: convert it'),
    'latin.txt': ('é\n'.encode('latin-1'), 'is no UTF-8 text: convert it'),
    'wide.txt': ('ab\n'.encode('utf-16-le'), 'is no UTF-8 text: convert it'),
    'wide.jsonl': ('{"text": "a"}\n'.encode('utf-16-le'), 'is no UTF-8 text: convert it'),
    'gzip.txt': (gzip.compress(b'a\n'), 'is no UTF-8 text: convert it'),
    'cut.jsonl.gz': (gzip.compress(LINES.encode())[:-20], 'is damaged or of another format than its suffix says'),
    'cut.jsonl.zst': (zstandard(LINES.encode())[:-20], 'is damaged or of another format than its suffix says'),
    'plain.jsonl.xz': (LINES, 'is damaged or of another format than its suffix says'),
    'plain.zip': (LINES, 'is damaged or of another format than its suffix says'),
    'plain.parquet': (LINES, 'is damaged or of another format than its suffix says'),
    'pointer.parquet': ('version https://git-lfs.github.com/spec/v1\n', 'is a pointer of git lfs'),
    'two.zip': (zipped(a_jsonl=LINES, b_jsonl=LINES), 'holds 2 files'),
    'texts.pdf': (LINES, "has the suffix '.pdf', which says no format"),
    'texts.tar.gz': (LINES, "has the suffix '.tar.gz', which says no format"),
    'texts': (LINES, "has the suffix 'none', which says no format"),
    'empty.json': ('', 'is empty: it has no rows'),
    'none.json': ('[]', 'is empty: it has no rows'),
    'header.csv': ('id,text\n', 'is empty: it has no rows'),
    'unquoted.csv': ('id,text\n0,Once, twice\n', 'row 1, until line 2, has 3 fields, the header has 2'),
    'twice.csv': ('text,text\na,b\n', 'two columns have one name'),
    'cut.json': (json.dumps(ROWS)[:-100], 'is damaged: what follows row 38 is no JSON'),
    'bad.json': (json.dumps(ROWS).replace('{"text": "Story \\u00e9 7', '{@', 1), 'is damaged: what follows row 7'),
    'deep.json': ('[' * 100_000, 'is damaged: what follows row 0'),
    'number.json': ('17', 'is damaged'),
}


@pytest.mark.parametrize('name', BAD)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(LensError, match=re.escape(message)) as error:
        tables.open_table(put(tmp_path / name, content))
    assert name in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 500


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jsonl')
    (tmp_path / 'folder.jsonl').mkdir()
    (tmp_path / 'link.jsonl').symlink_to('nowhere')
    for name, message in (
        ('pipe.jsonl', 'is no regular file and no folder'),
        ('folder.jsonl', 'gives no data files'),
        ('link.jsonl', 'does not exist'),
        ('no.csv', 'does not exist'),
    ):
        with pytest.raises(LensError, match=message):
            tables.open_table(str(tmp_path / name))


def test_a_row_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, 'MOST_CHARS', 1000)
    monkeypatch.setattr(readers, 'HEAD', 100)
    for name, content in (('a.jsonl', '{"text": "' + 'a' * 2000), ('a.json', '[{"text": "' + 'a' * 9000)):
        with pytest.raises(LensError, match='characters'):
            tables.open_table(put(tmp_path / name, content))


@pytest.mark.parametrize(
    ('names', 'splits'),
    [
        (['train-00000-of-00001.parquet', 'test-00000-of-00001.parquet'], ['train', 'test']),
        (['data/test_sft-00000-of-00001.parquet', 'data/train_sft-00000-of-00001.parquet'], ['test_sft', 'train_sft']),
        (['train-00000-of-00001.parquet', 'train_gen-00000-of-00001.parquet'], ['train', 'train_gen']),
        (['data/train.jsonl', 'data/test.jsonl'], ['train', 'test']),
        (['anything.csv.gz'], ['train']),
    ],
)
def test_the_splits_of_a_folder(tmp_path, names, splits):
    for name, split in zip(names, splits, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        row = {'text': split}
        if name.endswith('parquet'):
            put(tmp_path / name, parquet([row] * 3))
        elif name.endswith('gz'):
            put(tmp_path / name, gzip.compress(f'text\n{split}\n'.encode()))
        else:
            put(tmp_path / name, json.dumps(row))
    for split in splits:
        assert {r['text'] for _, r in tables.open_table(str(tmp_path), split).rows(0)} == {split}
    with pytest.raises(LensError, match=f'has no split trian; its splits: {", ".join(splits)}'):
        tables.open_table(str(tmp_path), 'trian')


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path, capsys):
    for name in ('a.jsonl', 'b.jsonl', 'sub/c.jsonl', 'notes.md'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        put(tmp_path / name, LINES)
    assert tables.open_table(str(tmp_path)).count == 120 and not capsys.readouterr().out
    put(tmp_path / 'e.csv', comma_separated())
    assert tables.open_table(str(tmp_path)).count == 120
    assert 'holds 1 other files of data, which are not read (e.csv)' in capsys.readouterr().out
    put(tmp_path / 'train.jsonl', LINES)
    assert tables.open_table(str(tmp_path)).count == 40
    assert '4 other files of data, which are not read (a.jsonl, b.jsonl, e.csv, …)' in capsys.readouterr().out


def test_names_of_the_hub_may_hold_a_point(monkeypatch):
    monkeypatch.setattr(tables, '_from_hub', lambda *_: datasets.Dataset.from_list(ROWS))
    for name in ('teknium/OpenHermes-2.5', 'one/v1.1-data'):
        assert tables.open_table(name).count == 40
    for name in ('texts.jsonl', 'data/texts.csv.gz', 'data/texts.gz', '/texts', 'a/b/c'):
        with pytest.raises(LensError, match=f'{name} does not exist: give a file'):
            tables.open_table(name)


def test_splits_of_what_has_none(tmp_path):
    with pytest.raises(LensError, match='has no split test; its splits: train'):
        tables.open_table(put(tmp_path / 'a.jsonl', LINES), 'test')
    datasets.Dataset.from_list(ROWS, split='test').save_to_disk(tmp_path / 'saved')
    assert tables.open_table(str(tmp_path / 'saved'), 'test').count == 40
    with pytest.raises(LensError, match='has no split train; its splits: test'):
        tables.open_table(str(tmp_path / 'saved'))


def test_a_number_of_too_many_digits_is_named(tmp_path):
    path = tmp_path / 'x.json'
    path.write_text('{"a": ' + '9' * 5000)
    with pytest.raises(LensError, match=r'x\.json is damaged: what follows row 0 is no JSON'):
        readers.count(path)
