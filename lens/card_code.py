import json
import os

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

FOLDER = '.'  # this folder
DTYPE = 'auto'  # of the models; auto: as they are stored
with open(f'{FOLDER}/lens.json') as file:
    spec = json.load(file)
where = os.path.join(FOLDER, spec['subject_folder'])
SUBJECT = where if spec['subject_folder'] and os.path.isdir(where) else spec['subject']  # or any folder that holds it
lens = load_file(f'{FOLDER}/lens.safetensors')
tokenizer = AutoTokenizer.from_pretrained(f'{FOLDER}/decoder', trust_remote_code=False)


def load(path):
    # eager attention is the one that has every family's soft-caps and sinks
    how = {'dtype': DTYPE, 'attn_implementation': 'eager'}
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **how)


subject, decoder, encoder = load(SUBJECT), load(f'{FOLDER}/decoder'), load(f'{FOLDER}/encoder')

# the most probable tokens, and nothing that the subject's own generation_config.json asks for
decoder.generation_config = GenerationConfig(max_new_tokens=spec['explanation_len'], do_sample=False)


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


def prompt(side, model):
    # rows left and right of what the prompt is about: trained ones, or those of its words in the model's own table
    table = model.get_input_embeddings().weight.float()
    return [lens.get(f'{side}/prompt_{at}', table[spec[side][f'prompt_ids_{at}']]) for at in ('left', 'right')]


@torch.no_grad()
def explain(activation, position=0):
    # activation [d] at a position, or one for each slot [slots, d] -> token ids of the most probable explanation
    c, (left, right), a = spec['decoder'], prompt('decoder', decoder), activation.float()
    slots = [len(left), *(len(left) + 1 + i for i in c['more_slots'])]
    if spec['position_vectors']:
        a = a - lens['decoder/positions'][position]
    if c['injection'] == 'affine':
        product = 'kd,ndke->nke' if c['layers'] else 'd,nde->ne'
        maps = torch.einsum(product, a, lens['decoder/maps_w']) + lens['decoder/maps_b']
        entry, at = maps[0], {k: maps[min(k, len(maps) - 1)] for k in range(c['patched_blocks'])}
    elif c['injection'] == 'replace':
        entry, at = a / a.norm(dim=-1, keepdim=True) * c['norm'] / spec['embed_scale'], {}
    elif c['injection'] == 'add':
        entry, at = decoder.get_input_embeddings().weight[c['marker_id']].float(), {2: None}
    else:
        raise NotImplementedError(c['injection'])

    def write(k, value):
        def hook(block, args):
            hooks[k].remove()  # in the pass of the prompt alone: later tokens see the slot through the cache
            x = args[0].clone()
            h = x[:, slots].float()
            new = (
                h + h.norm(dim=-1, keepdim=True) * a / a.norm(dim=-1, keepdim=True)
                if value is None
                else value.expand_as(h)
            )
            x[:, slots] = new.to(x.dtype)
            return (x, *args[1:])

        return hook

    rows = torch.cat([left, left.new_zeros(1, left.shape[1]), right])
    rows[slots] = entry
    hooks = {k: blocks(decoder)[k].register_forward_pre_hook(write(k, value)) for k, value in at.items()}
    return within(decoder.generate(inputs_embeds=inputs(decoder, rows))[0])


def within(ids):
    # what a response has between its tags; all of it where it has no closed pair
    opening, closing = (spec['tags'][k] for k in ('opening', 'closing'))

    def find(tag, i):
        return next((k for k in range(i, len(ids) - len(tag) + 1) if ids[k : k + len(tag)].tolist() == tag), -1)

    start = find(opening, 0) + len(opening)
    end = find(closing, max(start, 0)) if closing else len(ids)
    return ids[max(start, 0) : end] if end > start >= len(opening) else ids


def joined(ids):
    # where an explanation is text, its tokens as the tokenizer joins them to the prompt around it
    if not spec['reads_text']:
        return ids
    c, (left, right) = spec['encoder'], spec['encoder']['prompt'].rsplit('<text>', 1)
    whole = tokenizer(left + tokenizer.decode(ids).strip() + right, add_special_tokens=False).input_ids
    return torch.tensor(whole[len(c['prompt_ids_left']) : len(whole) - len(c['prompt_ids_right'])])


@torch.no_grad()
def reconstruct(ids, before=(), position=0):
    # token ids of an explanation, and of the text up to and with the token at that position -> activation [d]
    c, table = spec['encoder'], encoder.get_input_embeddings().weight
    before, ids = torch.as_tensor(before, dtype=torch.long), joined(ids)
    context = before[max(0, len(before) - c['context_tokens']) :]
    left, right = prompt('encoder', encoder)
    rows = torch.cat([left, table[ids].float(), right, table[context].float()])
    rows[-1] += lens.get('encoder/special_last', 0)
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
slots = [block_output(subject, k, input_ids=tokens)[-1] for k in spec['decoder']['layers']]
ids = explain(torch.stack(slots) if slots else activation, position)
reconstruction = reconstruct(ids, tokens[0], position)
print(tokenizer.decode(ids), torch.cosine_similarity(activation, reconstruction, dim=0).item())
