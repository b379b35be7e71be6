"""The words of data_gen.questions: topics, forms, styles and lengths. {t} is a topic, {o} another of its field.

What is a text is a list, with semicolons between its parts.
"""

from typing import NamedTuple

# field -> topics, as they stand after "about"; one that begins with a word in -ing is something that people do
TOPICS = {
    'everyday': 'laundry; public transport; grocery shopping; houseplants; early mornings; umbrellas; bicycles; sleep; '
    'moving house; neighbours; shoes; mirrors; keys and locks; birthdays; weekends; second-hand shops; rainy days; '
    'small talk; alarm clocks; old furniture; fixing a leaking tap; tidying a messy room',
    'science': 'gravity; photosynthesis; the periodic table; electricity; magnets; DNA; evolution; antibiotics; atoms; '
    'the immune system; light and colour; sound waves; plate tectonics; the scientific method; viruses; fossils; '
    'the human brain; radioactivity; the speed of light; vaccines; acids; crystals',
    'space': 'the Moon; Mars; comets; black holes; the International Space Station; the Milky Way; solar eclipses; '
    'telescopes; the Sun; rockets; astronauts; looking for life on other planets',
    'nature': 'volcanoes; rainforests; coral reefs; honeybees; wolves; whales; mushrooms; rivers; deserts; glaciers; '
    'thunderstorms; migrating birds; oak trees; owls; spiders; the four seasons; tides; earthworms; elephants; snow; '
    'earthquakes; butterflies; octopuses; wildflowers; caves; hedgehogs',
    'history': 'ancient Egypt; the Roman Empire; the Silk Road; the Vikings; the printing press; the French Revolution; '
    'the Industrial Revolution; the Black Death; medieval castles; the Great Wall of China; the Titanic; pirates; '
    'samurai; the Renaissance; the Inca Empire; ancient Greece; the invention of writing; the California Gold Rush; '
    'Mesopotamia; the First World War; Napoleon; Cleopatra; life on a farm in 1850',
    'cooking': 'baking bread; making pancakes; cooking rice; brewing coffee; making vegetable soup; pizza; chocolate; '
    'tea; cheese; spices; fermented food; breakfast; leftovers; olive oil; street food; garlic; ice cream; honey; '
    'vegetarian cooking; kitchen knives; sushi; apples; roasting a chicken; growing tomatoes',
    'arts': 'jazz; impressionist painting; Shakespeare; photography; ballet; Gothic cathedrals; opera; pottery; '
    'fairy tales; film music; street art; calligraphy; the theatre; comic books; the violin; museums; science fiction; '
    'self-portraits; drums; detective novels; learning to draw; playing the piano; writing a novel; singing in a choir',
    'technology': 'robots; artificial intelligence; the internet; electric cars; batteries; satellites; 3D printers; '
    'passwords; solar panels; social media; video games; the steam engine; bridges; clocks; airplanes; submarines; '
    'search engines; smartphones; wind turbines; lifts in tall buildings; nuclear power; learning to program; '
    'building a website; repairing a radio',
    'feelings': 'loneliness; jealousy; gratitude; fear of the dark; homesickness; joy; anger; boredom; curiosity; '
    'grief; hope; shyness; courage; forgiveness; nostalgia; first love; pride; embarrassment; friendship; trust; '
    'kindness; apologising to a friend',
    'work': 'job interviews; teamwork; working from home; deadlines; long meetings; nursing; firefighters; teachers; '
    'time management; starting a small business; asking for a raise; public speaking; retirement; shift work; '
    'apprenticeships; bus drivers; librarians; lighthouse keepers; burnout; good leadership; beekeepers',
    'society': 'democracy; elections; taxes; human rights; inflation; insurance; courts and judges; big cities; '
    'village life; public libraries; volunteering; recycling; climate change; newspapers; advertising; charity; '
    'traffic jams; money; school uniforms; saving energy',
    'health': 'the heart; vitamins; teeth; allergies; headaches; first aid; yoga; good posture; healthy snacks; '
    'the common cold; eyesight; stress; running a marathon; learning to swim; falling asleep at night; quitting smoking',
    'leisure': 'football; chess; mountain climbing; the Olympic Games; surfing; knitting; gardening; fishing; '
    'birdwatching; card games; jigsaw puzzles; board games; magic tricks; camping in the woods; juggling; tennis; '
    'hiking in the mountains; origami; stamp collecting; ice skating',
    'ideas': 'proverbs; learning a language; dictionaries; sign language; dreams; memory; free will; beauty; luck; '
    'happiness; honesty; logic; time; infinity; prime numbers; the number zero; probability; geometry; names; '
    'the alphabet; silence',
    'places': 'Paris; Tokyo; Antarctica; the Sahara; Venice; the Amazon; New York; Iceland; long train journeys; '
    'hotels; old maps; airports; desert islands; lighthouses; packing a suitcase; travelling alone; India; Kenya; '
    'the Mediterranean Sea; London; market squares',
    'family': 'grandparents; babies; brothers and sisters; homework; school exams; weddings; family dinners; '
    'bedtime stories; cats; dogs; toys; raising a puppy; studying for an exam; planning a birthday party; '
    'teaching a child to ride a bicycle; imaginary friends',
}


class Form(NamedTuple):
    """What is asked for. tone: key of STYLES and LENGTHS. doing: only of topics that people do."""

    tone: str
    wordings: tuple[str, ...]
    doing: bool = False


FORMS = {
    'explain': Form(
        'plain',
        (
            'Explain {t} to me.',
            'Can you explain the basics of {t}?',
            'I keep hearing about {t}. What should I know?',
            'Tell me something about {t}.',
            'What is the most important thing to understand about {t}?',
            'What would you tell someone who knows nothing about {t}?',
        ),
    ),
    'facts': Form(
        'list',
        (
            'List {n} facts about {t}.',
            'Give me {n} surprising facts about {t}.',
            'What are {n} things that most people do not know about {t}?',
            'Make a list of {n} interesting points about {t}.',
            'Name {n} reasons to be interested in {t}.',
        ),
    ),
    'why': Form(
        'plain',
        (
            'Why do so many people care about {t}?',
            'Why is it worth learning about {t}?',
            'What makes {t} so interesting?',
            'Why do people have such different opinions about {t}?',
        ),
    ),
    'history': Form(
        'plain',
        (
            'Give me a short history of {t}.',
            'What did people think about {t} a hundred years ago?',
            'How has our view of {t} changed over time?',
            'What might a {who} in the Middle Ages have said about {t}?',
        ),
    ),
    'compare': Form(
        'plain',
        (
            'Compare {t} and {o}.',
            'What do {t} and {o} have in common?',
            'What is the biggest difference between {t} and {o}?',
            'If I could learn about only one of them, {t} or {o}, which should it be?',
            'Is it easier to understand {t} or {o}? Give a reason.',
        ),
    ),
    'advice': Form(
        'plain',
        (
            'I want to learn more about {t}. Where should I start?',
            'What advice would you give to someone who is new to {t}?',
            'I feel a bit lost when it comes to {t}. What would you suggest?',
            'What is one good habit that has to do with {t}?',
            'My {relative} worries a lot about {t}. What should I say?',
        ),
    ),
    'myths': Form(
        'plain',
        (
            'What do people often get wrong about {t}?',
            'Name a common myth about {t} and correct it.',
            'Is there something about {t} that is widely believed but false?',
        ),
    ),
    'teach': Form(
        'plain',
        (
            'I teach a class of {age}-year-olds. How could I introduce {t}?',
            'Plan a short lesson about {t}.',
            'Suggest an activity that teaches children something about {t}.',
            'What is a good first question to ask my students about {t}?',
        ),
    ),
    'quiz': Form(
        'list',
        (
            'Write {n} quiz questions about {t}, with the answers.',
            'Make up a riddle about {t} and give the answer.',
            'Test what I know about {t} with {n} short questions.',
        ),
    ),
    'persuade': Form(
        'plain',
        (
            'Convince me that {t} should get more attention.',
            'Write the opening of a speech about {t}.',
            'How would you defend {t} against people who find the subject dull?',
            'Write a short advertisement for a museum about {t}.',
        ),
    ),
    'analogy': Form(
        'plain',
        (
            'Explain {t} with a comparison from {domain}.',
            'What has {t} to do with {domain}?',
            'Find a good metaphor for {t} and explain it.',
        ),
    ),
    'sides': Form(
        'plain',
        (
            'What are the good and the bad sides of {t}?',
            'Which benefits and which risks come with {t}?',
            'Give me one argument for and one against spending a lot of time on {t}.',
        ),
    ),
    'situation': Form(
        'plain',
        (
            'I have to give a talk about {t} on {day}, and I am nervous. How should I begin?',
            'We had an argument at dinner about {t}. What would an expert have told us?',
            'My {relative} talks about {t} all the time. What could I ask to keep the conversation going?',
            'My {relative} asked me about {t} yesterday and I had no answer. What should I have said?',
            'I am a {who} and I write a column for a local paper. This {day} it is about {t}. Give me a first paragraph.',
            'I only have ten minutes before a meeting about {t}. What do I need to know?',
            'There is a free course about {t} every {day} in our town. Should I go?',
        ),
    ),
    'future': Form(
        'plain',
        (
            'What will people say about {t} in {years} years?',
            'How could new technology change {t}?',
            'Imagine that {t} had never existed. How would the world be different?',
        ),
    ),
    'describe': Form(
        'plain',
        (
            'Describe {t} with all five senses.',
            'Paint a picture of {t} in words.',
            'Describe {t} to a visitor from another planet.',
            'Which words come to mind when you think of {t}, and why?',
        ),
    ),
    'terms': Form(
        'list',
        (
            'Name {n} words that have to do with {t} and say what each means.',
            'Which {n} terms should I know when I talk about {t}?',
        ),
    ),
    'ideas': Form(
        'list',
        (
            'Suggest {n} titles for a book about {t}.',
            'Give me {n} ideas for a short film about {t}.',
            'I write a blog about {t}. What could my next {n} posts be about?',
            'Think of {n} presents for a {who} who loves everything about {t}.',
        ),
    ),
    'start_doing': Form(
        'plain', ('How do I get started with {t}?', 'I have never tried {t}. What comes first?'), doing=True
    ),
    'steps': Form(
        'plain',
        ('Give me step-by-step instructions for {t}.', 'What are the steps of {t}, in their order?'),
        doing=True,
    ),
    'trouble': Form(
        'plain',
        ('What can go wrong with {t}, and how can I avoid that?', 'I failed at {t} again this {day}. What can I do?'),
        doing=True,
    ),
    'needs': Form('plain', ('What do I need for {t}?', 'How much time and money does {t} take?'), doing=True),
    'tips': Form('list', ('Give me {n} tips for {t}.', 'What are {n} common mistakes in {t}?'), doing=True),
    'story': Form(
        'made_up',
        (
            'Write a story about {t}.',
            'Tell me a bedtime story that has to do with {t}.',
            'Write the first paragraph of a novel about {t}.',
            'Make up a story about a {who} and {t}.',
            'Write a story that begins on a {day} and ends with {t}.',
        ),
    ),
    'poem': Form(
        'verse',
        (
            'Write a poem about {t}.',
            'Compose a few rhyming lines about {t}.',
            'Write the first verse of a song about {t}.',
            'Write a poem in which a {who} thinks about {t}.',
        ),
    ),
    'letter': Form(
        'made_up',
        (
            'Write a letter to a friend about {t}.',
            'Write a postcard from someone who has just learned about {t}.',
            'Draft a letter to the mayor about {t}.',
            'Write an email to my colleagues about {t}.',
            'A {who} writes to a newspaper about {t}. What does the letter say?',
        ),
    ),
    'dialogue': Form(
        'made_up',
        (
            'Write a dialogue between a {who} and a {other_who} about {t}.',
            'A {who} and a {other_who} disagree about {t}. Write what they say.',
            'Write a short interview with an expert on {t}.',
            'Two strangers on a train talk about {t}. Write their conversation.',
        ),
    ),
    'diary': Form(
        'made_up',
        (
            'Write the diary entry of a {who} who spent all of {day} thinking about {t}.',
            'Write a page from a diary about {t}.',
        ),
    ),
    'role': Form(
        'plain',
        (
            'Pretend to be a {who} and tell me about {t}.',
            'Answer as a {who} would: what do you think about {t}?',
            'What would a {who} and what would a {other_who} notice first about {t}?',
        ),
    ),
    'joke': Form(
        'plain',
        (
            'Tell me a joke about {t}.',
            'Write a funny slogan about {t} and explain it.',
            'What is funny about {t}?',
        ),
    ),
    'news': Form(
        'made_up',
        (
            'Write a short news report about {t} in a small town.',
            'Write a headline and the first lines of an article about {t}.',
            'Write what a radio host says on {day} morning about {t}.',
        ),
    ),
}

# what stands in braces -> its values
SLOTS = {
    'n': 'two; three; four; five',
    'age': 'six; eight; ten; twelve; fifteen',
    'years': 'twenty; fifty; a hundred; a thousand',
    'day': 'Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday',
    'domain': 'cooking; football; a busy city; a garden; an orchestra; a household budget; sailing',
    'relative': 'neighbour; grandmother; daughter; uncle; little brother; best friend; flatmate; boss',
    'who': 'farmer; grandmother; sailor; teacher; young doctor; neighbour; little brother; scientist; retired judge; '
    'painter; baker; student; taxi driver; gardener; tired parent; king; nurse',
}
SLOTS['other_who'] = SLOTS['who']  # another one

# tone -> what may follow a question; most questions have neither
STYLES = {
    'plain': 'Use words that a child understands.; Explain it as if I were ten years old.; Please be formal.; Make it '
    'funny.; Give an example.; Use an example from daily life.; Avoid technical terms.; Write it for readers of a '
    'newspaper.; Be honest about what is not known.; Sound enthusiastic.; Answer like a friendly teacher.; Be as '
    'precise as you can.; End with a question to me.; I already know the basics.; English is not my first language.',
    'list': 'Use short sentences.; Make it fun.; Make it suitable for children.; Number them.; Choose ones that I can '
    'tell my friends.; Start with the easiest.; No explanations, please.',
    'made_up': 'Make it funny.; Make it a little sad.; It should be mysterious.; Set it in the future.; Set it in '
    'winter.; Write it for children.; Use a calm and warm tone.; Write in the first person.; Mention a red door.; End '
    'with a surprise.; Give the people names.; Let it happen by the sea.',
    'verse': 'Make it cheerful.; Make it melancholy.; It does not need to rhyme.; Write it for a child.; Use simple '
    'words.; Mention the wind.; Let it end with hope.',
}
LENGTHS = {
    'plain': 'Answer in one sentence.; Answer in two sentences.; Three sentences are enough.; Keep it short.; Use '
    'about fifty words.; One paragraph, please.; At most a hundred words.; Go into some detail.',
    'list': 'One line for each.; Keep it short.; One sentence for each, please.',
    'made_up': 'Keep it short.; One paragraph is enough.; Use about eighty words.; No more than six sentences.; Make '
    'it as long as you like.',
    'verse': 'Four lines are enough.; Write eight lines.; Keep it short.; Two verses, please.',
}
OPENINGS = 'Hi!; Hello!; Quick question:; Please help me.; I am curious.; Good morning!; Hey there.'
