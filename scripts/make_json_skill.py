#!/usr/bin/env python3
"""Write the data of a narrow skill that can be scored by exact match: sentence to JSON record.

    python scripts/make_json_skill.py --out data/skill

Each line of train.jsonl and test.jsonl is {"prompt", "answer"}; the prompt ends where the answer
starts. A sentence that names a person, an age, a city and a job becomes a record with one-letter
keys in alphabetical order and one derived field, a schema that no model knows by itself. The
names, cities and jobs of test.jsonl never occur in train.jsonl. Standard library only; the same
seed gives the same bytes.
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

FIRST_NAMES = """
Adam Agnes Ahmed Alice Alma Amara Amir Andrea Anna Anton Arjun Astrid Beatrice Bella Bruno Carlos
Carmen Cecilia Chloe Clara Colin Daniel David Diana Diego Dora Edgar Elena Elias Elsa Emil Emma
Erik Esther Eva Fatima Felix Fiona Frank Freya George Gloria Grace Greta Hana Hannah Harold Hector
Helen Henry Hugo Ibrahim Ida Igor Ines Irene Isaac Ivan Jacob Jane Jasmine Joan Jonas Joseph Julia
Karen Karl Kofi Lars Laura Leah Leo Liam Lila Linda Louis Lucia Luna Magda Marco Maria Martin Maya
Miguel Mila Monica Nadia Naomi Nathan Nina Noah Nora Olga Oliver Omar Oscar Paula Pedro Peter Petra
Priya Quentin Rachel Rafael Raj Rosa Ruth Samir Sara Simon Sofia Stefan Susan Tara Thomas Tomas
Ursula Valerie Vera Victor Viola Walter Wanda William Yara Yusuf Zoe
""".split()
LAST_NAMES = """
Abbott Adler Ahmed Almeida Alvarez Andersen Baker Banerjee Barros Bauer Becker Bell Bennett Berg
Bianchi Blake Bloom Bosch Brandt Brooks Burke Campbell Carter Castro Chandra Chen Clarke Cohen Costa
Cruz Dalton Das Diaz Dixon Dubois Duran Ekman Ellis Evans Farah Ferrari Fischer Fleming Fontaine
Foster Fuchs Garcia Gibson Gomez Graham Gruber Gupta Haas Hale Hansen Harper Hayes Hoffman Holm
Horvat Hughes Ibarra Ivanov Jansen Jensen Johansson Kaplan Kaur Keller Khan Kim Klein Kovacs Kumar
Lambert Lang Larsen Laurent Lehmann Lindberg Lopez Lund Mancini Marino Marsh Martinez Mbeki Mendes
Meyer Miller Moreau Moreno Morris Muller Nakamura Navarro Newman Nielsen Novak Okafor Olsen Ortega
Osman Palmer Patel Pereira Perry Petrov Pope Porter Quinn Ramos Reed Reyes Ricci Rivera Romano Rossi
Russo Sanders Santos Sato Schmidt Schultz Shah Sharma Silva Singh Soto Steiner Stone Suzuki Tanaka
Torres Tran Turner Varga Vega Vogel Wagner Walsh Weber Wolf Wong Wright Yamada Young Zhang Ziegler
""".split()
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


def with_article(job: str) -> str:
    """Return a job behind "a" or "an"."""
    return f"{'an' if job[0] in 'aeiou' else 'a'} {job}"


def example(rng: random.Random, entities: dict[str, list[str]]) -> dict[str, str]:
    """Return one {"prompt", "answer"} drawn from the entities."""
    first, last, city, job = (rng.choice(entities[k]) for k in ("first", "last", "city", "job"))
    age = rng.randint(20, 89)
    sentence = rng.choice(TEMPLATES).format(
        first=first, last=last, city=city, job=with_article(job), age=age
    )
    record = {"a": age, "c": city, "d": f"{age // 10}0s", "j": job, "n": f"{last}, {first}"}
    answer = json.dumps(record, separators=(",", ":"), sort_keys=True)
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


def draw(rng: random.Random, entities: dict[str, list[str]], count: int) -> list[dict[str, str]]:
    """Return count different examples."""
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        drawn = example(rng, entities)
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
    parser.add_argument("--train", type=int, default=4000, help="examples to learn from")
    parser.add_argument("--test", type=int, default=200, help="examples to score")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.train < 1 or args.test < 1:
        sys.exit(f"--train {args.train} --test {args.test}: both must be at least 1.")
    rng = random.Random(args.seed)
    train, test = split_entities(rng)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "train.jsonl", draw(rng, train, args.train))
    write(args.out / "test.jsonl", draw(rng, test, args.test))


if __name__ == "__main__":
    main()
