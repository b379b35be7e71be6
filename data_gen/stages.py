"""Training files of stored activations: python -m data_gen.stages --base=data/base.parquet --tokenizer=MODEL_DIR --out=data/stages

Deals the documents of a file of data_gen.extract out to three files, which trainers of natural language autoencoders read:
av_sft.parquet, prompts and responses of the decoder; ar_sft.parquet, prompts of the encoder with the same explanations filled
in; rl.parquet, prompts alone. No document is in two of them. Rows are shuffled; those of the first two without an explanation
are left out. Vectors are looked up in a file of numbers beside the output while it is written.
"""

import dataclasses
import pathlib

import numpy as np

from lens.errors import LensError, need_package
from lens.files import check_free, new_folder

from .options import command, need, option


@dataclasses.dataclass(frozen=True)
class StageOptions:
    base: str = option('', 'Parquet file of the stage base, with explanations where fractions are not 0,0.')
    tokenizer: str = option('', 'Directory or Hub id of the model that decoder and encoder start from.')
    out: str = option('', 'New folder for the three files.')
    fractions: str = option('0.3,0.3', 'Shares of documents of av_sft and ar_sft; rl has the rest.')
    seed: int = option(42, 'Of split and order.', 0)
    form: str = option('fixed_size_list', 'Of the column of vectors.', choices=('fixed_size_list', 'list'))


def fractions(text: str) -> tuple[float, float]:
    """Reads two shares. Raises LensError."""
    try:
        first, second = map(float, text.split(','))
    except ValueError:
        raise LensError(f'--fractions={text} must be two numbers, of av_sft and ar_sft.') from None
    return first, second


def build(o: StageOptions) -> str:
    """Writes the three files with their sidecars; returns a line about them. Raises LensError."""
    need(o, 'base', 'tokenizer', 'out')
    need_package('pyarrow', 'datagen', 'data_gen.stages')
    from lens import hf

    from . import parquet_stages as stages

    out = pathlib.Path(o.out)
    check_free(out)
    base = stages.open_stage(pathlib.Path(o.base))
    if base.name != 'base':
        raise LensError(f'{o.base} is of the stage {base.name}: give one of the stage base.')
    tokens = stages.token_meta(hf.load_tokenizer(o.tokenizer))
    rest = base.scalars(*stages.REST)
    explained = base.explanations() if 'api_explanation' in base.columns else [None] * base.rows
    dealt = stages.split_documents(rest['doc_id'], fractions(o.fractions), o.seed)
    stage_of = {doc: name for name, docs in dealt.items() for doc in docs}
    of_row = [stage_of[doc] for doc in rest['doc_id']]
    counts, parts = {}, {}
    for name in stages.STAGES:
        mine = [i for i, x in enumerate(of_row) if x == name and (name == 'rl' or explained[i])]
        if dealt[name] and not mine:
            raise LensError(f'{o.base} has no explanation for {name}: label the data first, or give --fractions=0,0.')
        counts[name], parts[name] = len(mine), np.array(mine, np.int64)
    with new_folder(out) as folder:
        numbers = np.lib.format.open_memmap(folder / 'vectors.npy', 'w+', np.float32, (base.rows, base.d))
        for at, x in base.vectors():
            numbers[at : at + len(x)] = x
        for name, mine in parts.items():
            if len(mine):
                _write(
                    folder / f'{name}.parquet', base, tokens, mine, rest | {'api_explanation': explained}, numbers, o
                )
        (folder / 'vectors.npy').unlink()
    left_out = base.rows - sum(counts.values())
    return f'{", ".join(f"{n} {k}" for k, n in counts.items())} of {base.rows} rows, {left_out} without an explanation: {out}'


def _write(path: pathlib.Path, base, tokens: dict, mine: np.ndarray, values: dict, numbers: np.ndarray, o) -> None:
    """Writes one stage. mine: its rows of the base; numbers: the vectors of all."""
    from . import parquet_stages as stages

    name = path.stem
    made_of = f'{name}{base.id.removeprefix("base")}__{name}_raw'
    columns = stages.schema(stages.COLUMNS[name], name, base.d, o.form)
    with stages.writer(path, columns) as add:
        order = mine[stages.shuffled(len(mine), o.seed, made_of)]
        for some in (order[i : i + stages.ROWS] for i in range(0, len(order), stages.ROWS)):
            part = {k: [x[i] for i in some.tolist()] for k, x in values.items()}
            add(part | _prompts(name, part['api_explanation']), numbers[some])
    templates = {'actor': stages.AV_TEMPLATE, 'critic': stages.AR_TEMPLATE}
    suffix = tokens['critic_suffix_ids'] if name == 'ar_sft' else None
    meta = {
        'dataset_id': f'{made_of}__shuf{o.seed}',
        'stage': name,
        'row_count': len(mine),
        'extraction': base.extraction,
        'tokens': tokens | {'critic_suffix_ids': suffix},
        'prompt_templates': templates,
    }
    more = {k: base.side.more[k] for k in ('api_summaries',) if k in base.side.more}
    stages.write_sidecar(path, meta | more | {'parent_datasets': [base.id]}, 'data_gen.stages')


def _prompts(name: str, explanations: list[str]) -> dict[str, list]:
    """The columns that a stage has beside those of the base."""
    from . import parquet_stages as stages

    if name == 'ar_sft':
        return {'prompt': [stages.AR_TEMPLATE.format(explanation=x) for x in explanations]}
    content = stages.AV_TEMPLATE.format(injection_char=stages.sidecar.INJECT)
    out = {'prompt': [[{'role': 'user', 'content': content}]] * len(explanations)}
    return out if name == 'rl' else out | {'response': [f'{stages.OPEN}{x}{stages.CLOSE}' for x in explanations]}


def main() -> None:
    command(StageOptions, build)


if __name__ == '__main__':
    main()
