"""What texts tell an encoder beside the last tokens of the source: a scan over layers, label formats and contexts.

    python -m benchmarks.text_ceiling --model=data/smollm2/model --data=data/labels_a,data/labels_b

No lens is trained: the untouched base reads [prompt, words, last m tokens of the source], and a ridge regression on
training documents takes its stream after the block to the activation after the same block. One run of the base gives all
layers. Words: `none` (the context alone), `quote` (as many tokens of the source before the context as a label has), and
the explanations of each folder of --data, which have the same documents and positions. FVE of held-out documents; `beyond`
is the share of what the context leaves open. A trained encoder is better than each of these, by about as much.

Prints one table row for each layer, context and text.
"""

import pathlib

import jax
import numpy as np
from absl import app, flags

from lens import data, hf, metrics
from lens.response import word_count

RIDGE = 10.0 ** np.arange(-4, 5)  # times the mean eigenvalue of the features
TINY = 1e-9  # of features that are all alike, as those of no words and no context
STEP = 16  # widths of rows are multiples of it


def rows_of(split: data.Split, count: int, seed: int):
    """Returns (document, column) of `count` labelled activations, one document after the other, drawn over documents."""
    document, column = np.nonzero(np.asarray(split.positions) >= 0)
    pick = np.sort(np.random.default_rng(seed).permutation(len(document))[:count])
    return document[pick], column[pick]


def texts_of(split: data.Split, rows, words: str, context: int, prompt) -> list[np.ndarray]:
    """Returns the token ids that the encoder reads for each row. words: none | quote | given."""
    out = []
    for i, k in zip(*rows, strict=True):
        end = int(split.positions[i, k]) + 1
        last = np.asarray(split.tokens[i, max(end - context, 0) : end])
        label = np.asarray(split.explanations[i, k])
        label = label[: word_count(label, split.filler)]
        before = np.asarray(split.tokens[i, max(end - context - len(label), 0) : max(end - context, 0)])
        said = {'none': [], 'quote': before, 'given': label}[words]
        out.append(np.concatenate([prompt[0], said, prompt[1], last]).astype(np.int32))
    return out


def streams(model, texts: list[np.ndarray], layers: list[int], batch: int, at=None) -> np.ndarray:
    """Returns the base's stream after each of `layers` at the index `at` of every text, its last one at first: LxNxD."""

    @jax.jit
    def run(tokens_BxT, at_B):
        x, out, low = model.embed(tokens_BxT), [], 0
        for layer in layers:
            x, low = model.run_layers(x, low, layer + 1), layer + 1
            out.append(x[np.arange(len(at_B)), at_B])
        return out

    order = np.argsort([len(t) for t in texts], kind='stable')
    out = np.zeros((len(layers), len(texts), model.config.d_model), np.float32)
    for i in range(0, len(order), batch):
        pick = order[i : i + batch]
        width = -(-max(len(texts[j]) for j in pick) // STEP) * STEP
        tokens, last = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
        for row, j in enumerate(pick):
            tokens[row, : len(texts[j])] = texts[j]
            last[row] = len(texts[j]) - 1 if at is None else at[j]
        out[:, pick] = np.stack(run(tokens, last))[:, : len(pick)]
    return out


def reconstruction(x_NxD, a_NxD, doc_N, x_MxD):
    """Predicts activations of held-out features by ridge regression of a - x on x; its strength by a fifth of the documents."""
    x_NxD, x_MxD = (np.asarray(x, np.float64) for x in (x_NxD, x_MxD))
    mean, inner = x_NxD.mean(0), np.isin(doc_N, np.unique(doc_N)[::5])

    def fit(rows, strength):
        x, y = x_NxD[rows] - mean, (a_NxD - x_NxD)[rows]
        gram, bias = x.T @ x, y.mean(0)
        w = np.linalg.solve(gram + (strength * np.trace(gram) / len(gram) + TINY) * np.eye(len(gram)), x.T @ (y - bias))
        return lambda x: x + (x - mean) @ w + bias

    errors = [((fit(~inner, r)(x_NxD[inner]) - a_NxD[inner]) ** 2).sum() for r in RIDGE]
    return fit(np.ones(len(x_NxD), bool), RIDGE[int(np.argmin(errors))])(x_MxD)


def main(_):
    model, tokenizer = hf.load_model(pathlib.Path(MODEL.value)), hf.load_tokenizer(MODEL.value)
    layers = sorted(int(x) for x in LAYERS.value)
    left, _, right = PROMPT.value.partition('<text>')
    prompt = [tokenizer(x, add_special_tokens=False)['input_ids'] for x in (left, right)]
    counts = {'train': TRAIN.value, 'validation': HELD_OUT.value}

    def of(split, words, context, rows):
        return streams(model, texts_of(split, rows, words, context, prompt), layers, BATCH.value)

    opened = {d: {s: data.open_split(d, s, vocab_size=model.config.vocab_size) for s in counts} for d in DATA.value}
    first = opened[DATA.value[0]]
    rows = {s: rows_of(first[s], n, 0) for s, n in counts.items()}
    target, doc = {}, {}
    for s, (document, column) in rows.items():
        whole = [np.asarray(first[s].tokens[i, : first[s].lengths[i]]) for i in document]
        target[s] = streams(model, whole, layers, BATCH.value, first[s].positions[document, column])
        doc[s] = np.asarray(first[s].doc_id[document])
    print('| after block | context | words | FVE | beyond |\n|---|---|---|---|---|')
    for context in (int(x) for x in CONTEXTS.value):
        open_error = {}
        for name, words in [('none', 'none'), ('quote', 'quote'), *((d, 'given') for d in DATA.value)]:
            source = opened.get(name, first)
            seen = {s: of(source[s], words, context, rows[s]) for s in counts}
            for k, layer in enumerate(layers):
                a, held = target['train'][k], target['validation'][k]
                guess = reconstruction(seen['train'][k], a, doc['train'], seen['validation'][k])
                error = float(((guess - held) ** 2).sum())
                value = metrics.fve(guess, held, doc['validation'])['value']
                open_error.setdefault(layer, error)  # of `none`, the first
                beyond = 1 - error / open_error[layer]
                print(f'| {layer} | {context} | {pathlib.Path(name).name} | {value:.3f} | {beyond:.3f} |', flush=True)


if __name__ == '__main__':
    MODEL = flags.DEFINE_string('model', 'data/smollm2/model', 'Folder of the subject.')
    DATA = flags.DEFINE_list('data', None, 'Folders of labelled data, one for each format.', required=True)
    LAYERS = flags.DEFINE_list('layers', ['9', '12', '15', '18', '22'], '0-based blocks whose output is read.')
    CONTEXTS = flags.DEFINE_list('contexts', ['0', '8', '24'], 'Last tokens of the source that the encoder reads.')
    PROMPT = flags.DEFINE_string('prompt', '<|im_start|>Text: <text>\n', 'Of the encoder.')
    TRAIN = flags.DEFINE_integer('train', 2000, 'Activations of training documents.', 1)
    HELD_OUT = flags.DEFINE_integer('held_out', 800, 'Activations of held-out documents.', 1)
    BATCH = flags.DEFINE_integer('batch', 64, 'Texts in one run of the base.', 1)
    app.run(main)
