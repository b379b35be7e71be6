"""Activations of a data folder, stored: python -m data_gen.extract --data=data/mine --subject=MODEL_DIR --layer=20 --out=data/base.parquet

Reads the documents of a folder of data_gen.pretokenize with the subject and writes the stage `base` of NLA data: a row for
each position with its vector, the stream after block --layer as it is, and the text that it ends. Positions are the labelled
ones, with their explanations, where data_gen.label has been there; else drawn by its rule. data_gen.stages makes training
files of it, data_gen.import_stages a folder that lens.main trains on without the subject.

Documents are read in shards, which a command that was stopped goes on from. --store=bfloat16 rounds vectors, which halves
the file; the column is of float32 all the same, as its readers expect. --form=list writes lists of any length, as old files
have. FILE.parquet.nla_meta.yaml says of what model, block and corpus they are.
"""

import contextlib
import dataclasses
import pathlib

import numpy as np

from lens.errors import LensError, need_package

from . import activations, pretokenize, shards
from .label_prompts import Part, corpus_of, open_part
from .options import command, need, option

DOCUMENTS = 256  # of a shard
DTYPES = ('auto', 'float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class ExtractOptions:
    data: str = option('', 'Folder that data_gen.pretokenize wrote.')
    subject: str = option('', 'Directory or Hub id of the model that is read.')
    layer: int = option(-1, '0-based block whose output is read.', -1)
    out: str = option('', 'Parquet file that is written.')
    splits: str = option('train,validation', 'Splits that are read, in one file.')
    max_documents: int = option(0, 'Only the first documents of each split; 0: all.', 0)
    positions: int = option(10, 'Positions of each document, where it is not labelled.', 1)
    min_position: int = option(50, 'First position that may be sampled.', 0)
    seed: int = option(42, 'Of the positions.', 0)
    dtype: str = option('auto', 'Of the subject; auto: float32 on a CPU, else bfloat16.', choices=DTYPES)
    store: str = option('float32', 'What vectors are rounded to.', choices=DTYPES[1:])
    form: str = option('fixed_size_list', 'Of the column of vectors.', choices=('fixed_size_list', 'list'))
    mesh_model: int = option(1, 'Devices that split the subject.', 1)
    force: bool = option(False, 'Replace an existing file.')


def open_parts(o: ExtractOptions, tokenizer) -> list[Part]:
    """Returns the splits with the positions that are read: labelled ones, or drawn ones. Raises LensError."""
    names = [n.strip() for n in o.splits.split(',') if n.strip()]
    if not names or len(set(names)) < len(names) or set(names) - {'train', 'validation'}:
        raise LensError(f'--splits={o.splits!r} is not train, validation or train,validation.')
    drawn = {'seed': o.seed, 'count': o.positions, 'min_position': o.min_position, 'rows': o.max_documents}
    parts = [open_part(o.data, n, tokenizer, **drawn) for n in names]
    for i, part in enumerate(parts):
        if part.split.positions is not None:
            labelled = np.array(part.split.positions, np.int32)
            labelled[o.max_documents or len(labelled) :] = -1
            parts[i] = dataclasses.replace(part, positions=labelled)
    if not any((p.positions >= 0).any() for p in parts):
        raise LensError(
            f'{o.data} has no document with a token from position {o.min_position} on: lower --min_position.'
        )
    if len({p.split.positions is None for p in parts}) > 1:
        raise LensError(f'{o.data} is labelled in one of its splits alone: name one as --splits.')
    return parts


def _texts(part: Part, tokenizer, rows: np.ndarray) -> dict[str, list]:
    """The columns of some documents but for the vectors, position by position in their order."""
    from lens.response import word_count

    out = {k: [] for k in ('n_raw_tokens', 'detokenized_text_truncated', 'doc_id', 'api_explanation')}
    corpus, given = corpus_of(part.split.meta), part.split.explanations
    how = {'skip_special_tokens': True, 'clean_up_tokenization_spaces': False}
    for row in rows.tolist():
        ids = np.asarray(part.split.tokens[row])
        for slot in np.flatnonzero(part.positions[row] >= 0).tolist():
            n = int(part.positions[row, slot]) + 1
            out['n_raw_tokens'].append(n)
            out['detokenized_text_truncated'].append(tokenizer.decode(ids[:n], **how))
            out['doc_id'].append(f'{corpus}:{int(part.split.doc_id[row])}')
            if given is not None:
                said = given[row, slot, : word_count(given[row, slot], part.split.filler)]
                out['api_explanation'].append(tokenizer.decode(said, **how).strip())
    return out


def _shards(parts: list[Part]) -> list[tuple[Part, np.ndarray]]:
    """Documents that have positions, some of one split at a time."""
    out = []
    for part in parts:
        rows = np.flatnonzero((part.positions >= 0).any(1))
        out += [(part, rows[i : i + DOCUMENTS]) for i in range(0, len(rows), DOCUMENTS)]
    return out


def extract(o: ExtractOptions) -> str:
    """Writes the file and its sidecar; returns a line about it. Raises LensError."""
    need(o, 'data', 'subject', 'out')
    need_package('pyarrow', 'datagen', 'data_gen.extract')
    from lens import hf

    from . import parquet_stages as stages

    out = pathlib.Path(o.out)
    if out.suffix != '.parquet':
        raise LensError(f'--out={o.out} must end with .parquet.')
    if out.exists() and not o.force:
        return f'{out} exists and is kept; --force makes it again.'
    tokenizer, config = hf.load_tokenizer(o.subject), activations.config_of(o.subject, o.layer)
    parts = open_parts(o, tokenizer)
    for part in parts:
        made_with = part.split.meta.get('tokenizer_sha256')
        if made_with not in (None, hf.tokenizer_sha256(o.subject)):
            raise LensError(f'{part.split.directory} was made with another tokenizer than that of {o.subject}.')
    columns = [c for c in stages.COLUMNS['base'] if c != 'api_explanation' or parts[0].split.explanations is not None]
    schema, work = stages.schema(columns, 'base', config.d_model, o.form), _shards(parts)
    with _work_folder(o, parts, out) as folder:
        paths = [folder / f'{i:06}.parquet' for i in range(len(work))]
        counts = [int((part.positions[rows] >= 0).sum()) for part, rows in work]
        done = sum(n for n, path in zip(counts, paths, strict=True) if path.exists())
        bar = shards.progress('Reading', sum(counts), done)
        how = {'dtype': o.dtype, 'mesh_model': o.mesh_model}
        reader = activations.Reader(o.subject, o.layer, **how) if done < sum(counts) else None
        for (part, rows), path, n in zip(work, paths, counts, strict=True):
            if not path.exists():
                _write_shard(path, schema, part, rows, reader(part, rows), tokenizer, o)
                bar.update(n)
        bar.close()
        _join(paths, out, schema, config.d_model)
        stages.write_sidecar(out, _meta(o, parts, sum(counts), config.d_model), 'data_gen.extract')
    documents = sum(len(rows) for _, rows in work)
    return f'{sum(counts)} activations of {documents} documents after block {o.layer} of {o.subject}: {out}'


@contextlib.contextmanager
def _work_folder(o: ExtractOptions, parts: list[Part], out: pathlib.Path):
    """The folder of the shards, emptied where they are of other data or other settings; gone at the end."""
    from lens import data

    job = {k: v for k, v in dataclasses.asdict(o).items() if k != 'force'}
    job |= {'documents': [data.fingerprint(p.split) for p in parts]}
    with pretokenize.work_folder(out, job, '*.parquet') as folder:
        yield folder
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _write_shard(path, schema, part: Part, rows: np.ndarray, a_RxVxD: np.ndarray, tokenizer, o: ExtractOptions) -> None:
    from . import parquet_stages as stages

    values = _texts(part, tokenizer, rows)
    vectors = a_RxVxD[part.positions[rows] >= 0]
    if o.store == 'bfloat16':
        import jax.numpy as jnp

        vectors = vectors.astype(jnp.bfloat16).astype(np.float32)
    values['activation_layer'] = [o.layer] * len(vectors)
    with stages.writer(path, schema) as add:
        for i in range(0, len(vectors), stages.ROWS):
            some = slice(i, i + stages.ROWS)
            add({k: x[some] for k, x in values.items()}, vectors[some])


def _join(paths: list[pathlib.Path], out: pathlib.Path, schema, d: int) -> None:
    """Writes the rows of all shards to one file, a row group at a time."""
    import pyarrow.parquet as pq

    from . import parquet_stages as stages

    with stages.writer(out, schema) as add:
        for path in paths:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(stages.ROWS):
                    values = {n: batch.column(n).to_pylist() for n in schema.names if n != stages.VECTOR}
                    add(values, stages.numbers_of(batch.column(stages.VECTOR), d, path))


def _meta(o: ExtractOptions, parts: list[Part], rows: int, d: int) -> dict:
    from . import parquet_stages as stages

    corpus = corpus_of(parts[0].split.meta).rpartition(':')[0]
    documents = {'start': 0, 'length': sum(int((p.positions >= 0).any(1).sum()) for p in parts)}
    extraction = {
        'base_model': o.subject,
        'd_model': d,
        'layer_index': o.layer,
        'norm': 'none',
        'corpus': corpus,
        'corpus_slice': documents,
        'positions_per_doc': max(p.positions.shape[1] for p in parts),
    }
    out = {'dataset_id': stages.dataset_id(o.subject, o.layer, corpus, documents), 'stage': 'base', 'row_count': rows}
    out |= {'extraction': extraction, 'prompt_templates': {}}
    if parts[0].split.explanations is not None:
        by = f'data_gen.label, {parts[0].split.directory}'
        out['api_summaries'] = {'model': by, 'max_tokens': -1, 'temperature': -1.0, 'instruction_prompt': ''}
        out['dataset_id'] += '__explained'
    return out | {'parent_datasets': []}


def main() -> None:
    command(ExtractOptions, extract)


if __name__ == '__main__':
    main()
