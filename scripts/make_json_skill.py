#!/usr/bin/env python3
"""Write the data of a narrow skill that can be scored by exact match: sentence to JSON record.

    python scripts/make_json_skill.py --out data/skill

Each line of train.jsonl and test.jsonl is {"prompt", "answer"}; the prompt ends where the answer
starts. A sentence that names a person, an age, a city and a job becomes a record with two
one-letter keys, one field derived and the others reordered into one string, a schema that no
model knows by itself:

    Sentence: Meet Hana Patel, an illustrator from Amsterdam, aged 87.
    Record: {"a":87,"r":"80s / illustrator / Amsterdam / Patel, Hana"}

Every copied word stands behind a space, as in the sentence, so that its tokens are the same in
both places: the skill is to extract and to copy, not to respell. The names, cities and jobs of
test.jsonl never occur in train.jsonl, and half of those in train.jsonl are words made up of
random syllables, lest a model learns the list instead of the copying. Standard library only;
the same seed gives the same bytes.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

FIRST_NAMES = ["Adam", "Agnes", "Ahmed", "Alice", "Alma", "Amara", "Amir", "Andrea", "Anna", "Anton", "Arjun", "Astrid", "Beatrice", "Bella", "Bruno", "Carlos", "Carmen", "Cecilia", "Chloe", "Clara", "Colin", "Daniel", "David", "Diana", "Diego", "Dora", "Edgar", "Elena", "Elias", "Elsa", "Emil", "Emma", "Erik", "Esther", "Eva", "Fatima", "Felix", "Fiona", "Frank", "Freya", "George", "Gloria", "Grace", "Greta", "Hana", "Hannah", "Harold", "Hector", "Helen", "Henry", "Hugo", "Ibrahim", "Ida", "Igor", "Ines", "Irene", "Isaac", "Ivan", "Jacob", "Jane", "Jasmine", "Joan", "Jonas", "Joseph", "Julia", "Karen", "Karl", "Kofi", "Lars", "Laura", "Leah", "Leo", "Liam", "Lila", "Linda", "Louis", "Lucia", "Luna", "Magda", "Marco", "Maria", "Martin", "Maya", "Miguel", "Mila", "Monica", "Nadia", "Naomi", "Nathan", "Nina", "Noah", "Nora", "Olga", "Oliver", "Omar", "Oscar", "Paula", "Pedro", "Peter", "Petra", "Priya", "Quentin", "Rachel", "Rafael", "Raj", "Rosa", "Ruth", "Samir", "Sara", "Simon", "Sofia", "Stefan", "Susan", "Tara", "Thomas", "Tomas", "Ursula", "Valerie", "Vera", "Victor", "Viola", "Walter", "Wanda", "William", "Yara", "Yusuf", "Zoe"]
LAST_NAMES = ["Abbott", "Adler", "Ahmed", "Almeida", "Alvarez", "Andersen", "Baker", "Banerjee", "Barros", "Bauer", "Becker", "Bell", "Bennett", "Berg", "Bianchi", "Blake", "Bloom", "Bosch", "Brandt", "Brooks", "Burke", "Campbell", "Carter", "Castro", "Chandra", "Chen", "Clarke", "Cohen", "Costa", "Cruz", "Dalton", "Das", "Diaz", "Dixon", "Dubois", "Duran", "Ekman", "Ellis", "Evans", "Farah", "Ferrari", "Fischer", "Fleming", "Fontaine", "Foster", "Fuchs", "Garcia", "Gibson", "Gomez", "Graham", "Gruber", "Gupta", "Haas", "Hale", "Hansen", "Harper", "Hayes", "Hoffman", "Holm", "Horvat", "Hughes", "Ibarra", "Ivanov", "Jansen", "Jensen", "Johansson", "Kaplan", "Kaur", "Keller", "Khan", "Kim", "Klein", "Kovacs", "Kumar", "Lambert", "Lang", "Larsen", "Laurent", "Lehmann", "Lindberg", "Lopez", "Lund", "Mancini", "Marino", "Marsh", "Martinez", "Mbeki", "Mendes", "Meyer", "Miller", "Moreau", "Moreno", "Morris", "Muller", "Nakamura", "Navarro", "Newman", "Nielsen", "Novak", "Okafor", "Olsen", "Ortega", "Osman", "Palmer", "Patel", "Pereira", "Perry", "Petrov", "Pope", "Porter", "Quinn", "Ramos", "Reed", "Reyes", "Ricci", "Rivera", "Romano", "Rossi", "Russo", "Sanders", "Santos", "Sato", "Schmidt", "Schultz", "Shah", "Sharma", "Silva", "Singh", "Soto", "Steiner", "Stone", "Suzuki", "Tanaka", "Torres", "Tran", "Turner", "Varga", "Vega", "Vogel", "Wagner", "Walsh", "Weber", "Wolf", "Wong", "Wright", "Yamada", "Young", "Zhang", "Ziegler"]
CITIES = """
Accra|Adelaide|Algiers|Amman|Amsterdam|Ankara|Antwerp|Athens|Atlanta|Auckland|Austin|Baltimore
Bangkok|Barcelona|Basel|Beirut|Belgrade|Bergen|Berlin|Bilbao|Bogota|Bologna|Boston|Bremen|Brisbane
Bristol|Brussels|Bucharest|Budapest|Buenos Aires|Cairo|Calgary|Cape Town|Cardiff|Casablanca|Chicago
Cologne|Copenhagen|Dakar|Dallas|Delhi|Denver|Detroit|Dresden|Dublin|Durban|Edinburgh|Florence
Geneva|Genoa|Glasgow|Graz|Hamburg|Hanoi|Havana|Helsinki|Houston|Istanbul|Jakarta|Kampala|Krakow
Kyoto|Lagos|Leeds|Leipzig|Lima|Lisbon|Liverpool|London|Lyon|Madrid|Malaga|Manila|Marseille|Melbourne
Mexico City|Miami|Milan|Montreal|Moscow|Mumbai|Munich|Nairobi|Nantes|Naples|New York|Nice|Osaka|Oslo
Ottawa|Oxford|Palermo|Paris|Perth|Phoenix|Porto|Prague|Quito|Riga|Rome|Rotterdam|Salzburg|San Diego
Santiago|Sarajevo|Seattle|Seoul|Seville|Sofia|Stockholm|Stuttgart|Sydney|Tallinn|Tampa|Tokyo|Toronto
Tunis|Turin|Utrecht|Valencia|Vancouver|Venice|Vienna|Vilnius|Warsaw|Zagreb|Zurich
""".strip().replace("\n", "|").split("|")
JOBS = """
accountant|actor|architect|astronomer|baker|banker|barber|biologist|bus driver|butcher|carpenter
chemist|coach|composer|cook|dancer|dentist|designer|detective|doctor|editor|electrician|engineer
farmer|firefighter|fisherman|florist|gardener|geologist|glassblower|historian|hotel manager
illustrator|interpreter|jeweller|journalist|judge|lawyer|librarian|locksmith|magician|mathematician
mechanic|midwife|miner|musician|night guard|novelist|nurse|optician|painter|pharmacist|photographer
physicist|pilot|plumber|poet|police officer|postal worker|potter|printer|programmer|psychologist
radio host|sailor|school teacher|sculptor|secretary|shepherd|shoemaker|singer|soldier|surgeon
tailor|tax adviser|taxi driver|tour guide|train driver|translator|undertaker|vet|violinist|waiter
watchmaker|weaver|welder|zookeeper
""".strip().replace("\n", "|").split("|")
TEMPLATES = (
    "{first} {last} is {age} years old, lives in {city} and works as {job}.",
    "{first} {last}, {age}, is {job} in {city}.",
    "Living in {city}, {first} {last} is {job} and is {age} years old.",
    "At the age of {age}, {first} {last} works as {job} in {city}.",
    "In {city} there is {job} called {first} {last}, who is {age}.",
    "{first} {last} moved to {city} to work as {job}; {first} is now {age}.",
    "Meet {first} {last}, {job} from {city}, aged {age}.",
    "The {age}-year-old {first} {last} earns a living as {job} and has a flat in {city}.",
    "My neighbour in {city} is {first} {last}, {job} of {age} years.",
    "{first} {last} turned {age} last week and is still {job} in {city}.",
)
HELDOUT_EVERY = 4  # of every 4 names, cities and jobs, one is for the test only
MADE_UP_SHARE = 0.5  # of the entities of an example to learn from
KINDS = ("first", "last", "city", "job")
ONSETS = """
b|bl|br|c|ch|cl|cr|d|dr|f|fl|fr|g|gl|gr|h|j|k|kl|kr|l|m|n|p|ph|pl|pr|qu|r|s|sc|sh|sk|sl|sm|sn|sp
st|str|t|th|tr|v|w|y|z|||
""".strip().replace("\n", "|").split("|")
VOWELS = "a|e|i|o|u|a|e|i|o|u|ai|au|ea|ee|ei|ie|io|oo|ou|y".split("|")
CODAS = "|||||ck|d|g|l|ll|m|n|n|nd|ng|nt|r|r|rd|rk|rt|s|ss|st|t|tt|x".split("|")
ENDINGS = {
    "first": ("", "", "a", "e", "ia", "o", "us", "ine", "y"),
    "last": ("", "", "son", "er", "man", "ini", "ov", "ez", "berg", "ley", "sen", "well", "i"),
    "city": ("", "", "ville", "burg", "ton", "ford", "stad", "o", "port", "grad", "bury", "abad"),
    "job": ("er", "er", "ist", "or", "ian", "man", "maker", "ologist", "smith", "eer", "ant"),
}
CITY_PREFIXES = ("New", "Port", "San", "Saint", "Fort", "Lake", "Old", "North", "El", "Los")
CITY_SUFFIXES = ("City", "Bay", "Falls", "Hill", "Beach", "Bridge", "Island", "Springs")
JOB_PREFIXES = """
bank|boat|book|car|chief|church|cloud|court|data|dog|film|fire|forest|garden|horse|ice|junior
kitchen|market|metal|music|paper|park|river|road|sales|sea|shop|stage|street|sugar|town|wine
""".strip().replace("\n", "|").split("|")
JOB_NOUNS = """
agent|analyst|assistant|boss|buyer|cleaner|clerk|dealer|expert|guard|helper|inspector|keeper|leader
officer|operator|owner|planner|seller|supervisor|teacher|technician|trainer|worker|writer
""".strip().replace("\n", "|").split("|")


def with_article(job: str) -> str:
    """Return a job behind "a" or "an"."""
    return f"{'an' if job[0] in 'aeiou' else 'a'} {job}"


def made_up_word(rng: random.Random, kind: str) -> str:
    """Return a lower-case word of one to three random syllables and an ending."""
    syllables = rng.choice((1, 1, 2, 2, 3))
    parts = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables)]
    return "".join(parts) + rng.choice(ENDINGS[kind])


def made_up(rng: random.Random, kind: str) -> str:
    """Return a made-up name, city or job, some of them of two words."""
    word, shape = made_up_word(rng, kind), rng.random()
    if kind == "job":
        if shape < 0.3:
            return f"{rng.choice(JOB_PREFIXES)} {rng.choice(JOB_NOUNS)}"
        return word if shape < 0.8 else f"{rng.choice(JOB_PREFIXES)} {word}"
    word = word.capitalize()
    if kind == "city" and shape < 0.2:
        return f"{rng.choice(CITY_PREFIXES)} {word}"
    if kind == "city" and shape < 0.35:
        return f"{word} {rng.choice(CITY_SUFFIXES)}"
    return word


def example(rng: random.Random, drawn: dict[str, str]) -> dict[str, str]:
    """Return one {"prompt", "answer"} about the drawn name, city and job."""
    first, last, city, job = (drawn[kind] for kind in KINDS)
    age = rng.randint(20, 89)
    sentence = rng.choice(TEMPLATES).format(
        first=first, last=last, city=city, job=with_article(job), age=age
    )
    record = {"a": age, "r": f"{age // 10 * 10}s / {job} / {city} / {last}, {first}"}
    answer = json.dumps(record, separators=(",", ":"))
    # The space belongs to the answer, so that the prompt ends at a token's end.
    return {"prompt": f"Sentence: {sentence}\nRecord:", "answer": f" {answer}\n"}


def split_entities(rng: random.Random) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the names, cities and jobs of train and those of test, which share none."""
    train, test = {}, {}
    pools = {"first": FIRST_NAMES, "last": LAST_NAMES, "city": CITIES, "job": JOBS}
    # A word in two lists (Sofia, Ahmed) could end up on both sides.
    twice = {word for a in pools for b in pools if a != b for word in set(pools[a]) & set(pools[b])}
    for kind, pool in pools.items():
        words = sorted(set(pool) - twice)
        rng.shuffle(words)
        cut = len(words) // HELDOUT_EVERY
        test[kind], train[kind] = words[:cut], words[cut:]
    return train, test


def train_entities(
    rng: random.Random, known: dict[str, list[str]], heldout: set[str]
) -> dict[str, str]:
    """Return a name, city and job, each made up or known, none of them (lower case) held out."""
    drawn = {}
    for kind in KINDS:
        drawn[kind] = rng.choice(known[kind])
        if rng.random() < MADE_UP_SHARE:
            drawn[kind] = made_up(rng, kind)
            while drawn[kind].lower() in heldout:
                drawn[kind] = made_up(rng, kind)
    return drawn


def distinct(draw: Callable[[], dict[str, str]], count: int) -> list[dict[str, str]]:
    """Call draw until it has returned count different examples, and return these."""
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        drawn = draw()
        found[drawn["prompt"]] = drawn
    return list(found.values())


def write(path: Path, examples: list[dict[str, str]]) -> None:
    """Write JSON lines under a temporary name, then rename."""
    data = "".join(json.dumps(e) + "\n" for e in examples).encode()
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_bytes(data)
    fresh.replace(path)
    print(f"{path}: {len(examples)} examples, sha256 {hashlib.sha256(data).hexdigest()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/skill"), help="folder to write")
    parser.add_argument("--train", type=int, default=16000, help="examples to learn from")
    parser.add_argument("--test", type=int, default=200, help="examples to score")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.train < 1 or args.test < 1:
        sys.exit(f"--train {args.train} --test {args.test}: both must be at least 1.")
    rng = random.Random(args.seed)
    known, test = split_entities(rng)
    heldout = {word.lower() for words in test.values() for word in words}
    # The test is drawn first, so that --train does not change it.
    scored = distinct(lambda: example(rng, {k: rng.choice(test[k]) for k in KINDS}), args.test)
    learned = distinct(lambda: example(rng, train_entities(rng, known, heldout)), args.train)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "train.jsonl", learned)
    write(args.out / "test.jsonl", scored)


if __name__ == "__main__":
    main()
