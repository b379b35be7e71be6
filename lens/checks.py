"""What a configuration must be to run: refusals of its keys, its subject, its data and its devices.

Each is one sentence that names the key, raised before weights are read. What a single key may hold: keys.py.
"""

import numpy as np

from lens import data, keys, objectives, response, sharding
from lens.errors import LensError, need_package, require, shown
from lens.keys import choice, get
from lens.models import injection
from lens.models.transformer import TransformerConfig
from lens.response import Texts

INITS = ('identity', 'scale', 'tuned_lens')
MOST_TEXTS = 1 << 20  # that one micro-step reads or draws


def check_values(cfg) -> None:
    """Raises LensError for values that are impossible with any subject and any data."""
    keys.check(cfg)
    if cfg.log.tensorboard:
        need_package('tensorboardX', 'tensorboard', 'log.tensorboard=True')
    if cfg.log.wandb_project:
        need_package('wandb', 'wandb', f'log.wandb_project={cfg.log.wandb_project}')
    trained = cfg.subject.packed and 'full' in (cfg.decoder.train, cfg.encoder.train)
    remedy = 'drop it, or use train=lora or maps'
    require(not trained, f'subject.packed=True keeps the experts as bytes, which cannot be trained: {remedy}.')


def check_subject(cfg, c: TransformerConfig) -> None:
    """Raises LensError for values that are impossible with this subject."""
    last, out = c.n_layers - 1, cfg.encoder.output_layer
    require(0 <= cfg.layer <= last, f'layer={cfg.layer} is not a block of the subject, which has blocks 0..{last}.')
    most, both = c.d_model, (cfg.decoder.train, cfg.encoder.train)
    fits = 'lora' not in both or cfg.lora.rank <= most
    require(fits, f'lora.rank={cfg.lora.rank} is above the width of the subject, {most}: lower it, or use train=full.')
    wanted = f'0..{last}, or -1 for layer'
    require(-1 <= out <= last, f'encoder.output_layer={out} is not a block of the subject ({wanted}).')
    injection.of_config(cfg.decoder, c)
    check_layers(cfg, c)
    learned = not c.ropes or not cfg.position_vectors
    require(learned, f'position_vectors=True needs a subject with learned positions (GPT-2), not {c.family}.')
    if cfg.init_from:
        return
    for key in ('decoder.init', 'encoder.init'):
        choice(get(cfg, key), INITS, key)
    init, readout = cfg.encoder.init, cfg.encoder.readout
    missing = readout == 'none' and init != 'identity'
    require(not missing, f'encoder.init={init} starts a map that encoder.readout=none does not have: use identity.')
    missing = 'tuned_lens' in (cfg.decoder.init, init) and not cfg.tuned_lens
    require(not missing, 'init=tuned_lens needs tuned_lens, a folder that lens.tools.tuned_lens has written.')


def check_layers(cfg, c: TransformerConfig) -> None:
    """Raises LensError where decoder.layers is not a block of this subject for each slot."""
    layers, slots, last = tuple(cfg.decoder.layers), cfg.decoder.prompt.count(response.EMBED), c.n_layers - 1
    outside, named = [k for k in layers if not 0 <= k <= last], f'decoder.layers={shown(layers)}'
    require(not outside, f'{named} names {outside}, and the subject has blocks 0..{last}.')
    what = f'{named} has {len(layers)} blocks, and decoder.prompt has {response.EMBED} {slots} times'
    require(not layers or len(layers) == slots, f'{what}: give one block for each.')
    both, why = layers and cfg.position_vectors, 'the vectors of positions are those of one block'
    require(not both, f'decoder.layers does not go with position_vectors=True: {why}.')


def check_lengths(cfg, c: TransformerConfig, texts: Texts) -> None:
    """Raises LensError where the subject has no positions for a prompt with its explanation."""
    left, right = texts.decoder[:2]
    context = cfg.encoder.context_tokens
    read = sum(map(len, texts.encoder)) + (texts.tags.joints.more if texts.tags.joints else 0)
    lengths = {'decoder': len(left) + 1 + len(right), 'encoder': read + context}  # 1: the slot
    for side, tokens in lengths.items():
        total, most = tokens + cfg.explanation_len, c.max_positions
        what = f'{side}.prompt and explanation_len={cfg.explanation_len}'
        what = f'encoder.context_tokens={context}, {what}' if side == 'encoder' and context else what
        require(total <= most, f'{what} make {total} tokens, the subject reads {most}.')
    n, around = cfg.explanation_len, texts.tags.around
    require(around < n, f'explanation_len={n} leaves no room between tags of {around} tokens.')


def check_prefixes(cfg, tags: response.Tags) -> None:
    """Raises LensError where a phase draws prefixes that no explanation has."""
    room = cfg.explanation_len - tags.around
    for name in cfg.phases:
        least, most = cfg[name].prefix_min, cfg[name].prefix_max
        wanted = f'0 and 0, or 1 <= prefix_min <= prefix_max <= {room}, the words that a response has room for'
        fits = least <= most <= room and (least > 0) == (most > 0)
        require(fits, f'{name}.prefix_min={least} and {name}.prefix_max={most} must be {wanted}.')


def check_context(cfg) -> None:
    """Raises LensError where no phase trains the encoder, which has a context to learn."""
    learns = not cfg.encoder.context_tokens or not cfg.phases or any(cfg[name].mse_weight != 0 for name in cfg.phases)
    why = 'the encoder would never learn the context without words, which figures compare with'
    blind = f'{"".join(cfg.phases[-1:])}.mse_weight=0 with encoder.context_tokens={cfg.encoder.context_tokens}'
    require(learns, f'{blind}: {why}.')


def check_batches(cfg, mesh) -> None:
    """Raises LensError where a batch of training cannot be split over the devices."""
    for name in cfg.phases:
        p = cfg[name]
        sharding.check_divides(p.documents, f'{name}.documents', mesh)
        each = p.slices * sharding.row_count(mesh)
        what = f'{name}.documents={p.documents} cannot be split into {name}.slices={p.slices} equal parts'
        require(p.documents % each == 0, f'{what} on every device: use a multiple of {each}.')


def check_phase(cfg, name: str) -> None:
    """Raises LensError for impossible values of the phase block `name`."""
    exists = name in cfg and 'objective' in cfg[name]
    require(exists, f'phases names {shown(repr(name))}, but there is no phase block of that name.')
    p = cfg[name]
    reads = objectives.OBJECTIVES[p.objective].reads
    alone = 'group' in reads and p.group < 2
    require(not alone, f'{name}.group={p.group} must be at least 2: advantages compare the group.')
    require(p.documents * p.vectors >= 2, f'{name}: one activation has no variance; raise documents or vectors.')
    texts = p.documents * p.vectors * (p.group * p.mean_of if 'group' in reads else 1)
    factors = 'documents x vectors' + ' x group x mean_of' * ('group' in reads)
    require(texts <= MOST_TEXTS, f'{name}: {factors} make {texts} texts in a micro-step, more than {MOST_TEXTS}.')
    both = p.updates > 1 and p.accumulate > 1
    require(not both, f'{name}.updates={p.updates} does not go with {name}.accumulate={p.accumulate}.')
    require(not p.resample or p.documents >= 2, f'{name}.resample=True needs {name}.documents of at least 2.')
    alone = not p.resample or p.slices == 1
    require(alone, f'{name}.resample=True needs {name}.slices=1: the next document may be in another slice.')
    for key, off in objectives.OPTIONAL.items():
        idle = f'{name}.{key}={shown(repr(p[key]))} does nothing under the {p.objective} objective'
        require(key in reads or p[key] == off, f'{idle}: use {off}.')
    both = p.reward_ema > 0 and p.reward_lag > 0
    require(
        not both, f'{name}.reward_ema={p.reward_ema} does not go with {name}.reward_lag={p.reward_lag}: set one to 0.'
    )
    both, why = p.mismatch != 0 and p.updates > 1, 'later updates differ from the sampler by what they have learnt'
    require(not both, f'{name}.mismatch does not go with {name}.updates={p.updates}: {why}.')
    open_end = p.length_price != 0 and not cfg.explanation_close
    require(
        not open_end, f'{name}.length_price needs an explanation_close: without one all responses are equally long.'
    )
    together = p.mean_of > 1 and (p.lm_weight != 0 or p.kl_weight != 0)
    require(not together, f'{name}.mean_of above 1 has no single text: set lm_weight and kl_weight to 0.')
    n, some = cfg.explanation_len, p.beta == 0 or 0 <= p.kl_skip < cfg.explanation_len
    require(some, f'{name}.kl_skip={p.kl_skip} leaves no token of explanation_len={n}.')


def check_documents(cfg, name: str, train: data.Split, tags: response.Tags) -> None:
    """Raises LensError where the data does not have what the phase block `name` asks for."""
    p, where = cfg[name], train.directory
    require(
        len(train) >= p.documents, f'{name}.documents={p.documents}, but {where} holds only {len(train)} documents.'
    )
    _check_vectors(p.vectors, f'{name}.vectors', train)
    if objectives.OBJECTIVES[p.objective].samples:
        return
    need = f'the {p.objective} objective of {name} needs given explanations'
    require(train.explanations is not None, f'{where}/explanations.npy does not exist: {need}.')
    row, need = data.first_unlabelled(train, cfg.data.min_pos), f'{name} needs one in each document'
    from_ = f'from data.min_pos={cfg.data.min_pos} on'
    require(row is None, f'{where}/positions.npy row {row} has no labelled position {from_}: {need}.')
    n, have = cfg.explanation_len, train.explanations.shape[2]
    require(have == n or bool(tags), f'explanation_len={n}, but the given explanations in {where} have {have} tokens.')


def check_stored(cfg, c: TransformerConfig, split: data.Split) -> None:
    """Raises LensError where stored activations are of another place than the lens reads, and for what needs their texts,
    which are not there."""
    where, d = f'{split.directory}/activations.npy', split.activations.shape[2]
    require(d == c.d_model, f'{where} has activations of {d} numbers, {cfg.subject.path} has streams of {c.d_model}.')
    of = split.meta['activations'].get('layer')
    require(of == cfg.layer, f'layer={cfg.layer}, but {where} was read after block {shown(of)}: set layer={shown(of)}.')
    idle = {'encoder.context_tokens': 0, **{f'{p}.{k}': 0 for p in cfg.phases for k in ('kl_weight', 'copy_price')}}
    idle |= {'data.positions': 'any', 'decoder.layers': ()}
    scales = ['decoder.init'] * bool(injection.of_config(cfg.decoder, c).n_maps) + ['encoder.init']
    wrong = [k for k, off in idle.items() if (get(cfg, k) or off) != off]
    wrong += [k for k in scales if get(cfg, k) == 'scale' and not cfg.init_from]
    if wrong:
        off = idle.get(wrong[0], 'identity')
        raise LensError(
            f'{wrong[0]}={shown(repr(get(cfg, wrong[0])))} needs the texts, and {split.directory} has stored activations alone: use '
            f'{off!r}, or import it with --vectors=False.'
        )


def check_held_out(cfg, validation: data.Split) -> None:
    """Raises LensError where the held-out documents do not allow the figures that end a phase."""
    where, e = validation.directory, cfg.eval
    _check_vectors(e.vectors, 'eval.vectors', validation)
    read, counts = np.unique(validation.doc_id[validation.read_rows[: e.documents]], return_counts=True)
    require(len(read) > 1, f'{where} holds one document: controls need at least 2.')
    often, half = counts.max(), 'more than half of the documents that are evaluated'
    require(2 * often <= counts.sum(), f'{where}/doc_id.npy: {read[counts.argmax()]} is the id of {half}, {often}.')
    quick = e.quick_documents * e.vectors
    require(quick >= 2, 'eval.quick_documents x eval.vectors is one activation, which has no variance: raise one.')


def _check_vectors(vectors: int, key: str, split: data.Split) -> None:
    width, what = split.width or split.positions.shape[1], 'tokens' if split.width else 'activations'
    require(vectors <= width, f'{key}={vectors}, but the rows of {split.directory} have {width} {what}.')
