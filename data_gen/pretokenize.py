"""Chats or texts to arrays: python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=MODEL_DIR --out=data/mine

--input is a .jsonl or .parquet file, a text file (a document per line), a folder that `datasets` saved, or
the name of a data set on the Hub. What a row holds is found in this order: question and answer;
user_content and assistant_content; a column of chats (messages); a column `text`; --column names one.
Chats go through the chat template of the tokenizer, gpt-oss chats through Harmony with their thinking.

Written per split: tokens.npy, lengths.npy, doc_id.npy (row number in the input), role.npy (int8 per token;
names and codes in meta.json) and meta.json. Documents are cut at --seq_len tokens; those with fewer than
--min_tokens, repetitions and rows that are no document are left out and counted. The split is by
document. A killed command goes on from its finished shards; existing output is kept unless --force.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections import Counter

import numpy as np
from absl import flags

from data_gen import arrays, chat_data, documents, locks, render, shards
from lens import cli, files
from lens.errors import LensError

FORMAT = 'lens-tokens/1'  # lens.data.FORMAT; that module loads more than a worker process needs
SPLITS = ('train', 'validation')
EXAMPLE_CHARS = 4000  # of the document that is printed


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines the output; the flags say what each is."""

    input: str
    tokenizer: str
    split: str = 'train'
    dataset_config: str | None = None
    column: str | None = None
    validation_input: str | None = None
    validation_split: str | None = None
    validation_fraction: float = 0.05
    seq_len: int = 4096
    min_tokens: int = 16
    truncate: str = 'right'
    reasoning_effort: str = 'medium'
    date: str = render.DATE
    seed: int = 0


def choose(rows: dict[str, np.ndarray], validation_N: np.ndarray, s: Settings, given: bool) -> np.ndarray:
    """The split of every document [N]: 0 train, 1 validation, -1 left out as a repetition.

    given: validation_N says which documents are of the given validation split, which keeps what both have.
    """
    part = validation_N.astype(np.int8)
    order = np.argsort(-part, kind='stable')  # validation first
    first = np.empty(len(part), bool)
    first[order] = arrays.first_of_each(rows['digest'][order])
    kept = np.flatnonzero(first)
    held_out = max(round(len(kept) * s.validation_fraction), 1)
    if not given and len(kept) > held_out:
        part[kept[np.random.default_rng(s.seed).permutation(len(kept))[:held_out]]] = 1
    part[~first] = -1
    return part


def existing(out: pathlib.Path, s: Settings, force: bool) -> str | None:
    """A sentence if `out` is to be kept. Raises LensError if it is something else than data."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        metas = [files.read_json(out / name / 'meta.json', 'choose another --out') for name in SPLITS]
        found = metas[0]['source'].get('settings')
        counts = ' and '.join(f'{m["documents"]} {name}' for m, name in zip(metas, SPLITS, strict=True))
    except (LensError, KeyError, TypeError, AttributeError):
        raise LensError(f'{out} exists and is no folder of tokens: choose another --out.') from None
    if force:
        return None
    other = '' if found == shown_settings(s) else ', made with other settings'
    return f'{out} exists and is kept ({counts} documents{other}); --force makes it again.'


def shown_settings(s: Settings) -> dict:
    """Settings as meta.json has them: files by their name alone."""
    names = ('input', 'tokenizer', 'validation_input')
    values = dataclasses.asdict(s)
    return values | {k: pathlib.Path(values[k]).name for k in names if values[k] and pathlib.Path(values[k]).exists()}


@contextlib.contextmanager
def work_folder(out: pathlib.Path, job: dict):
    """The hidden folder beside `out` that holds the shards; emptied if they are of another job."""
    folder = out.with_name(f'.{out.name}.partial')
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'lock').open('w') as lock:
        locks.take(lock, f'Another command is writing {out}: wait for it, or choose another --out.')
        file = folder / 'job.json'
        if not file.exists() or file.read_text() != json.dumps(job):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.name == 'lock' or path.unlink()
            file.write_text(json.dumps(job))
        try:
            yield folder
        except BaseException:
            if not any(folder.glob('*.npz')):  # nothing to go on from
                shutil.rmtree(folder)
            raise


def open_tables(s: Settings) -> list:
    """[the training rows] or [those, the given validation rows]. Raises LensError."""
    tables = [chat_data.open_table(s.input, s.split, s.dataset_config)]
    if s.validation_input:
        tables.append(chat_data.open_table(s.validation_input, s.validation_split or s.split, s.dataset_config))
    elif s.validation_split and s.validation_split != s.split:
        tables.append(chat_data.open_table(s.input, s.validation_split, s.dataset_config))
    return tables


def pretokenize(s: Settings, out: pathlib.Path, *, num_proc: int = 1, force: bool = False) -> str:
    """Writes out/train and out/validation; returns what they hold, in a few lines. Raises LensError."""
    if kept := existing(out, s, force):
        return kept
    from lens import hf  # with it comes what only this process needs

    tables = open_tables(s)
    formats = [documents.row_format(t, s.column) for t in tables]
    tokenizer = hf.load_tokenizer(s.tokenizer)
    chats = any(form != 'text' for form, _ in formats)
    renderer = render.Renderer(tokenizer, seq_len=s.seq_len, truncate=s.truncate, date=s.date, chats=chats)
    meta = {
        'format': FORMAT,
        'seq_len': s.seq_len,
        'vocab_size': len(tokenizer),
        'pad_id': next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        'tokenizer_sha256': hf.tokenizer_sha256(s.tokenizer),
        'template_sha256': renderer.template_sha256() if chats else None,
        'template': renderer.kind if chats else None,
        'roles': render.ROLES,
    }
    job = dataclasses.asdict(s) | meta | {'tables': [[t.name, len(t), t.identity] for t in tables], 'formats': formats}
    worker = shards.Worker(renderer, tables, formats, s.min_tokens, s.reasoning_effort)
    try:
        with work_folder(out, job) as folder:
            paths = shards.encode_all(worker, folder, num_proc)
            done = finish(s, folder, out, paths, [len(t) for t in tables], meta, formats)
    except OSError as e:
        raise LensError(
            f'{out} cannot be written ({e.strerror or e}): mend that and give the same command, which goes on from '
            'what is finished.'
        ) from None
    return f'{report(out, tokenizer)}\n{done}'


def finish(s: Settings, folder: pathlib.Path, out: pathlib.Path, paths, table_rows, meta: dict, formats) -> str:
    """From shards to `out`. paths: of the shards by table. Raises LensError if too few documents are left."""
    flat = [p for part in paths for p in part]
    rows, counts = shards.read_rows(flat)
    of_validation = rows['shard'] >= len(paths[0])
    part = choose(rows, of_validation, s, given=len(paths) > 1)
    dropped = sum((Counter(c['dropped']) for c in counts), Counter(repeated=int((part < 0).sum())))
    sizes = [int((part == i).sum()) for i in range(len(SPLITS))]
    if min(sizes) == 0:
        reasons = ', '.join(f'{n} {k}' for k, n in dropped.most_common() if n)
        for path in flat:
            path.unlink()
        raise LensError(
            f'{s.input} leaves {sum(sizes)} documents of at least {s.min_tokens} tokens, too few to split '
            f'(left out: {reasons or "none"}).'
        )
    free, needed = shutil.disk_usage(folder).free, sum(sizes) * s.seq_len * 5
    if needed > free:
        raise LensError(f'{out} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left: make room.')
    doc_id = rows['row'] + np.where(of_validation, table_rows[0], 0)
    source = {
        'file': pathlib.Path(s.input).name,
        'rows': sum(table_rows),
        'format': [f[0] for f in formats],
        'dropped': dict(sorted(dropped.items())),
        'settings': shown_settings(s),
    }
    new, bar = folder / 'out', shards.progress('Writing', sum(sizes))
    shutil.rmtree(new, ignore_errors=True)
    for i, name in enumerate(SPLITS):
        keep, split = part == i, new / name
        split.mkdir(parents=True)
        marks = rows['flags'][keep]
        totals = arrays.merge(
            flat, rows['shard'], keep, split, s.seq_len, meta['pad_id'], len(meta['roles']), bar.update
        )
        np.save(split / 'lengths.npy', rows['lengths'][keep])
        np.save(split / 'doc_id.npy', doc_id[keep])
        more = {'split': name, 'documents': sizes[i], 'tokens': int(totals.sum())}
        more['role_tokens'] = {k: int(totals[code]) for k, code in meta['roles'].items()}
        more |= {key: int((marks & flag > 0).sum()) for key, flag in render.FLAGS.items()}
        arrays.write_json(split / 'meta.json', meta | more | {'source': source})
    bar.close()
    arrays.replace_folder(new, out)
    shutil.rmtree(folder)
    left_out = ''.join(f', {n} {k}' for k, n in source['dropped'].items())
    return f'{sizes[0]} train, {sizes[1]} validation documents of {sum(table_rows)} rows (left out: {left_out[2:] or "none"}): {out}'


def report(out: pathlib.Path, tokenizer) -> str:
    """The first training document, its roles in brackets; what truncation took."""
    metas = [files.read_json(out / name / 'meta.json', 'pretokenize again') for name in SPLITS]
    ids, roles, n = (np.load(out / 'train' / f'{k}.npy', mmap_mode='r')[0] for k in ('tokens', 'role', 'lengths'))
    names = {code: name for name, code in metas[0]['roles'].items()}
    runs = np.split(np.arange(n), np.flatnonzero(np.diff(roles[:n])) + 1)
    text = ''.join(f'[{names[int(roles[r[0]])]}] {tokenizer.decode(ids[r])}\n' for r in runs)
    lines = [f'First document:\n{text[:EXAMPLE_CHARS]}{" …" if len(text) > EXAMPLE_CHARS else ""}']
    cut, touched, lost = (sum(m[k] for m in metas) for k in render.FLAGS)
    if cut:
        lines.append(f'{cut} documents were cut at {metas[0]["seq_len"]} tokens.')
    if touched + lost:
        lines.append(
            f'Warning: {lost} documents lost their final assistant message to that and {touched} a part of it: '
            'raise --seq_len, or keep the end with --truncate=left.'
        )
    return '\n'.join(lines)


def main(_):
    values = {f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(Settings)}
    num_proc = flags.FLAGS.num_proc or len(os.sched_getaffinity(0))
    print(pretokenize(Settings(**values), pathlib.Path(flags.FLAGS.out), num_proc=num_proc, force=flags.FLAGS.force))


def define_flags() -> None:
    d = Settings('', '')
    for name, text in {
        'input': 'File, folder or Hub id of the chats or texts.',
        'tokenizer': 'Directory or Hub id of the subject, which has its tokenizer.',
        'column': 'Column of chats or texts, where several are there.',
        'dataset_config': 'Configuration of a Hub data set.',
        'split': 'Split that is read of a data set that has splits.',
        'validation_split': 'Its split that is held out, in place of a cut.',
        'validation_input': 'File, folder or Hub id that is held out, in place of a cut.',
        'date': 'What chat templates print for the current date, YYYY-MM-DD.',
    }.items():
        flags.DEFINE_string(name, getattr(d, name) or None, text)
    flags.DEFINE_string('out', None, 'Folder for train/ and validation/.')
    flags.DEFINE_integer('seq_len', d.seq_len, 'Tokens a document is cut at.', lower_bound=2)
    flags.DEFINE_integer('min_tokens', d.min_tokens, 'Shorter documents are left out.')
    flags.DEFINE_float('validation_fraction', d.validation_fraction, 'Share of held-out documents.', 0.0, 1.0)
    flags.DEFINE_integer('seed', d.seed, 'Of the cut.', lower_bound=0)
    flags.DEFINE_enum('truncate', d.truncate, ['right', 'left'], 'Side on which tokens beyond seq_len are taken off.')
    flags.DEFINE_enum(
        'reasoning_effort', d.reasoning_effort, documents.EFFORTS, 'For the template, where a row names none.'
    )
    flags.DEFINE_integer('num_proc', 0, 'Worker processes; 0: one per core.', lower_bound=0)
    flags.DEFINE_bool('force', False, 'Replace existing output.')
    flags.mark_flags_as_required(['input', 'tokenizer', 'out'])


if __name__ == '__main__':
    define_flags()
    cli.run(main)
