"""A GGUF file to a model directory: python -m data_gen.gguf --input=model.gguf --out=data/model

Writes the Hugging Face layout that lens reads: config.json, weights in bfloat16, the tokenizer with its chat template.
transformers reads the file and takes the blocks of few bits apart; a 4-bit model stays what its 4 bits say. What the
file says and that reader passes over (widths of heads, scaled rotary tables, caps) is put into config.json here, and a
file of which a tensor would be lost is refused. The folder appears at once, or not at all.
"""

import dataclasses
import os
import pathlib

import numpy as np

from lens import files
from lens.errors import LensError, need_package, shown

from .options import command, need, option

# general.architecture -> what config.json calls it; gpt-oss is left out: transformers 5.24 does not find its experts
FAMILIES = {x: x for x in ('llama', 'qwen2', 'qwen3', 'gemma2', 'gpt2')} | {'gemma3': 'gemma3_text'}
SCALED = 'rope_freqs.weight'  # by what Llama 3's rotary frequencies are divided
LLAMA3 = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}  # of all of them
LARGEST_GEMMA = (46, 62)  # blocks of the two whose scores have a scale of their own, by width and not by head
AGAIN = 'download it again'


@dataclasses.dataclass(frozen=True)
class GgufOptions:
    input: str = option('', 'The GGUF file.')
    out: str = option('', 'Folder of the model; must not hold anything.')


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file says before its weights are read. facts: its keys without the name of the family before them.

    sizes: name of a tensor -> number of its values. factors: of SCALED, or None.
    """

    family: str
    facts: dict
    sizes: dict[str, int]
    factors: np.ndarray | None


def read(path: pathlib.Path) -> Content:
    """Reads what stands before the weights. Raises LensError."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        said = {k: f.contents() for k, f in reader.fields.items() if not k.startswith('tokenizer.ggml.')}
        sizes = {t.name: int(t.n_elements) for t in reader.tensors}
        factors = next((np.array(t.data, np.float64) for t in reader.tensors if t.name == SCALED), None)
    except Exception as e:  # the library checks little, so that anything may be raised
        raise LensError(f'{path} is no complete GGUF file ({shown(e) or type(e).__name__}): {AGAIN}.') from None
    name = said.get('general.architecture')
    if name not in FAMILIES:
        raise LensError(
            f'{path} is a model of the family {shown(name)}; lens reads {", ".join(FAMILIES)} out of GGUF files: for others '
            'give the Hugging Face directory of the model.'
        )
    if said.get('split.count', 1) > 1:
        raise LensError(f'{path} is one of {said["split.count"]} parts: merge them first (llama-gguf-split --merge).')
    facts = {k.removeprefix(f'{name}.'): v for k, v in said.items()}
    return Content(FAMILIES[name], facts, sizes, factors)


def changes(content: Content, config: dict) -> dict:
    """Returns keys of config.json that the file determines and that the reader of transformers leaves at what one
    model of the family has. config: what that made. Raises LensError for what lens does not run."""
    facts, family, out = content.facts, content.family, {}
    copied = {'attn_logit_softcapping': 'attn_logit_softcapping', 'final_logit_softcapping': 'final_logit_softcapping'}
    if family == 'gpt2':
        copied |= {'context_length': 'n_positions', 'feed_forward_length': 'n_inner'}
    elif family != 'qwen2':
        copied['attention.key_length'] = 'head_dim'
    out |= {ours: facts[theirs] for theirs, ours in copied.items() if theirs in facts}
    if family.startswith('gemma') and config['num_hidden_layers'] in LARGEST_GEMMA:
        out['query_pre_attn_scalar'] = config['hidden_size'] // config['num_attention_heads']
    if scaling := _rope(content):
        tables = config['rope_parameters']
        whole = tables.get('full_attention', tables)
        scaled = whole | scaling
        out['rope_parameters'] = scaled if whole is tables else tables | {'full_attention': scaled}
    return out


def _rope(content: Content) -> dict:
    """How the rotary table is scaled, as rope_parameters has it; {} where it is not."""
    facts = content.facts
    kind = facts.get('rope.scaling.type', 'none')
    if content.factors is not None:
        return {'rope_type': 'llama3', 'factor': float(content.factors.max())} | LLAMA3
    if kind == 'none':
        return {}
    if kind not in ('linear', 'yarn'):
        raise LensError(f'rotary scaling of the kind {shown(kind)} is not supported')
    factor = facts.get('rope.scaling.factor')
    length = facts.get('rope.scaling.original_context_length')
    if factor is None or (kind == 'yarn' and length is None):
        raise LensError(f'the rotary scaling {kind} has no factor or original length')
    return {'rope_type': kind, 'factor': factor} | ({'original_max_position_embeddings': length} if length else {})


def _check_factors(content: Content, config) -> None:
    """Raises LensError unless the formula of Llama 3 gives the factors of the file, which tells it by them alone."""
    from lens.models import rope

    if content.factors is None:
        return
    p, width = config.rope_parameters, 2 * len(content.factors)
    plain = rope.Rope(p['rope_theta'])
    scaled = rope.Rope(p['rope_theta'], 'llama3', p['factor'], p['original_max_position_embeddings'])
    factors = rope.inverse_frequencies(plain, width) / rope.inverse_frequencies(scaled, width)
    if not np.allclose(factors, content.factors, rtol=1e-3):
        raise LensError(f'its rotary table ({SCALED}) is not that of Llama 3, which is the only one known')


def _load(path: pathlib.Path, content: Content):
    """(model of transformers in bfloat16, tokenizer). Raises LensError, and whatever the library does."""
    import transformers

    from lens.models import families

    folder, file = str(path.parent), {'gguf_file': path.name}
    config = transformers.AutoConfig.from_pretrained(folder, **file)
    for key, value in changes(content, config.to_dict()).items():
        setattr(config, key, value)
    families.from_hf(config.to_dict())  # refuses what lens does not run
    _check_factors(content, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **file)
    more = {'config': config, 'dtype': 'bfloat16', 'output_loading_info': True}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **file, **more)
    if lost := [k for k in info['missing_keys'] if not (config.tie_word_embeddings and k == 'lm_head.weight')]:
        raise LensError(f'it lacks {shown(lost[0])}')
    there, wanted = sum(n for name, n in content.sizes.items() if name != SCALED), model.num_parameters()
    if there != wanted:
        raise LensError(f'it holds {there} weights where such a model has {wanted}: some would be lost')
    if not all(bool(x.isfinite().all()) for x in model.parameters()):
        raise LensError('it holds weights that are not finite')
    model.hf_quantizer = None  # otherwise it refuses to be saved
    for name in ('quantization_config', '_name_or_path'):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model, tokenizer


def need_packages() -> None:
    """Raises LensError where a package that reading a file needs is not installed."""
    for name in ('gguf', 'torch', 'accelerate'):
        need_package(name, 'gguf', 'Reading a GGUF file')


def convert(path: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the model directory `out` of a GGUF file. Raises LensError; `out` is then not there."""
    need_packages()
    if not path.is_file():
        raise LensError(f'{path} {"is no file" if path.exists() else "does not exist"}: name a GGUF file.')
    files.check_free(out)
    content = read(path)
    import transformers

    from lens import hf  # with JAX, which --help needs not

    transformers.logging.set_verbosity_error()
    try:
        model, tokenizer = _load(path, content)
    except Exception as e:
        raise LensError(f'{path} cannot be converted ({shown(e).rstrip(".") or type(e).__name__}).') from None
    with files.new_folder(out) as tmp:
        model.save_pretrained(tmp, max_shard_size=hf.SHARD_BYTES)
        tokenizer.save_pretrained(tmp)
        for file in tmp.iterdir():
            os.chmod(file, 0o644)  # the library makes weights private
        try:
            hf.load_tokenizer(tmp)
        except LensError as e:
            raise LensError(f'{path} cannot be converted ({str(e).rstrip(".")}).') from None


def act(o: GgufOptions) -> str:
    need(o, 'input', 'out')
    out = pathlib.Path(o.out)
    convert(pathlib.Path(o.input), out)
    weights = sum(p.stat().st_size for p in out.glob('*.safetensors'))
    return f'{weights / 1e6:.0f} MB of weights in bfloat16: {out}'


def main() -> None:
    command(GgufOptions, act)


if __name__ == '__main__':
    main()
