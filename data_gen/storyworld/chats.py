"""Questions about stories: python -m data_gen.storyworld.chats --out=data/story_chats.jsonl --rows=64

Every row is {"messages": [user, assistant]}: the beginning of a story with a question, and its answer with
thinking. `tiny_chat` fits its models on such chats; this file has stories that they have not seen.
"""

if __name__ == '__main__':  # before JAX is imported: --help needs none of it
    from . import commands

    commands.chats()

import itertools
import pathlib
import re
from typing import NamedTuple

from lens import files

from . import world

SENTENCES = 6  # of a story
QUESTIONS = {  # question -> fields that the story must tell, thinking, answer
    'Who is the story about?': (
        ('name', 'kind'),
        'The user asks who it is about. The text names {name}, a {kind}.',
        'It is about {name} the {kind}.',
    ),
    'What is eaten, and when?': (
        ('food', 'time'),
        'The user asks about food and time. The text says {food}, at {time}.',
        'There was {food} at {time}.',
    ),
    'What was found, and where?': (
        ('object', 'place'),
        'The user asks for a thing and a place. The text has a {object} and the {place}.',
        'It was the {object}, near the {place}.',
    ),
}


class StoryChat(NamedTuple):
    """A question about a story, and its answer."""

    prompt: str
    thinking: str
    content: str


def of_story(seed: int, index: int) -> list[StoryChat]:
    """Returns the questions that the beginning of story `index` of the world `seed` answers; may be none."""
    story = world.generate(seed, index)
    text = ' '.join(re.findall(r'\S[^.]*\.', story.text)[:SENTENCES])
    told = set(world.split_words(text))
    return [
        StoryChat(f'{text}\n\n{question}', thinking.format_map(story.scene), content.format_map(story.scene))
        for question, (fields, thinking, content) in QUESTIONS.items()
        if all(story.scene[f] in told for f in fields)
    ]


def first_chats(count: int, *, seed: int = 0, index: int = 0) -> list[StoryChat]:
    """Returns the first `count` chats of the stories from number `index` on."""
    of_all = (chat for i in itertools.count(index) for chat in of_story(seed, i))
    return list(itertools.islice(of_all, count))


def held_out(count: int, seed: int) -> list[StoryChat]:
    """Returns chats of stories that no model is fitted on."""
    return first_chats(count, seed=seed, index=world.FIRST_VALIDATION_INDEX)


def row(chat: StoryChat) -> dict:
    """Returns the chat as a row of JSON lines."""
    answer = {'role': 'assistant', 'content': chat.content, 'thinking': chat.thinking}
    return {'messages': [{'role': 'user', 'content': chat.prompt}, answer]}


def main(out: str, rows: int, seed: int) -> None:
    path, chats = pathlib.Path(out), held_out(rows, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_jsonl(path, map(row, chats))
    print(f'{len(chats)} chats: {path}')
