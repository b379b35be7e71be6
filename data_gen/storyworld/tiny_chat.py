"""A tiny chat model that thinks, fitted on Storyworld chats: python -m data_gen.tiny_chat --family=gpt_oss --out=DIR

It answers questions about stories that it has not seen, a minute of fitting on 2 CPU cores. Two families:

llama    the embedded subject, configs/tiny_subject, which learns on; it thinks in <think> tags inside its text
gpt_oss  a fresh model of two layers with the real Harmony vocabulary: analysis and final channel

Both are ordinary Hugging Face directories that vLLM serves, also on a CPU: what the chain of data generation is
tried out on.
"""

import dataclasses
import functools
import pathlib
import shutil
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import flags
from flax import nnx

from data_gen import arrays, render
from data_gen.documents import Chat
from data_gen.storyworld import chats, harmony_tokenizer, pretrain, world
from lens import cli, files, hf, logger, losses
from lens.errors import LensError
from lens.models import families
from lens.models.transformer import Transformer

SUBJECT = pathlib.Path('configs/tiny_subject')
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
    matrices: float
    rest: float


# Right answers about stories not seen: 0.89 (llama), 0.98 (gpt_oss; with 350 steps 0.96, and 0.89 with another seed)
RECIPES = {'llama': Recipe(140, 0.02, 3e-3), 'gpt_oss': Recipe(400, 0.01, 6e-3)}


class Chats(NamedTuple):
    """Chats as tokens; the answer, to the end of the row, is what the model learns.

    tokens int32 [N, T], right padded; lengths int32 [N]; starts int32 [N]: first position after the user's text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray

    def __getitem__(self, rows) -> 'Chats':
        return Chats(*(x[rows] for x in (self.tokens, self.lengths, self.starts)))


def messages(chat: chats.StoryChat, level: str | None, family: str) -> list[dict]:
    """The chat with the system line of a level, as vLLM hands it to a model of the family."""
    turns = chats.row(chat)['messages']
    if level is None:
        return turns
    line = f'Reasoning: {level}'
    if family == 'llama':
        return [{'role': 'system', 'content': line}, *turns]
    # vLLM's Harmony has a system message of its own and takes the line for the developer's
    return [{'role': 'system', 'content': ''}, {'role': 'developer', 'content': line}, *turns]


def encode(chats: list[chats.StoryChat], tokenizer, family: str) -> Chats:
    """Every chat with one of LEVELS and one of DATES; in another order than they were given."""
    encoded = []
    for i, date in enumerate(DATES):
        renderer = render.Renderer(tokenizer, seq_len=SEQ_LEN, truncate='right', date=date, chats=True)
        some = enumerate(chats[i :: len(DATES)])
        encoded += renderer.encode([Chat(messages(c, LEVELS[k % len(LEVELS)], family), 'medium') for k, c in some])
    lengths = np.array([len(ids) for ids, _, _ in encoded], np.int32)
    starts = np.array([np.flatnonzero(roles == render.USER)[-1] + 1 for _, roles, _ in encoded], np.int32)
    tokens = arrays.pad(np.concatenate([ids for ids, _, _ in encoded]), lengths, int(lengths.max()), 0)
    return Chats(tokens, lengths, starts)


class Table(NamedTuple):
    """The rows of a large embedding table that chats use, and one for all others, which comes last.

    A softmax over the small table with `log_rows` added equals that over the large one in which the others
    are all alike: nothing is approximated, and a step costs hundreds of rows in place of 201088.
    """

    ids: np.ndarray  # token ids in use, ascending
    size: int  # rows of the large table

    @property
    def log_rows(self) -> np.ndarray:
        """Logarithm of how many rows of the large table each one stands for, float32."""
        return np.log(np.append(np.ones(len(self.ids)), self.size - len(self.ids)), dtype=np.float32)

    def compact(self, tokens: np.ndarray) -> np.ndarray:
        """Token ids of the large table to those of the small one."""
        row = np.searchsorted(self.ids, tokens).astype(np.int32)
        return np.where(self.ids[np.minimum(row, len(self.ids) - 1)] == tokens, row, len(self.ids)).astype(np.int32)

    def expand(self, model: Transformer) -> Transformer:
        """The model with the large table at its input and output."""
        row = np.full(self.size, len(self.ids))
        row[self.ids] = np.arange(len(self.ids))
        out = jax.tree.map(lambda x: x, model)
        out.config = dataclasses.replace(model.config, vocab_size=self.size)
        out.embedding = nnx.Param(model.embedding[...][row])
        out.head = nnx.Param(model.head[...][:, row])
        return out


def loss_fn(tree, chats: Chats, log_rows_V, *, answer_len: int):
    """Cross-entropy of the answers in nats, and the share of them of which every token is the most probable one."""
    m = tree['model']
    x_BxTxD = m.run_layers(m.embed(chats.tokens), 0, m.config.n_layers)
    at_BxA = chats.starts[:, None] + jnp.arange(answer_len)
    mask_BxA = at_BxA < chats.lengths[:, None]
    at_BxA = jnp.minimum(at_BxA, chats.tokens.shape[1] - 1)
    logits_BxAxV = m.logits(jnp.take_along_axis(x_BxTxD, at_BxA[..., None] - 1, 1)) + log_rows_V
    ids_BxA = jnp.take_along_axis(chats.tokens, at_BxA, 1)
    right_B = jnp.all((jnp.argmax(logits_BxAxV - log_rows_V, -1) == ids_BxA) | ~mask_BxA, 1)
    return losses.cross_entropy(losses.token_log_probs(logits_BxAxV, ids_BxA), mask_BxA), jnp.mean(right_B)


def fit(model: Transformer, chats: Chats, held_out: Chats, log_rows_V, recipe: Recipe) -> tuple[Transformer, float]:
    """(the fitted model, its share of right answers among the held-out chats)."""
    steps = recipe.steps
    answer_len = int((chats.lengths - chats.starts).max())
    loss = functools.partial(loss_fn, log_rows_V=jnp.asarray(log_rows_V), answer_len=answer_len)
    rates = {'learning_rate_matrices': recipe.matrices, 'learning_rate': recipe.rest, 'weight_decay': 0.0}
    tree = {'model': model}
    tx = pretrain.make_optimizer(ml_collections.ConfigDict(rates | {'steps': steps, 'warmup_steps': 20}), tree)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(tree, opt, batch):
        (nats, _), grads = jax.value_and_grad(loss, has_aux=True)(tree, batch)
        updates, opt = tx.update(grads, opt, tree)
        return optax.apply_updates(tree, updates), opt, nats

    opt, rng, begin = tx.init(tree), np.random.default_rng(0), time.monotonic()
    for i in range(1, steps + 1):
        tree, opt, nats = step(tree, opt, chats[rng.integers(len(chats.tokens), size=BATCH)])
        if i % EVERY == 0 or i == steps:
            left = logger.clock((time.monotonic() - begin) / i * (steps - i))
            print(f'step {i}/{steps}  {float(nats):.3f} nats per token of the answers  ETA {left}', flush=True)
    return tree['model'], float(jax.jit(loss)(tree, held_out)[1])


def write_tokenizer(family: str, folder: pathlib.Path) -> None:
    """The files of the tokenizer with the chat template, and for llama the token ids of the subject."""
    if family == 'gpt_oss':
        harmony_tokenizer.build(folder)
        return
    for name in hf.TOKENIZER_FILES:
        if (SUBJECT / name).exists():
            shutil.copy(SUBJECT / name, folder / name)
    (folder / 'chat_template.jinja').write_text(INLINE_TEMPLATE)


def make(family: str, out: pathlib.Path, recipe: Recipe) -> float:
    """Writes the model to `out`; returns its share of right answers about stories not seen. Raises LensError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LensError(f'{out} holds something already: choose another --out, or remove it.')
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(family, pathlib.Path(folder))
        tokenizer = hf.load_tokenizer(folder)
        seen = encode(chats.first_chats(CHATS), tokenizer, family)
        unseen = chats.first_chats(HELD_OUT, index=world.FIRST_VALIDATION_INDEX)
        unseen = encode(unseen, tokenizer, family)
        ids = {f'{k}_token_id': getattr(tokenizer, f'{k}_token_id') for k in ('bos', 'eos', 'pad')}
        if family == 'llama':
            model, table = hf.load_model(SUBJECT, remat='dots'), None
            log_rows_V = np.zeros(model.config.vocab_size, np.float32)
            ids['eos_token_id'] = tokenizer.convert_tokens_to_ids(END)
            config = files.read_json(SUBJECT / 'config.json', 'see configs/tiny_subject.py')
        else:
            table = Table(np.unique(seen.tokens), harmony_tokenizer.VOCAB_SIZE)
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


def main(_):
    family, out = flags.FLAGS.family, pathlib.Path(flags.FLAGS.out)
    begin = time.monotonic()
    recipe = RECIPES[family]
    right = make(family, out, recipe._replace(steps=flags.FLAGS.steps or recipe.steps))
    seconds = time.monotonic() - begin
    print(f'{right:.0%} of {HELD_OUT} answers about stories not seen are right, word by word ({seconds:.0f} s): {out}')


if __name__ == '__main__':
    flags.DEFINE_enum('family', 'gpt_oss', list(RECIPES), 'What is fitted; see the text above.')
    flags.DEFINE_string('out', None, 'Folder of the model; must not hold anything.')
    flags.DEFINE_integer('steps', 0, 'Optimizer steps; 0: as many as the family needs.', lower_bound=0)
    flags.mark_flags_as_required(['out'])
    cli.run(main)
