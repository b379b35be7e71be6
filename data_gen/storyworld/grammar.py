"""Word lists and sentence forms of Storyworld: plain data, written for this project.

`FIELDS` maps each of the 8 scene fields to its values. A value is one word that occurs in one field
only and never in a template, so a value word identifies field and value. No value starts with a
vowel letter where a template says "a".

`TEMPLATES` holds (weight, form). In a form `{field}` stands for the scene's value and `[a|b|c]` for
one of several words. The weights even out how often each field is mentioned.
"""

_VALUES = {
    'name': (
        'Mira Tomas Elin Rufus Nadia Otto Petra Hugo Ines Leo Vera Felix Alma Boris Clara Dario '
        'Freya Gideon Hana Ivan Jonas Kira Lena Milo'
    ),
    'kind': (
        'fox badger heron rabbit hedgehog bear mouse wolf baker miller tailor farmer sailor painter potter shepherd'
    ),
    'friend': (
        'Anton Bella Cora Dina Emil Flora Greta Henrik Isla Jasper Kasper Lotta Marta Nico Olga '
        'Pablo Quinn Rosa Sven Tilda Uma Viktor Wanda Yara'
    ),
    'place': (
        'harbor forest meadow bridge castle market garden valley tower cave lake barn library chapel windmill village'
    ),
    'object': (
        'lantern kettle ribbon compass drum ladder mirror basket hammer whistle feather button '
        'candle blanket wagon violin'
    ),
    'food': ('bread soup honey cheese porridge rice jam cake pudding stew salad pie butter corn fish toast'),
    'mood': 'glad sad calm proud shy brave tired curious lonely grumpy cheerful nervous',
    'time': 'dawn sunrise noon dusk sunset twilight midnight nightfall',
}
FIELDS: dict[str, tuple[str, ...]] = {field: tuple(words.split()) for field, words in _VALUES.items()}

TEMPLATES: tuple[tuple[float, str], ...] = (
    (0.9, 'Once there was a {kind} [named|called] {name}.'),
    (0.9, '{name} was a [small|young|good] {kind}.'),
    (0.9, 'Everyone [knew|liked|loved] {name} the {kind}.'),
    (1.1, 'The {kind} had a friend [named|called] {friend}.'),
    (0.9, 'The {kind} [walked|wandered|went] to the {place}.'),
    (0.9, 'Near the {place} [lived|was] a {kind}.'),
    (1.2, '{friend} lived [near|behind] the {place}.'),
    (1, 'One day, {name} [found|saw] a {object}.'),
    (1, 'Near the {place} [lay|was] a {object}.'),
    (1, 'Only the {object} was [left|hidden] at the {place}.'),
    (1, 'The {object} [belonged|mattered] to {name}.'),
    (0.8, 'At {time} the {object} [fell|shone|broke].'),
    (0.8, 'The {object} was [lost|hidden|gone] until {time}.'),
    (0.8, 'At {time} they met near the {place}.'),
    (0.8, 'At {time} the {place} was [quiet|bright|cold].'),
    (1.1, 'At {time} there was [warm|fresh] {food}.'),
    (1.1, 'The {food} was [cold|warm|ready] by {time}.'),
    (1.2, 'The {food} from the {place} [was|tasted] good.'),
    (1.2, 'In the bag were a {object} and some {food}.'),
    (1.2, 'The {kind} [felt|was|looked] {mood}.'),
    (1.3, '{name} [still|often] looked {mood}.'),
    (1, 'It was {time} when {friend} [came|left].'),
    (1.2, 'It was {time}, and the {kind} was {mood}.'),
    (1.3, 'At {time} {name} [felt|was] {mood}.'),
    (1.2, 'The {mood} {kind} [slept|rested|sang] until {time}.'),
    (1.8, 'The {mood} {kind} [wanted|liked|ate] {food}.'),
    (1.6, '{name}, still {mood}, [held|carried|took] the {object}.'),
    (1.6, 'The {object} [kept|made] {name} {mood}.'),
    (1.9, '{friend} [asked|wondered|knew] why {name} was {mood}.'),
    (1.7, '{friend} [saw|heard] that the {kind} was {mood}.'),
    (1.7, 'What a {mood} {kind}, [said|thought|laughed] {friend}.'),
    (1.7, 'The {kind} was {mood}, and {friend} [smiled|sang|laughed].'),
    (1.6, '{name} felt {mood} [near|at|behind] the {place}.'),
    (1.4, 'The road to the {place} made the {kind} {mood}.'),
    (1.9, 'Some {food} [kept|made] {name} {mood}.'),
    (1, 'Before {time} {name} [came|went|ran] to the {place}.'),
    (1.2, '{friend} [waited|sat|rested] near the {place} until {time}.'),
    (1.5, 'At {time} {friend} [cooked|brought|made] some {food}.'),
    (1.2, '{friend} and {name} [talked|sang|played] until {time}.'),
    (1.8, '{name} and {friend} [shared|ate|cooked] some {food}.'),
    (1.6, '{friend} [brought|gave|offered] {food} to the {kind}.'),
    (1.5, '{name} [smelled|bought|wanted] {food} at the {place}.'),
    (1.5, '{name} [traded|left] the {object} for some {food}.'),
    (1.1, 'The {kind} [hid|left|dropped] the {object} near the {place}.'),
    (1.4, '{friend} [found|saw|kept] the {object} at the {place}.'),
    (1.3, 'The {kind} [gave|showed|lent] the {object} to {friend}.'),
    (1.8, 'A {object} for some {food}, [said|asked|thought] {friend}.'),
    (1.2, '{friend} [cleaned|fixed|mended] the {object} before {time}.'),
    (1.3, 'The {kind} [packed|took] {food} and a {object}.'),
    (1.1, 'By {time} the {food} was [gone|ready].'),
)
