"""Stories whose facts are known at every token, as labelled token arrays; and the tokenizer of these stories.

    python -m data_gen.storyworld --tokenizer=configs/tiny_subject --out=data/storyworld
    python -m data_gen.storyworld --train_tokenizer=DIR

Arrays that are there already with the same settings are kept. The layout is that of lens/data.py.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from . import commands

    commands.storyworld()

from . import world


def main(train_tokenizer: str | None, out: str, tokenizer: str, *settings: int) -> None:
    if train_tokenizer:
        trained = world.train_tokenizer(train_tokenizer)
        print(f'Tokenizer with {len(trained)} entries: {train_tokenizer}')
        return
    s = world.Settings(*settings)
    print(f'Storyworld: {s.train} training and {s.validation} validation stories, seed {s.seed} ...', flush=True)
    written = world.write_arrays(out, tokenizer, s)
    print(f'Arrays written: {out}' if written else f'Nothing to do, these settings are there already: {out}')
