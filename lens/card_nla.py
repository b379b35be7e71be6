import json
import os

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

FOLDER = '.'  # this folder
DTYPE = 'auto'  # of the models; auto: as they are stored
about = {}
for side in ('av', 'ar'):
    with open(f'{FOLDER}/{side}/nla_meta.yaml', encoding='utf-8') as file:
        about[side] = yaml.safe_load(file)
where = os.path.join(FOLDER, about['av']['subject']['folder'])
SUBJECT = where if about['av']['subject']['folder'] and os.path.isdir(where) else about['av']['base_checkpoint']
K = about['ar']['critic']['extraction_layer_index']  # 0-based block whose output is the activation
tokenizer = AutoTokenizer.from_pretrained(f'{FOLDER}/av', trust_remote_code=False)


def load(path):
    # eager attention is the one that has every family's soft-caps and sinks
    how = {'dtype': DTYPE, 'attn_implementation': 'eager'}
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **how).eval()


@torch.no_grad()
def load_side(side):
    # a model of its own, or the subject and the adapters: W + scale * B A
    folder = f'{FOLDER}/{side}'
    if os.path.exists(f'{folder}/config.json'):
        return load(folder)
    model, of_av = load(SUBJECT), side == 'av'
    with open(f'{folder}/{"adapter_config" if of_av else "ar_meta"}.json') as file:
        c = json.load(file)
    alpha, rank = (c['lora_alpha'], c['r']) if of_av else (c['lora_alpha'], c['lora_r'])
    scale = alpha / rank if of_av and not c['use_rslora'] else alpha / rank**0.5
    tensors = load_file(f'{folder}/{"adapter_model" if of_av else "ar_lora_value_head"}.safetensors')
    for name in [n for n in tensors if '.lora_A.' in n]:
        module = name.removeprefix('base_model.model.' if of_av else 'backbone.').partition('.lora_A.')[0]
        low = scale * tensors[name.replace('.lora_A.', '.lora_B.')].float() @ tensors[name].float()
        weight = model.get_parameter(f'{module}.weight')
        weight.copy_(weight.float() + low)
    return model


def blocks(model):
    body = model.base_model
    return body.layers if hasattr(body, 'layers') else body.h  # GPT-2: h


@torch.no_grad()
def block_output(model, block, ids):
    # the residual stream [T, d] after a block, before any final norm
    found = []
    hook = blocks(model)[block].register_forward_hook(lambda *a: found.append(a[2]))
    model.base_model(input_ids=ids, use_cache=False)
    hook.remove()
    out = found[0][0] if isinstance(found[0], tuple) else found[0]
    return out[0].float()


subject, av = load(SUBJECT), load_side('av')
ar = load_side('ar')
stored = load_file(
    f'{FOLDER}/ar/value_head.safetensors'
    if os.path.exists(f'{FOLDER}/ar/value_head.safetensors')
    else f'{FOLDER}/ar/ar_lora_value_head.safetensors'
)
head = stored.get('weight', stored.get('value_head.weight')).float()
response, replaces = about['av']['response'], about['av']['injection']['family'] == 'replace'
prompt, marker = about['av']['rendered_prompt_ids'], about['av']['tokens']['injection_token_id']
# the most probable tokens, and nothing that the subject's own generation_config.json asks for
av.generation_config = GenerationConfig(max_new_tokens=response['explanation_len'], do_sample=False)


@torch.no_grad()
def explain(activations):
    # activations [N, d] -> token ids [N, T] of the most probable responses
    slot, a = prompt.index(marker), activations.float()
    size = a.norm(dim=-1, keepdim=True)
    rows = av.get_input_embeddings()(torch.tensor([prompt] * len(a))).clone()  # with Gemma's scale
    if replaces:
        rows[:, slot] = (a / size.clamp_min(1e-12) * about['av']['extraction']['injection_scale']).to(rows.dtype)

    def add(block, args, output):
        hook.remove()  # in the pass of the prompt alone: later tokens see the slot through the cache
        x = (output[0] if isinstance(output, tuple) else output).clone()
        h = x[:, slot].float()
        x[:, slot] = (h + h.norm(dim=-1, keepdim=True) * a / (size + 1e-9)).to(x.dtype)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    hook = blocks(av)[1].register_forward_hook(add)
    if replaces:
        hook.remove()
    return av.generate(inputs_embeds=rows)


def within(ids):
    # the text that a response has between its tags, without white space at its edges; all of it where it has no closed pair
    text, opening = tokenizer.decode(ids), response['explanation_open'].strip()
    closing = response['explanation_close'].strip()
    inner = text.partition(opening)[2] if opening else text
    found = inner.partition(closing)[0] if closing and closing in inner else text
    return found.strip() if opening else found


def read(text):
    # the token ids of what the encoder reads
    filled = about['ar']['prompt_templates']['ar'].format(explanation=text)
    return tokenizer(filled, return_tensors='pt', add_special_tokens=replaces).input_ids


@torch.no_grad()
def reconstruct(text):
    # the text of an explanation -> activation [d]
    return block_output(ar, K, read(text))[-1] @ head.T


# the hidden state of the last token of a text
activation = block_output(subject, K, tokenizer('The hidden state of this token', return_tensors='pt').input_ids)[-1]
explanation = within(explain(activation[None])[0])
print(explanation, torch.cosine_similarity(activation, reconstruct(explanation), dim=0).item())
