"""Text to arrays: python -m data_gen.pretokenize --input=texts.jsonl --tokenizer=MODEL_DIR --out=data/mine

One document per line: of a .jsonl file the field "text", of any other file the line itself. Documents
are cut at --seq_len tokens; those with fewer than --min_tokens, and repetitions, are left out and
counted. The split is by document.
"""

import hashlib
import json
import pathlib

import numpy as np
from absl import flags

from data_gen import arrays
from lens import cli, data, hf
from lens.errors import LensError

BATCH = 1000  # texts per tokenizer call


def read_texts(path: pathlib.Path):
    """Yields the documents of a file. Raises LensError naming the line."""
    if not path.is_file():
        raise LensError(f'{path} does not exist: --input must be a text or .jsonl file.')
    with path.open(encoding='utf-8') as f:
        for number, line in enumerate(f, 1):
            if path.suffix != '.jsonl':
                yield line.rstrip('\n')
                continue
            try:
                yield json.loads(line)['text']
            except (ValueError, KeyError, TypeError):
                raise LensError(f'{path} line {number} is not a JSON object with a field "text".') from None


def tokenize(texts, tokenizer, seq_len: int, min_tokens: int) -> tuple[list[list[int]], dict[str, int]]:
    """(token ids of the kept documents, counts of the dropped ones by reason)."""
    kept, seen, dropped = [], set(), {'short': 0, 'repeated': 0}
    texts = list(texts)
    for i in range(0, len(texts), BATCH):
        for ids in tokenizer(texts[i : i + BATCH], truncation=True, max_length=seq_len)['input_ids']:
            digest = hashlib.sha256(np.asarray(ids, np.int32).tobytes()).digest()
            reason = 'short' if len(ids) < min_tokens else 'repeated' if digest in seen else None
            if reason:
                dropped[reason] += 1
                continue
            seen.add(digest)
            kept.append(ids)
    return kept, dropped


def split_arrays(rows: list[list[int]], doc_ids: np.ndarray, seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """tokens, lengths and doc_id of one split."""
    tokens = np.full((len(rows), seq_len), pad_id, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return {'tokens': tokens, 'lengths': np.array([len(r) for r in rows], np.int32), 'doc_id': doc_ids.astype(np.int64)}


def pretokenize(
    source: pathlib.Path,
    tokenizer_dir: str,
    out: pathlib.Path,
    *,
    seq_len: int,
    min_tokens: int,
    validation: float,
    seed: int,
) -> str:
    """Writes out/train and out/validation; returns one line that says what they hold. Raises LensError."""
    if out.exists():
        raise LensError(f'{out} exists: remove it or choose another --out.')
    tokenizer = hf.load_tokenizer(tokenizer_dir)
    rows, dropped = tokenize(read_texts(source), tokenizer, seq_len, min_tokens)
    held_out = max(round(len(rows) * validation), 1)
    if len(rows) <= held_out:
        raise LensError(f'{source} leaves {len(rows)} documents of at least {min_tokens} tokens: too few to split.')
    order = np.random.default_rng(seed).permutation(len(rows))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    parts = {'train': np.sort(order[held_out:]), 'validation': np.sort(order[:held_out])}
    meta = {
        'format': data.FORMAT,
        'seq_len': seq_len,
        'vocab_size': len(tokenizer),
        'pad_id': pad_id,
        'tokenizer_sha256': hf.tokenizer_sha256(tokenizer_dir),
        'source': {'file': source.name, 'seed': seed, 'dropped': dropped},
    }
    splits = (
        (
            name,
            split_arrays([rows[i] for i in ids], ids, seq_len, pad_id),
            meta | {'split': name, 'documents': len(ids)},
        )
        for name, ids in parts.items()
    )
    arrays.write_splits(out, splits)
    counts = ', '.join(f'{len(ids)} {name}' for name, ids in parts.items())
    return f'{counts} documents ({dropped["short"]} too short, {dropped["repeated"]} repeated): {out}'


def main(_):
    settings = {'seq_len': SEQ_LEN.value, 'min_tokens': MIN_TOKENS.value, 'validation': VALIDATION_FRACTION.value}
    print(pretokenize(pathlib.Path(INPUT.value), TOKENIZER.value, pathlib.Path(OUT.value), seed=SEED.value, **settings))


if __name__ == '__main__':
    INPUT = flags.DEFINE_string('input', None, 'Text file (a document per line) or .jsonl file with "text" fields.')
    TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Directory of the subject, which holds its tokenizer.')
    OUT = flags.DEFINE_string('out', None, 'Folder for train/ and validation/.')
    SEQ_LEN = flags.DEFINE_integer('seq_len', 512, 'Tokens a document is cut at.', lower_bound=2)
    MIN_TOKENS = flags.DEFINE_integer('min_tokens', 16, 'Shorter documents are left out.')
    VALIDATION_FRACTION = flags.DEFINE_float('validation_fraction', 0.05, 'Share of held-out documents.')
    SEED = flags.DEFINE_integer('seed', 0, 'Of the split.')
    flags.mark_flags_as_required(['input', 'tokenizer', 'out'])
    cli.run(main)
