"""A tiny chat model that thinks, fitted on Storyworld chats: python -m data_gen.storyworld.tiny_chat --family=gpt_oss --out=DIR

It answers questions about stories that it has not seen, a minute of fitting on 2 CPU cores. Two families:

llama    the embedded subject, configs/tiny_subject, which learns on; it thinks in <think> tags inside its text
gpt_oss  a fresh model of two layers with the real Harmony vocabulary: analysis and final channel

Both are ordinary Hugging Face directories that vLLM serves, also on a CPU: what the chain of data generation is
tried out on.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from . import commands

    commands.tiny_chat()

import dataclasses
import functools
import pathlib
import shutil
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lens import files, hf, losses
from lens.models import families
from lens.models.transformer import Transformer

from .. import arrays, render
from ..documents import Chat
from . import chats, harmony_tokenizer, pretrain

END = '<|end|>'  # of a turn, where the llama stops
INLINE_TEMPLATE = (  # the subject's own without a field for thinking, which is then part of the text
    '{{ bos_token }}'
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# What config.json says; the windows are those of the published models. Their YaRN, made for long texts, learns to
# copy names out of a story several times slower: a factor of 1 is the plain rotary table in YaRN's form.
GPT_OSS = {
    'model_type': 'gpt_oss',
    'hidden_size': 64,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 32,  # vLLM's CPU engine takes 32, 64, 80, …
    'intermediate_size': 64,
    'num_local_experts': 4,
    'num_experts_per_tok': 2,
    'max_position_embeddings': 4096,
    'rope_parameters': {
        'rope_type': 'yarn',
        'rope_theta': 10000.0,
        'factor': 1.0,
        'original_max_position_embeddings': 4096,
        'truncate': False,
        'beta_fast': 32.0,  # the serving engine takes no defaults
        'beta_slow': 1.0,
    },
}
CHATS, HELD_OUT = 1500, 96
SEQ_LEN = 384  # more than any of these chats has
LEVELS = (None, 'low', 'medium', 'high')  # of the line "Reasoning: …" that data_gen.generate sends; None: no line
DATES = [f'{2025 + i // 4}-{3 * i % 12 + 1:02}-{7 * i % 28 + 1:02}' for i in range(16)]  # in Harmony's system message
EVERY = 50  # steps between two lines
BATCH = 8


class Recipe(NamedTuple):
    """Optimizer steps and peak learning rates: Muon's for block matrices, Adam's for the rest."""

    steps: int
    learning_rate_matrices: float
    learning_rate: float
    warmup_steps: int = 20
    weight_decay: float = 0.0


# Right answers about stories not seen: 0.89 (llama), 0.98 (gpt_oss; with 350 steps 0.96, and 0.89 with another seed)
RECIPES = {'llama': Recipe(140, 0.02, 3e-3), 'gpt_oss': Recipe(400, 0.01, 6e-3)}


class Encoded(NamedTuple):
    """Chats as tokens; the answer, to the end of the row, is what the model learns.

    tokens int32 [N, T], right padded; lengths int32 [N]; starts int32 [N]: first position after the user's text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray


def messages(chat: chats.StoryChat, level: str | None, family: str) -> list[dict]:
    """Returns the chat with the system line of a level, as vLLM hands it to a model of the family."""
    turns = chats.row(chat)['messages']
    if level is None:
        return turns
    line = f'Reasoning: {level}'
    if family == 'llama':
        return [{'role': 'system', 'content': line}, *turns]
    # vLLM's Harmony has a system message of its own and takes the line for the developer's
    return [{'role': 'system', 'content': ''}, {'role': 'developer', 'content': line}, *turns]


def encode(questions: list[chats.StoryChat], tokenizer, family: str) -> Encoded:
    """Encodes every chat with one of LEVELS and one of DATES; in another order than they were given."""
    encoded = []
    for i, date in enumerate(DATES):
        renderer = render.Renderer(tokenizer, seq_len=SEQ_LEN, truncate='right', date=date, chats=True)
        some = enumerate(questions[i :: len(DATES)])
        encoded += [renderer.encode(Chat(messages(c, LEVELS[k % len(LEVELS)], family), 'medium')) for k, c in some]
    lengths = np.array([len(e.ids) for e in encoded], np.int32)
    starts = np.array([np.flatnonzero(e.roles == render.USER)[-1] + 1 for e in encoded], np.int32)
    tokens = arrays.pad(np.concatenate([e.ids for e in encoded]), lengths, int(lengths.max()), 0)
    return Encoded(tokens, lengths, starts)


class UsedVocabulary(NamedTuple):
    """The rows of a large embedding table that chats use, and one for all others, which comes last.

    A softmax over the small table with `log_rows` added equals that over the large one in which the others
    are all alike: nothing is approximated, and a step costs hundreds of rows in place of 201088.
    """

    ids: np.ndarray  # token ids in use, ascending
    size: int  # rows of the large table

    @property
    def log_rows(self) -> np.ndarray:
        """Returns the logarithm of how many rows of the large table each one stands for, float32."""
        return np.log(np.append(np.ones(len(self.ids)), self.size - len(self.ids)), dtype=np.float32)

    def compact(self, tokens: np.ndarray) -> np.ndarray:
        """Maps token ids of the large table to those of the small one."""
        row = np.searchsorted(self.ids, tokens).astype(np.int32)
        return np.where(self.ids[np.minimum(row, len(self.ids) - 1)] == tokens, row, len(self.ids)).astype(np.int32)

    def expand(self, model: Transformer) -> Transformer:
        """Returns the model with the large table at its input and output."""
        row = np.full(self.size, len(self.ids))
        row[self.ids] = np.arange(len(self.ids))
        out = jax.tree.map(lambda x: x, model)
        out.config = dataclasses.replace(model.config, vocab_size=self.size)
        out.embedding = nnx.Param(model.embedding[...][row])
        out.head = nnx.Param(model.head[...][:, row])
        return out


def loss_fn(tree, chats: Encoded, log_rows_V, *, answer_len: int):
    """Computes the cross-entropy of the answers in nats; right: the share with every token the most probable."""
    m = tree['model']
    x_BxTxD = m.run_layers(m.embed(chats.tokens), 0, m.config.n_layers)
    at_BxA = chats.starts[:, None] + jnp.arange(answer_len)
    mask_BxA = at_BxA < chats.lengths[:, None]
    at_BxA = jnp.minimum(at_BxA, chats.tokens.shape[1] - 1)
    logits_BxAxV = m.logits(jnp.take_along_axis(x_BxTxD, at_BxA[..., None] - 1, 1)) + log_rows_V
    ids_BxA = jnp.take_along_axis(chats.tokens, at_BxA, 1)
    right_B = jnp.all((jnp.argmax(logits_BxAxV - log_rows_V, -1) == ids_BxA) | ~mask_BxA, 1)
    nats = losses.cross_entropy(losses.token_log_probs(logits_BxAxV, ids_BxA), mask_BxA)
    return nats, {'answer_nats': nats, 'right': jnp.mean(right_B)}


def fit(model: Transformer, seen: Encoded, unseen: Encoded, log_rows_V, recipe: Recipe) -> tuple[Transformer, float]:
    """Returns (the fitted model, its share of right answers among the held-out chats)."""
    answer_len = int((seen.lengths - seen.starts).max())
    loss = functools.partial(loss_fn, log_rows_V=jnp.asarray(log_rows_V), answer_len=answer_len)
    tx = pretrain.make_optimizer(recipe)
    step, state = pretrain.make_step(loss, tx), {'trainable': {'model': model}, 'opt': tx.init({'model': model})}
    rng, begin = np.random.default_rng(0), time.monotonic()
    for i in range(1, recipe.steps + 1):
        rows = rng.integers(len(seen.tokens), size=BATCH)
        state, figures = step(state, Encoded(*(x[rows] for x in seen)))
        if i % EVERY == 0 or i == recipe.steps:
            pretrain.show(i, recipe.steps, figures, (time.monotonic() - begin) / i)
    return state['trainable']['model'], float(jax.jit(loss)(state['trainable'], unseen)[1]['right'])


def write_tokenizer(family: str, folder: pathlib.Path) -> None:
    """Writes the files of the tokenizer with the chat template, and for llama the token ids of the subject."""
    if family == 'gpt_oss':
        harmony_tokenizer.build(folder)
        return
    for name in hf.TOKENIZER_FILES:
        if (pretrain.SUBJECT / name).exists():
            shutil.copy(pretrain.SUBJECT / name, folder / name)
    (folder / 'chat_template.jinja').write_text(INLINE_TEMPLATE)


def make(family: str, out: pathlib.Path, recipe: Recipe) -> float:
    """Writes the model to `out`; returns its share of right answers about stories not seen. Raises LensError."""
    files.check_free(out, 'choose another --out, or remove it')
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(family, pathlib.Path(folder))
        tokenizer = hf.load_tokenizer(folder)
        seen = encode(chats.first_chats(CHATS), tokenizer, family)
        unseen = encode(chats.held_out(HELD_OUT, seed=0), tokenizer, family)
        ids = {f'{k}_token_id': getattr(tokenizer, f'{k}_token_id') for k in ('bos', 'eos', 'pad')}
        if family == 'llama':
            model, table = hf.load_model(pretrain.SUBJECT, remat='dots'), None
            log_rows_V = np.zeros(model.config.vocab_size, np.float32)
            ids['eos_token_id'] = tokenizer.convert_tokens_to_ids(END)
            config = files.read_json(pretrain.SUBJECT / 'config.json', 'see configs/tiny_subject.py')
        else:
            table = UsedVocabulary(np.unique(seen.tokens), harmony_tokenizer.VOCAB_SIZE)
            log_rows_V = table.log_rows
            seen, unseen = (x._replace(tokens=table.compact(x.tokens)) for x in (seen, unseen))
            config = GPT_OSS | {'vocab_size': len(log_rows_V)}
            shape = families.from_hf(config)
            # so small a batch on a CPU is quickest with every expert for every token
            shape = dataclasses.replace(shape, remat='dots', experts='dense')
            model = Transformer(shape, rngs=nnx.Rngs(0))
            model.embedding = nnx.Param(model.embedding[...] * 0.02)
        model, right = fit(model, seen, unseen, log_rows_V, recipe)
        model = table.expand(model) if table else model
        hf.save_model(model, out, dtype=jnp.bfloat16, source=folder, config=config | ids)
    return right


def main(family: str, out: str, steps: int) -> None:
    begin = time.monotonic()
    recipe = RECIPES[family]
    right = make(family, pathlib.Path(out), recipe._replace(steps=steps or recipe.steps))
    seconds = time.monotonic() - begin
    print(f'{right:.0%} of {HELD_OUT} answers about stories not seen are right, word by word ({seconds:.0f} s): {out}')
