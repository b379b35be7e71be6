"""Chats or texts to arrays: python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=MODEL_DIR --out=data/mine

--input is a file (JSON lines or an array, CSV, Parquet, .txt with a document per line; also packed, as .jsonl.gz), a
folder of such files or one that `datasets` saved, or the name of a data set on the Hub. What a row holds is found in
this order: question and answer; user_content and assistant_content; a column of chats (messages); a prompt and its
completion, chosen, response or output; a column `text`; --column names one, or a question and its answer.
Chats go through the chat template of the tokenizer, gpt-oss chats through Harmony with their thinking. A chat with
control tokens among its words is left out; what a template leaves out of the others is counted.

Written per split: tokens.npy (as wide as the longest document), lengths.npy, doc_id.npy (row number in the input), role.npy (int8 per token;
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

from lens import files
from lens.errors import LensError, harmless

from . import arrays, documents, journal, render, shards, tables
from .options import command, need, option

FORMAT = 'lens-tokens/1'  # lens.data.FORMAT; that module loads more than a worker process needs
SPLITS = ('train', 'validation')
EXAMPLE_CHARS = 4000  # of the document that is printed
ELSEWHERE = ('out', 'num_proc', 'force')  # options that do not determine what is written


@dataclasses.dataclass(frozen=True)
class PretokenizeOptions:
    input: str = option('', 'File, folder or Hub id of the chats or texts.')
    tokenizer: str = option('', 'Directory or Hub id of the subject, which has its tokenizer.')
    out: str = option('', 'Folder for train/ and validation/.')
    split: str = option('train', 'Split that is read of a data set that has splits.')
    dataset_config: str | None = option(None, 'Configuration of a Hub data set.')
    column: str | None = option(None, 'Column of chats or texts, or QUESTION,ANSWER, where several are there.')
    validation_input: str | None = option(None, 'File, folder or Hub id that is held out, in place of a cut.')
    validation_split: str | None = option(None, 'Its split that is held out, in place of a cut.')
    validation_fraction: float = option(0.05, 'Share of held-out documents.', 0, 1)
    seq_len: int = option(4096, 'Tokens a document is cut at.', 2)
    min_tokens: int = option(16, 'Shorter documents are left out.')
    truncate: str = option('right', 'Side on which tokens beyond seq_len are taken off.', choices=('right', 'left'))
    reasoning_effort: str = option('medium', 'For the template, where a row names none.', choices=documents.EFFORTS)
    date: str = option(render.DATE, 'What chat templates print for the current date, YYYY-MM-DD.')
    seed: int = option(0, 'Of the cut.', 0)
    num_proc: int = option(0, 'Worker processes; 0: one per core.', 0)
    force: bool = option(False, 'Replace existing output.')


def settings(o: PretokenizeOptions) -> dict:
    """Returns what determines the output."""
    return {k: v for k, v in dataclasses.asdict(o).items() if k not in ELSEWHERE}


def shown_settings(o: PretokenizeOptions) -> dict:
    """Returns the settings as meta.json has them: files by their name alone."""
    values = settings(o)
    paths = {k: pathlib.Path(values[k]) for k in ('input', 'tokenizer', 'validation_input') if values[k]}
    return values | {k: path.name for k, path in paths.items() if path.exists()}


def choose(digest_N: np.ndarray, held_out_N: np.ndarray, o: PretokenizeOptions, given: bool) -> np.ndarray:
    """Returns the split of every document [N]: 0 train, 1 validation, -1 left out as a repetition.

    given: held_out_N says which documents are of the given validation split, which keeps what both have.
    """
    order = np.argsort(~held_out_N, kind='stable')  # validation first
    kept = np.sort(order[np.unique(digest_N[order], return_index=True)[1]])  # the first one of each digest
    part = np.full(len(digest_N), -1, np.int8)
    part[kept] = held_out_N[kept]
    count = max(round(len(kept) * o.validation_fraction), 1)
    if not given and len(kept) > count:
        part[kept[np.random.default_rng(o.seed).permutation(len(kept))[:count]]] = 1
    return part


def existing(o: PretokenizeOptions) -> str | None:
    """Returns a sentence if `out` is to be kept. Raises LensError if it is something else than data."""
    out = pathlib.Path(o.out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        metas = [files.read_json(out / name / 'meta.json', 'choose another --out') for name in SPLITS]
        found = metas[0]['source'].get('settings')
        counts = ' and '.join(f'{m["documents"]} {name}' for m, name in zip(metas, SPLITS, strict=True))
    except (LensError, KeyError, TypeError, AttributeError):
        raise LensError(f'{out} exists and is no folder of tokens: choose another --out.') from None
    if o.force:
        return None
    other = '' if found == shown_settings(o) else ', made with other settings'
    return f'{out} exists and is kept ({counts} documents{other}); --force makes it again.'


@contextlib.contextmanager
def work_folder(out: pathlib.Path, job: dict, shards: str = '*.npz'):
    """Yields the hidden folder beside `out` that holds the shards; emptied if they are of another job. shards: what
    their names match."""
    folder = out.with_name(f'.{out.name}.partial')
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock(folder / 'lock', str(out), 'wait for it, or choose another --out'):
        file = folder / 'job.json'
        if not file.exists() or file.read_text() != json.dumps(job):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.name == 'lock' or path.unlink()
            file.write_text(json.dumps(job))
        try:
            yield folder
        except BaseException:
            if not any(folder.glob(shards)):  # nothing to go on from
                shutil.rmtree(folder)
            raise


def open_tables(o: PretokenizeOptions) -> list[tables.Table]:
    """Returns [the training rows] or [those, the given validation rows]. Raises LensError."""
    split = o.validation_split or o.split
    sources = [(o.input, o.split)]
    if o.validation_input or split != o.split:
        sources.append((o.validation_input or o.input, split))
    return [tables.open_table(*source, o.dataset_config) for source in sources]


def pretokenize(o: PretokenizeOptions) -> str:
    """Writes out/train and out/validation; returns what they hold, in a few lines. Raises LensError."""
    need(o, 'input', 'tokenizer', 'out')
    if not 0 <= o.validation_fraction <= 1:  # neither is NaN
        raise LensError(f'--validation_fraction={o.validation_fraction} must be a number from 0 to 1.')
    if kept := existing(o):
        return kept
    from lens import hf  # with it comes what only this process needs

    sources = open_tables(o)
    formats = [documents.row_format(t, o.column) for t in sources]
    tokenizer = hf.load_tokenizer(o.tokenizer)
    chats = any(form != 'text' for form, _ in formats)
    renderer = render.Renderer(tokenizer, seq_len=o.seq_len, truncate=o.truncate, date=o.date, chats=chats)
    meta = {
        'format': FORMAT,
        'seq_len': o.seq_len,
        'vocab_size': max(tokenizer.get_vocab().values()) + 1,  # some have gaps
        'pad_id': next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        'tokenizer_sha256': hf.tokenizer_sha256(o.tokenizer),
        'template_sha256': renderer.template_sha256() if chats else None,
        'template': renderer.kind,
        'roles': render.ROLES,
    }
    job = settings(o) | meta | {'tables': [[t.name, t.count, t.identity] for t in sources], 'formats': formats}
    worker = shards.Worker(renderer, formats, o.min_tokens, o.reasoning_effort)
    try:
        with work_folder(pathlib.Path(o.out), job) as folder:
            paths = shards.encode_all(worker, sources, folder, o.num_proc or len(os.sched_getaffinity(0)))
            done = finish(o, folder, paths, sources, formats, meta)
    except OSError as e:
        raise LensError(
            f'{o.out} cannot be written ({e.strerror or e}): mend that and give the same command, which goes on from '
            'what is finished.'
        ) from None
    return f'{report(pathlib.Path(o.out), tokenizer)}\n{done}'


def finish(o: PretokenizeOptions, folder: pathlib.Path, paths, sources: list, formats: list, meta: dict) -> str:
    """Makes `out` from shards. paths: of the shards by table. Raises LensError if too few documents are left."""
    flat = [p for part in paths for p in part]
    rows, counts = shards.read_rows(flat)
    held_out = rows['shard'] >= len(paths[0])
    part = choose(rows['digest'], held_out, o, given=len(paths) > 1)
    dropped = sum((Counter(c['dropped']) for c in counts), Counter(repeated=int((part < 0).sum())))
    sizes = [int((part == i).sum()) for i in range(len(SPLITS))]
    if min(sizes) == 0:
        reasons = ', '.join(f'{n} {k}' for k, n in dropped.most_common() if n)
        for path in flat:
            path.unlink()
        raise LensError(
            f'{o.input} leaves {sum(sizes)} documents of at least {o.min_tokens} tokens in its {shown_format(formats[0])}, '
            f'too few to split (left out: {reasons or "none"}).'
        )
    out, total, dropped = pathlib.Path(o.out), sum(t.count for t in sources), dict(sorted(dropped.items()))
    journal.check_folder(out, sum(sizes) * int(rows['lengths'][part >= 0].max()) * 5)
    rows['doc_id'] = rows['row'] + np.where(held_out, sources[0].count, 0)
    source = {'file': pathlib.Path(o.input).name, 'rows': total, 'format': [form for form, _ in formats]}
    source |= {'columns': [columns for _, columns in formats], 'dropped': dropped} | lost_parts(rows['lost'][part >= 0])
    meta = meta | {'source': source | {'settings': shown_settings(o)}}
    new, bar = folder / 'out', shards.progress('Writing', sum(sizes))
    shutil.rmtree(new, ignore_errors=True)
    for i, name in enumerate(SPLITS):
        write_split(new / name, flat, rows, part == i, meta | {'split': name, 'documents': sizes[i]}, bar)
    bar.close()
    arrays.replace_folder(new, out)
    shutil.rmtree(folder)
    left_out = ', '.join(f'{n} {k}' for k, n in dropped.items()) or 'none'
    read = shown_format(formats[0])
    return f'{sizes[0]} train, {sizes[1]} validation documents of {total} rows, {read} (left out: {left_out}): {out}'


def shown_format(form: tuple[str, tuple[str, ...]]) -> str:
    """Returns what of a row was read, in words."""
    return f'{"texts" if form[0] == "text" else "chats"} ({" and ".join(form[1])})'


def lost_parts(lost_NxK: np.ndarray) -> dict[str, dict[str, int]]:
    """Returns what the chat template left out of the kept documents: parts of each kind, and documents that lost some."""
    parts, documents = (x.sum(0).tolist() for x in (lost_NxK, lost_NxK > 0))
    counted = {'lost': parts, 'lost_documents': documents}
    return {key: {name: n for name, n in zip(render.LOST, ns, strict=True) if n} for key, ns in counted.items()}


def write_split(folder: pathlib.Path, paths, rows: dict[str, np.ndarray], keep_N: np.ndarray, meta: dict, bar) -> None:
    """Writes the arrays of the kept rows, and meta.json with the counts that follow from them."""
    folder.mkdir(parents=True)
    width, roles = int(rows['lengths'][keep_N].max()), meta['roles']
    totals = arrays.merge(
        paths, rows['shard'], keep_N, folder, width, meta['pad_id'], len(roles), meta['vocab_size'], bar.update
    )
    for name in ('lengths', 'doc_id'):
        np.save(folder / f'{name}.npy', rows[name][keep_N])
    flags = rows['flags'][keep_N]
    counts = {'tokens': int(totals.sum()), 'role_tokens': {k: int(totals[code]) for k, code in roles.items()}}
    counts |= {key: int((flags & flag > 0).sum()) for key, flag in render.FLAGS.items()}
    files.write_json(folder / 'meta.json', meta | counts)


def report(out: pathlib.Path, tokenizer) -> str:
    """Returns the first training document, its roles in brackets, and what truncation took."""
    metas = [files.read_json(out / name / 'meta.json', 'pretokenize again') for name in SPLITS]
    ids, roles, n = (np.load(out / 'train' / f'{k}.npy', mmap_mode='r')[0] for k in ('tokens', 'role', 'lengths'))
    names = {code: name for name, code in metas[0]['roles'].items()}
    runs = np.split(np.arange(n), np.flatnonzero(np.diff(roles[:n])) + 1)
    text = ''.join(f'[{names[int(roles[r[0]])]}] {tokenizer.decode(ids[r])}\n' for r in runs)
    text = harmless(text, '\n\t')
    lines = [f'First document:\n{text[:EXAMPLE_CHARS]}{" …" if len(text) > EXAMPLE_CHARS else ""}']
    cut, touched, lost, unanswered = (sum(m[k] for m in metas) for k in render.FLAGS)
    source = metas[0]['source']
    if cut:
        lines.append(f'{cut} documents were cut at {metas[0]["seq_len"]} tokens.')
    if touched + lost:
        lines.append(
            f'Warning: {lost} documents lost their final assistant message to that and {touched} a part of it: '
            'raise --seq_len, or keep the end with --truncate=left.'
        )
    if source['lost']:
        parts = ', '.join(f'{n} {k} in {source["lost_documents"][k]} documents' for k, n in source['lost'].items())
        lines.append(f'Warning: the chat template leaves out {parts}.')
    if unanswered:
        lines.append(f'Warning: {unanswered} chats do not end with an answer; --column names where it is.')
    return '\n'.join(lines)


def main() -> None:
    command(PretokenizeOptions, pretokenize)


if __name__ == '__main__':
    main()
