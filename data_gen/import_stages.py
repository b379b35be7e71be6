"""NLA data for lens.main: python -m data_gen.import_stages --input=av_sft.parquet,ar_sft.parquet --tokenizer=MODEL_DIR --out=data/nla

Makes a data folder of Parquet files of the stages base, av_sft, ar_sft or rl (data_gen/parquet_stages.py), which stand beside
their sidecars. The folder holds the stored vectors, positions and, where the files have explanations, their tokens: lens.main
trains on it without reading the subject, whose texts it does not have. --vectors=False makes a folder of texts instead, of
which the subject reads its activations anew; rows whose text has other tokens than it had are left out then.

Held out are whole documents. Explanations are cut at --explanation_len tokens and filled with pad_id, as by data_gen.label;
explanation_open and explanation_close of the recipe are put around them in training. Vectors are never all in memory.
"""

import dataclasses
import hashlib
import pathlib
import random

import numpy as np

from lens import files
from lens.errors import LensError, need_package

from .options import command, need, option

FORMAT = 'lens-tokens/1'  # lens.data.FORMAT; that module loads more than --help needs
SPLITS = ('validation', 'train')


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    input: str = option('', 'Parquet files, separated by commas.')
    tokenizer: str = option('', 'Directory or Hub id of the model that decoder and encoder start from.')
    out: str = option('', 'New folder for train/ and validation/.')
    vectors: bool = option(True, 'Keep the vectors that are stored, and no texts.')
    store: str = option('float32', 'What they are rounded to.', choices=('float32', 'bfloat16'))
    explanation_len: int = option(0, 'Tokens of an explanation; 0: of the longest.', 0, 1 << 16)
    validation_fraction: float = option(0.05, 'Share of held-out documents.', 0, 1)
    seed: int = option(0, 'Of the cut.', 0)


def number_of(doc_id: str) -> int:
    """Returns the number of a document that is named by a text: 63 bits of a digest, the same in every file."""
    return int.from_bytes(hashlib.blake2b(doc_id.encode(), digest_size=8).digest()) >> 1


@dataclasses.dataclass
class Rows:
    """All rows of all files. place: (document, slot) of each, document -1 where it is left out; names: of documents."""

    stages: list
    doc_id: list[str]
    positions: np.ndarray
    explanations: list[str] | None
    texts: list[str] | None
    place: np.ndarray = None
    names: list[str] = None

    def arrange(self, keep: np.ndarray) -> None:
        """Gives every kept row its place, documents in the order of their names."""
        self.names = sorted({d for d, k in zip(self.doc_id, keep, strict=True) if k})
        index, used = {d: i for i, d in enumerate(self.names)}, np.zeros(len(self.names), int)
        self.place = np.full((len(self.doc_id), 2), -1)
        for i, (doc, k) in enumerate(zip(self.doc_id, keep, strict=True)):
            if k:
                at = index[doc]
                self.place[i], used[at] = (at, used[at]), used[at] + 1

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (documents, most rows of one)."""
        return len(self.names), int(self.place[:, 1].max()) + 1

    def laid_out(self, values: np.ndarray, fill: int) -> np.ndarray:
        """Returns values of rows [..., T] in their places, [N, P, T]."""
        out, kept = np.full((*self.shape, *values.shape[1:]), fill, values.dtype), self.place[:, 0] >= 0
        out[tuple(self.place[kept].T)] = values[kept]
        return out


def read_rows(paths: list[pathlib.Path], texts: bool) -> Rows:
    """Reads all but the vectors. Raises LensError where files do not belong together."""
    from . import parquet_stages

    stages = [parquet_stages.open_stage(p) for p in paths]
    for key in ('base', 'd_model', 'layer'):
        if len({getattr(s.side, key) for s in stages}) > 1:
            raise LensError(f'{paths[0]} and the other files differ in {key}: give files of one model and block.')
    names = ['doc_id', 'n_raw_tokens'] + ['detokenized_text_truncated'] * texts
    columns = [s.scalars(*names) for s in stages]
    doc_id, counts, *text = ([x for c in columns for x in c[k]] for k in names)
    positions = np.array(counts, np.int64) - 1
    if not len(positions) or positions.min() < 0 or positions.max() >= 1 << 31:
        raise LensError(f'{paths[0]} has no rows, or an n_raw_tokens that is no count of tokens: extract it again.')
    with_words = [s.name != 'rl' and (s.name != 'base' or 'api_explanation' in s.columns) for s in stages]
    if any(with_words) != all(with_words):
        raise LensError('Some of the files have explanations and others have none: import them as two folders.')
    explanations = [x for s in stages for x in s.explanations()] if all(with_words) else None
    return Rows(stages, doc_id, positions.astype(np.int32), explanations, text[0] if texts else None)


def tokenized(rows: Rows, tokenizer) -> dict[str, np.ndarray]:
    """Returns the tokens of every document, of its longest text, whose row has as many as n_raw_tokens says."""
    longest = {}
    for i, doc in enumerate(rows.doc_id):
        if rows.positions[i] > rows.positions[longest.setdefault(doc, i)]:
            longest[doc] = i
    made = tokenizer([rows.texts[i] for i in longest.values()])['input_ids']
    ids = zip(longest, longest.values(), made, strict=True)
    return {doc: np.array(x, np.int32) for doc, i, x in ids if len(x) == rows.positions[i] + 1}


def _ends(ids: np.ndarray | None, position: int, text: str, tokenizer) -> bool:
    """Whether the document is `text` up to and with a position."""
    how = {'skip_special_tokens': True, 'clean_up_tokenization_spaces': False}
    return ids is not None and tokenizer.decode(ids[: position + 1], **how) == text


def convert(o: ImportOptions) -> str:
    """Writes the folder; returns a line about it. Raises LensError."""
    need(o, 'input', 'tokenizer', 'out')
    need_package('pyarrow', 'datagen', 'data_gen.import_stages')
    from lens import hf

    out = pathlib.Path(o.out)
    files.check_free(out)
    tokenizer = hf.load_tokenizer(o.tokenizer)
    rows = read_rows([pathlib.Path(p.strip()) for p in o.input.split(',') if p.strip()], not o.vectors)
    keep = (
        np.ones(len(rows.doc_id), bool) if rows.explanations is None else np.array([bool(x) for x in rows.explanations])
    )
    without, tokens = int((~keep).sum()), None
    if not o.vectors:
        tokens = tokenized(rows, tokenizer)
        keep &= np.array(
            [
                _ends(tokens.get(d), p, x, tokenizer)
                for d, p, x in zip(rows.doc_id, rows.positions, rows.texts, strict=True)
            ]
        )
    rows.arrange(keep)
    if len(rows.names) < 2:
        raise LensError(f'{o.input} leaves {len(rows.names)} documents, too few to split.')
    order = list(rows.names)
    random.Random(o.seed).shuffle(order)
    count = min(max(round(len(order) * o.validation_fraction), 1), len(order) - 1)
    held_out = np.isin(rows.names, order[:count])
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    first = rows.stages[0].side
    meta = {'format': FORMAT, 'vocab_size': max(tokenizer.get_vocab().values()) + 1, 'pad_id': pad, 'filler_id': pad}
    meta |= {'tokenizer_sha256': hf.tokenizer_sha256(o.tokenizer)}
    meta |= {'source': {'files': [s.path.name for s in rows.stages], 'datasets': [s.id for s in rows.stages]}}
    if o.vectors:
        meta |= {'activations': {'layer': first.layer, 'subject': first.base, 'dtype': o.store}}
    with files.new_folder(out) as folder:
        arrays = _arrays(rows, tokenizer, tokens, pad, o)
        for name, mine in zip(SPLITS, (held_out, ~held_out), strict=True):
            (folder / name).mkdir()
            for stem, x in arrays.items():
                np.save(folder / name / f'{stem}.npy', x[mine])
            files.write_json(folder / name / 'meta.json', meta | {'split': name, 'documents': int(mine.sum())})
        if o.vectors:
            _write_vectors(folder, rows, held_out, o.store)
    lost = len(rows.doc_id) - int(keep.sum()) - without
    return (
        f'{int(keep.sum())} activations of {len(rows.names) - count} training and {count} held-out documents after block '
        f'{first.layer} of {first.base} (left out: {without} without an explanation, {lost} whose text '
        f'has other tokens): {out}'
    )


def _arrays(rows: Rows, tokenizer, tokens: dict | None, pad: int, o: ImportOptions) -> dict[str, np.ndarray]:
    """The arrays of all documents but their vectors."""
    out = {'doc_id': np.array([number_of(d) for d in rows.names], np.int64)}
    if o.vectors or rows.explanations is not None:
        out['positions'] = rows.laid_out(rows.positions, -1)
    if rows.explanations is not None:
        how = {'add_special_tokens': False, 'split_special_tokens': True}  # what quotes a special token spells it
        ids = tokenizer([x or '' for x in rows.explanations], **how)['input_ids']
        made = np.full((len(ids), o.explanation_len or max(map(len, ids))), pad, np.int32)
        for row, x in zip(made, ids, strict=True):
            row[: len(x)] = x[: len(row)]
        out['explanations'] = rows.laid_out(made, pad)
    if tokens is not None:
        lengths = np.array([len(tokens[d]) for d in rows.names], np.int32)
        out |= {'lengths': lengths, 'tokens': np.full((len(lengths), lengths.max()), pad, np.int32)}
        for row, d in zip(out['tokens'], rows.names, strict=True):
            row[: len(tokens[d])] = tokens[d]
    return out


def _write_vectors(folder: pathlib.Path, rows: Rows, held_out: np.ndarray, store: str) -> None:
    """Writes activations.npy of both splits, float32 or the 16 bits of bfloat16 as whole numbers; 0 where there is no row."""
    import ml_dtypes

    (_, most), d, files_of, at = rows.shape, rows.stages[0].d, {}, 0
    rank = np.where(held_out, np.cumsum(held_out), np.cumsum(~held_out)) - 1  # of a document in its split
    for name, mine in zip(SPLITS, (held_out, ~held_out), strict=True):
        dtype, shape = np.float32 if store == 'float32' else np.uint16, (int(mine.sum()), most, d)
        files_of[name] = np.lib.format.open_memmap(folder / name / 'activations.npy', 'w+', dtype, shape)
    for stage in rows.stages:
        for first, x in stage.vectors():
            doc, slot = rows.place[at + first : at + first + len(x)].T
            x = x if store == 'float32' else x.astype(ml_dtypes.bfloat16).view(np.uint16)
            for name, mine in zip(SPLITS, (held_out, ~held_out), strict=True):
                here = (doc >= 0) & mine[doc]
                files_of[name][rank[doc[here]], slot[here]] = x[here]
        at += stage.rows
    for x in files_of.values():
        x.flush()


def main() -> None:
    command(ImportOptions, convert)


if __name__ == '__main__':
    main()
