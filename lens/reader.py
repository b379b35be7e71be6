"""A trained lens as an instrument: what it says of any text, and what changes when its words do.

    reader = lens.load('runs/tiny')
    reading = reader.explain('Once Lena found a compass.')   # a table; rows, JSON, page, frame: lens/reading.py
    reader.edit('Once Lena found a compass.', -1, ' Hugo found a compass')

No training data is needed. A text is a str, a list of messages (role, content, perhaps thinking), or token ids; a position
may be negative. Programs are compiled for few widths of texts and one batch size.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from lens import instrument, reopen, sharding, spoken, steer
from lens.errors import LensError, number, shown
from lens.joints import padded
from lens.models.encoder import Source
from lens.reading import Choice, Explanation, Reading, Row, Settings, Word, ranked
from lens.reopen import Reopened

Text = str | Sequence[Mapping] | Sequence[int] | np.ndarray
TOP = 5  # alternatives of a token of an explanation, and of the subject's next
BATCH = 16  # explanations of one program
ENCODED = 4  # times as many texts are read back at a time
OUTLIER = 4.0  # a norm that is so many times the median of the text, or below one over that, is flagged


def load(path: str | pathlib.Path, subject: str = '', batch: int = BATCH, question: str = '') -> 'Reader':
    """Opens a lens: a workdir (its newest checkpoint), a folder of lens.export, a lens of others (lens/interchange), or the
    name of one that ships with the package. No training data is needed.

    subject: where the model that it reads is, if not where it was. batch: explanations that are drawn at a time; more
    take more memory and change no row. question: what an activation oracle is asked, about one vector or, with <embed> for
    each, about several (`describe`). Raises LensError: no lens there, or another subject than that of its training.
    """
    number(batch, 'batch', 1, 4096)
    opened = reopen.open_lens(path, question=question, **{'subject_path': str(subject)} if subject else {})
    return Reader(opened, str(path), batch)


@dataclasses.dataclass
class _Said:
    """An explanation as it was made: its tokens, how probable they and others were there, its reconstruction."""

    ids: list[int]
    found: bool
    sampled: bool
    probability_T: np.ndarray
    alternatives: tuple[np.ndarray, np.ndarray]
    pred_D: np.ndarray
    salience: dict[int, float] = dataclasses.field(default_factory=dict)  # by the first token of a word


class Reader:
    """A lens with its subject on the devices; `load` makes it.

    layer: 0-based block after which it reads. layers: those that its decoder is given, one for each slot; (): `layer` alone.
    tokenizer: of the subject. length: tokens of a response. context_tokens: how many of the last tokens of the text its
    encoder is shown beside the words.
    """

    def __init__(self, opened: Reopened, name: str, batch: int = BATCH):
        self.name, self.run, self.lens = name, opened.run, opened.params
        self.batch = -(-batch // self._rows) * self._rows
        self.config, self.step = opened.config, opened.step
        self.tokenizer, self.base, self.layer = self.run.tokenizer, self.run.base, self.run.layer
        self.length, self.context_tokens = self.run.length, self.lens.encoder.config.context_tokens
        self.layers = self.lens.decoder.config.layers

    def tokens(self, text: Text) -> spoken.Tokens:
        """Returns the tokens of a text as `explain` reads them. Raises LensError."""
        c = self.base.config
        if isinstance(text, str):
            found = spoken.of_text(self.tokenizer, text)
        elif len(text) and isinstance(text[0], Mapping):
            found = spoken.of_chat(self.tokenizer, text)
        else:
            found = spoken.of_ids(self.tokenizer, text, c.vocab_size)
        if not 0 < len(found.ids) <= c.max_positions:
            raise LensError(
                f'The text has {len(found.ids)} tokens, the subject reads 1..{c.max_positions}: give a part.'
            )
        return found

    def explain(
        self,
        text: Text,
        positions: Sequence[int] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        layers: Sequence[int] | None = None,
        **how,
    ) -> Reading:
        """Explains what the subject carries at each token of a text.

        positions: of the tokens that are read; None: all. progress(done, total) hears of each batch. layers: blocks that
        are read; this lens must have been trained for them.
        samples=1: explanations of each token. greedy=True: the first of them is the most probable one, the others are
        drawn. temperature=1.0, seed=0: of what is drawn, which depends on seed, position and number alone.
        salience=True: also reads each explanation without each of its words. Raises LensError.
        """
        found, rows = self.tokens(text), []
        total = len(self.positions(positions, len(found.ids)))
        for row in self.explain_stream(text, positions, layers=layers, **how):
            rows.append(row)
            if progress:
                progress(len(rows), total)
        shows = tuple(zip(found.texts, found.roles, found.messages, strict=True))
        return Reading(tuple(rows), self.about(**Settings(**how).__dict__), shows)

    def explain_stream(
        self, text: Text, positions: Sequence[int] | None = None, *, layers: Sequence[int] | None = None, **how
    ) -> Iterator[Row]:
        """Yields the rows of `explain` a batch at a time, in the order of `positions`. Arguments and errors of `explain`,
        raised at the call."""
        settings = Settings(**how)
        if layers is not None and (*layers,) != (own := self.layers or (self.layer,)):
            of = f'blocks {", ".join(map(str, own))}, one for each slot' if self.layers else f'block {self.layer} alone'
            raise LensError(f'layers={shown(layers)}: this lens was trained on the stream after {of}.')
        found = self.tokens(text)
        at_P = self.positions(positions, len(found.ids))
        read, size = self._read(found.ids), max(self.batch // settings.samples, 1)
        parts = (at_P[i : i + size] for i in range(0, len(at_P), size))
        return (row for at in parts for row in self._explained(found, read, at, settings))

    def best_of(self, text: Text, k: int = 8, positions: Sequence[int] | None = None, **how) -> Reading:
        """Draws k explanations of each token and puts the one first that its activation is best recovered from.

        how: progress, temperature, seed, salience of `explain`. Raises LensError.
        """
        reading = self.explain(text, positions, samples=k, greedy=False, **how)
        return dataclasses.replace(reading, rows=tuple(map(ranked, reading.rows)), about=reading.about | {'best_of': k})

    def activations(self, text: Text, positions: Sequence[int] | None = None) -> np.ndarray:
        """Returns the activations of a text, PxD float32: the stream after block `layer` at positions, or at all tokens.
        Raises LensError."""
        ids = self.tokens(text).ids
        return self._read(ids).a_SxD[self.positions(positions, len(ids))]

    def vectors(self, text: Text, positions: Sequence[int] | None = None) -> np.ndarray:
        """Returns what the decoder is given of a text, as `describe` takes it: activations PxD or, of a lens with `layers`,
        PxKxD. Raises LensError."""
        ids = self.tokens(text).ids
        a_PxD, slots_PxKxD = self._at(self._read(ids), self.positions(positions, len(ids)))
        return a_PxD if slots_PxKxD is None else slots_PxKxD

    def describe(self, vectors, context: Sequence[Sequence[int]] | None = None, **how) -> Reading:
        """Explains vectors NxD, or one of D, as if they were activations: rows without a token, `position` their number.
        NxKxD: one for each of the K slots of its prompt, as a lens with `layers` needs; norm and errors are those of the one of
        `layer`, or where none is, of the first.

        context: the text up to and with the token that each is of, as tokens or a str, for a lens whose encoder is shown
        the last of them, or that knows positions. how: samples, greedy, temperature, seed, salience of `explain`. Raises LensError.
        """
        given = self._vectors(vectors)
        return self._described(self._target(given), given, context, Settings(**how))

    def _described(self, a_NxD: np.ndarray, shown: np.ndarray, context, settings: Settings) -> Reading:
        """What the decoder says where it is given `shown`, with norms and errors of a_NxD."""
        said = self._said(a_NxD, self._after(context, len(a_NxD)), np.arange(len(a_NxD)), settings, shown)
        rows = [
            Row('', -1, i, '', float(np.linalg.norm(a)), tuple(self._explanation(x, a) for x in of_one))
            for i, (a, of_one) in enumerate(zip(a_NxD, said, strict=True))
        ]
        return Reading(tuple(rows), self.about(**settings.__dict__))

    def reconstruct(self, texts, context: Sequence[Sequence[int]] | None = None) -> np.ndarray:
        """Returns what the encoder makes of explanations, NxD float32.

        texts: a str or token ids each, as `words` reads them. context: as in `describe`; without it the words are alone.
        Raises LensError.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self._encode([self.words(t) for t in texts], self._after(context, len(texts)))

    def score(self, vector, texts, context: Sequence[int] | None = None) -> list[dict]:
        """Returns how well each text recovers one vector of D: {'text', 'nmse', 'cosine'}. Raises LensError."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        pred = self.reconstruct(texts, None if context is None else [context] * len(texts))
        a_D = self._target(self._vectors(vector, one=True))[0]
        errors = (self._error(p, a_D) for p in pred)
        return [{'text': t, 'nmse': e, 'cosine': c} for t, (e, c) in zip(texts, errors, strict=True)]

    def compare(self, text_a: Text, text_b: Text, position_a: int = -1, position_b: int = -1, **how) -> Reading:
        """Explains two activations and their difference, rescaled to the norm of the first: rows `a`, `b`, `a - b`.

        how: of `describe`. Raises LensError.
        """
        ids = [self.tokens(t).ids for t in (text_a, text_b)]
        at = [self.positions([p], len(x))[0] for p, x in zip((position_a, position_b), ids, strict=True)]
        of_a, of_b = (self._at(self._read(x), p) for x, p in zip(ids, at, strict=True))
        size, norm = np.linalg.norm(of_a[0] - of_b[0]), np.linalg.norm(of_a[0])
        if size <= 1e-6 * norm:
            raise LensError('The two activations are the same: compare other texts or positions.')

        def three(a, b):
            to, of = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, a - b))
            return np.stack([a, b, (a - b) * (to / of)])

        a_NxD, slots = jax.tree.map(three, of_a, of_b)
        context = [x[: p + 1] for x, p in zip(ids, at, strict=True)]
        shown = self._vectors(a_NxD if slots is None else slots)
        made = self._described(a_NxD, shown, [*context, context[0]], Settings(**how))
        rows = (dataclasses.replace(r, token=t) for r, t in zip(made.rows, ('a', 'b', 'a - b'), strict=True))
        return dataclasses.replace(made, rows=tuple(rows), about=made.about | {'difference_norm': float(size)})

    def edit(self, text: Text, position: int, explanation, **how) -> steer.Edit:
        """Says something else of a token and shows what the subject then does: lens/steer.py. Raises LensError."""
        return steer.edit(self, text, position, explanation, **how)

    def about(self, **settings) -> dict:
        """Returns what a reading says of the lens that made it, and of its settings."""
        of_lens = {'subject': self.config['subject']['path'], 'layer': self.layer, 'lens': self.name, 'step': self.step}
        of_lens |= {'layers': [*self.layers]} if self.layers else {}
        return of_lens | {'error': self.run.error, 'min_pos': self.run.min_pos} | settings

    def words(self, text) -> list[int]:
        """Returns the tokens of an explanation that is given as a str, or as token ids. Raises LensError.

        A str is read with or without a blank before it, whichever makes fewer tokens. A lens without tags fills what is
        shorter than its explanations as its decoder does.
        """
        if isinstance(text, str):
            forms = [
                self.tokenizer(t, add_special_tokens=False)['input_ids'] for t in (text.strip(), f' {text.strip()}')
            ]
            ids = min(forms, key=len)
        else:
            ids = spoken.of_ids(self.tokenizer, text, self.base.config.vocab_size).ids
        tags = self.run.texts.tags
        most = self.length - tags.around
        if not 0 < len(ids) <= most:
            raise LensError(f'An explanation of {len(ids)} tokens was given, this lens reads 1..{most}: give as many.')
        return ids if tags or self._filler is None else [*ids, *[self._filler] * (self.length - len(ids))]

    def text_of(self, ids: Sequence[int]) -> str:
        """Returns the text of an explanation, without control tokens."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip() if self.run.texts.tags.joints else text

    def positions(self, given: Sequence[int] | None, n: int) -> np.ndarray:
        at_P = np.arange(n) if given is None else np.asarray(given).reshape(-1)
        if not len(at_P) or not np.issubdtype(at_P.dtype, np.integer):
            raise LensError(f'positions={shown(given)} must be whole numbers, one at least.')
        if wrong := [int(p) for p in at_P if not -n <= p < n]:
            raise LensError(f'position {wrong[0]} is not in the text, which has the tokens 0..{n - 1}.')
        return at_P % n

    def _vectors(self, given, one: bool = False) -> np.ndarray:
        """Vectors that a caller gives, NxD or NxKxD. one: what is reconstructed will do, where the slots stand for blocks."""
        a, d = np.asarray(given, np.float32), self.base.config.d_model
        a, slots = a[None] if a.ndim == 1 else a, len(self.lens.decoder.slots)
        alone = one or not self.layers
        fits = (a.ndim == 2 and alone) or (a.shape[1:-1] == (slots,) and self.lens.decoder.positions is None)
        if not fits or a.shape[-1] != d or not len(a) or not np.isfinite(a).all():
            wanted = [f'Nx{d}'] * alone + [f'Nx{slots}x{d}'] * (slots > 1 or not alone)
            raise LensError(
                f'vectors of shape {a.shape} were given, this lens takes finite ones {" or ".join(wanted)}.'
            )
        if not a.any(-1).all():
            raise LensError('A vector of zeros was given, which has no direction to say anything of: give another.')
        return a

    def _target(self, a: np.ndarray) -> np.ndarray:
        """The vectors NxD of `layer` among NxKxD."""
        return a if a.ndim == 2 else a[:, self.layers.index(self.layer) if self.layer in self.layers else 0]

    def _at(self, read: instrument.Text, at) -> tuple[np.ndarray, np.ndarray | None]:
        """Activations of tokens, …xD, and those for the slots of the decoder's prompt, …xKxD, where it has layers."""
        return jax.tree.map(lambda x: x[at], (read.a_SxD, read.slots_SxKxD))

    def _source(self, ids: Sequence[int], at_P) -> Source:
        """Where activations of a text are from."""
        at_P = np.asarray(at_P, np.int32) % len(ids)
        recent = at_P[:, None] - np.arange(max(1, self.context_tokens))[::-1]
        return Source(np.asarray(ids, np.int32)[np.maximum(recent, 0)], at_P)

    def _after(self, context, n: int) -> Source:
        """Where n vectors are from, as far as it is said: the tokens that each comes after."""
        if context is None:
            if self.lens.encoder.positions is not None:
                raise LensError('This lens knows positions: give the tokens before each vector or text as context.')
            return Source(np.zeros((n, max(1, self.context_tokens)), np.int32), np.full(n, -1, np.int32))
        if len(context) != n:
            raise LensError(f'context has {len(context)} entries for {n} vectors or texts: give one for each.')
        sources = [self._source(self.tokens(c).ids, [-1]) for c in context]
        return jax.tree.map(lambda *x: np.concatenate(x), *sources)

    def _read(self, ids: Sequence[int]) -> instrument.Text:
        """What instrument.read says of the tokens of a text, on the host."""
        tokens = np.zeros((1, self.width(len(ids))), np.int32)
        tokens[0, : len(ids)] = ids
        program = functools.partial(instrument.read, self.base, layer=self.layer, layers=self.layers, top=TOP)
        return jax.tree.map(lambda x: x[0, : len(ids)], self.in_batches(program, tokens, self._rows))

    @property
    def _rows(self) -> int:
        """The fewest rows that the devices can split."""
        return sharding.row_count(self.run.mesh)

    def width(self, n: int) -> int:
        """Returns the width of the program that reads n tokens: one of few."""
        fits = (w for k in range(5, 31) for w in (2**k, 3 * 2 ** (k - 1)) if w >= n)
        return min(next(fits), self.base.config.max_positions)

    def in_batches(self, program: Callable, arrays, rows: int):
        """Runs program(arrays) on `rows` rows at a time, the last of them repeated to fill it: a tree on the host."""
        n, parts, rows = len(jax.tree.leaves(arrays)[0]), [], -(-rows // self._rows) * self._rows
        for i in range(0, n, rows):
            pick = np.minimum(np.arange(i, i + rows), n - 1)
            leaves, tree = jax.tree.flatten(jax.tree.map(lambda x, pick=pick: np.asarray(x)[pick], arrays))
            with jax.set_mesh(self.run.mesh):
                placed = sharding.put_batch(dict(enumerate(leaves)), self.run.mesh)
                out = sharding.fetch(program(jax.tree.unflatten(tree, list(placed.values()))))
            parts.append(out)
        return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)

    def _encode(self, texts: Sequence[Sequence[int]], source: Source) -> np.ndarray:
        """Reads words back, NxD: one text and one row of source each."""
        joints, width = self.run.texts.tags.joints, self.length
        if joints:
            texts, width = [joints.exact(t) for t in texts], self.length + joints.more
        lengths = np.asarray([len(t) for t in texts], np.int32)
        ids_NxT = padded(texts, 0, width)
        return self.in_batches(
            lambda x: instrument.reconstruct(self.lens, self.base, *x), (ids_NxT, lengths, source), ENCODED * self.batch
        )

    def _said(
        self, a_NxD: np.ndarray, source: Source, key_N: np.ndarray, s: Settings, shown: np.ndarray | None = None
    ) -> list[list[_Said]]:
        """The explanations of activations. key_N: what the randomness of each depends on, besides seed and number. shown:
        what the decoder is given, if not the activations themselves."""
        n, k = len(a_NxD), s.samples
        drawn_K = np.arange(k) >= int(s.greedy)
        fold = np.stack([np.repeat(key_N, k), np.tile(np.arange(k), n)], axis=1).astype(np.int32)
        temperature = np.tile(np.where(drawn_K, s.temperature, 0), n).astype(np.float32)
        repeated = jax.tree.map(lambda x: np.repeat(x, k, axis=0), (a_NxD if shown is None else shown, source))
        how = {'length': self.length, 'tags': self.run.texts.tags, 'top': TOP}
        explain = functools.partial(instrument.explain, self.lens, self.base)
        out = self.in_batches(
            lambda x: explain(*x[0], s.seed, *x[1:], **how), (repeated, fold, temperature), self.batch
        )
        said, pred = [], out.pred_NxD
        if self.run.texts.tags.joints:  # the program reads nearly their text, this all of it
            spans = zip(out.words_NxT, out.start_N, out.length_N, strict=True)
            pred = self._encode([ids[start : start + length].tolist() for ids, start, length in spans], repeated[1])
        for i in range(n * k):
            words = slice(out.start_N[i], out.start_N[i] + out.length_N[i])
            alternatives = out.alternatives.probability[i, words], out.alternatives.id[i, words]
            found = bool(out.found_N[i])
            said.append(
                _Said(
                    out.words_NxT[i, words].tolist(),
                    found,
                    bool(drawn_K[i % k]),
                    out.probability_NxT[i, words],
                    alternatives,
                    pred[i] * found,
                )
            )
        if s.salience:
            self._salience(a_NxD, source, said, k)
        return [said[i : i + k] for i in range(0, n * k, k)]

    def _salience(self, a_NxD: np.ndarray, source: Source, said: list[_Said], k: int) -> None:
        """Reads every explanation without each of its words; k explanations of each activation."""
        without, which = [], []
        for i, x in enumerate(said):
            starts = spoken.word_starts(self.tokenizer, x.ids) if x.found else []
            for first, end in zip(starts, [*starts[1:], len(x.ids)], strict=bool(starts)):
                if end - first < len(x.ids):
                    without.append(x.ids[:first] + x.ids[end:])
                    which.append((i, first))
        if not without:
            return
        rows = np.asarray([i // k for i, _ in which])
        pred = self._encode(without, jax.tree.map(lambda x: x[rows], source))
        for (i, first), p in zip(which, pred, strict=True):
            whole, rest = (self._error(v, a_NxD[i // k])[0] for v in (said[i].pred_D, p))
            said[i].salience[first] = (rest - whole) / max(whole, 1e-9)

    def _error(self, pred_D: np.ndarray, a_D: np.ndarray) -> tuple[float, float]:
        """(nmse, cosine) in float64, as lens.evaluate has them: 2 - 2 cosine where only directions count."""
        a, p = a_D.astype(np.float64), pred_D.astype(np.float64)
        size_a, size_p = np.linalg.norm(a), np.linalg.norm(p)
        cosine = float(a @ p / max(size_a * size_p, 1e-12))
        if self.run.error == 'direction':
            return (2 - 2 * cosine if size_p else 1.0), cosine
        return float(((a - p) ** 2).sum() / max(size_a**2, 1e-12)), cosine

    def _explanation(self, x: _Said, a_D: np.ndarray) -> Explanation:
        shows = spoken.pieces(self.tokenizer, x.ids)
        rest = zip(shows, x.ids, x.probability_T, *x.alternatives, strict=True)
        words = tuple(
            Word(show, i, float(p), self.choices(*others), x.salience.get(k))
            for k, (show, i, p, *others) in enumerate(rest)
        )
        return Explanation(self.text_of(x.ids), words, *self._error(x.pred_D, a_D), x.sampled, x.found)

    def choices(self, probability_K, id_K) -> tuple[Choice, ...]:
        return tuple(Choice(self.tokenizer.decode([i]), float(p)) for p, i in zip(probability_K, id_K, strict=True))

    @functools.cached_property
    def _blind(self) -> list[int]:
        """What the decoder says most probably where there is no activation."""
        nothing, somewhere = np.zeros((1, self.base.config.d_model), np.float32), [0] * (self.run.min_pos + 1)
        shown = np.repeat(nothing[:, None], len(self.layers), axis=1) if self.layers else nothing
        source, how = self._source(somewhere, [-1]), Settings(salience=False)
        return self._said(nothing, source, np.zeros(1, int), how, shown)[0][0].ids

    @functools.cached_property
    def _filler(self) -> int | None:
        """What the decoder ends a short explanation with, where it does so."""
        *_, before, last = self._blind[-2:] * 2
        return last if before == last or last in self.tokenizer.all_special_ids else None

    def _explained(self, found: spoken.Tokens, read: instrument.Text, at_P: np.ndarray, s: Settings) -> Iterator[Row]:
        """The rows of one batch of positions."""
        (a, slots), source = self._at(read, at_P), self._source(found.ids, at_P)
        said = self._said(a, source, at_P, s, slots)
        others = {'blind': self._blind} | ({'context': []} if self.context_tokens else {})
        others = {name: self._encode([ids] * len(at_P), source) for name, ids in others.items()}
        norm_S, after_first = np.linalg.norm(read.a_SxD, axis=1), slice(min(1, len(read.a_SxD) - 1), None)
        usual, mean = np.median(norm_S[after_first]), read.a_SxD[after_first].mean(0)
        for k, p in enumerate(at_P.tolist()):
            explanations = tuple(self._explanation(x, a[k]) for x in said[k])
            odd = not usual / OUTLIER <= norm_S[p] <= usual * OUTLIER
            flags = {'early': p < self.run.min_pos, 'norm': odd, 'failed': not explanations[0].found}
            controls = {name: self._error(pred[k], a[k])[0] for name, pred in others.items()}
            yield Row(
                token=found.texts[p],
                token_id=found.ids[p],
                position=p,
                role=found.roles[p],
                norm=float(norm_S[p]),
                explanations=explanations,
                next_tokens=self.choices(*(x[p] for x in read.next)),
                logit_lens=self.choices(*(x[p] for x in read.logit_lens)),
                controls={'mean': self._error(mean, a[k])[0]} | controls,
                flags=tuple(name for name, on in flags.items() if on),
                message=found.messages[p],
                fragment=found.fragments[p],
            )
