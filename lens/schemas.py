"""What requests to a server of a lens may hold: the validation of the routes of lens.api and their description at once.

Names are those of open servers of the kind where they have one.
"""

import reprlib
from typing import Annotated, Any, Literal

import pydantic
import pydantic_core
from pydantic import Field

from lens import steer
from lens.errors import LARGEST_FLOAT, LARGEST_INT, LensError, shown
from lens.reading import MOST_SAMPLES

MOST_TEXT, MOST_TEXTS, MOST_MESSAGES, MOST_LENGTH = 65_536, 512, 256, 4096
MOST_EXPLANATIONS = 4096  # of a request: positions * samples
MOST_STEPS, MOST_ROWS = 512, 1 << 15

Whole = Annotated[int, Field(ge=-LARGEST_INT, le=LARGEST_INT)]
Natural = Annotated[int, Field(ge=0, le=LARGEST_INT)]
Real = Annotated[float, Field(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT)]
String = Annotated[str, Field(max_length=MOST_TEXT, pattern=r'^[^\x00]*$')]
Vector = Annotated[list[Real], Field(min_length=1, max_length=MOST_ROWS)]
Ids = Annotated[list[Natural], Field(min_length=1, max_length=MOST_ROWS)]
Positions = Annotated[list[Whole], Field(max_length=MOST_EXPLANATIONS)]
Temperature = Annotated[float, Field(ge=0, le=5, description='Of what is drawn.')]
Stream = Annotated[bool, Field(description='Answer by server-sent events, [DONE] at the end.')]
Samples = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
Length = Annotated[int, Field(ge=1, le=MOST_LENGTH)]


class Request(pydantic.BaseModel):
    """An object of JSON with these keys and no others; values are of their types, none is converted."""

    model_config = pydantic.ConfigDict(extra='forbid', strict=True, allow_inf_nan=False)


class Message(Request):
    role: Annotated[String, Field(max_length=100)]
    content: String = ''
    thinking: String | None = Field(None, description='What the assistant thought before it.')
    channel: Literal['final'] | None = Field(None, description='What was thought is in `thinking`.')


class Source(Request):
    text: String | None = Field(None, description='Text that is read; or give messages or token_ids.')
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = Field(
        None, description='Chat that is read by the template of the subject. The text is then not looked at.'
    )
    token_ids: Ids | None = Field(None, description='Tokens that are read. The others are then not looked at.')
    enable_thinking: Literal[False] | None = Field(None, description='Thinking is given in messages.')
    add_generation_prompt: bool | None = Field(
        None, description='A chat that does not end with the assistant asks for it; one that does is read as it is.'
    )
    continue_final_message: Literal[False] | None = None


class Seeded(Request):
    temperature: Temperature = 1.0
    seed: Natural = 0
    max_new_tokens: Length | None = Field(None, description='Changes nothing: explanations are as long as in training.')


class Drawn(Seeded):
    samples: Samples = Field(1, description='Explanations of each: the most probable one, the others drawn.')
    best_of: Samples | None = Field(None, description='Draw so many instead, the best recovery first.')
    salience: bool = Field(True, description='Read each explanation without each of its words.')
    stream: Stream = False


class Extract(Source):
    positions: Positions | None = Field(None, description='Tokens that are read, -1 the last one; none: all.')


class Explain(Extract, Drawn):
    reverse: bool = Field(False, description='From the last position to the first.')
    prompt_length: Natural | None = Field(None, description='Tokens from there on are `generated`.')


class Describe(Drawn):
    activations: Annotated[list[Vector], Field(min_length=1, max_length=MOST_TEXTS)]
    context: Annotated[list[Ids], Field(min_length=1, max_length=MOST_TEXTS)] | None = Field(
        None, description='For each, the tokens up to the one it is of: a lens that reads the last of them needs it.'
    )
    per_prompt: int = Field(
        1, ge=1, le=MOST_TEXTS, description='So many of them after each other are one prompt, one in each of its slots.'
    )


class Score(Request):
    activation: Vector
    description: String
    context: Ids | None = Field(None, description='The tokens up to the one it is of.')


class Compare(Seeded):
    activation_a: Vector | None = Field(None, description='Give both, or two texts.')
    activation_b: Vector | None = Field(None, description='Give both, or two texts.')
    text_a: String | None = Field(None, description='Its activation at position_a is a.')
    text_b: String | None = Field(None, description='Its activation at position_b is b.')
    position_a: Whole = -1
    position_b: Whole = -1


class Completion(Source):
    completion_tokens: int = Field(16, ge=1, le=MOST_STEPS)
    temperature: float | None = Field(None, ge=0, le=5, description='Changes nothing.')
    stream: Stream = False


def _some(n: int) -> int:
    if n == 0:
        raise pydantic_core.PydanticCustomError('some', 'Input should be -1 or at least 1')
    return n


class Sampling(Request):
    temperature: Temperature = 1.0
    max_new_tokens: Length = 200
    skip_special_tokens: bool = False
    no_stop_trim: bool = Field(False, description='Leave the control token that ends it in the text.')
    spaces_between_special_tokens: bool = Field(True, description='Changes nothing.')
    stop: None = Field(None, description='It ends by its closing tag or a control token.')
    stop_token_ids: None = Field(None, description='It ends by its closing tag or a control token.')
    sampling_seed: Natural | None = Field(None, description='Another one each time, if it is missing.')
    top_p: float = Field(
        1, gt=0, le=1, description='A token may be drawn where those more probable have no more than this in all.'
    )
    top_k: Annotated[int, pydantic.AfterValidator(_some)] = Field(
        -1, ge=-1, le=LARGEST_INT, description='So many of the most probable tokens may be drawn; -1: all.'
    )
    min_p: float = Field(
        0, ge=0, le=1, description='Only tokens of so many times the largest probability may be drawn.'
    )


class Generate(Request):
    input_embeds: Annotated[list[Vector], Field(min_length=2, max_length=MOST_ROWS)]
    sampling_params: Sampling = Sampling()
    return_logprob: bool = Field(True, description='Changes nothing: they are given.')
    stream: Literal[False] = False


class Edit(Source):
    position: Whole = -1
    description: String
    before: String | Ids | None = Field(
        None, description='The words that are replaced, or their tokens; those of the lens, if it is missing.'
    )
    unrelated: String | None = Field(None, description='Words of the control.')
    strength: float = Field(steer.STRENGTH, ge=-100, le=100)
    mode: Literal[steer.MODES] = steer.MODES[0]
    steps: Literal[8, 20, 40] = Field(20, description='Tokens that it goes on with; each number is a program.')
    seed: Natural = 0


class Note(Request):
    lit: bool = False
    text: String = ''


class Page(Request):
    reading: dict[str, Any]
    notes: dict[Annotated[str, Field(pattern='^[0-9]{1,9}$')], Note] = {}


def checked(value: Any, takes: type[Request]) -> dict[str, Any]:
    """Returns a value of JSON with defaults filled in. Raises LensError, a sentence about the first fault."""
    try:
        return takes.model_validate(value).model_dump()
    except pydantic.ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ''.join(f'[{x}]' if isinstance(x, int) else f'.{x}' for x in first['loc'])[1:] or 'The request'
        said = (
            'input should be an object' if first['type'] == 'model_type' else first['msg'][0].lower() + first['msg'][1:]
        )
        given = '' if first['type'] == 'missing' else f' (given: {shown(reprlib.repr(first["input"]), 80)})'
        raise LensError(f'{shown(where, 80)}: {said}{given}.') from None
