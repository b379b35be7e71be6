"""A trained lens as Hugging Face directories, with a model card.

python -m lens.export --workdir=runs/tiny --out=exports/tiny      # the newest checkpoint of a run

Layout: lens/lens_folder.py. Training and evaluation start from such a folder with --config.init_from=DIR.
"""

import json
import os
import pathlib
import shlex
import shutil
import tempfile
import time

import jax
from absl import flags

from lens import cli, hf, lens_folder, logger
from lens.checkpoint import reopen
from lens.config import Run
from lens.errors import LensError
from lens.metrics import FIGURES, meaning
from lens.models.lens import Lens

# Configuration that a lens depends on; the rest is how it was trained.
TAGS = ('explanation_open', 'explanation_close')
KEYS = ('seed', 'subject', 'layer', 'data', 'explanation_len', *TAGS, 'position_vectors', 'decoder', 'encoder', 'lora')

# Reads everything from the folder, so that it is the same in every card.
CODE = """\
import json

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = '.'  # this folder
spec = json.load(open(f'{FOLDER}/lens.json'))
lens = load_file(f'{FOLDER}/lens.safetensors')
tokenizer = AutoTokenizer.from_pretrained(f'{FOLDER}/decoder')


def load(path):
    # eager attention is the one that has every family's soft-caps and sinks
    return AutoModelForCausalLM.from_pretrained(path, dtype='auto', attn_implementation='eager')


subject, decoder, encoder = load(spec['subject']), load(f'{FOLDER}/decoder'), load(f'{FOLDER}/encoder')


def blocks(model):
    body = model.base_model
    return body.layers if hasattr(body, 'layers') else body.h  # GPT-2: h


def inputs(model, rows):
    # rows in units of the embedding table; token ids get Gemma's scale inside the model, these get it here
    return rows.to(model.dtype)[None] * spec['embed_scale']


@torch.no_grad()
def block_output(model, block, **tokens):
    # the residual stream [T, d] after a block; hidden_states would have the final norm on the last one
    found = []
    hook = blocks(model)[block].register_forward_hook(lambda *a: found.append(a[2]))
    model(**tokens, use_cache=False)
    hook.remove()
    out = found[0][0] if isinstance(found[0], tuple) else found[0]
    return out[0].float()


@torch.no_grad()
def explain(activation, position=0):
    # activation [d] at a position -> token ids of the most probable explanation
    c, left, right, a = spec['decoder'], lens['decoder/prompt_left'], lens['decoder/prompt_right'], activation.float()
    slots = [len(left), *(len(left) + 1 + i for i in c['more_slots'])]
    if spec['position_vectors']:
        a = a - lens['decoder/positions'][position]
    if c['injection'] == 'affine':
        maps = torch.einsum('d,nde->ne', a, lens['decoder/maps_w']) + lens['decoder/maps_b']
        entry, at = maps[0], {k: maps[min(k, len(maps) - 1)] for k in range(c['patched_blocks'])}
    elif c['injection'] == 'replace':
        entry, at = a / a.norm() * c['norm'] / spec['embed_scale'], {}
    else:
        entry, at = decoder.get_input_embeddings().weight[c['marker_id']].float(), {2: None}

    def write(value):
        def hook(block, args):
            x = args[0].clone()
            h = x[:, slots].float()
            new = h + h.norm(dim=-1, keepdim=True) * a / a.norm() if value is None else value.expand_as(h)
            x[:, slots] = new.to(x.dtype)
            return (x, *args[1:])

        return hook

    rows = torch.cat([left, entry[None], right])
    rows[slots] = entry
    hooks = [blocks(decoder)[k].register_forward_pre_hook(write(value)) for k, value in at.items()]
    out = decoder(inputs_embeds=inputs(decoder, rows), use_cache=True)
    for hook in hooks:  # later tokens see the slot through the cache
        hook.remove()
    ids = [out.logits[0, -1].argmax()]
    while len(ids) < spec['explanation_len']:
        out = decoder(input_ids=ids[-1].view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        ids.append(out.logits[0, -1].argmax())
    return within(torch.stack(ids))


def within(ids):
    # what a response has between its tags; all of it where it has no closed pair
    opening, closing = (spec['tags'][k] for k in ('opening', 'closing'))
    find = lambda tag, i: next((k for k in range(i, len(ids) - len(tag) + 1) if ids[k : k + len(tag)].tolist() == tag), -1)
    start = find(opening, 0) + len(opening)
    end = find(closing, max(start, 0)) if closing else len(ids)
    return ids[max(start, 0) : end] if end > start >= len(opening) else ids


@torch.no_grad()
def reconstruct(ids, token=0, position=0):
    # token ids of an explanation of that token at that position -> activation [d]
    c, table = spec['encoder'], encoder.get_input_embeddings().weight
    current = table[token].float()[None] if c['current_token'] else lens['encoder/prompt_right'][:0]
    rows = torch.cat([lens['encoder/prompt_left'], table[ids].float(), lens['encoder/prompt_right'], current])
    rows[-1] += lens['encoder/special_last']
    x = block_output(encoder, c['output_layer'], inputs_embeds=inputs(encoder, rows))[-1]
    if c['readout'] != 'none':
        x = x @ lens['encoder/readout_w']
    if c['readout'] == 'affine':
        x = x + lens['encoder/readout_b']
    return x + lens['encoder/positions'][position] if spec['position_vectors'] else x


# write out special tokens that the training texts began with and the tokenizer does not add
text = 'The hidden state of the last token of this text is read.'
tokens = tokenizer(text, return_tensors='pt').input_ids
activation = block_output(subject, spec['layer'], input_ids=tokens)[-1]
position = tokens.shape[1] - 1
ids = explain(activation, position)
reconstruction = reconstruct(ids, tokens[0, -1], position)
print(tokenizer.decode(ids), torch.cosine_similarity(activation, reconstruction, dim=0).item())
"""


def _code(text: str) -> str:
    """Inline code of any text."""
    fence = '``' if '`' in text else '`'
    return f'{fence}{text}{fence}'


def command(config: dict) -> str:
    """The command that opens this lens again; --config.phases and a --workdir are the user's."""
    keys = [k for k in KEYS if k != 'lora' or 'lora' in (config['decoder']['train'], config['encoder']['train'])]
    flat = []
    for key in keys:
        values = config[key]
        flat += [(f'{key}.{k}', v) for k, v in values.items()] if isinstance(values, dict) else [(key, values)]
    overrides = [shlex.quote(f'--config.{k}={v}') for k, v in flat]
    return ' \\\n    '.join(['python -m lens.main --config=configs/base.py', *overrides])


def _side_line(spec: dict, side: str) -> str:
    how = {
        'maps': "the subject's weights, nothing of them trained",
        'lora': "the subject's weights with the trained low-rank adapters merged in",
        'full': 'weights trained in full',
    }[spec['trained'][side]]
    c = spec[side]
    if side == 'decoder':
        n = c.get('patched_blocks')
        if c['injection'] != 'affine':
            act = {'replace': f'put into the slot at norm {c["norm"]:g}', 'add': 'added to the slot after block 1'}
            return f'{how}; the activation is {act[c["injection"]]}; prompt {_code(c["prompt"])}'
        where = f'written into the slot at the entrance of blocks 0..{n - 1}' if n else 'put into the slot at the input'
        maps = 'one map' if c['shared_map'] or n < 2 else 'one map per block'
        return f'{how}; the activation is {where}, {maps}; prompt {_code(c["prompt"])}'
    after = '' if c['readout'] == 'none' else f' and {"an" if c["readout"] == "affine" else "a"} {c["readout"]} map'
    return (
        f'{how}; cut and read out after block {c["output_layer"]}{after}; prompt {_code(c["prompt"])}; its final norm and '
        "head are the subject's, for completeness: nothing reads them"
    )


def _figures(summary: dict, error: str) -> str:
    if not summary:
        return 'Not evaluated yet.'
    known = {k: meaning(k, error).replace('|', '\\|') for k in FIGURES if k in summary}
    rows = [f'| `{k}` | {summary[k]:.3f} | {text} |' for k, text in known.items()]
    counts = f'{summary["activations"]} activations of {summary["documents"]} held-out documents'
    source = f'{counts}; {summary["device"]}, commit {summary["commit"]}, {_code(summary["command"])}.'
    return '\n'.join(['| figure | value | meaning |', '|---|---|---|', *rows, '', source])


def card(spec: dict, summary: dict) -> str:
    """README.md of the folder. spec: lens.json; summary: summary.json of the run, {} where there is none."""
    config, layer = spec['config'], spec['layer']
    phases = ', '.join(f'{p} {config[p]["steps"]}' for p in config['phases']) or 'none'
    merged = ''
    if 'lora' in spec['trained'].values():
        merged = (
            'The adapters are merged into the models (in float32, then rounded to the dtype of the weights) and are in '
            '`lens.safetensors` all the same, so that training can go on: do not add them a second time.\n\n'
        )
    return f"""# Lens: {spec['subject']}, block {layer}

A consistency lens reads hidden states of a language model as text. The *decoder* writes an explanation of {spec['explanation_len']}
tokens of one activation, the *encoder* turns the words alone back into the activation; they were trained together. An
explanation says what the encoder can use: read it beside its controls below before you trust its words.

- Subject: {_code(spec['subject'])} ({spec['family']}, width {spec['d_model']})
- Activation: residual stream after block {layer} (0-based), `hidden_states[{layer + 1}]` of transformers but before any final norm
- Decoder: {_side_line(spec, 'decoder')}
- Encoder: {_side_line(spec, 'encoder')}
- Trained: step {spec['step']} (steps of the phases: {phases})
- Exported: {spec['exported']}, commit {spec['provenance']['commit']}

## Figures

{_figures(summary, config['encoder']['error'])}

## Files

- `decoder/`, `encoder/`: complete models for `AutoModelForCausalLM`, with tokenizer
- `lens.safetensors`: maps, soft prompts, special vector, read-out and adapters; `lens.json` says what each of them is
- `lens.json`: settings, shapes, meanings, figures and the configuration of the run

{merged}## Use

With torch, transformers and safetensors alone, in this folder:

```python
{CODE}```

## Evaluate again, train on

With the code that made it; `--config.phases='()'` evaluates only, without it training goes on from here:

```sh
{command(config)} \\
    --config.init_from=DIR --config.phases='()' --workdir=runs/again
```
"""


def describe(config: dict, run: Run, step: int, summary: dict) -> tuple[dict, dict]:
    """(prompts, about) of lens_folder.write."""
    ids = {'decoder': run.decoder_prompt[:2], 'encoder': run.encoder_prompt}
    prompts = {
        side: {'prompt': config[side]['prompt'], 'prompt_ids_left': left, 'prompt_ids_right': right}
        for side, (left, right) in ids.items()
    }
    adapted = 'lora' in (config['decoder']['train'], config['encoder']['train'])
    about = {
        'subject': config['subject']['path'],
        'explanation_len': run.length,
        'tags': {'opening': list(run.tags.opening), 'closing': list(run.tags.closing)},
        'lora': config['lora'] if adapted else None,
        'step': step,
        'figures': {k: summary[k] for k in FIGURES if k in summary},
        'exported': time.strftime('%Y-%m-%d', time.gmtime()),
        'provenance': logger.provenance(),
        'config': config,
    }
    return prompts, about


def write_folder(out: pathlib.Path, lens: Lens, run: Run, config: dict, step: int, summary: dict) -> None:
    """The whole folder; it appears at once, by rename. Call under jax.set_mesh(run.mesh).

    config: of the run; summary: its summary.json, {} where there is none.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = pathlib.Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    try:
        lens_folder.write(tmp, lens, run.base, *describe(config, run, step, summary))
        (tmp / 'README.md').write_text(card(json.loads((tmp / 'lens.json').read_text()), summary))
        for side in lens_folder.SIDES:
            model = lens_folder.model(lens, run.base, side)
            print(f'Writing {side}: {model.config.n_layers} blocks, {model.embedding.dtype}', flush=True)
            hf.save_model(model, tmp / side, source=config['subject']['path'])
        tmp.chmod(0o755)
        os.replace(tmp, out)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def _summary(workdir: pathlib.Path, step: int) -> dict:
    """summary.json if it is about this checkpoint."""
    file = workdir / 'summary.json'
    summary = json.loads(file.read_text()) if file.exists() else {}
    return summary if summary.get('steps') == step else {}


def export(workdir: pathlib.Path, out: pathlib.Path, step: str = 'newest') -> None:
    """Writes a checkpoint of a run, by `step` of state.reopen, to `out`. Raises LensError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LensError(f'{out} holds something already: give an empty or a new folder as --out.')
    again = reopen(workdir, step, data=1)  # there is no batch to split
    with jax.set_mesh(again.run.mesh):
        write_folder(out, again.params, again.run, again.config, again.step, _summary(workdir, again.step))


def main(_):
    out = pathlib.Path(OUT.value)
    export(pathlib.Path(WORKDIR.value), out, STEP.value)
    print(f'Exported to {out}: how to use it, with its figures, is in {out}/README.md')


if __name__ == '__main__':
    WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run of lens.main.')
    STEP = flags.DEFINE_string(
        'step', 'newest', 'Which checkpoint: newest, best (highest held-out FVE), or its number.'
    )
    OUT = flags.DEFINE_string('out', None, 'New folder for the lens.')
    flags.mark_flags_as_required(['workdir', 'out'])
    cli.run(main)
