"""nla_meta.yaml: what a natural language autoencoder says of itself beside its weights; read, checked, written.

Two kinds: nla_model, of a trained verbalizer (av, actor: our decoder) or reconstructor (ar, critic: our encoder), and
nla_dataset, of training rows, which some trainers copy into the directory of a model.
"""

import dataclasses
import math
import pathlib
import string
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from lens import files
from lens.errors import LensError, number, shown
from lens.hf import SIDECAR
from lens.models.transformer import TransformerConfig

KINDS = ('nla_model', 'nla_dataset')
SCHEMA_VERSION = 2  # of nla_model, as written
MOST_BYTES, MOST_VALUES = 1 << 20, 1 << 17  # of a sidecar; aliases make many values of few bytes
ROLES = {'av': 'decoder', 'actor': 'decoder', 'ar': 'encoder', 'critic': 'encoder'}
# Names of a template, in the order in which the first that is there counts.
TEMPLATES = {'decoder': ('av', 'actor', 'verbalizer'), 'encoder': ('ar', 'critic', 'reconstructor')}
CHAR, EXPLANATION, INJECT = 'injection_char', 'explanation', '<INJECT>'  # INJECT: {injection_char}, in custom prompts
# Injection -> what the top-level key `injection` says of it; no field of the format names it.
FAMILIES = {
    'replace': {'family': 'replace', 'layer': 'embedding', 'norm_rule': 'injection_scale'},
    'add': {'family': 'add', 'layer': 1, 'norm_rule': 'match_residual'},
}
PROMPT_IDS = 'rendered_prompt_ids'  # our top-level key: the prompt of a decoder as token ids
READ = ('kind', 'schema_version', 'role', 'base_checkpoint', 'd_model', 'extraction', 'tokens', 'prompt_templates')
READ += ('critic', 'extraction_layer_index', 'injection', PROMPT_IDS)  # the other keys at the top are kept as they are


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """One sidecar. role: decoder | encoder, '' where it does not say. base: the model that it was made of, or whose
    activations they are. layer: 0-based block whose output is read (K). family: of FAMILIES, '' where it does not say.
    injection_scale: norm of the row in the slot; mse_scale: norm that both vectors have in the error; None: as they are.
    left, right: ids beside the marker in the prompt. suffix: last ids of what the encoder reads. more: other keys at the top.
    """

    file: pathlib.Path
    kind: str
    role: str
    base: str
    d_model: int
    layer: int | None
    family: str
    injection_scale: float | None
    mse_scale: float | None
    marker: str
    marker_id: int
    left: int
    right: int
    suffix: tuple[int, ...] | None
    decoder_template: str
    encoder_template: str
    prompt_ids: tuple[int, ...] | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def prompt(self, tokenizer) -> str:
        """Renders the prompt of the decoder, its marker in it: one user turn, the generation prompt on. Whether a thinking
        model was told not to think stands in no sidecar but ours: those that add to the stream do so. Raises LensError."""
        text = self._filled('decoder', self.decoder_template.replace(INJECT, f'{{{CHAR}}}'), CHAR, self.marker)
        turns, rendered = [{'role': 'user', 'content': text}], []
        for how in sorted(({}, {'enable_thinking': False}), key=len, reverse=self.family == 'add'):
            try:  # tokenised by itself afterwards: what tokenize=True returns depends on the version of transformers
                rendered.append(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **how))
            except Exception as e:  # a template may raise what it likes
                raise self._wrong(
                    f'the chat template of the tokenizer cannot hold its prompt ({shown(e, 80)})'
                ) from None
        said = [x for x in rendered if self.prompt_ids == tuple(tokenizer(x, add_special_tokens=False)['input_ids'])]
        return [*said, *rendered][0]

    def encoder_text(self, words: str) -> str:
        """Fills the template of the encoder with words. Raises LensError."""
        return self._filled('encoder', self.encoder_template, EXPLANATION, words)

    def check(self, tokenizer, c: TransformerConfig, prompt: str | None = None) -> None:
        """Raises LensError unless tokenizer and model are those that the sidecar tells of: the width, the marker, its
        neighbours in the prompt, the end of what the encoder reads. prompt: as rendered; None: by this tokenizer."""

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)['input_ids']

        if self.d_model != c.d_model:
            raise self._wrong(f'd_model={self.d_model}, the model has hidden states of {c.d_model}')
        if self.marker:
            self._check_marker(ids, tokenizer.unk_token_id, self.prompt(tokenizer) if prompt is None else prompt)
        if self.encoder_template:
            tail = self.encoder_text('\0').rpartition('\0')[2]
            # the first token after the words may merge with their last one
            if self.suffix is not None and tuple(ids(tail)[1:]) != self.suffix:
                raise self._wrong(
                    f'tokens.critic_suffix_ids={[*self.suffix]}, the tokenizer ends the template with {ids(tail)[1:]}'
                )

    def _check_marker(self, ids: Callable[[str], list[int]], unknown: int | None, prompt: str) -> None:
        found, marker = ids(self.marker), self.marker_id
        if found != [marker] or marker == unknown:
            what = 'unknown to it' if unknown in found else f'{found}'
            raise self._wrong(
                f'the marker {shown(repr(self.marker), 40)} has the id {marker}, in the tokenizer it is {what}'
            )
        row = ids(prompt)
        at = [i for i, x in enumerate(row) if x == marker]
        if len(at) != 1 or not 0 < at[0] < len(row) - 1:
            raise self._wrong(f'its prompt holds the marker {len(at)} times inside, it must once')
        here = row[at[0] - 1], row[at[0] + 1]
        if here != (self.left, self.right):
            raise self._wrong(
                f'the marker stands between the ids {self.left} and {self.right}, the tokenizer has {here}'
            )
        if self.prompt_ids is not None and tuple(row) != self.prompt_ids:
            raise self._wrong(f'{PROMPT_IDS} are not the ids that the tokenizer makes of the prompt')

    def written(self) -> dict:
        """Returns the content of the file of an nla_model, in the order of the format; scales are numbers or null."""
        suffix = None if self.suffix is None else [*self.suffix]
        critic = {'extraction_layer_index': self.layer} if self.role == 'encoder' else None
        out = {
            'kind': KINDS[0],
            'schema_version': SCHEMA_VERSION,
            'role': {'decoder': 'av', 'encoder': 'ar'}[self.role],
            'stage': self.more.get('stage'),
            'base_checkpoint': self.base,
            'd_model': self.d_model,
            'extraction': {'injection_scale': self.injection_scale, 'mse_scale': self.mse_scale},
            'tokens': {
                'injection_char': self.marker,
                'injection_token_id': self.marker_id,
                'injection_left_neighbor_id': self.left,
                'injection_right_neighbor_id': self.right,
                'critic_suffix_ids': suffix,
            },
            'prompt_templates': {'av': self.decoder_template, 'ar': self.encoder_template or None},
            **{k: self.more.get(k) for k in ('trained_on', 'parent_checkpoints', 'created_at', 'created_by')},
            'critic': critic,
            'training': self.more.get('training'),
            'extraction_layer_index': self.layer,
            'injection': FAMILIES.get(self.family),
            PROMPT_IDS: None if self.prompt_ids is None else [*self.prompt_ids],
        }
        return {k: x for k, x in (out | {k: x for k, x in self.more.items() if k not in out}).items() if x is not None}

    def _filled(self, side: str, template: str, field: str, value: str) -> str:
        """A template with its one field filled, as str.format does."""
        try:
            fields = [x for x in string.Formatter().parse(template) if x[1] is not None]
        except ValueError as e:
            raise self._of_template(side, f'has a brace alone ({e}; of a text, {{{{ and }}}})') from None
        if [x[1:] for x in fields] != [(field, '', None)]:
            raise self._of_template(side, f'must hold {{{field}}} once and no other field')
        return template.format(**{field: value})

    def _of_template(self, side: str, what: str) -> LensError:
        key = '|'.join(TEMPLATES[side])
        return LensError(f'{self.file}: prompt_templates.{key} {what}: mend the template, or download it again.')

    def _wrong(self, what: str) -> LensError:
        return _wrong(self.file, what)


def _wrong(file: pathlib.Path, what: str) -> LensError:
    return LensError(f'{file}: {what}: give the tokenizer and weights that it was written for, or a mended sidecar.')


def scale(value, d_model: int, key: str) -> float | None:
    """Reads a norm: null, raw and none say that vectors are as they are (None), sqrt_d_model is the root of d_model, else a
    number or a numeric text. Raises LensError, which begins with the key."""
    if value in (None, 'raw', 'none'):
        return None
    if value == 'sqrt_d_model':
        return math.sqrt(d_model)
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        raise LensError(f'{key}={shown(repr(value), 40)} must be a number, null, raw, none or sqrt_d_model.') from None
    return float(number(value, key, 1e-12, whole=False))


def place(path: str | pathlib.Path) -> pathlib.Path:
    """Returns where the sidecar of a Parquet file or of a model's directory is. Raises LensError for a name with a suffix
    that is neither: a directory that is missing, or a name of the Hub."""
    path = pathlib.Path(str(path).partition('@[')[0])
    if path.is_dir() or not path.suffix:
        return path / SIDECAR
    if path.suffix != '.parquet':
        raise LensError(f'{shown(path)} is no directory and no .parquet file: download it first, or correct its name.')
    return path.with_name(f'{path.name}.{SIDECAR}')


def parse(file: pathlib.Path) -> Sidecar:
    """Reads a sidecar of either kind and any version. Raises LensError, which names the file and the key."""
    try:
        raw = files.read_bytes(file, MOST_BYTES)
    except OSError as e:
        raise LensError(f'{file} cannot be read ({e.strerror}): put the sidecar there.') from None
    except ValueError as e:
        raise LensError(f'{file} {e}: put the sidecar there.') from None
    try:
        content = yaml.load(raw.decode(), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        what = 'it is nested too deep' if isinstance(e, RecursionError) else e
        if isinstance(e, yaml.MarkedYAMLError) and e.problem_mark:
            what = f'line {e.problem_mark.line + 1}: {e.problem}'
        raise LensError(f'{file} is not valid YAML ({shown(what, 120)}): mend it, or download it again.') from None
    if _count(content) > MOST_VALUES:
        raise LensError(f'{file} holds more than {MOST_VALUES} values: download it again.')
    try:
        return _parsed(file, content)
    except LensError as e:
        raise e if str(e).startswith(str(file)) else LensError(f'{file}: {e}') from None


class _Loader(yaml.SafeLoader):
    """Of the keys of an object none may stand twice, and none be <<: PyYAML would take the last one without a word, and
    copies what << merges, which grows with every use. Numbers of base 60, 1:30:00, take it time that grows with the square."""

    def compose_scalar_node(self, anchor):
        node = super().compose_scalar_node(anchor)
        if node.tag.endswith((':int', ':float')) and len(node.value) > files.MOST_DIGITS:
            raise yaml.MarkedYAMLError(None, None, f'a number of {len(node.value)} digits', node.start_mark)
        return node

    def compose_mapping_node(self, anchor):
        node, keys = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if key.value == '<<' or (key.tag, str(key.value)) in keys:
                what = 'is not read here' if key.value == '<<' else 'stands twice'
                raise yaml.MarkedYAMLError(None, None, f'the key {shown(key.value, 40)} {what}', key.start_mark)
            keys.add((key.tag, str(key.value)))
        return node


def _count(content) -> int:
    """How many values a tree has, counted to MOST_VALUES and a few."""
    left, n = [content], 0
    while left and n <= MOST_VALUES:
        x, n = left.pop(), n + 1
        left += x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return n


def _parsed(file: pathlib.Path, content) -> Sidecar:
    kind = content.get('kind') if isinstance(content, dict) else None
    if kind not in KINDS:
        raise LensError(f'kind={shown(repr(kind), 40)} is not one of {", ".join(KINDS)}: give a sidecar of a model.')
    extraction, tokens, templates = (_part(content, k) for k in ('extraction', 'tokens', 'prompt_templates'))
    of_data = kind == KINDS[1]
    if extraction.get('norm', 'none') != 'none':
        raise LensError(
            f'extraction.norm={shown(repr(extraction["norm"]), 40)}: only activations as they are, none, can be read: read them anew, or give another lens.'
        )
    d_model = number(
        (extraction if of_data else content).get('d_model'), 'extraction.d_model' if of_data else 'd_model', 1
    )
    role = content.get('role')
    if not of_data and role not in ROLES:
        raise LensError(f'role={shown(repr(role), 40)} is not one of {", ".join(ROLES)}: name the role of the model.')
    scales = {k: scale(extraction.get(k), d_model, f'extraction.{k}') for k in ('injection_scale', 'mse_scale')}
    if 'mse_scale' not in extraction:
        scales['mse_scale'] = math.sqrt(d_model)
    marker = _text(tokens, 'injection_char', 'tokens.')
    names = ('injection_token_id', 'injection_left_neighbor_id', 'injection_right_neighbor_id')
    ids = [number(tokens.get(k), f'tokens.{k}', 0) if marker else -1 for k in names]
    chosen = {
        f'{side}_template': next(filter(None, (_text(templates, k, 'prompt_templates.') for k in keys)), '')
        for side, keys in TEMPLATES.items()
    }
    return Sidecar(
        file,
        kind,
        ROLES.get(role, ''),
        _text(extraction, 'base_model', 'extraction.') if of_data else _text(content, 'base_checkpoint'),
        d_model,
        _layer(content, extraction),
        _family(content),
        **scales,
        marker=marker,
        marker_id=ids[0],
        left=ids[1],
        right=ids[2],
        suffix=_ids(tokens, 'critic_suffix_ids', 'tokens.'),
        **chosen,
        prompt_ids=_ids(content, PROMPT_IDS),
        more={k: x for k, x in content.items() if k not in READ},
    )


def _part(content: dict, key: str, within: str = '') -> dict:
    """An object of the sidecar, {} where there is none."""
    part = content.get(key) or {}
    if not isinstance(part, dict):
        raise LensError(f'{within}{key}={shown(repr(part), 40)} must be an object.')
    return part


def _text(part: dict, key: str, within: str = '') -> str:
    """A text, '' where there is none."""
    value = part.get(key)
    if not isinstance(value, str | None):
        raise LensError(f'{within}{key}={shown(repr(value), 40)} must be a text.')
    return value or ''


def _ids(part: dict, key: str, within: str = '') -> tuple[int, ...] | None:
    value = part.get(key)
    if not isinstance(value, list | None):
        raise LensError(f'{within}{key}={shown(repr(value), 40)} must be a list of token ids.')
    return None if value is None else tuple(number(x, f'{within}{key}', 0) for x in value)


def _layer(content: dict, extraction: dict) -> int | None:
    """K, wherever it stands: critic.num_hidden_layers of version 1 is K as well, not the number of blocks."""
    critic = _part(content, 'critic')
    said = {
        'critic.extraction_layer_index': critic.get('extraction_layer_index'),
        'extraction_layer_index': content.get('extraction_layer_index'),
        'extraction.layer_index': extraction.get('layer_index'),
        'critic.num_hidden_layers': critic.get('num_hidden_layers'),
    }
    said = {k: number(x, k, 0) for k, x in said.items() if x is not None}
    if len(set(said.values())) > 1:
        listed = ', '.join(f'{k}={x}' for k, x in said.items())
        raise LensError(f'{listed} disagree on the layer: correct the one that is wrong.')
    return next(iter(said.values()), None)


def _family(content: dict) -> str:
    said = _part(content, 'injection')
    if not said:
        return ''
    family = next(
        (name for name, means in FAMILIES.items() if means | said == means and said.get('family') == name), None
    )
    if family is None:
        known = ' or '.join(map(str, FAMILIES.values()))
        raise LensError(f'injection={shown(said, 80)} is not supported: {known}.')
    return family
