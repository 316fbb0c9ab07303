"""The quickstart's prompts: forty families of short everyday requests, filled in from lists of words and numbers.

    python configs/quickstart/prompts.py > prompts.jsonl

Prints one conversation a line: 2 held-out prompts of every family, then 64 to train on. A held-out prompt is a new
instance of its family: no training prompt fills the family's slots with the same values, whatever the phrasing. The
families come in turns, shuffled anew each turn, so that the first N training prompts cover all of them evenly.
Deterministic: the seed is fixed, and a family's prompts do not depend on the other families.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

SEED = 0
TRAIN = 64
HELDOUT = 2


class Person(NamedTuple):
    """A name with its pronouns, for templates such as ``{who.name} has 3 apples. {who.He} ...``."""

    name: str
    he: str
    He: str
    his: str


class Event(NamedTuple):
    """Something that somebody does, in the present and in the past tense."""

    now: str
    past: str


class Task(NamedTuple):
    """A small Python function: its name and what it does."""

    name: str
    does: str


class Loop(NamedTuple):
    """A loop over ``items`` that computes ``value`` from each ``item``."""

    items: str
    item: str
    value: str


class Call(NamedTuple):
    """A function of two arguments that returns ``value``."""

    name: str
    args: str
    value: str


class Measure(NamedTuple):
    """A measured thing: ``{thing} 5 {unit}``, to be converted to another unit."""

    thing: str
    unit: str
    other: str


@dataclass(frozen=True)
class Family:
    """Prompts of one kind: phrasings, each with every slot, and the values that the slots are drawn from."""

    category: str
    name: str
    templates: tuple[str, ...]
    slots: dict[str, Sequence[Any]] = field(default_factory=dict)

    def draw(self) -> tuple[list[str], list[str]]:
        """Distinct prompts to train on and to hold out; the two share no combination of slot values."""
        rng = random.Random(f"{SEED}-{self.category}-{self.name}")
        decks = [deck(self.slots[slot], rng) for slot in self.slots]
        templates = deck(self.templates, rng)
        heldout: dict[str, tuple] = {}
        train: dict[str, tuple] = {}
        while len(train) < TRAIN:
            values = tuple(next(cards) for cards in decks)
            prompt = next(templates).format(**dict(zip(self.slots, values, strict=True)))
            if len(set(values)) < len(values) or values in heldout.values():
                continue
            (heldout if len(heldout) < HELDOUT else train)[prompt] = values
        return list(train), list(heldout)


def deck(values: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    """The values in random order, again and again, each once per turn."""
    while True:
        yield from rng.sample(values, len(values))


def words(text: str) -> list[str]:
    """A list written with commas, over one or more lines."""
    return [" ".join(word.split()) for word in text.split(",")]


def rows(kind: type[Any], text: str) -> list[Any]:
    """Named tuples written as ``field | field``, with commas between them."""
    return [kind(*(part.strip() for part in row.split("|"))) for row in words(text)]


def fill(patterns: Sequence[str], **slots: Sequence[Any]) -> list[str]:
    """Every pattern with every combination of the values of the slots."""
    return [
        pattern.format(**dict(zip(slots, values, strict=True)))
        for pattern in patterns
        for values in product(*slots.values())
    ]


# --- arithmetic ---

PEOPLE = [Person(name, "she", "She", "her") for name in words("""
    Anna, Clara, Emma, Grace, Ines, Julia, Lena, Maya, Nina, Olivia, Rosa, Sara""")]  # fmt: skip
PEOPLE += [Person(name, "he", "He", "his") for name in words("""
    Ben, David, Farid, Hugo, Jack, Leo, Noah, Omar, Pablo, Sam, Tom, Victor""")]  # fmt: skip
GOODS = words("""notebooks, mugs, candles, sandwiches, plants, books, puzzles, hats, scarves, posters, toys, umbrellas,
    lamps, cushions, magazines, pizzas, T-shirts, baskets""")
SMALL_THINGS = words("""apples, pencils, marbles, stickers, oranges, balloons, stamps, cards, shells, buttons, cookies,
    candies, peaches, crayons, coins, beads, plums, nuts""")
TREATS = words("cookies, muffins, brownies, cupcakes, rolls, biscuits, tarts, scones, pretzels, buns, waffles, pies")
VEHICLES = words("car, bus, train, truck, van, taxi, motorcycle, tram, boat, minibus")
BOOKS = words("""a novel, a history book, a book about animals, a mystery book, a travel book, an adventure book,
    a science book, a book of short stories, a biography, a book about space""")
MEASURES = rows(Measure, """
    A rope is | meters long | centimeters, A river is | kilometers long | meters, A fence is | yards long | feet,
    A table is | feet long | inches, A bag of rice weighs | kilograms | grams, A train ride lasts | hours | minutes,
    A song lasts | minutes | seconds, A holiday lasts | weeks | days, A trip lasts | days | hours,
    A bottle holds | liters | milliliters, A course lasts | years | months, A ribbon is | centimeters long | millimeters,
    A truck weighs | tons | kilograms, A box of apples weighs | pounds | ounces""")

# --- code ---

TASKS = rows(Task, """
    sum_list | returns the sum of a list of numbers, reverse_string | reverses a string,
    is_even | checks if a number is even, find_max | finds the largest number in a list,
    count_vowels | counts the vowels in a string, is_palindrome | checks if a word is a palindrome,
    factorial | computes the factorial of a number, remove_duplicates | removes duplicates from a list,
    to_fahrenheit | converts Celsius to Fahrenheit, average | computes the average of a list of numbers,
    sort_numbers | sorts a list of numbers, count_words | counts the words in a sentence,
    is_prime | checks if a number is prime, find_min | finds the smallest number in a list,
    capitalize_words | capitalizes every word in a sentence, merge_lists | merges two lists into one,
    circle_area | computes the area of a circle, square_all | squares every number in a list,
    count_letter | counts how often a letter occurs in a string, last_element | returns the last element of a list,
    is_leap_year | checks if a year is a leap year, multiply | multiplies two numbers,
    fibonacci | returns the first n Fibonacci numbers, join_words | joins a list of words with spaces,
    longest_word | returns the longest word in a list, to_hours | converts minutes to hours,
    is_empty | checks if a list is empty, even_numbers | returns the even numbers of a list,
    power | raises a number to a power, find_index | finds the index of an element in a list,
    to_lowercase | converts a string to lowercase, rectangle_area | computes the area of a rectangle,
    split_words | splits a sentence into words, remove_spaces | removes the spaces from a string,
    absolute_value | returns the absolute value of a number, is_positive | checks if a number is positive,
    celsius | converts Fahrenheit to Celsius, first_letter | returns the first letter of a string,
    count_items | counts the items in a list, add_numbers | adds two numbers,
    greet | returns a greeting for a name, to_kilometers | converts miles to kilometers,
    triangle_area | computes the area of a triangle, gcd | finds the greatest common divisor of two numbers""")
NAMES = words("process, compute, transform, collect, helper, convert, calculate, handle, run, apply")
TESTS = words("n > 0, n < 10, n % 2 == 0, n % 2 == 1, n > 100, n != 0, n % 3 == 0, n >= 18, n <= 5, n == 1")
FORMULAS = words("n * 2, n + 1, n ** 2, n - 3, n * 10, n + 5, abs(n), n // 2, n * n, n - 1")
NUMBER_LOOPS = words("numbers | n, prices | price, scores | score, values | value, ages | age, points | point")
TEXT_LOOPS = words("words | word, names | name, cities | city, lines | line, letters | letter, titles | title")
LOOPS = [
    Loop(*(part.strip() for part in loop.split("|")), value)
    for loops, values in (
        (NUMBER_LOOPS, words("{x} * 2, {x} + 1, {x} ** 2, {x} - 5, {x} / 10, abs({x}), str({x}), round({x})")),
        (TEXT_LOOPS, words("{x}.upper(), len({x}), {x}.lower(), {x}.strip(), {x}[0], {x}.title(), {x} + '!', {x}[::-1]")),
    )
    for loop in loops
    for value in fill(values, x=[loop.split("|")[1].strip()])
]
CALLS = [
    Call(name, f"{x}, {y}", value.format(x=x, y=y))
    for name, value in (row.split(" | ") for row in words("""
        add | {x} + {y}, subtract | {x} - {y}, multiply | {x} * {y}, divide | {x} / {y}, power | {x} ** {y},
        mean | ({x} + {y}) / 2, remainder | {x} % {y}, is_larger | {x} > {y}, is_equal | {x} == {y},
        difference | abs({x} - {y})"""))
    for x, y in (("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("p", "q"))
]  # fmt: skip
TABLES = [
    dict(zip(("table", "text", "number"), row.split(" "), strict=True))
    for row in words("""customers city age, products category price, employees department salary, books author year,
        orders status total, students class grade, movies director rating, cars brand price, hotels city rating,
        flights airline price, players team score, songs artist length""")
]
QUERIES = [
    query.format(**table)
    for table in TABLES
    for query in words("""selects the {text} and {number} of all {table}, counts the {table} for each {text},
        finds the average {number} of all {table}, sorts all {table} by {number}, shows the ten {table} with the highest
        {number}, finds the highest {number} for each {text}, lists every different {text} in the {table} table""")
]
SHELL_JOBS = fill(
    words("""list all {kind} files in a folder, count the {kind} files in a folder, delete all {kind} files in a folder,
        copy all {kind} files to another folder, find the largest {kind} file, move all {kind} files to a backup folder,
        search for a word in all {kind} files, compress all {kind} files in a folder, find {kind} files changed today"""),
    kind=words(".txt, .py, .jpg, .csv, .log, .json, .md, .pdf, .html, .png"),
)
MENU_ITEMS = words("""fruits, vegetables, animals, colors, countries, sports, drinks, hobbies, planets, flowers, trees,
    desserts, cities, musical instruments, school subjects, kitchen tools, birds, spices, clothes, books, breakfast foods,
    pets, jobs, programming languages""")

# --- rewriting ---

SUBJECTS = words("""The teacher, My brother, The old man, Our neighbor, The girl, The chef, The driver, The student,
    The manager, The farmer, The nurse, The pilot, My aunt, The singer, The boy, The engineer, My best friend, The doctor,
    Her uncle, The young artist, The librarian, His grandmother""")
EVENTS = rows(Event, """
    opens the window | opened the window, writes the letter | wrote the letter, reads the report | read the report,
    cleans the kitchen | cleaned the kitchen, paints the fence | painted the fence, buys the tickets | bought the tickets,
    feeds the dog | fed the dog, repairs the car | repaired the car, waters the plants | watered the plants,
    sings the song | sang the song, bakes the bread | baked the bread, finds the keys | found the keys,
    closes the door | closed the door, sends the package | sent the package, brings the flowers | brought the flowers,
    washes the dishes | washed the dishes, plans the trip | planned the trip, takes the photos | took the photos,
    builds the shelf | built the shelf, cooks the soup | cooked the soup, tells the story | told the story,
    carries the boxes | carried the boxes, checks the results | checked the results, draws the map | drew the map""")
NOW = words("""every morning, in the evening, on Sundays, at noon, after work, before dinner, once a week, in the summer,
    every day, at night, on weekends, twice a month""")
PAST = words("""yesterday, last night, last week, on Monday, this morning, two days ago, before lunch, after the meeting,
    in the afternoon, on Saturday, at noon, last summer""")
STATES = words("""likes spicy food, has a red bicycle, is ready for the test, can play the violin, lives near the river,
    speaks three languages, knows the answer, wants a new phone, is happy with the result, has time for a walk,
    can swim very well, drinks coffee, works at the bank, is afraid of spiders, plays tennis, needs a new coat,
    understands the question, believes the story, will come to the party, was at home, remembers the address,
    enjoys long walks, owns a small house, is good at chess""")
REQUESTS = words("""send me the report, fix my laptop, check these numbers, call the client, share the photos,
    book a meeting room, look at my essay, print the tickets, give me the address, pay the bill, finish the slides,
    move our meeting, sign the papers, update the list, answer my email, bring the documents""")
DEADLINES = words("today, by Friday, before lunch, by Monday, tonight, this week, right now, before the meeting")
THANKS = words("Thanks a lot!, Thanks a bunch!, Cheers!, It's super important., I need it ASAP., Let me know!")
NEWS = words("""found an old painting in the attic, opened a free library, won the city marathon, rescued a cat from a tree,
    planted a thousand trees, discovered a new comet, built a house from recycled wood, returned a lost wallet,
    wrote a popular song, started a school garden, baked the largest pie in the country, crossed the lake in a small boat,
    repaired bicycles for children, saved a dog from the river, invented a cheap water filter, won a national chess prize""")
CITIZENS = words("""A teacher, A young student, A retired farmer, A local baker, A bus driver, A group of children,
    A nurse, Two sisters, A police officer, A grandmother, A team of engineers, A family""")
CITIES = words("""Paris, London, Rome, Tokyo, Berlin, Madrid, New York, Chicago, Boston, Vienna, Lisbon, Dublin, Sydney,
    Toronto, Athens, Prague, Amsterdam, Seattle, Istanbul, Barcelona""")
TYPO_SUBJECTS = words("""My freind, Our nieghbor, The techer, My brohter, Her sistre, The docter, My unkle, The childern,
    The goverment, A strangre, My daugther, The studant""")
TYPO_EVENTS = words("""recieved a long letter, bougth a new jacket, forgot the adress, went to the libary,
    wrote a beautifull poem, ate a delicous lunch, visited the musuem, lost an expensive neckless, cleaned the kichen,
    learned a new langauge, made a terrible mistaek, told an intresting story, planted some vegtables, saw a big elefant,
    watched a realy funny movie, found a diffrent answer""")
TYPO_TIMES = words("""on Wensday, yesterdy, in Febuary, last nite, this moring, befor dinner, on Saterday, after scool,
    last weak, at the beggining of May""")
ASIDES = words("""as a matter of fact; to tell you the truth; as everybody already knows; if I remember correctly;
    who was really very tired; who always tries to be helpful to everyone; generally speaking;
    as I have already mentioned before""".replace(",", "").replace(";", ","))  # fmt: skip
TAILS = words("""due to the fact that there was still some time, in spite of the fact that it was late, in order to be of
    help to other people, without any kind of help from anyone else, for the simple reason that nobody else did it,
    at a point in time when everyone else was busy, in a manner that was slow and careful, on account of being asked""")

# --- questions ---

DEVICES = words("""a thermometer, a compass, a telescope, a microscope, a barometer, a magnet, a battery, a solar panel,
    a vacuum cleaner, a refrigerator, a printer, a calculator, a stethoscope, a parachute, a submarine, a windmill,
    a light bulb, a keyboard, a router, a clock, a camera, a pulley, an elevator, a toaster, a microwave oven,
    a washing machine, a bicycle pump, a smoke detector, a fire extinguisher, a ruler, a dictionary, a calendar, a lighthouse,
    a dam, a greenhouse, a sewing machine, a hammer, a screwdriver, an anchor, a helmet, a satellite, a spreadsheet""")
COUNTRIES = words("""France, Japan, Brazil, Egypt, Canada, Kenya, Norway, Peru, India, Spain, Italy, Greece, Mexico, Chile,
    Poland, Turkey, Portugal, Sweden, Finland, Austria, Ireland, Morocco, Thailand, Vietnam, Cuba, Hungary, Denmark,
    Argentina, Germany, Australia, China, Nigeria, Iceland, Belgium, Colombia, Ghana, Nepal, Indonesia, Russia, Jordan,
    Romania, Ukraine, Uruguay, Ethiopia, the Philippines""")
PAIRS = words("""a virus and a bacterium, weather and climate, a lake and a river, a fruit and a vegetable, mass and weight,
    a comet and an asteroid, a simile and a metaphor, a crocodile and an alligator, a city and a village, tea and coffee,
    speed and velocity, a list and a tuple in Python, hardware and software, a country and a continent, jam and jelly,
    a novel and a poem, a star and a planet, butter and margarine, a frog and a toad, a sea and an ocean, sugar and honey,
    a doctor and a nurse, a credit card and a debit card, running and jogging, a hotel and a hostel, a verb and a noun,
    a moth and a butterfly, memory and storage, an adjective and an adverb, a violin and a cello, a mile and a kilometer,
    a turtle and a tortoise, a hill and a mountain, a solid and a liquid, a bus and a train, a debate and a discussion,
    a mammal and a reptile, an atom and a molecule, a biography and an autobiography, a donkey and a horse""")
HABITS = words("""cats purr, dogs bark, birds migrate, bears hibernate, bees make honey, frogs croak, snakes shed their skin,
    owls hunt at night, spiders spin webs, ants live in colonies, whales sing, wolves howl, penguins live in groups,
    rabbits have long ears, giraffes have long necks, zebras have stripes, camels have humps, dogs wag their tails,
    cats sleep so much, birds sing in the morning, fish have gills, ducks have webbed feet, elephants have trunks,
    squirrels bury nuts, bats hang upside down, sharks have so many teeth, horses sleep standing up, birds build nests,
    salmon swim upstream, moths fly toward light, mosquitoes bite people, turtles have shells, flamingos stand on one leg,
    butterflies visit flowers, lions live in prides, dolphins jump out of the water, cows chew so long, beavers build dams,
    crabs walk sideways, geese fly in a V shape, chameleons change color, cats like small boxes""")
HARD_WORDS = words("""generous, fragile, ancient, curious, reluctant, abundant, brave, honest, efficient, transparent, rapid,
    gentle, patient, vivid, temporary, essential, obvious, scarce, stubborn, cautious, humble, precise, diverse, urgent,
    loyal, flexible, grateful, hostile, innocent, modest, neutral, rare, severe, tidy, vague, wise, eager, mature, sincere,
    bold, durable, annual, hesitate, persuade, borrow, predict""")
FAMOUS = words("""Albert Einstein, Marie Curie, Leonardo da Vinci, Isaac Newton, William Shakespeare, Mahatma Gandhi,
    Charles Darwin, Ada Lovelace, Galileo Galilei, Napoleon Bonaparte, Nelson Mandela, Vincent van Gogh, Abraham Lincoln,
    Florence Nightingale, Nikola Tesla, Julius Caesar, Aristotle, Amelia Earhart, Frida Kahlo, Socrates, Cleopatra,
    Christopher Columbus, George Washington, Queen Victoria, Pablo Picasso, Rosa Parks, Alan Turing, Thomas Edison,
    Jane Austen, Marco Polo, Joan of Arc, Archimedes, Plato, Louis Pasteur, Neil Armstrong, Benjamin Franklin, Michelangelo,
    Alexander Graham Bell, Johannes Gutenberg, Helen Keller, Charles Dickens, Wolfgang Amadeus Mozart""")
CONCEPTS = words("""gravity, photosynthesis, inflation, a black hole, democracy, electricity, evolution, a rainbow,
    the water cycle, magnetism, an ecosystem, a volcano, the internet, a vaccine, sound, recycling, friction, a hurricane,
    energy, an earthquake, the solar system, a cell, DNA, a computer virus, climate change, probability, a bank, a budget,
    an eclipse, erosion, an atom, a loan, the food chain, a map, oxygen, pollution, an election, a robot, a glacier,
    a fossil, the immune system, an algorithm""")
ACTIVITIES = words("""running, reading, swimming, gardening, yoga, cooking at home, cycling, meditation, learning a language,
    walking every day, playing chess, sleeping well, drinking water, keeping a diary, singing, hiking, volunteering,
    stretching, painting, playing the piano, dancing, taking breaks, eating breakfast, growing vegetables, saving money,
    traveling by train, eating fruit, spending time outdoors, listening to music, having a pet, working in a team,
    setting goals, writing letters, doing puzzles, practicing gratitude, living in a small town, eating vegetables,
    getting up early, recycling paper, using public transport""")

# --- instructions ---

GOALS = words("""sleeping better, saving money, learning to code, staying healthy, writing an essay, studying for an exam,
    keeping a clean kitchen, making new friends, speaking in public, growing tomatoes, running a first race,
    reading more books, planning a trip, managing time, preparing for a job interview, training a puppy, reducing waste,
    working from home, taking good photos, learning the guitar, packing a suitcase, staying focused, moving to a new house,
    eating more vegetables, improving handwriting, riding a bike in the city, being a good listener, saving energy at home,
    learning a new language, starting a small garden, writing a good resume, caring for houseplants, hosting a dinner party,
    camping with children, staying calm under stress, drinking more water, organizing a desk, buying a used car,
    giving a good presentation, remembering names, waking up early, writing a short story""")
TOPICS = words("""red fruits, healthy snacks, things to do on a rainy day, animals that live in the sea, hobbies for the winter,
    questions for a job interview, countries in Europe, gifts for a friend, green vegetables, sports played with a ball,
    jobs in a hospital, things to pack for the beach, kinds of music, ways to save water, musical instruments,
    topics for a short talk, rules for a library, tools for a garden, reasons to visit a museum, ways to say thank you,
    games for children, kinds of trees, things made of glass, breakfast ideas, large rivers, kinds of cheese,
    outdoor activities, ways to learn new words, kinds of weather, things found in a kitchen""")
RECIPIENTS = words("""my boss, a friend, my teacher, a customer, my landlord, a colleague, my neighbor, my team, my cousin,
    a new client, the hotel manager, my doctor""")
REASONS = words("""a late delivery, a meeting on Monday, a birthday party, being sick today, a broken window, a day off,
    a lost package, a change of plans, a question about an invoice, the new schedule, a weekend trip, a missed call,
    the summer holiday, a small mistake, a dinner invitation""")
ANIMALS = words("""a cat, a small dog, a horse, an owl, a whale, a bee, an elephant, a penguin, a frog, a fox, a rabbit,
    a turtle, a brave mouse, a bear, a squirrel, a lion, a goat, a hedgehog, an old crow, a duck""")
PLACES = words("""a forest, an old castle, a small village, a big city, a library, a farm, a train station, a lighthouse,
    a garden, a school, a snowy mountain, a quiet island, a bakery, a museum, a harbor""")
VISITORS = words("""a family with children, two friends, a young couple, a student with little money, a museum lover,
    a food lover, a photographer, a school class, someone who likes parks, someone who likes history, a grandmother,
    a first-time visitor""")
DISHES = words("""pancakes, vegetable soup, fried rice, an omelette, tomato pasta, banana bread, a fruit salad, hummus,
    mashed potatoes, a cheese sandwich, chicken curry, lentil soup, chocolate cookies, a green salad, apple pie, oatmeal,
    scrambled eggs, roast vegetables, a smoothie, pizza dough, garlic bread, a bean stew, rice pudding, French toast,
    guacamole, potato soup, a burrito, lemonade, chicken soup, baked salmon, a grilled cheese sandwich, carrot cake, waffles,
    pasta salad, blueberry muffins, iced tea, meatballs, a veggie burger, tomato sauce, corn bread, stuffed peppers, chili""")
OBJECTS = words("""a bicycle, a lighthouse, an umbrella, a piano, a microscope, a bridge, a clock, a candle, a telescope,
    a kite, a wooden chair, a backpack, a lamp, a train, a camera, a teapot, a compass, a mirror, a violin, a sailing boat,
    a hammer, a garden, a market, a snowman, a waterfall, a desert, a rainy street, a campfire, a sunset, a busy airport,
    an old book, a castle, a beach, a coffee shop, a treehouse, a guitar, a library, a thunderstorm, a birthday cake,
    a mountain lake, a pine tree, a fire truck""")
NAMELESS = words("""a black cat, a small dog, a white horse, a goldfish, a parrot, a rabbit, a hamster, a turtle, a bakery,
    a coffee shop, a bookstore, a flower shop, a bicycle shop, a toy store, a pizza restaurant, a hair salon, a fishing boat,
    a sailing boat, a soccer team, a chess club, a rock band, a school newspaper, a podcast about history, a travel blog,
    a cooking blog, a robot, a spaceship in a story, a dragon in a story, a hero in a story, a small village in a story,
    a clothing brand, a soap brand, a fitness app, a weather app, a music app, a garden center, a dance school, a hotel,
    a book club, a running club, a farm, a summer camp""")

FAMILIES = (
    Family("arithmetic", "shop", (
        "{who.name} buys {few} {item} for ${price} each and {count} {other} for ${cost} each. "
        "How much does {who.he} spend in total?",
        "A shop sells {item} for ${price} each and {other} for ${cost} each. {who.name} buys {few} {item} and {count} "
        "{other}. How much does {who.he} pay?",
        "{who.name} has $100. {who.He} buys {few} {item} for ${price} each and {count} {other} for ${cost} each. "
        "How much money does {who.he} have left?",
    ), {"who": PEOPLE, "few": range(2, 6), "item": GOODS, "price": range(3, 10), "count": range(2, 6), "other": GOODS,
        "cost": range(2, 10)}),
    Family("arithmetic", "share", (
        "{who.name} has {deal[0]} {thing}. {who.He} shares them equally among {deal[1]} friends. "
        "How many {thing} does each friend get?",
        "{deal[1]} children find {deal[0]} {thing} and give them to {who.name}. {who.He} divides the {thing} equally "
        "among the children. How many {thing} does each child get?",
        "{who.name} puts {deal[0]} {thing} into {deal[1]} bags. Each bag has the same number of {thing}. "
        "How many {thing} are in each bag?",
    ), {"who": PEOPLE, "deal": [(a * b, b) for a in range(3, 13) for b in range(3, 10)], "thing": SMALL_THINGS}),
    Family("arithmetic", "age", (
        "{who.name} is {age} years old. {other.name} is {gap} years older than {who.name}. "
        "How old will {other.name} be in {years} years?",
        "{other.name} is {age} years old, and {who.name} is {gap} years younger. How old was {who.name} {years} years ago?",
    ), {"who": PEOPLE, "other": PEOPLE, "age": range(20, 46), "gap": range(2, 10), "years": range(2, 10)}),
    Family("arithmetic", "savings", (
        "{who.name} saves ${weekly} every week. {who.He} already has ${start}. "
        "How much money will {who.he} have after {weeks} weeks?",
        "{who.name} earns ${weekly} every week by walking dogs and puts it in {who.his} piggy bank, which already has ${start} "
        "in it. How many dollars are in the piggy bank after {weeks} weeks?",
    ), {"who": PEOPLE, "weekly": range(3, 21), "start": range(10, 65, 5), "weeks": range(2, 13)}),
    Family("arithmetic", "travel", (
        "A {vehicle} travels at {speed} miles per hour for {hours} hours. How many miles does it travel in total?",
        "{who.name} rides in a {vehicle} that goes {speed} kilometers every hour. How far does {who.he} get in {hours} hours?",
    ), {"vehicle": VEHICLES, "speed": range(20, 80, 5), "hours": range(2, 10), "who": PEOPLE}),
    Family("arithmetic", "baking", (
        "{who.name} bakes {trays} trays of {treat} with {each} {treat} on each tray. {who.He} gives {gone} {treat} to "
        "{who.his} neighbors. How many {treat} are left?",
        "There are {each} {treat} on a tray. {who.name} bakes {trays} trays and sells {gone} {treat} at the market. "
        "How many {treat} does {who.he} have left?",
    ), {"who": PEOPLE, "trays": range(3, 9), "treat": TREATS, "each": range(6, 17), "gone": range(4, 18)}),
    Family("arithmetic", "reading", (
        "{who.name} is reading {book} with {total} pages. {who.He} reads {daily} pages every day. "
        "How many pages are left after {days} days?",
        "{who.name} has {book} with {total} pages. If {who.he} reads {daily} pages a day for {days} days, "
        "how many pages does {who.he} still have to read?",
    ), {"who": PEOPLE, "book": BOOKS, "total": range(210, 410, 10), "daily": range(10, 26), "days": range(3, 9)}),
    Family("arithmetic", "units", (
        "{m.thing} {n} {m.unit}. How many {m.other} is that?",
        "{m.thing} {n} {m.unit}. Convert this to {m.other} and show your work.",
    ), {"m": MEASURES, "n": range(2, 13)}),
    Family("code", "function", (
        "Write a Python function that {task.does}.",
        "Write a Python function called {task.name} that {task.does}.",
        "How do I write a Python function that {task.does}?",
    ), {"task": TASKS}),
    Family("code", "explain", (
        "Explain what this Python function does:\n\ndef {f}(numbers):\n    result = []\n    for n in numbers:\n"
        "        if {test}:\n            result.append({value})\n    return result",
        "What does this Python function return?\n\ndef {f}(numbers):\n    total = 0\n    for n in numbers:\n"
        "        if {test}:\n            total += {value}\n    return total",
        "Describe this Python function in a few words:\n\ndef {f}(n):\n    if {test}:\n        return {value}\n    return n",
    ), {"f": NAMES, "test": TESTS, "value": FORMULAS}),
    Family("code", "sql", (
        "Write a SQL query that {query}.",
        "How do I write a SQL query that {query}?",
    ), {"query": QUERIES}),
    Family("code", "comprehension", (
        "Convert this for loop into a list comprehension:\n\nresult = []\nfor {loop.item} in {loop.items}:\n"
        "    result.append({loop.value})",
        "Rewrite this Python code with a list comprehension:\n\noutput = []\nfor {loop.item} in {loop.items}:\n"
        "    output.append({loop.value})",
    ), {"loop": LOOPS}),
    Family("code", "shell", (
        "Write a shell command to {job}.",
        "Which Linux command can I use to {job}?",
    ), {"job": SHELL_JOBS}),
    Family("code", "test", (
        "Write a unit test for a Python function called {task.name} that {task.does}.",
        "The Python function {task.name} {task.does}. Write three assert statements that test it.",
        "Write a pytest test for the function {task.name}, which {task.does}.",
    ), {"task": TASKS}),
    Family("code", "bug", (
        "Fix the syntax error in this Python function:\n\ndef {call.name}({call.args})\n    return {call.value}",
        "This Python function returns None. Fix the bug:\n\ndef {call.name}({call.args}):\n    result = {call.value}",
        "Find and fix the mistake in this code:\n\ndef {call.name}({call.args}):\n    retrun {call.value}",
    ), {"call": CALLS}),
    Family("code", "html", (
        "Write an HTML list of {count} {item}.",
        "Write an HTML page with a heading and a list of {count} {item}.",
        "Show me the HTML code for a numbered list of {count} {item}.",
    ), {"count": words("three, four, five, six"), "item": MENU_ITEMS}),
    Family("rewriting", "past", (
        "Rewrite this sentence in the past tense: {who} {event.now} {when}.",
        "Change this sentence to the past tense: {who} {event.now} {when}.",
    ), {"who": SUBJECTS, "event": EVENTS, "when": NOW}),
    Family("rewriting", "question", (
        "Turn this sentence into a question: {who} {event.past} {when}.",
        "Rewrite this statement as a question: {who} {event.past} {when}.",
    ), {"who": SUBJECTS, "event": EVENTS, "when": PAST}),
    Family("rewriting", "formal", (
        "Rewrite this message in formal English: Hey {who.name}, can you {request} {when}? {thanks}",
        "Make this message sound more professional: Hi {who.name}, please {request} {when}. {thanks}",
    ), {"who": PEOPLE, "request": REQUESTS, "when": DEADLINES, "thanks": THANKS}),
    Family("rewriting", "passive", (
        "Rewrite this sentence in the passive voice: {who} {event.past} {when}.",
        "Change this sentence from active to passive: {who} {event.past} {when}.",
    ), {"who": SUBJECTS, "event": EVENTS, "when": PAST}),
    Family("rewriting", "negative", (
        "Make this sentence negative: {who} {state}.",
        "Rewrite this sentence so that it says the opposite: {who} {state}.",
    ), {"who": SUBJECTS, "state": STATES}),
    Family("rewriting", "headline", (
        "Write a newspaper headline for this story: {who} in {city} {news}.",
        "Turn this sentence into a short headline: {who} from {city} {news}.",
    ), {"who": CITIZENS, "city": CITIES, "news": NEWS}),
    Family("rewriting", "spelling", (
        "Correct the spelling in this sentence: {who} {event} {when}.",
        "Fix the spelling mistakes: {who} {event} {when}.",
    ), {"who": TYPO_SUBJECTS, "event": TYPO_EVENTS, "when": TYPO_TIMES}),
    Family("rewriting", "shorter", (
        "Make this sentence shorter: {who}, {aside}, {event.past} {tail}.",
        "Rewrite this sentence with fewer words: {who}, {aside}, {event.past} {tail}.",
    ), {"who": SUBJECTS, "aside": ASIDES, "event": EVENTS, "tail": TAILS}),
    Family("questions", "device", (
        "What is {thing} used for?",
        "What is {thing}, and how does it work?",
        "Explain in two sentences what {thing} does.",
    ), {"thing": DEVICES}),
    Family("questions", "capital", (
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "Name the capital of {country} and tell me one fact about it.",
    ), {"country": COUNTRIES}),
    Family("questions", "difference", (
        "What is the difference between {pair}?",
        "Explain the difference between {pair} in simple words.",
        "How can I tell the difference between {pair}?",
    ), {"pair": PAIRS}),
    Family("questions", "animal", (
        "Why do {habit}? Answer in two sentences.",
        "Can you explain to me why {habit}?",
        "Why is it that {habit}?",
    ), {"habit": HABITS}),
    Family("questions", "meaning", (
        'What does the word "{word}" mean?',
        'Explain the word "{word}" and use it in a sentence.',
        'What is the meaning of "{word}"? Give an example.',
    ), {"word": HARD_WORDS}),
    Family("questions", "person", (
        "Who was {person}? Answer in two sentences.",
        "What is {person} best known for?",
        "Tell me three facts about {person}.",
    ), {"person": FAMOUS}),
    Family("questions", "child", (
        "Explain {concept} to a young child.",
        "How would you explain {concept} to a child?",
        "In simple words for children, what is {concept}?",
    ), {"concept": CONCEPTS}),
    Family("questions", "benefit", (
        "What are the benefits of {activity}?",
        "Name three important benefits of {activity}.",
        "What are the main advantages of {activity}?",
    ), {"activity": ACTIVITIES}),
    Family("instructions", "tips", (
        "Give me five tips for {goal}.",
        "What are some useful tips for {goal}?",
        "Write three short tips for {goal}.",
    ), {"goal": GOALS}),
    Family("instructions", "list", (
        "Please make a list of {count} {topic}.",
        "Can you give me {count} {topic}?",
        "Write down {count} {topic}, each with a short explanation.",
    ), {"count": words("three, four, five, six"), "topic": TOPICS}),
    Family("instructions", "email", (
        "Write a short email to {person} about {reason}.",
        "Help me write a polite email to {person} about {reason}.",
    ), {"person": RECIPIENTS, "reason": REASONS}),
    Family("instructions", "story", (
        "Write a short story about {animal} who lives in {place}.",
        "Tell me a short story about {animal} and a child who meet in {place}.",
    ), {"animal": ANIMALS, "place": PLACES}),
    Family("instructions", "day", (
        "Plan a day in {city} for {visitor}.",
        "Write a simple plan for one day in {city} for {visitor}.",
    ), {"city": CITIES, "visitor": VISITORS}),
    Family("instructions", "recipe", (
        "Give me a simple recipe for {dish}.",
        "How do I make {dish} at home?",
        "List the ingredients and the steps for {dish}.",
    ), {"dish": DISHES}),
    Family("instructions", "describe", (
        "Describe {thing} in three short sentences.",
        "Write a short paragraph that describes {thing}.",
        "Describe what {thing} looks like.",
    ), {"thing": OBJECTS}),
    Family("instructions", "name", (
        "Suggest five good names for {thing}.",
        "What are some good names for {thing}?",
        "Give me three names for {thing} and explain each one.",
    ), {"thing": NAMELESS}),
)  # fmt: skip


def conversations(family: Family) -> Iterator[dict[str, Any]]:
    """The family's conversations: those to train on, then the held-out ones."""
    train, heldout = family.draw()
    for i, prompt in enumerate(train + heldout):
        yield {
            "id": f"{family.category}-{family.name}-{i:03d}",
            "split": "train" if i < TRAIN else "heldout",
            "category": family.category,
            "messages": [{"role": "user", "content": prompt}],
        }


def main() -> None:
    """Print the conversations, the held-out ones first, one of each family per turn."""
    rng = random.Random(SEED)
    turns = list(zip(*map(conversations, FAMILIES), strict=True))
    for turn in turns[TRAIN:] + turns[:TRAIN]:
        for conversation in rng.sample(turn, len(turn)):
            print(json.dumps(conversation))


if __name__ == "__main__":
    main()
