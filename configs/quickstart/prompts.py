"""The quickstart's prompts: 31 families of everyday instructions, filled in from lists.

    python configs/quickstart/prompts.py > prompts.jsonl
    specforge regenerate --data prompts.jsonl --target models/SmolLM2-135M-Instruct \
        --output configs/quickstart/conversations.jsonl --max_new_tokens 128

Each family provides training prompts and held-out prompts; no prompt is both. The families take turns,
so that the first N lines cover all of them evenly. The output is deterministic: the seed is fixed.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

# Training and held-out prompts per family: each category holds out about the same number of answer tokens.
COUNTS = {"arithmetic": (80, 2), "code": (80, 2), "rewriting": (56, 2), "questions": (48, 1), "instructions": (48, 1)}


@dataclass(frozen=True)
class Family:
    """Prompts of one kind: templates whose ``{slots}`` are filled from lists; ``{n}``, ``{m}``, ``{k}`` are numbers."""

    category: str
    name: str
    templates: tuple[str, ...]
    slots: dict[str, list[str]]

    def split(self, rng: random.Random) -> tuple[list[str], list[str]]:
        """Training prompts, and held-out prompts whose key word (from the longest list) is in no training prompt."""
        train, held_out = COUNTS[self.category]
        if not self.slots:
            found = self._fill(rng, train + held_out, self.slots)
            return found[held_out:], found[:held_out]
        main = max(self.slots, key=lambda slot: len(self.slots[slot]))
        values = rng.sample(self.slots[main], len(self.slots[main]))
        kept = self._fill(rng, held_out, {**self.slots, main: values[:held_out]})
        return self._fill(rng, train, {**self.slots, main: values[held_out:]}), kept

    def _fill(self, rng: random.Random, count: int, slots: dict[str, list[str]]) -> list[str]:
        found: dict[str, None] = {}
        for _ in range(200 * count):
            numbers = {"n": rng.randint(3, 12), "m": rng.randint(2, 9), "k": rng.randint(15, 60)}
            fill = {slot: rng.choice(values) for slot, values in slots.items()}
            found[rng.choice(self.templates).format(**numbers, **fill)] = None
            if len(found) == count:
                return list(found)
        raise ValueError(f"{self.category}-{self.name} has only {len(found)} prompts")


def words(text: str) -> list[str]:
    """The items of a comma-separated list."""
    return [word.strip() for word in text.split(",")]


NAMES = words("Anna, Ben, Carla, David, Emma, Farid, Grace, Hugo, Ines, Jack, Kira, Leo, Maya, Noah, Olga, Pablo, Rosa, Sam")
THINGS = words(
    "apples, pencils, books, marbles, stickers, cookies, oranges, balloons, stamps, cards, shells, candles, buttons, eggs"
)
ANIMALS = words(
    "cat, dog, horse, owl, whale, bee, spider, elephant, penguin, frog, bat, shark, wolf, rabbit, octopus, turtle, ant,"
    "eagle, tiger, snail, dolphin, bear, fox, crow, squirrel, lion, camel, giraffe, kangaroo, hedgehog"
)
COUNTRIES = words(
    "France, Japan, Brazil, Egypt, Canada, Kenya, Norway, Peru, India, Spain, Italy, Greece, Mexico, Chile, Poland, Turkey,"
    "Portugal, Sweden, Finland, Austria, Ireland, Morocco, Thailand, Vietnam, Cuba, Hungary, Denmark, Argentina, Germany,"
    "Australia, China, Nigeria, Iceland, Belgium, Colombia, Ghana, Nepal, Indonesia"
)
CONCEPTS = words(
    "gravity, photosynthesis, inflation, a black hole, democracy, electricity, evolution, a rainbow, the water cycle,"
    "magnetism, an ecosystem, a volcano, the internet, a vaccine, sound, recycling, friction, a hurricane, energy,"
    "an earthquake, light, the moon, a cell, DNA, a battery, a computer virus, climate change, probability, a bank,"
    "supply and demand, a solar panel, an eclipse, the heart, erosion, a tide, an atom, a loan, a satellite"
)
ACTIVITIES = words(
    "running, reading, swimming, gardening, yoga, cooking at home, cycling, meditation, learning a language, walking,"
    "playing chess, sleeping well, drinking water, writing a diary, singing, hiking, volunteering, stretching, painting,"
    "playing the piano, dancing, taking breaks, eating breakfast, growing vegetables, saving money, travelling by train"
)
GOALS = words(
    "sleeping better, saving money, learning to code, staying healthy, writing an essay, studying for an exam,"
    "keeping a clean kitchen, making new friends, speaking in public, growing tomatoes, running a first race,"
    "reading more books, planning a trip, managing time, a job interview, training a puppy, reducing waste,"
    "working from home, taking good photos, learning guitar, cooking rice, packing a suitcase, staying focused,"
    "eating more vegetables, improving handwriting, riding a bike in the city, moving house, being a good listener"
)
FUNCTIONS = words(
    "returns the sum of a list, reverses a string, checks if a number is even, finds the largest number in a list,"
    "counts the vowels in a string, checks if a word is a palindrome, computes the factorial of a number,"
    "removes duplicates from a list, converts Celsius to Fahrenheit, finds the average of a list, sorts a list of numbers,"
    "counts the words in a sentence, checks if a number is prime, returns the smallest number in a list,"
    "capitalizes every word in a sentence, merges two lists, computes the area of a circle, squares every number in a list,"
    "counts how often a letter occurs in a string, returns the last element of a list, checks if a year is a leap year,"
    "multiplies two numbers, returns the first n Fibonacci numbers, joins a list of words with commas,"
    "returns the longest word in a list, converts minutes to hours, checks if a list is empty,"
    "returns the even numbers of a list, computes the power of a number, finds the index of an element in a list,"
    "swaps two variables, rounds a number to two decimals, converts a string to lowercase, adds a value to a dictionary,"
    "returns the length of a string, checks if a key is in a dictionary, computes the perimeter of a rectangle,"
    "splits a sentence into words, replaces spaces with dashes in a string, computes the absolute value of a number"
)
FIELDS = words("name, price, age, city, title, year, score, email, country, rating")
TABLES = words("customers, products, employees, books, orders, students, movies, cars, teachers, flights")
SUBJECTS = words(
    "The teacher, My brother, The old man, Our neighbor, The girl, The chef, The driver, A student, The manager,"
    "The farmer, The nurse, The pilot, My aunt, The singer, The boy, The engineer"
)
VERBS = words(
    "cooks dinner, opens the window, writes a letter, reads the report, cleans the room, paints the fence, buys a ticket,"
    "feeds the dog, fixes the car, waters the plants, sings a song, makes a cake, visits the museum, plays a game,"
    "sends an email, finds the keys"
)
TIMES = words("every morning, in the evening, on Sundays, at noon, after work, before school, once a week, in the summer")
FEELINGS = words("happy, sad, big, small, fast, slow, good, bad, beautiful, angry, smart, tired, cold, strong, funny, quiet")
PEOPLE = words("my boss, a friend, my teacher, a customer, my landlord, a colleague, my neighbor, the team, a new client, my cousin")
REASONS = words(
    "a late delivery, a meeting on Monday, a birthday party, being sick today, a broken window, a job well done, a day off,"
    "a lost package, a change of plans, a question about the invoice, the new schedule, a weekend trip"
)
PLACES = words("a forest, an old castle, a small village, the beach, a big city, the moon, a library, a farm, a ship, the mountains")
DISHES = words(
    "pancakes, vegetable soup, fried rice, an omelette, tomato pasta, banana bread, a fruit salad, mashed potatoes,"
    "a cheese sandwich, chicken curry, lentil soup, chocolate cookies, a green salad, apple pie, scrambled eggs, hummus,"
    "oatmeal, roast vegetables, a smoothie, pizza dough, garlic bread, a bean stew, rice pudding, french toast, guacamole"
)
OBJECTS = words(
    "a bicycle, a lighthouse, an umbrella, a piano, a microscope, a bridge, a clock, a candle, a telescope, a kite,"
    "a wooden chair, a backpack, a lamp, a train, a camera, a teapot, a compass, a mirror, a violin, a sailing boat,"
    "a hammer, a garden, a market, a snowman, a waterfall, a desert, a rainy street, a campfire"
)
PAIRS = words(
    "a virus and bacteria, weather and climate, a lake and a river, a fruit and a vegetable, a comet and an asteroid,"
    "a simile and a metaphor, mass and weight, a crocodile and an alligator, a city and a village, tea and coffee,"
    "speed and velocity, a list and a tuple in Python, hardware and software, a country and a continent, a novel and a poem,"
    "stars and planets, butter and margarine, a frog and a toad, a sea and an ocean, a doctor and a nurse,"
    "credit cards and debit cards, running and jogging, a hotel and a hostel, a moth and a butterfly, RAM and storage,"
    "renewable and fossil energy, a verb and a noun, a violin and a cello, a mile and a kilometer, sugar and honey"
)
HARD_WORDS = words(
    "generous, fragile, ancient, curious, reluctant, abundant, brave, honest, efficient, transparent, rapid, gentle,"
    "patient, vivid, temporary, essential, obvious, scarce, stubborn, cautious, humble, precise, diverse, urgent, loyal,"
    "flexible, grateful, hostile, innocent, modest, neutral, rare, severe, tidy, vague, wise, eager, mature, sincere, bold"
)
FAMOUS = words(
    "Albert Einstein, Marie Curie, Leonardo da Vinci, Isaac Newton, William Shakespeare, Mahatma Gandhi, Cleopatra,"
    "Charles Darwin, Ada Lovelace, Galileo Galilei, Napoleon Bonaparte, Martin Luther King, Nelson Mandela, Mozart,"
    "Vincent van Gogh, Abraham Lincoln, Florence Nightingale, Nikola Tesla, Julius Caesar, Aristotle, Amelia Earhart,"
    "Frida Kahlo, Socrates, Beethoven, Christopher Columbus, George Washington, Queen Victoria, Pablo Picasso,"
    "Rosa Parks, Alan Turing, Thomas Edison, Jane Austen, Marco Polo, Joan of Arc, Archimedes, Plato, Anne Frank"
)
TOPICS = words(
    "fruits that are red, healthy snacks, things to do on a rainy day, animals that live in the sea, words that mean happy,"
    "questions for a job interview, countries in Europe, hobbies for the winter, gifts for a friend, vegetables that are green,"
    "sports that need a ball, jobs in a hospital, things to pack for the beach, kinds of music, ways to save water,"
    "musical instruments, uses of a paper clip, topics for a short talk, rules for a library, names for a cat,"
    "parts of a plant, tools for a garden, reasons to visit a museum, colors of the rainbow, planets of the solar system,"
    "ways to say thank you, games for children, kinds of trees, things made of glass, breakfast ideas"
)
EXPRESSIONS = words("x * 2, x + 1, x ** 2, len(x), x % 2 == 0, x - 3, x[0], x.upper(), x > 10, abs(x), str(x), x // 2")
FUNCTION_NAMES = words("f, compute, process, transform, check, apply, update, convert, helper, run")
LOOPS = words("numbers, words, items, values, names, scores, prices, letters")
FILES = words(".txt, .py, .jpg, .csv, .log, .json, .md, .pdf, .html, .zip")
SHELL = words(
    "list all {f} files in a folder, count the {f} files in a folder, delete all {f} files, copy all {f} files to a backup folder,"
    "find the largest {f} file, search for the word error in all {f} files, rename a {f} file, show the first lines of a {f} file"
)

FAMILIES = (
    Family("arithmetic", "shopping", (
        "{name} buys {n} {thing} for ${m} each. How much does {name} pay in total?",
        "A shop sells {thing} for ${m} each. {name} buys {n} of them and pays with a $100 bill. How much change does {name} get?",
    ), {"name": NAMES, "thing": THINGS}),
    Family("arithmetic", "sharing", (
        "{name} has {k} {thing} and gives {m} to {other}. How many {thing} does {name} have left?",
        "{name} has {n} bags with {m} {thing} in each bag. {other} gives {name} {k} more. How many {thing} does {name} have now?",
    ), {"name": NAMES[:9], "other": NAMES[9:], "thing": THINGS}),
    Family("arithmetic", "savings", (
        "{name} saves ${n} every week. How much money does {name} have after {k} weeks?",
        "{name} earns ${k} a day and spends ${n} of it. How much does {name} save in {m} days?",
    ), {"name": NAMES}),
    Family("arithmetic", "distance", (
        "A {vehicle} travels at {k} kilometers per hour for {m} hours. How far does it go?",
        "{name} drives a {vehicle} {k} miles a day for {n} days. How many miles does {name} drive in total?",
    ), {"vehicle": words("car, train, bus, truck, van, taxi"), "name": NAMES}),
    Family("arithmetic", "reading", (
        "{name} reads {k} pages of a book every day. How many pages does {name} read in {n} days?",
        "A book has {k}0 pages. {name} reads {n} pages a day. How many pages are left after {m} days?",
    ), {"name": NAMES}),
    Family("arithmetic", "sums", (
        "What is {k} plus {n}? Show your work.",
        "What is {k} times {m}? Explain step by step.",
        "Calculate {k} minus {n}, then multiply the result by {m}.",
    ), {}),
    Family("code", "function", (
        "Write a Python function that {task}.",
        "Write a function in Python that {task}, and explain how it works.",
        "How do I write a Python function that {task}?",
    ), {"task": FUNCTIONS}),
    Family("code", "javascript", ("Write a JavaScript function that {task}.", "Show me JavaScript code that {task}.", "How do I write a JavaScript function that {task}?"), {"task": FUNCTIONS}),
    Family("code", "explain", (
        "Explain what this Python function does:\n\ndef {f}(x):\n    return {e}",
        "What does this code print?\n\nfor x in {values}:\n    print({e})",
    ), {"f": FUNCTION_NAMES, "e": EXPRESSIONS, "values": words("items, names, data, numbers")}),
    Family("code", "sql", (
        "Write a SQL query that selects the {a} and {b} of all {table}.",
        "Write a SQL query that finds all {table} where the {a} is larger than {k}.",
        "Write a SQL query that counts the {table} by {a}.",
    ), {"a": FIELDS[:5], "b": FIELDS[5:], "table": TABLES}),
    Family("code", "comprehension", (
        "Rewrite this loop as a list comprehension:\n\nresult = []\nfor x in {values}:\n    result.append({e})",
        "Write a Python loop that goes through a list called {values} and prints {e} for every x.",
    ), {"e": EXPRESSIONS, "values": LOOPS}),
    Family("code", "shell", ("Write a shell command to {task}.", "Which Linux command can I use to {task}?"),
           {"task": [task.format(f=f) for task in SHELL for f in FILES]}),
    Family("rewriting", "past", (
        "Rewrite this sentence in the past tense: {who} {does} {when}.",
        "Change this sentence to the past tense: {who} {does} {when}.",
    ), {"who": SUBJECTS, "does": VERBS, "when": TIMES}),
    Family("rewriting", "question", (
        "Turn this sentence into a question: {who} {does} {when}.",
    ), {"who": SUBJECTS, "does": VERBS, "when": TIMES}),
    Family("rewriting", "formal", (
        "Rewrite this message in a formal tone: Hey {name}, can you send me the {thing} by {day}?",
        "Make this sentence more polite: {name}, give me the {thing} before {day}.",
    ), {"name": NAMES, "thing": words("report, notes, keys, photos, list, slides, invoice, tickets"), "day": words("Monday, Tuesday, Friday, noon, tonight")}),
    Family("rewriting", "longer", (
        "Make this sentence longer and more descriptive: {who} {does}.",
        "Rewrite this sentence with more detail: {who} {does} {when}.",
    ), {"who": SUBJECTS, "does": VERBS, "when": TIMES}),
    Family("rewriting", "synonym", (
        "Replace the word {word} with a better word: The {animal} in the story is very {word}.",
        "Rewrite this sentence without the word {word}: It was a {word} day for the {animal}.",
    ), {"word": FEELINGS, "animal": ANIMALS}),
    Family("rewriting", "headline", (
        "Write a newspaper headline for this sentence: {who} {does} {when}.",
        "Write a short title for a story in which a {animal} lives in {place}.",
    ), {"who": SUBJECTS, "does": VERBS, "when": TIMES, "animal": ANIMALS, "place": PLACES}),
    Family("questions", "capital", (
        "What is the capital of {country}?", "Tell me about the capital city of {country}.", "What language is spoken in {country}?",
    ), {"country": COUNTRIES}),
    Family("questions", "concept", (
        "What is {concept}?", "Explain {concept} to a child.", "Explain {concept} in two sentences.",
    ), {"concept": CONCEPTS}),
    Family("questions", "difference", (
        "What is the difference between {pair}?", "Compare {pair} in a short paragraph.", "How can I tell the difference between {pair}?",
    ), {"pair": PAIRS}),
    Family("questions", "animal", (
        "Where does a {animal} live?", "What does a {animal} eat?", "Give me an interesting fact about the {animal}.",
    ), {"animal": ANIMALS}),
    Family("questions", "meaning", (
        "What does the word {word} mean?", "Use the word {word} in a sentence.", "What is the opposite of {word}?",
    ), {"word": HARD_WORDS}),
    Family("questions", "who", (
        "Who was {who}?", "What is {who} famous for?",
    ), {"who": FAMOUS}),
    Family("instructions", "tips", (
        "Give me five tips for {goal}.", "What are some tips for {goal}?", "Write a short guide to {goal}.",
    ), {"goal": GOALS}),
    Family("instructions", "benefits", (
        "What are the benefits of {activity}?", "Name three benefits of {activity}.", "Why is {activity} good for you?",
    ), {"activity": ACTIVITIES}),
    Family("instructions", "lists", ("List five {topic}.", "Give me a list of three {topic}.", "Name some {topic}."), {"topic": TOPICS}),
    Family("instructions", "email", (
        "Write a short email to {person} about {reason}.", "Write a polite message to {person} about {reason}.",
    ), {"person": PEOPLE, "reason": REASONS}),
    Family("instructions", "story", (
        "Write a short story about a {animal} who lives in {place}.", "Tell me a story about a {animal} and a {other} in {place}.",
    ), {"animal": ANIMALS[:15], "other": ANIMALS[15:], "place": PLACES}),
    Family("instructions", "recipe", (
        "How do I make {dish}?", "Give me a simple recipe for {dish}.", "List the ingredients for {dish}.",
    ), {"dish": DISHES}),
    Family("instructions", "describe", (
        "Describe {thing} in three sentences.", "Write a short description of {thing}.", "Write a short poem about {thing}.",
    ), {"thing": OBJECTS}),
)


def main() -> None:
    """Print the conversations, the held-out ones first."""
    rng = random.Random(0)
    held_out: list[list[dict[str, Any]]] = []
    train: list[list[dict[str, Any]]] = []
    for family in FAMILIES:
        for rows, prompts in zip((train, held_out), family.split(rng), strict=True):
            kind = "h" if rows is held_out else ""
            rows.append([
                {"id": f"{family.category}-{family.name}-{kind}{i:02d}", "messages": [{"role": "user", "content": prompt}]}
                for i, prompt in enumerate(prompts)
            ])
    for split, families in (("heldout", held_out), ("train", train)):
        for turn in zip_longest(*families):
            for row in filter(None, turn):
                print(json.dumps({"id": row["id"], "split": split, "messages": row["messages"]}))


if __name__ == "__main__":
    main()
