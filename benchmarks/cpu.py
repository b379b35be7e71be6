"""Our programs against PyTorch's on a CPU: same weights, batch, threads, dtype (float32) and, checked first, same numbers.

    python -m benchmarks.cpu                                     # the shape of SmolLM2-135M, random weights
    python -m benchmarks.cpu --size=tiny --work=sft --repeats=9  # the embedded subject's shape, one work

forward   logits of 8 x 192 tokens
read      activations of 64 positions in them, after the middle block
sft       a training step on 64 activations and explanations of 24 tokens: cross-entropy of the decoder and error of the
          encoder, soft prompts and read-out of the latter and adapters on q k v o trained, AdamW, clipped
sample    explanations of 24 tokens for 64 activations after a prompt of 15, greedy, with their log-probabilities

PyTorch is Hugging Face's Llama, as it is (eager) and through torch.compile. All run in turn in one process, the products
that the floor is made of among them: model FLOPs (lens/flops.py) at the rate of a 2048^3 product, the faster of both
libraries. Medians count. Needs the extra [test].
"""

import copy
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags
from torch.nn import functional

from benchmarks.timing import in_turn
from configs import base as recipes
from lens import flops, hf, objectives, optimizer, sampling, sharding
from lens.config import Phase
from lens.models import decoder as dec
from lens.models import lora
from lens.models.encoder import Encoder, EncoderConfig, Source
from lens.models.injection import Replace
from lens.models.lens import Lens
from lens.models.rope import Rope
from lens.models.transformer import TransformerConfig
from lens.rollout import read
from lens.schedules import Units, constant
from lens.train import init_state, train_step

SMOLLM2 = TransformerConfig(
    family='llama',
    vocab_size=49152,
    d_model=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    norm_eps=1e-5,
    tied=True,
    max_positions=8192,
    ropes=(Rope(100000.0),),
)
ADAPTED = ('q', 'k', 'v', 'o')
FORMS = ('eager', 'compiled')
RANK, RATE, NORM = 16, 1e-4, 1.0
WORKS = ('forward', 'read', 'sft', 'sample')
FIGURES = ('loss_decoder', 'loss_encoder', 'grad_norm_decoder', 'grad_norm_encoder')  # of a step that are compared
TOLERANCE = 1e-4  # of the norm of a difference to that of ours
AGREE = 0.95  # rows of greedy tokens: two nearly equal logits may part one
SIDE = 2048  # of the matrices of the floor


class Shape(NamedTuple):
    """Documents x width tokens; activations, tokens of an explanation, rows of the decoder's prompt."""

    documents: int = 8
    width: int = 192
    activations: int = 64
    length: int = 24
    prompt: int = 15


class Given(NamedTuple):
    """What both sides start from, numpy and torch."""

    directory: pathlib.Path
    model: 'transformers.LlamaForCausalLM'
    tokens: np.ndarray
    positions: np.ndarray
    a_NxD: np.ndarray
    ids_NxT: np.ndarray
    left: list[int]
    right: list[int]


class Program(NamedTuple):
    """run() does the work once; numbers(run()) are what is compared. gflop: of the model, once."""

    run: Callable
    numbers: Callable
    gflop: float = 0.0


def given(c: TransformerConfig, shape: Shape, directory: pathlib.Path) -> Given:
    """Draws a model, writes it to `directory`, and draws a batch."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tied,
            max_position_embeddings=c.max_positions,
            rope_parameters={'rope_type': 'default', 'rope_theta': c.ropes[0].theta},
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    draws = torch.Generator().manual_seed(0)
    for w in model.parameters():
        x = torch.randn(w.shape, generator=draws)
        w.data = 1 + 0.1 * x if w.ndim == 1 else x * w.shape[-1] ** -0.5
        w.requires_grad_(False)
    model.eval().save_pretrained(directory)
    rng = np.random.default_rng(0)
    half = shape.prompt // 2
    return Given(
        directory,
        model,
        rng.integers(c.vocab_size, size=(shape.documents, shape.width), dtype=np.int32),
        rng.integers(shape.width, size=(shape.documents, shape.activations // shape.documents), dtype=np.int32),
        rng.standard_normal((shape.activations, c.d_model), dtype=np.float32),
        rng.integers(c.vocab_size, size=(shape.activations, shape.length), dtype=np.int32),
        rng.integers(c.vocab_size, size=half).tolist(),
        rng.integers(c.vocab_size, size=shape.prompt - half - 1).tolist(),
    )


def adapters(base, n: int, seed: int) -> dict:
    """Adapters of the first n blocks, without a zero that would hide a gradient."""
    key = jax.random.key(seed)
    tree = lora.init_adapters(base.blocks, n, '|'.join(ADAPTED), RANK, RANK, key)
    return {k: ab | {'b': 0.02 * jax.random.normal(key, ab['b'].shape)} for k, ab in tree.items()}


def make_lens(base, layer: int, left: list[int], right: list[int], *, adapted: bool = True) -> Lens:
    decoder_adapters, encoder_adapters = (
        adapters(base, n, n) if adapted else None for n in (base.config.n_layers, layer + 1)
    )
    how = dec.DecoderConfig(Replace(base.config.d_model**0.5), layer)
    return Lens(
        dec.Decoder(how, left, right, base, None, own_base=False, adapters=decoder_adapters),
        Encoder(EncoderConfig(layer, 'affine'), left, right, base, own_base=False, adapters=encoder_adapters),
    )


def phase(shape: Shape, layer: int) -> Phase:
    rows, sides = optimizer.parse_table(recipes.table(), Units(), 'table'), optimizer.SIDES
    values = dict.fromkeys(objectives.KNOBS, 0.0) | {'mse_weight': 1.0}
    return Phase(
        name='sft',
        start=0,
        end=1,
        objective=objectives.OBJECTIVES['sft'],
        hparams=objectives.Hparams(layer, shape.length),
        tx=optimizer.make(rows),
        documents=shape.documents,
        vectors=shape.activations // shape.documents,
        schedules={k: constant(v) for k, v in values.items()},
        rates=dict.fromkeys(sides, constant(RATE)),
        table=rows,
        clip_norms=dict.fromkeys(sides, NORM),
    )


def ours(base, shape: Shape, g: Given, mesh) -> dict[str, Program]:
    """Our programs by work. Call under jax.set_mesh(mesh)."""
    c, layer = base.config, base.config.n_layers // 2
    batch = sharding.put_batch({'tokens': g.tokens, 'positions': g.positions}, mesh)
    rows = sharding.put_batch({'a': g.a_NxD, 'ids': g.ids_NxT}, mesh)
    a_NxD, ids_NxT = rows['a'], rows['ids']

    def gflop(program, *args, **static):
        return sum(flops.by_scope(program.trace(*args, **static).jaxpr, c).values()) / 1e9

    forward = jax.jit(lambda model, ids: model(ids))
    programs = {
        'forward': Program(
            lambda: forward(base, batch['tokens']),
            lambda logits: {'logits': logits},
            gflop(forward, base, batch['tokens']),
        ),
        'read': Program(
            lambda: read(base, batch, layer=layer),
            lambda roll: {'activations': roll.a_NxD},
            gflop(read, base, batch, layer=layer),
        ),
    }

    p, key = phase(shape, layer), jax.random.key(0)
    positions = g.positions.reshape(shape.documents, -1)
    source = Source(ids_NxT[:, :1], jnp.zeros(shape.activations, jnp.int32))
    labels = sharding.put_batch(
        {'positions': positions, 'explanations': g.ids_NxT.reshape(*positions.shape, shape.length)}, mesh
    )
    roll = objectives.Rollout(a_NxD, source, labels)
    state = [init_state(make_lens(base, layer, g.left, g.right), p, mesh)]

    def step():
        state[0], metrics = train_step(state[0], base, roll, key, p.knobs(0), **p.program)
        return metrics

    programs['sft'] = Program(
        step,
        lambda metrics: {k: metrics[k] for k in FIGURES},
        gflop(train_step, state[0], base, roll, key, p.knobs(0), **p.program),
    )

    def in_one_pass(decoder, base, a_NxD, ids_NxT):
        """The products of sampling: every token passes the blocks once, those of the prompt that all rows share for all
        of them, those before a sampled one the head."""
        return base.logits(dec.teacher_forced(decoder, base, a_NxD, ids_NxT))

    decoder = make_lens(base, layer, g.left, g.right, adapted=False).decoder
    sample = jax.jit(sampling.sample, static_argnames='length')
    with mock.patch.object(dec, 'PASS_TOKENS', 0):
        work = gflop(jax.jit(in_one_pass), decoder, base, a_NxD, ids_NxT)
    programs['sample'] = Program(
        lambda: sample(decoder, base, a_NxD, key, length=shape.length, temperature=0.0),
        lambda s: {'ids': s.ids_NxT, 'logp': s.logp_NxT},
        work,
    )
    return programs


class Adapted(torch.nn.Module):
    """A frozen matrix and its trained adapter."""

    def __init__(self, linear: torch.nn.Linear, a, b):
        super().__init__()
        self.linear = linear
        self.a, self.b = (torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in (a, b))

    def forward(self, x):
        return self.linear(x) + (x @ self.a) @ self.b


def twin(model, n: int, given_adapters: dict | None):
    """A copy of the first n blocks of `model` around the same weights, adapted where asked for."""
    out = copy.deepcopy(model, {id(w): w for w in model.parameters()})
    out.model.layers = out.model.layers[:n]
    out.config.num_hidden_layers = out.model.config.num_hidden_layers = n
    for i, block in enumerate(out.model.layers if given_adapters else ()):
        for name in ADAPTED:
            a, b = (np.asarray(given_adapters[name][k][i]) for k in ('a', 'b'))
            linear = getattr(block.self_attn, f'{name}_proj')
            adapted = Adapted(linear, a.reshape(-1, RANK), b.reshape(RANK, -1))
            setattr(block.self_attn, f'{name}_proj', adapted)
    return out


class Theirs:
    """The works in PyTorch. compiled: models through torch.compile, a cache of fixed size."""

    def __init__(self, c: TransformerConfig, shape: Shape, g: Given, lens: Lens, *, compiled: bool):
        def model(n, adapters=None, headless=False):
            out = twin(g.model, n, adapters)
            if headless:
                out = out.model
                out.norm = torch.nn.Identity()
            return out

        layer = c.n_layers // 2
        self.length, self.compiled = shape.length, compiled
        self.full, self.lower = model(c.n_layers), model(layer + 1, headless=True)
        self.decoder = model(c.n_layers, lens.decoder.adapters)
        self.encoder = model(layer + 1, lens.encoder.adapters, headless=True)
        self.table = g.model.model.embed_tokens.weight
        self.tokens, self.positions, self.ids_NxT = (torch.tensor(x).long() for x in (g.tokens, g.positions, g.ids_NxT))
        self.a_NxD = torch.tensor(g.a_NxD)
        # a row of norm sqrt(d) in the slot of the decoder's prompt
        self.slot_NxD = self.a_NxD * c.d_model**0.5 / self.a_NxD.norm(dim=-1, keepdim=True)

        self.untrained = [self.table[ids] for ids in (g.left, g.right)]
        self.texts = [torch.nn.Parameter(p.clone()) for p in self.untrained]
        self.last = torch.nn.Parameter(torch.zeros(c.d_model))
        self.readout = torch.nn.Linear(c.d_model, c.d_model)
        self.readout.weight.data, self.readout.bias.data = torch.eye(c.d_model), torch.zeros(c.d_model)
        self.sides = [
            [w for w in self.decoder.parameters() if w.requires_grad],
            [*self.texts, self.last, *self.readout.parameters()]
            + [w for w in self.encoder.parameters() if w.requires_grad],
        ]
        decoder, encoder = self.sides
        self.optimizer = torch.optim.AdamW(decoder + encoder, RATE, weight_decay=0.0)
        if compiled:
            for name in ('full', 'lower', 'decoder', 'encoder'):
                setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    @torch.no_grad()
    def forward(self):
        return {'logits': self.full(self.tokens, use_cache=False).logits}

    @torch.no_grad()
    def read(self):
        x = self.lower(self.tokens, use_cache=False).last_hidden_state
        return {'activations': x.take_along_dim(self.positions[..., None], 1).flatten(0, 1)}

    def prompted(self, left, right, rows_NxTxD):
        """The decoder's prompt around the slot, and rows after it."""
        left, right = (p.expand(len(rows_NxTxD), -1, -1) for p in (left, right))
        return torch.cat([left, self.slot_NxD[:, None], right, rows_NxTxD], 1)

    def sft(self):
        self.optimizer.zero_grad()
        rows = functional.embedding(self.ids_NxT, self.table)
        x = self.prompted(*self.untrained, rows[:, :-1])
        logits = self.decoder(inputs_embeds=x, use_cache=False, logits_to_keep=self.length).logits
        cross_entropy = functional.cross_entropy(logits.flatten(0, 1), self.ids_NxT.flatten())

        left, right = (p.expand(len(rows), -1, -1) for p in self.texts)
        x = torch.cat([left, rows, right[:, :-1], right[:, -1:] + self.last], 1)
        y = self.readout(self.encoder(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1])
        error = ((y - self.a_NxD).square().mean(-1) / self.a_NxD.square().mean(-1)).mean()
        (cross_entropy + error).backward()
        norms = [torch.nn.utils.clip_grad_norm_(side, NORM) for side in self.sides]
        self.optimizer.step()
        return dict(zip(FIGURES, (cross_entropy.detach(), error.detach(), *norms), strict=True))

    @torch.no_grad()
    def sample(self):
        rows = self.prompted(*self.untrained, self.slot_NxD[:, None][:, :0])
        if self.compiled:
            cache = transformers.StaticCache(self.full.config, rows.shape[1] + self.length)
        else:
            cache = transformers.DynamicCache(config=self.full.config)
        logits = self.full(None, None, None, cache, rows, logits_to_keep=1).logits
        ids, logp = [], []
        for t in range(self.length):
            best = logits[:, -1].log_softmax(-1).max(-1)
            ids.append(best.indices)
            logp.append(best.values)
            if t + 1 < self.length:
                logits = self.full(best.indices[:, None], None, None, cache).logits
        return {'ids': torch.stack(ids, 1), 'logp': torch.stack(logp, 1)}


def difference(mine: dict, theirs: dict) -> float:
    """Returns the largest of |mine - theirs| / |mine| (norms) over numbers of the same names.

    Token ids are compared by rows, and other numbers in the rows alone whose ids agree. Raises ValueError where fewer
    than AGREE of the rows do.
    """
    mine, theirs = ({k: np.asarray(x) for k, x in side.items()} for side in (mine, theirs))
    if 'ids' in mine:
        same = (mine.pop('ids') == theirs.pop('ids')).all(1)
        if same.mean() < AGREE:
            raise ValueError(f'only {same.mean():.0%} of the rows of tokens agree')
        mine, theirs = ({k: x[same] for k, x in side.items()} for side in (mine, theirs))
    return max(float(np.linalg.norm(x - theirs[k]) / np.linalg.norm(x)) for k, x in mine.items())


def products(rng: np.random.Generator) -> dict[str, Callable]:
    """One product of square matrices by each library, and by PyTorch in bfloat16."""
    a = rng.standard_normal((SIDE, SIDE), dtype=np.float32)
    ours, theirs, product = jnp.asarray(a), torch.tensor(a), jax.jit(jnp.dot)
    half = theirs.bfloat16()
    return {
        'JAX float32': lambda: product(ours, ours),
        'PyTorch float32': lambda: theirs @ theirs,
        'PyTorch bfloat16': lambda: half @ half,
    }


def measure(work: str, mine: Program, others: dict[str, Theirs], repeats: int, say: Callable[[str], None]) -> dict:
    """Compares the numbers, then times the work; what PyTorch cannot do is said and left out.

    Raises ValueError where its numbers are others.
    """
    numbers = jax.device_get(mine.numbers(mine.run()))
    runs = {'lens': mine.run}
    for name, other in others.items():
        try:
            run = getattr(other, work)
            far = difference(numbers, run())
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as e:  # no compiler, an operation that it lacks
            say(f'{work}: PyTorch {name} does not run: {str(e).strip().splitlines()[0][:200]}')
            continue
        if not far <= TOLERANCE:
            raise ValueError(f'{work}: the numbers of PyTorch {name} are {far:.1e} from ours')
        say(f'{work}: PyTorch {name} gives our numbers to {far:.1e}')
        runs[name] = run
    return in_turn(runs | products(np.random.default_rng(0)), repeats)


def table(rows: dict[str, dict[str, float]], gflop: dict[str, float]) -> str:
    """Lays out medians by work and name."""
    lines = [
        '| work | TFLOP | floor s | bf16 floor s | lens s | share of floor | eager s | compiled s | eager / lens |'
        ' compiled / lens |',
        '|---' * 10 + '|',
    ]
    for work, t in rows.items():
        one = gflop[work] / (2 * SIDE**3 / 1e9)  # products of the floor
        floor = one * min(t['JAX float32'], t['PyTorch float32'])
        cells = [gflop[work] / 1e3, floor, one * t['PyTorch bfloat16'], t['lens'], floor / t['lens']]
        cells += [t.get('eager'), t.get('compiled')]
        cells += [t[k] / t['lens'] if k in t else None for k in ('eager', 'compiled')]
        lines.append(f'| {work} | ' + ' | '.join('' if x is None else f'{x:.3g}' for x in cells) + ' |')
    return '\n'.join(lines)


def main(_):
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    transformers.utils.logging.disable_progress_bar()
    c = SMOLLM2 if SIZE.value == 'smollm2' else hf.read_config(pathlib.Path('configs/tiny_subject'))
    shape, mesh, rows, gflop = Shape(), sharding.make_mesh(1, 1), {}, {}
    print(f'{SIZE.value}, {cores} threads, jax {jax.__version__}, torch {torch.__version__}', flush=True)

    def say(text):
        print(text, flush=True)

    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        g = given(c, shape, pathlib.Path(folder))
        base = hf.load_model(g.directory, mesh=mesh, remat='dots')  # PyTorch keeps what it computed, too
        programs = ours(base, shape, g, mesh)
        lens = make_lens(base, c.n_layers // 2, g.left, g.right)
        others = {k: Theirs(c, shape, g, lens, compiled=k == 'compiled') for k in AGAINST.value}
        for work in WORK.value:
            gflop[work] = programs[work].gflop
            rows[work] = measure(work, programs[work], others, REPEATS.value, say)
            rates = {k: 2 * SIDE**3 / 1e9 / rows[work][k] for k in products(np.random.default_rng(0))}
            say(f'{work}: GFLOP/s of a product of {SIDE}: ' + ', '.join(f'{k} {v:.0f}' for k, v in rates.items()))
    print(table(rows, gflop))


if __name__ == '__main__':
    SIZE = flags.DEFINE_enum('size', 'smollm2', ['smollm2', 'tiny'], 'Shape of the model.')
    WORK = flags.DEFINE_multi_enum('work', list(WORKS), list(WORKS), 'What is measured.')
    AGAINST = flags.DEFINE_multi_enum('against', list(FORMS), list(FORMS), 'Forms of PyTorch.')
    REPEATS = flags.DEFINE_integer('repeats', 5, 'Runs of each in turn.', lower_bound=1)
    app.run(main)
