"""The Parquet files that data of natural language autoencoders travels in: columns, sidecars, names, split, order.

A row is an activation. Stages: `base`, activations and the texts that they end, with an explanation each once there is one;
of it `av_sft` (prompt and response of the decoder), `ar_sft` (prompt of the encoder) and `rl` (prompt alone), each of other
documents. Beside FILE.parquet stands FILE.parquet.nla_meta.yaml, which says of what model, block and corpus it is.

Vectors are read and written a few rows at a time, as flat numbers: what Arrow itself takes out of or joins to a column of
lists is wrong above 2^31 numbers. Dimension letters: N rows, D width of the residual stream.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import os
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from lens.configs.nla_qwen2_5_7b import CLOSE, EXPLAIN, OPEN, SUMMARY

from lens.errors import LensError, shown
from lens.interchange import sidecar

from . import readers

VECTOR = 'activation_vector'
ROWS = 4096  # of a row group: at a width of 8192 they have 2^27 bytes
STAGES = ('av_sft', 'ar_sft', 'rl')  # of base, in the order in which they get documents
FORMS = ('fixed_size_list', 'list')
AV_TEMPLATE = EXPLAIN.replace('<embed>', '{injection_char}')
AR_TEMPLATE = '{explanation}'.join(SUMMARY.rsplit('<text>', 1))
MARKERS = range(0x3200, 0x3400)  # the first of them that is one token stands for the vector
EXPLANATION = re.compile(f'{OPEN.strip()}(.*?){CLOSE.strip()}', re.DOTALL)
REST = ('n_raw_tokens', 'activation_layer', 'doc_id', 'detokenized_text_truncated')
COLUMNS = {  # of a stage, in their order
    'base': ('n_raw_tokens', 'detokenized_text_truncated', VECTOR, 'activation_layer', 'doc_id', 'api_explanation'),
    'av_sft': ('prompt', 'response', VECTOR, *REST),
    'ar_sft': ('prompt', VECTOR, *REST),
    'rl': ('prompt', VECTOR, *REST),
}


def dataset_id(base_model: str, layer: int, corpus: str, corpus_slice: dict) -> str:
    """Names a base file after what it is made of: base_MODEL_LLAYER_HASH."""
    digest = hashlib.sha256(f'{base_model}|{layer}|{corpus}|{corpus_slice}'.encode()).hexdigest()
    return f'base_{base_model.rstrip("/").rpartition("/")[2]}_L{layer}_{digest[:8]}'


def split_documents(doc_ids: Iterable[str], fractions: Sequence[float], seed: int) -> dict[str, list[str]]:
    """Deals documents out to STAGES: sorted as texts, shuffled, cut at whole numbers. fractions: of the first two, which
    leave the rest to rl. Raises LensError where they are more than all."""
    if min(fractions) < 0 or sum(fractions) > 1:
        raise LensError(f'fractions {shown(fractions)} must not be negative, nor more than 1 together.')
    order = sorted(set(doc_ids))
    random.Random(seed).shuffle(order)
    first, second = (int(len(order) * f) for f in fractions)
    return dict(zip(STAGES, (order[:first], order[first : first + second], order[first + second :]), strict=True))


def shuffled(n: int, seed: int, name: str) -> np.ndarray:
    """Returns the order of the rows of a shuffled file: row i is row [i] of the file `name` before."""
    order = list(range(n))
    random.Random(hashlib.sha256(f'{seed}|{name}'.encode()).digest()).shuffle(order)
    return np.array(order, np.int64)


def schema(names: Iterable[str], stage: str, d: int, form: str = 'fixed_size_list') -> pa.Schema:
    """Returns the schema of the columns `names` of a stage. form: of the vectors, one of FORMS."""
    chat = pa.list_(pa.struct([('role', pa.string()), ('content', pa.string())]))
    kinds = {'n_raw_tokens': pa.int64(), 'activation_layer': pa.int64()}
    kinds[VECTOR] = pa.list_(pa.float32(), d) if form == 'fixed_size_list' else pa.list_(pa.float32())
    kinds['prompt'] = pa.string() if stage == 'ar_sft' else chat
    return pa.schema([(name, kinds.get(name, pa.string())) for name in names])


@contextlib.contextmanager
def writer(path: pathlib.Path, columns: pa.Schema):
    """Yields add(values, vectors_NxD), which writes up to ROWS rows: values are columns by name, but for the vectors. The
    file appears at the end, whole. Raises LensError where it cannot be written."""
    tmp = path.with_name(f'.{path.name}.tmp')
    vector = columns.field(VECTOR).type

    def add(values: dict[str, list], vectors_NxD: np.ndarray) -> None:
        flat = pa.array(np.ascontiguousarray(vectors_NxD, np.float32).reshape(-1))
        if pa.types.is_fixed_size_list(vector):
            made = pa.FixedSizeListArray.from_arrays(flat, type=vector)
        else:
            ends = np.arange(len(vectors_NxD) + 1, dtype=np.int32) * vectors_NxD.shape[1]
            made = pa.ListArray.from_arrays(pa.array(ends), flat)
        arrays = [made if f.name == VECTOR else pa.array(values[f.name], f.type) for f in columns]
        file.write_table(pa.Table.from_arrays(arrays, schema=columns), row_group_size=ROWS)

    # the bytes of floats apart from each other: of numbers rounded to bfloat16 two of four are 0
    item = f'{VECTOR}.list.element'
    texts = [f.name for f in columns if f.name != VECTOR]
    how = {'compression': 'zstd', 'use_dictionary': texts, 'use_byte_stream_split': [item]}
    try:
        with pq.ParquetWriter(tmp, columns, **how) as file:
            yield add
        os.replace(tmp, path)
    except OSError as e:
        raise LensError(f'{path} cannot be written ({e.strerror or shown(e)}): free some disk.') from e
    finally:
        tmp.unlink(missing_ok=True)


def numbers_of(column, d: int, path: pathlib.Path) -> np.ndarray:
    """Returns the vectors of a part of a column, [N, D] float32. Raises LensError for a row without D finite numbers, or
    of zeros alone."""
    flat = column.flatten()
    wrong = column.null_count or flat.null_count or len(flat) != len(column) * d
    if not wrong and not pa.types.is_fixed_size_list(column.type):
        wrong = (np.diff(column.offsets.to_numpy()) != d).any()
    x = np.zeros((0, d), np.float32) if wrong else flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, d)
    if wrong or not np.isfinite(x).all() or not np.abs(x).max(1, initial=0).all():
        raise LensError(f'{path} has a row without an {VECTOR} of {d} finite numbers that are not all 0: leave it out.')
    return x


@dataclasses.dataclass(frozen=True)
class Stage:
    """A file of a stage: its columns, its number of rows, and what its sidecar says."""

    path: pathlib.Path
    columns: tuple[str, ...]
    rows: int
    side: sidecar.Sidecar

    @property
    def name(self) -> str:
        return self.side.more['stage']

    @property
    def id(self) -> str:
        return str(self.side.more.get('dataset_id', self.path.stem))

    @property
    def d(self) -> int:
        return self.side.d_model

    @property
    def extraction(self) -> dict:
        """Returns where its activations are from, as the sidecar has it."""
        return yaml.safe_load(self.side.file.read_text('utf-8'))['extraction']

    def scalars(self, *names: str) -> dict[str, list]:
        """Returns whole columns, but not that of the vectors. Raises LensError where one is not there."""
        if missing := [n for n in names if n not in self.columns]:
            raise LensError(f'{self.path} has no column {missing[0]}: it has {", ".join(self.columns)}.')
        with readers.reading(self.path):
            found = pq.read_table(self.path, columns=list(names)).to_pydict()
        if holes := [n for n in names if n != 'api_explanation' and None in found[n]]:
            raise LensError(f'{self.path} has a row without {holes[0]}: leave it out.')
        return found

    def vectors(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number of the first row, vectors NxD) of all rows, some at a time. Raises LensError."""
        at = 0
        with readers.reading(self.path), pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(ROWS, columns=[VECTOR]):
                yield at, numbers_of(batch.column(0), self.d, self.path)
                at += len(batch)

    def explanations(self) -> list[str | None]:
        """Returns the explanation of every row, None where there is none. Raises LensError."""
        if self.name == 'base':
            return self.scalars('api_explanation')['api_explanation']
        if self.name == 'av_sft':
            found = (EXPLANATION.search(x) for x in self.scalars('response')['response'])
            return [m and m[1].strip() for m in found]
        if self.name == 'rl':
            return [None] * self.rows
        before, _, after = (self.side.encoder_template or AR_TEMPLATE).partition('{explanation}')
        prompts = self.scalars('prompt')['prompt']
        if wrong := [p for p in prompts if not (p.startswith(before) and p.endswith(after))]:
            raise LensError(f'{self.path} has the prompt {shown(repr(wrong[0]), 60)}, which is not of its template.')
        return [p[len(before) : len(p) - len(after)].strip() for p in prompts]


def open_stage(path: pathlib.Path) -> Stage:
    """Opens a file of a stage with its sidecar. Raises LensError, which names the file and what is wrong with it."""
    if not path.is_file():
        raise LensError(f'{path} does not exist: give a Parquet file of a stage.')
    with readers.reading(path):
        columns, rows = pq.read_schema(path), pq.read_metadata(path).num_rows
    side = sidecar.parse(sidecar.place(path))
    if side.kind != 'nla_dataset' or side.layer is None or side.more.get('stage') not in COLUMNS:
        raise LensError(
            f'{side.file} is no nla_dataset of a block and a stage, {", ".join(COLUMNS)}: give that of the data.'
        )
    d = side.d_model
    kind = columns.field(VECTOR).type if VECTOR in columns.names else None
    lists = kind is not None and (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind))
    if not lists or not pa.types.is_floating(kind.value_type) or getattr(kind, 'list_size', d) != d:
        raise LensError(
            f'{path} has no column {VECTOR} of lists of {d} numbers, as its sidecar says: give its own sidecar.'
        )
    return Stage(path, tuple(columns.names), rows, side)


def write_sidecar(path: pathlib.Path, meta: dict, by: str) -> None:
    """Writes the sidecar of a Parquet file: dataset_id, stage, row_count, extraction and what else `meta` has, in the order
    in which others write it. by: the module that made the data."""
    first = ('dataset_id', 'stage', 'row_count', 'extraction')
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    out = {k: meta[k] for k in first} | {'kind': 'nla_dataset', 'schema_version': 1, 'keep_debug_metadata': True}
    out |= {k: x for k, x in meta.items() if k not in first}
    out |= {'created_at': now, 'created_by': by, 'git_commit': ''}
    tmp = path.with_name(f'.{path.name}.yaml.tmp')
    tmp.write_text(yaml.safe_dump(out, sort_keys=False, allow_unicode=True), 'utf-8')
    os.replace(tmp, sidecar.place(path))


def token_meta(tokenizer) -> dict:
    """Returns what a sidecar says of tokens: the marker, what stands beside it in the prompt of the decoder, the end of that
    of the encoder. Raises LensError for a tokenizer without a chat template or a marker."""
    if not tokenizer.chat_template:
        raise LensError(
            'The tokenizer has no chat template, which prompts of av_sft and rl are for: give one that has.'
        )

    def ids(x: str) -> list[int]:
        return tokenizer(x, add_special_tokens=False)['input_ids']

    marker = next((chr(c) for c in MARKERS if len(i := ids(chr(c))) == 1 and i[0] != tokenizer.unk_token_id), None)
    if marker is None:
        raise LensError('The tokenizer has none of U+3200..U+33FF as one token, to stand for the vector: give another.')
    chat = [{'role': 'user', 'content': AV_TEMPLATE.format(injection_char=marker)}]
    row = ids(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    at = [i for i, x in enumerate(row) if x == ids(marker)[0]]
    if len(at) != 1:
        raise LensError(
            f'The prompt of the decoder has {len(at)} markers {marker} in the tokens of this tokenizer, not one.'
        )
    return {
        'injection_char': marker,
        'injection_token_id': row[at[0]],
        'injection_left_neighbor_id': row[at[0] - 1],
        'injection_right_neighbor_id': row[at[0] + 1],
        # the first one may be joined with the end of an explanation
        'critic_suffix_ids': ids(AR_TEMPLATE.partition('{explanation}')[2])[1:],
    }
