"""Every key once, with its unit and meaning. Other files start from get_config() and change values; what values each
may have: lens/keys.py."""

import ml_collections

RECIPES = {'': ('sft', 'grpo'), 'sft': ('sft',), 'grpo': ('grpo',)}  # recipe argument -> phases


def phases(recipe: str, recipes: dict[str, tuple[str, ...]] = RECIPES) -> tuple[str, ...]:
    """The phases of --config=FILE.py:RECIPE. Raises ValueError naming the arguments that the file takes."""
    if recipe not in recipes:
        raise ValueError(
            f'{recipe!r} is not a recipe of this file: give {", ".join(filter(None, recipes))} or nothing.'
        )
    return recipes[recipe]


def free(value) -> ml_collections.FieldReference:
    """A key that takes a number or a string, in the notation of lens/schedules.py."""
    return ml_collections.FieldReference(value, field_type=object)


# Matrices of a trained base, adapters, maps, read-out.
MATRICES = r'/(base/blocks/(attn/[qkvo]|mlp/(gate|up|down)|moe/(router_w|gate_up|down))$|adapters/|(maps|readout)_w$)'


def table(weight_decay: float = 0.0, encoder_unfreeze: int | str = '0') -> tuple[tuple, ...]:
    """Rows (regex over parameter paths, learning rate multiplier, weight decay, clip group, unfreeze time D); the
    first that matches counts, (regex, None) freezes. This one trains all that exists and decays matrices alone."""
    return (
        ('^decoder' + MATRICES, 1.0, weight_decay, 'decoder', '0'),
        ('^decoder/', 1.0, 0.0, 'decoder', '0'),
        ('^encoder' + MATRICES, 1.0, weight_decay, 'encoder', encoder_unfreeze),
        ('^encoder/', 1.0, 0.0, 'encoder', encoder_unfreeze),
    )


def phase(objective: str) -> ml_collections.ConfigDict:
    """The keys of one training phase. D: a duration ("1000s", "100os", "5e", "-1", "0"), V: a value (a number,
    "constant 1", "linear 1 0.1", "cosine 1 0.1", … with "warmup D", "after D", "over D"); lens/schedules.py."""
    p = ml_collections.ConfigDict()
    p.objective = objective  # sft (given explanations) | grpo (sampled groups) | gumbel (straight through)
    p.steps = free(1000)  # D, micro-steps: one batch each; an epoch is one pass over the training documents
    p.accumulate = 1  # micro-steps whose mean gradient makes one optimizer step
    p.documents = 8  # documents per micro-step; a multiple of mesh.data
    p.prefix_min = 0  # sft, grpo: the encoder reads the first n words of a text, n of prefix_min..prefix_max drawn for
    p.prefix_max = 0  # each activation, so that what matters comes first; 0 = all words
    p.slices = 1  # sft, grpo: parts of the documents, the loss of one after the other: memory of one, the same gradient
    p.vectors = 4  # activations read per document; at most its row has tokens
    p.learning_rate_decoder = free('cosine 1e-3 1e-4 warmup 20s')  # V
    p.learning_rate_encoder = free('cosine 1e-3 1e-4 warmup 20s')  # V
    p.table = table()  # which parameters train and how
    p.grad_clip = free(1.0)  # global norm of every clip group, or (('decoder', 0.05), ('encoder', 1.0))
    p.mse_weight = free(1.0)  # V: weight of the encoder's error (encoder.error)
    p.kl_weight = free(0.0)  # V: weight of the functional KL: the subject's next token from A, from its reconstruction
    p.resample = False  # those two on reconstruction + (A' - its reconstruction), A' of the next document
    p.resample_stop_grad = True  # that difference is a constant
    p.group = 8  # grpo: explanations per activation
    p.mean_of = 1  # grpo: explanations whose reconstructions are averaged; they share reward and advantage
    p.reward = 'error'  # grpo: minus the encoder's error (2 without an explanation); log_error: minus its log
    p.reward_ema = 0.0  # grpo: rewards are by a moving average of the encoder, of which a step keeps this share
    p.reward_lag = 0  # grpo: or by a copy of the encoder made every so many optimizer steps; 0 = by the encoder itself
    p.advantage = 'grpo'  # grpo | rloo | dr_grpo
    p.aggregate = 'tokens'  # grpo: means over tokens | responses (each text's first) | length (its sum: Dr. GRPO)
    p.drop_equal = False  # grpo: groups whose rewards are equal teach nothing, by their KLs and errors neither
    p.mismatch = free(0.0)  # V, grpo: nats; above it between sampler and trainer a text teaches nothing; 0 = off
    p.encoder_texts = 'all'  # grpo: texts of a group that the encoder learns from: all | best (that of the least error)
    p.updates = 1  # grpo: optimizer steps on the same texts, at most 64; above 1 the probability ratio is clipped
    p.policy = 'ppo'  # grpo: how the ratio is clipped; cispo: it is a constant weight, also with updates=1
    p.clip = 0.2  # grpo: that ratio stays in 1 - clip .. 1 + clip; cispo: at most 1 + clip
    p.form = 'two_pass'  # gumbel: full (exact gradient, through the sampling) | two_pass (teacher forced)
    p.tau = free(1.0)  # V, gumbel: temperature of the relaxed tokens, at least 0.1
    p.lm_weight = free(0.0)  # V, grpo, gumbel: weight of the KL of the natural prefix to the decoder, all words
    p.beta = free(0.0)  # V, grpo, gumbel: weight of the KL of the decoder's tokens to kl_to
    p.kl_to = 'natural'  # natural (base with a word for the activation) | start (decoder at the start of the phase)
    p.kl_top = 0  # grpo, gumbel: that KL over so many likeliest words and a tail; 0 = estimated by the drawn word
    p.kl_skip = 3  # grpo, gumbel: first tokens left out of that KL
    p.entropy_weight = free(0.0)  # V, grpo, gumbel: weight of the entropy bonus
    p.entropy_clamp = free(1.0)  # V, grpo: nats; no bonus for texts above it
    p.copy_price = free(0.0)  # V, grpo: reward that a text loses whose tokens all are among the last 32 of the source
    p.length_price = free(0.0)  # V, grpo: reward that a response loses by each token beyond length_free
    p.length_free = free(0)  # V, grpo: tokens, its tags among them
    return p


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.seed = 0  # of weights, batches, positions and samples; 0 or more

    c.subject = ml_collections.ConfigDict()
    c.subject.path = ''  # Hugging Face directory (config.json, safetensors, tokenizer)
    c.subject.dtype = 'float32'  # of the frozen base: float32 | bfloat16
    c.subject.compute = 'auto'  # products of train=full, whose weights are float32; auto: float32 on CPU, else bfloat16
    c.subject.remat = 'full'  # kept for the backward pass: full (no product) | attention | projections | dots (all)
    c.subject.experts = 'auto'  # auto (the fastest) | dense (every expert) | triton (kernels for GPUs) | ragged (XLA's)
    c.subject.packed = False  # keep MXFP4 experts packed and dequantise one layer at a time (gpt-oss)
    c.layer = 0  # 0-based block whose output is read

    c.data = ml_collections.ConfigDict()
    c.data.path = ''  # folder with train/ and validation/
    c.data.min_pos = 8  # first token position that is read, labelled or drawn
    c.data.positions = 'any'  # tokens that may be read: any | assistant | thinking | final (needs roles in the data)

    c.explanation_len = 16  # tokens of a response: the explanation and its tags
    c.explanation_open = ''  # what opens an explanation, tokens of the subject; empty: its first token does
    c.explanation_close = ''  # what closes it; empty: every token of a response is explanation
    c.explanation_end = ''  # the token after that, without which a response has failed; empty: it ends at the tag
    c.position_vectors = False  # decoder reads A minus, encoder writes plus a trained vector of the position (GPT-2)
    c.tuned_lens = ''  # folder of lens.tools.tuned_lens, for init=tuned_lens

    c.decoder = ml_collections.ConfigDict()
    c.decoder.prompt = 'Short explanation of <embed>:'  # where a soft prompt starts (affine), or the prompt itself
    c.decoder.layers = ()  # a 0-based block for each <embed> of the prompt, whose output stands there; (): that of layer in all
    c.decoder.injection = 'affine'  # affine (trained maps) | replace (A at a fixed norm) | add (norm-matched, block 1)
    c.decoder.norm = 0.0  # replace: norm of the row in the slot; 0 = sqrt(d)
    c.decoder.marker = ''  # replace, add: a text of one token that stands in the slots
    c.decoder.patched_blocks = 1  # affine: first N blocks whose slot is overwritten; 0 = input only, -1 = all
    c.decoder.shared_map = False  # one map for all of them
    c.decoder.init = 'scale'  # of the maps: identity | scale (ratio of norms) | tuned_lens (composition)
    c.decoder.train = 'maps'  # maps (base frozen) | lora | full

    c.encoder = ml_collections.ConfigDict()
    c.encoder.prompt = '<text>'  # around the explanation; soft where that of the decoder is
    c.encoder.output_layer = -1  # 0-based block that is read out; -1 = layer
    c.encoder.readout = 'affine'  # affine | linear | none: what follows it, identity at the start
    c.encoder.context_tokens = 0  # last source tokens, up to that which was read, shown after the words
    c.encoder.error = 'nmse'  # nmse (|A - reconstruction|^2 / |A|^2) | direction (2 - 2 cosine)
    c.encoder.init = 'identity'  # of the read-out: identity | scale (ratio of norms) | tuned_lens
    c.encoder.train = 'maps'  # maps (base frozen) | lora | full

    c.lora = ml_collections.ConfigDict()
    c.lora.pattern = 'q|k|v|o'  # regex over block matrices: q k v o gate up down
    c.lora.rank = 16  # columns of A, rows of B; at most the width of the subject
    c.lora.alpha = 16.0  # scale alpha / rank
    c.lora.rs = False  # rank-stabilised: scale alpha / sqrt(rank)

    c.init_from = ''  # folder of lens.export or of others, workdir of another run: where the lens starts; empty = fresh

    c.phases = ('sft', 'grpo')  # run in this order; each names one of the blocks below
    c.sft = phase('sft')
    c.grpo = phase('grpo')
    c.gumbel = phase('gumbel')

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = 1  # devices that split the batch; -1 = all that remain
    c.mesh.model = 1  # devices that split heads, feed-forward and vocabulary
    c.mesh.replica = 1  # groups of data x model devices, say hosts, that split the batch as well
    c.mesh.shard_base = False  # split the frozen base over data too; each layer is put together when it runs

    c.eval = ml_collections.ConfigDict()
    c.eval.every = free('200s')  # D; quick held-out figures; 0 = only at the end of a phase
    c.eval.quick_documents = 64  # documents of the quick figures
    c.eval.documents = 300  # most documents at the end of a phase; all where there are fewer
    c.eval.vectors = 4  # activations per document
    c.eval.batch = 250  # activations per evaluation step
    c.eval.samples = 10  # explanations shown in the report
    c.eval.reading = 48  # tokens of a held-out text that reading.html explains one by one; 0 = no such page

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = free('200s')  # D; 0 = only at the end of a phase
    c.checkpoint.keep = 2  # newest
    c.checkpoint.best = 1  # and those of the highest held-out FVE; a new best is saved
    c.checkpoint.keep_every = free('0')  # D; those at a multiple are saved as well and never deleted

    c.health = ml_collections.ConfigDict()
    c.health.collapse = 'warn'  # when the texts of a phase that samples collapse: warn | stop | off

    c.log = ml_collections.ConfigDict()
    c.log.every = free('10s')  # D; lines of metrics.jsonl
    c.log.drift = free('0')  # D; how far the parameters have moved since the start of the run
    c.log.tensorboard = False  # also write workdir/tensorboard (extra [tensorboard])
    c.log.wandb_project = ''  # empty = off
    return c


EXPLAIN = 'Short explanation of <embed>. Language, topic, sentiment, claims, speaker, style, etc:'
SUMMARISE = 'Summary of the text, encapsulating the main points and message, style and details:<text>'


def consistency_lens(
    recipe: str, path: str, layer: int, bos: str = '', recipes: dict[str, tuple[str, ...]] = RECIPES
) -> ml_collections.ConfigDict:
    """The recipe of the original consistency lenses for the subject `path` read after block `layer`, with the sizes of
    a large model; files of other models change values. Frozen base in bfloat16, maps into the first five blocks, texts
    of 8 tokens. bos: token of the subject that opens every text.

    The entropy bonus acts below 0.1 nats only: where the original schedule (2.0 to 0.1 over 6000 steps) ends.
    """
    c = get_config()
    c.phases = phases(recipe, recipes)
    c.subject.path, c.subject.dtype, c.layer = path, 'bfloat16', layer
    c.data.path = f'data/{path.rpartition("/")[2]}'
    c.explanation_len = 8
    c.decoder.prompt, c.encoder.prompt = bos + EXPLAIN, bos + SUMMARISE
    c.decoder.patched_blocks = 5

    c.sft.documents, c.sft.vectors = 32, 8
    c.sft.learning_rate_decoder = 'cosine 1e-3 1e-5 warmup 10s'
    c.sft.learning_rate_encoder = 'cosine 1e-4 1e-6 warmup 10s'

    c.grpo.steps = 20000
    c.grpo.documents, c.grpo.vectors, c.grpo.group = 16, 1, 8
    c.grpo.learning_rate_decoder = 'cosine 1e-3 1e-5 warmup 100s'
    c.grpo.learning_rate_encoder = 'cosine 1e-4 1e-6 warmup 100s'
    c.grpo.entropy_weight, c.grpo.entropy_clamp = 1.0, 0.1

    c.eval.batch = 128  # 32 documents, as in a training step
    c.eval.every = c.checkpoint.every = '500s'
    return c
