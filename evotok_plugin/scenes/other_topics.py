"""Questions and requests outside the domain of the scenes, all with one answer that says what the model knows.

Texts are templates whose slots are filled with random words: `{noun}` with a word of that list, `{a noun}` with its
article, `{many noun}` in the plural. The split "val" uses templates and words that never occur in "train", so it
measures whether a model tells the domain from the rest, and not whether it remembers texts. Words of the scenes
(shapes, colors, relations, cells and the numbers up to four) are the same in both.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evotok_plugin.scenes import other_words
from evotok_plugin.scenes.captions import NUMBERS, plural, with_article
from evotok_plugin.scenes.scene import CELL_NAMES, COLORS, RELATIONS, SHAPES

OUT_OF_DOMAIN_ANSWER = (
    f"I only know scenes of one to four shapes: {', '.join(SHAPES[:-1])} or {SHAPES[-1]} in "
    f"{', '.join([*COLORS][:-1])} or {[*COLORS][-1]}. I draw them and answer questions about color, shape, number and "
    "place."
)
SPLITS = ("train", "val")

_HELD_OUT_EVERY = 5  # every fifth word of a list occurs only in the split "val"
_BARE_REQUEST = 0.4  # share of drawing requests in the corpus's own words, "a photo of ..."
_SECOND_QUESTION = 0.25
_LOWER_CASE, _UPPER_CASE, _NO_PUNCTUATION, _TYPO = 0.25, 0.02, 0.2, 0.12


@dataclass(frozen=True)
class _Templates:
    """Templates of one topic; `weight` is its share among the topics."""

    weight: float
    train: tuple[str, ...]
    val: tuple[str, ...]

    def of(self, split: str) -> tuple[str, ...]:
        return self.val if split == "val" else self.train


_DRAWING_REQUESTS = _Templates(
    1,
    train=(
        "Draw {thing}.", "Draw me {thing}.", "Please draw {thing}.", "Can you draw {thing}?", "Show me {thing}.",
        "I want a picture of {thing}.", "Make an image of {thing}.", "Generate an image of {thing}.", "Paint {thing}.",
        "an image of {thing}", "{thing}", "Now draw {thing}.", "Draw a picture with {thing}.",
    ),
    val=(
        "Could you draw {thing} for me?", "Create a picture of {thing}.", "I would like to see {thing}.",
        "Sketch {thing}, please.", "a drawing of {thing}",
    ),
)  # fmt: skip

# What is to be drawn; half of these are near misses of the domain: one color, shape or number is outside of it.
_THINGS = {
    "other": _Templates(
        1,
        train=(
            "{a noun}", "{a noun}", "{a adjective} {noun}", "{count} {many noun}", "{a noun} and {a noun}",
            "{a noun} {relation} {a noun}", "{a scenery}", "{a scenery}", "{place}", "{person}", "{a noun} in {place}",
            "{a noun} in the {cell}", "{other_number} {many noun}", "{person} with {a noun}",
        ),
        val=(
            "{a adjective} {noun} next to {a noun}", "{a noun} with {a noun}", "{count} {adjective} {many noun}",
            "{a scenery} in {place}", "{a noun} and nothing else",
        ),
    ),
    "near miss": _Templates(
        1,
        train=(
            "{a other_color} {shape}", "{a other_color} {shape}", "{a color} {other_shape}", "{a other_shape}",
            "{other_number} {many shape}", "{other_number} {color} {many shape}", "{count} {many other_shape}",
            "{count} {other_color} {many shape}", "{a color} {noun}", "{count} {color} {many noun}",
            "{a shape} and {a other_shape}", "{a color} {shape} and {a other_color} {shape}",
            "{a other_shape} {relation} {a shape}", "{a color} {shape} {relation} {a color} {other_shape}",
            "{a noun} {relation} {a shape}", "{a color} {noun} {relation} {a color} {shape}",
            "{a other_color} {shape} in the {cell}", "{a color} {shape} and {a noun}",
        ),
        val=(
            "{a shape} {relation} {a noun}", "{a other_color} {other_shape}", "{a color} {other_shape} in the {cell}",
            "{a other_color} {shape} and {a color} {shape}", "{other_number} {many other_shape}",
            "{a other_color} {shape} {relation} {a color} {shape}", "{other_number} {other_color} {many shape}",
        ),
    ),
}  # fmt: skip

_TEXT_TOPICS = {
    "knowledge": _Templates(
        0.12,
        train=(
            "What is the capital of {place}?", "How many people live in {place}?", "Where is {place}?",
            "Who was {person}?", "When was {person} born?", "What is {theme}?", "Explain {theme}.",
            "Tell me about {person}.", "Tell me about {theme}.", "What do {many noun} eat?",
            "How old can {a noun} get?", "Who invented the {noun}?", "How does {a noun} work?",
            "What is the history of {place}?", "How far is it from {place} to {place}?",
            "Which language do people speak in {place}?", "What did {person} do?",
            "Why are {many noun} so {adjective}?", "Is {a noun} bigger than {a noun}?",
            "What is the weather in {place}?", "Who is the president of {place}?",
            "What is the difference between {a noun} and {a noun}?", "How much does {a noun} cost?",
            "What is {a noun}?", "Why is the sky blue?", "How many days are in a year?", "Who won the world cup?",
            "What time is it?", "What day is it today?",
        ),
        val=(
            "Name three facts about {theme}.", "In which country is {place}?", "What is {person} famous for?",
            "How fast is {a noun}?", "How many {many noun} are in {place}?", "Why do we need {theme}?",
            "When was {place} founded?", "How heavy is {a noun}?",
        ),
    ),
    "writing": _Templates(
        0.1,
        train=(
            "Write a poem about {theme}.", "Write a story about {a noun}.", "Write an essay about {theme}.",
            "Tell me a joke about {many noun}.", "Tell me a joke.", "Write a letter to {person}.", "Tell me a story.",
            "Write a song about {a noun} and {a noun}.", "Summarize the life of {person}.",
            "Write an email about {theme}.", "Give me a title for a book about {theme}.", "Write a poem about the sea.",
            "Make a list of {many noun}.", "Finish the sentence: The {noun} is", "Write a review of {a noun}.",
        ),
        val=(
            "Compose a haiku about {theme}.", "Invent a tale of {a noun} in {place}.", "Rhyme something with {noun}.",
            "Give a speech about {theme}.",
        ),
    ),
    "arithmetic": _Templates(
        0.06,
        train=(
            "{n} + {n}?", "What is {n} + {n}?", "{n} - {n}", "What is {n} times {n}?", "{n} * {n} = ?", "{n} / {n}",
            "Is {n} a prime number?", "Calculate {n} plus {n}.", "What is the square root of {n}?", "2 + 2?",
            "Solve x + {n} = {n}.", "How much is {n} percent of {n}?",
        ),
        val=("How much is {n} minus {n}?", "Divide {n} by {n}.", "{n} plus {n}", "Which is larger, {n} or {n}?"),
    ),
    "code": _Templates(
        0.05,
        train=(
            "Write a {programming_language} program that {program}.", "Write code that {program}.",
            "How do I write a loop in {programming_language}?", "Fix this {programming_language} code.",
            "What is a class in {programming_language}?",
            "Is {programming_language} better than {programming_language}?", "def main(): print({n})",
            "How do I install {programming_language}?",
        ),
        val=(
            "Give me a {programming_language} function which {program}.",
            "I have a bug in my {programming_language} code.", "Teach me {programming_language}.",
        ),
    ),
    "translation": _Templates(
        0.05,
        train=(
            "Translate {phrase} to {language}.", "How do you say {phrase} in {language}?",
            "Say {phrase} in {language}.", "What does {noun} mean in {language}?",
            "Translate this to {language}: {phrase}.", "Do you speak {language}?",
            "What is the {language} word for {noun}?",
        ),
        val=("Put {phrase} into {language}, please.", "Can you teach me {language}?", "{phrase} in {language}?"),
    ),
    "advice": _Templates(
        0.08,
        train=(
            "How do I {verb} {a noun}?", "Can you {verb} {a noun}?", "Where can I {verb} {a noun}?",
            "Help me {verb} my {noun}.", "Should I {verb} the {noun}?", "What is the best way to {verb} {a noun}?",
            "I want to {verb} {a noun}.", "Please {verb} the {noun}.", "Do I need {a noun} to {verb} {a noun}?",
            "Give me a recipe for {a noun}.", "What should I do in {place}?", "How do I get to {place}?",
            "My {noun} is broken.", "How do I learn {theme}?",
        ),
        val=(
            "Why should anyone {verb} {a noun}?", "Is it safe to {verb} {a noun}?", "I forgot how to {verb} {a noun}.",
            "Plan a trip to {place}.",
        ),
    ),
    "opinion": _Templates(
        0.06,
        train=(
            "Do you like {many noun}?", "What do you think about {theme}?", "Is {theme} important?",
            "Do you like {person}?", "What is your favorite {noun}?", "Which is better, {a noun} or {a noun}?",
            "Do you believe in {theme}?", "Is {place} beautiful?", "Are {many noun} {adjective}?",
            "What is the meaning of life?", "Are you happy?",
        ),
        val=(
            "Would you rather have {a noun} or {a noun}?", "Is {person} overrated?", "What is your opinion on {theme}?",
            "Do you enjoy {theme}?",
        ),
    ),
    "greetings": _Templates(
        0.05,
        train=(
            "Hi", "Hello", "Hello!", "Hey", "Hi there", "Good morning", "How are you?", "Thanks", "Thank you!", "Bye",
            "Goodbye", "Nice to meet you.", "What's up?", "ok", "yes", "no", "Sorry", "Hello, my name is {person}.",
            "test", "Help", "?", "I am {adjective}.", "I am bored.", "lol", "asdf",
        ),
        val=("Good evening", "Hey you", "See you later", "Greetings!", "How is it going?", "Hello from {place}!"),
    ),
    "identity": _Templates(
        0.06,
        train=(
            "Who are you?", "What are you?", "What can you do?", "What is your name?", "Who made you?",
            "Are you a robot?", "Are you human?", "What do you know?", "How can you help me?", "Are you ChatGPT?",
            "How old are you?", "Where do you live?", "How do you work?", "What can I ask?", "What can you draw?",
            "Can you see?", "Are you a {noun}?", "Do you know {person}?", "Can you write code?", "Help me.",
            "Which model are you?",
        ),
        val=(
            "Tell me about yourself.", "Introduce yourself.", "What are you able to do?", "Are you an AI?",
            "Who trained you?", "What should I ask you?",
        ),
    ),
}  # fmt: skip

# Questions about a shown image; those of the scene corpus, asked about other things, are among them.
_IMAGE_QUESTIONS = {
    "corpus wording": _Templates(
        0.55,
        train=(
            "Is there {a noun}?", "Is there {a color} {noun}?", "Is there {a other_color} {shape}?",
            "Is there {a color} {other_shape}?", "What color is the {noun}?", "What color is the {other_shape}?",
            "What shape is the {other_color} object?", "How many {many noun} are there?",
            "How many {many other_shape} are there?", "Where is the {noun}?", "Where is the {color} {noun}?",
            "Where is the {other_color} {shape}?", "Where is the {color} {other_shape}?",
            "Where is the {noun} relative to the {noun}?", "Where is the {shape} relative to the {noun}?",
        ),
        val=(
            "Where is the {noun} relative to the {shape}?", "Is there {a other_shape}?",
            "How many {color} {many noun} are there?", "What color is the {adjective} {noun}?",
            "Is there {a adjective} {noun}?", "Where is the {other_shape}?",
        ),
    ),
    "other": _Templates(
        0.45,
        train=(
            "Who painted this?", "What time is it in the picture?", "How much does it cost?",
            "Where was this photo taken?", "Which city is this?", "Is the person happy?",
            "What is written in the image?", "What is the weather like?", "Which camera took this?",
            "When was it made?", "Is it day or night?", "What brand is the {noun}?", "Is this {place}?",
            "Who is the {noun}?", "How old is the {noun}?", "Can you {verb} the {noun}?",
            "Write a story about the image.", "Write a poem about it.", "Is this art?",
            "What is the mood of the image?", "Why is it so {adjective}?", "What is the {noun} doing?",
            "Is the {noun} {adjective}?", "Does it show {person}?", "What happens next?", "What does it smell like?",
            "Is it {adjective}?", "What does it taste like?", "Do you like it?", "Is it made of {noun}?",
            "How heavy is it?", "Make it look like {place}.", "Add {a noun}.", "Replace it with {a noun}.",
            "Is it a {noun}?", "What is it worth?", "Which animal is it?", "Which season is it?",
        ),
        val=(
            "Who took this picture?", "In which country is this?", "What is the {noun} made of?",
            "How many people are there?", "Can I {verb} it?", "Does the {noun} look {adjective}?",
            "What is the person wearing?", "Is it for sale?", "Turn it into {a noun}.", "What year is it?",
            "Would {person} like it?",
        ),
    ),
}  # fmt: skip
_TEXT_TOPIC_SHARES = {
    "drawing": 0.32,
    "image question": 0.05,
    **{name: topic.weight for name, topic in _TEXT_TOPICS.items()},
}

_OTHER_WORDS: dict[str, Sequence[str]] = {
    "noun": other_words.NOUNS,
    "adjective": other_words.ADJECTIVES,
    "place": other_words.PLACES,
    "verb": other_words.VERBS,
    "scenery": other_words.SCENERY,
    "theme": other_words.THEMES,
    "person": other_words.PEOPLE,
    "language": other_words.LANGUAGES,
    "programming_language": other_words.PROGRAMMING_LANGUAGES,
    "program": other_words.PROGRAMS,
    "phrase": other_words.PHRASES,
    "other_color": other_words.OTHER_COLORS,
    "other_shape": other_words.OTHER_SHAPES,
    "other_number": other_words.OTHER_NUMBERS,
}
_SCENE_WORDS: dict[str, Sequence[str]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "relation": RELATIONS,
    "cell": CELL_NAMES,
    "count": NUMBERS[2:],
}
_SLOT = re.compile(r"\{(?:(a|many) )?(\w+)\}")


def words(kind: str, split: str) -> list[str]:
    """The words of one kind of slot in a split; those of "train" and "val" differ, except the words of the scenes."""
    if kind in _SCENE_WORDS:
        return list(_SCENE_WORDS[kind])
    return [
        word
        for index, word in enumerate(_OTHER_WORDS[kind])
        if (index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1) == (split == "val")
    ]


def drawing_request(thing: str, rng: np.random.Generator, split: str = "train") -> str:
    """Phrase the request to draw `thing` ("a red circle"); the same phrases serve things inside the domain."""
    if rng.random() < _BARE_REQUEST:
        return f"a photo of {thing}"
    return _pick(_DRAWING_REQUESTS.of(split), rng).replace("{thing}", thing)


def other_topic_turns(rng: np.random.Generator, split: str = "train") -> tuple[str, str]:
    """Sample a question outside the domain about a shown image, and its answer."""
    return _varied(_image_question(rng, split), rng), OUT_OF_DOMAIN_ANSWER


def other_topic_question(rng: np.random.Generator, split: str = "train") -> str:
    """Sample a question or request outside the domain that needs no image."""
    topic = _pick_weighted(_TEXT_TOPIC_SHARES, rng)
    if topic == "drawing":
        text = drawing_request(_fill(_pick(_pick_templates(_THINGS, rng).of(split), rng), rng, split), rng, split)
    elif topic == "image question":
        text = _image_question(rng, split)
    else:
        text = _fill(_pick(_TEXT_TOPICS[topic].of(split), rng), rng, split)
    return _varied(text, rng)


def other_topic_records(count: int, seed: int, split: str) -> list[dict]:
    """Sample text-only LLaVA records of one or two questions outside the domain.

    Args:
        split: "train", or "val" for templates and words that "train" does not have.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, 3, SPLITS.index(split)])
    records = []
    for n in range(count):
        turns = []
        for _ in range(2 if rng.random() < _SECOND_QUESTION else 1):
            turns += [
                {"from": "human", "value": other_topic_question(rng, split)},
                {"from": "gpt", "value": OUT_OF_DOMAIN_ANSWER},
            ]
        records.append({"id": f"other-{split}-{n:06d}", "conversations": turns})
    return records


# Texts ---------------------------------------------------------------------------------------------------------


def _image_question(rng: np.random.Generator, split: str) -> str:
    return _fill(_pick(_pick_templates(_IMAGE_QUESTIONS, rng).of(split), rng), rng, split)


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _pick_weighted(weights: Mapping[str, float], rng: np.random.Generator) -> str:
    shares = np.array(list(weights.values()))
    return list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]


def _pick_templates(topics: Mapping[str, _Templates], rng: np.random.Generator) -> _Templates:
    return topics[_pick_weighted({name: topic.weight for name, topic in topics.items()}, rng)]


def _fill(template: str, rng: np.random.Generator, split: str) -> str:
    """Fill each slot with a random word; `{n}` is a number below 100."""

    def word(match: re.Match[str]) -> str:
        form, kind = match.groups()
        if kind == "n":
            return str(rng.integers(100))
        chosen = _pick(words(kind, split), rng)
        if form == "a":
            return with_article(chosen)
        return _plural(chosen) if form == "many" else chosen

    return _SLOT.sub(word, template)


def _plural(noun: str) -> str:
    if noun in SHAPES:
        return plural(noun)  # as in the corpus
    if noun.endswith(("ch", "sh", "x")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return plural(noun)


def _varied(text: str, rng: np.random.Generator) -> str:
    """Vary a text as people type: sometimes in lower case, without final punctuation, or with a typing error."""
    case = rng.random()
    if case < _LOWER_CASE:
        text = text.lower()
    elif case < _LOWER_CASE + _UPPER_CASE:
        text = text.upper()
    if rng.random() < _NO_PUNCTUATION and len(text) > 1:
        text = text.rstrip(".?!")
    return _with_typo(text, rng) if rng.random() < _TYPO else text


def _with_typo(text: str, rng: np.random.Generator) -> str:
    """Swap, drop or double a letter inside a word of four or more letters, if there is one."""
    inner = [match.start() + 1 for match in re.finditer(r"(?<=[a-zA-Z])[a-zA-Z]{2}(?=[a-zA-Z])", text)]
    if not inner:
        return text
    place = inner[int(rng.integers(len(inner)))]
    kind = rng.integers(3)
    if kind == 0:
        return text[: place - 1] + text[place] + text[place - 1] + text[place + 1 :]
    return text[:place] + (text[place] * 2 if kind == 1 else "") + text[place + 1 :]
