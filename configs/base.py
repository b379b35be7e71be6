"""Every key once, with its unit and meaning. Other files start from get_config() and change values."""

import ml_collections

RECIPES = {'': ('sft', 'grpo'), 'sft': ('sft',), 'grpo': ('grpo',)}  # recipe argument -> phases


def phases(recipe: str, recipes: dict[str, tuple[str, ...]] = RECIPES) -> tuple[str, ...]:
    """The phases of --config=FILE.py:RECIPE. Raises ValueError naming the arguments that the file takes."""
    if recipe not in recipes:
        raise ValueError(
            f'{recipe!r} is not a recipe of this file: give {", ".join(filter(None, recipes))} or nothing.'
        )
    return recipes[recipe]


def phase(objective: str) -> ml_collections.ConfigDict:
    """The keys of one training phase."""
    p = ml_collections.ConfigDict()
    p.objective = objective  # sft (given explanations) | grpo (sampled groups) | gumbel (straight through)
    p.steps = 1000  # optimizer steps
    p.documents = 8  # documents per step; a multiple of mesh.data
    p.vectors = 4  # activations read per document
    p.learning_rate_decoder = 1e-3  # peak
    p.learning_rate_encoder = 1e-3  # peak
    p.warmup_steps = 20  # linear, from 0
    p.final_fraction = 0.1  # learning rate at the last step / peak; cosine in between
    p.weight_decay = 0.0  # on matrices of trained bases and adapters
    p.grad_clip = 1.0  # global norm, decoder and encoder each
    p.group = 8  # grpo: explanations per activation
    p.tau = 1.0  # gumbel: temperature of the relaxed tokens, at least 0.1
    p.beta = 0.0  # grpo, gumbel: weight of the KL to the natural prefix
    p.kl_skip = 3  # grpo, gumbel: first tokens left out of that KL
    p.entropy_weight = 0.0  # grpo, gumbel: weight of the entropy bonus
    p.entropy_clamp = 1.0  # grpo: nats; no bonus for texts above it
    return p


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.seed = 0  # of weights, batches, positions and samples

    c.subject = ml_collections.ConfigDict()
    c.subject.path = ''  # Hugging Face directory (config.json, safetensors, tokenizer)
    c.subject.dtype = 'float32'  # of the frozen base: float32 | bfloat16
    c.subject.remat = 'full'  # full: recompute blocks in the backward pass; dots: keep matrix products
    c.subject.experts = 'ragged'  # ragged (grouped matmul) | tokamax (GPU kernel) | dense (every expert, for checks)
    c.subject.packed = False  # keep MXFP4 experts packed and dequantise one layer at a time (gpt-oss)
    c.layer = 0  # 0-based block whose output is read

    c.data = ml_collections.ConfigDict()
    c.data.path = ''  # folder with train/ and validation/
    c.data.min_pos = 8  # first token position that is read
    c.data.positions = 'any'  # tokens that may be read: any | assistant | thinking | final (needs roles in the data)

    c.explanation_len = 16  # tokens of an explanation

    c.decoder = ml_collections.ConfigDict()
    c.decoder.prompt = 'Short explanation of <embed>:'  # soft prompt starts from this text
    c.decoder.patched_blocks = 1  # first N blocks whose slot is overwritten; 0 = input only
    c.decoder.shared_map = False  # one map for all of them
    c.decoder.train = 'maps'  # maps (base frozen) | lora | full

    c.encoder = ml_collections.ConfigDict()
    c.encoder.prompt = '<text>'  # soft prompt around the explanation
    c.encoder.output_layer = -1  # 0-based block that is read out; -1 = layer
    c.encoder.readout = True  # affine map after it, identity at the start
    c.encoder.train = 'maps'  # maps (base frozen) | lora | full

    c.lora = ml_collections.ConfigDict()
    c.lora.pattern = 'q|k|v|o'  # regex over block matrices: q k v o gate up down
    c.lora.rank = 16  # columns of A, rows of B
    c.lora.alpha = 16.0  # scale alpha / rank

    c.init_from = ''  # folder of lens.export whose lens training starts from; empty = fresh

    c.phases = ('sft', 'grpo')  # run in this order; each names one of the blocks below
    c.sft = phase('sft')
    c.grpo = phase('grpo')
    c.gumbel = phase('gumbel')

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = 1  # devices that split the batch; -1 = all that remain
    c.mesh.model = 1  # devices that split heads, feed-forward and vocabulary

    c.eval = ml_collections.ConfigDict()
    c.eval.every_steps = 200  # quick held-out figures; 0 = only at the end of a phase
    c.eval.quick_documents = 64  # documents of the quick figures
    c.eval.documents = 300  # documents at the end of a phase
    c.eval.vectors = 4  # activations per document
    c.eval.batch = 250  # activations per evaluation step
    c.eval.samples = 10  # explanations shown in the report

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every_steps = 200  # optimizer steps between two saves
    c.checkpoint.keep = 2  # newest

    c.log = ml_collections.ConfigDict()
    c.log.every_steps = 10  # lines of metrics.jsonl
    c.log.tensorboard = False  # also write workdir/tensorboard (extra [tensorboard])
    c.log.wandb_project = ''  # empty = off
    return c
