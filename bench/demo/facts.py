"""What is true in the demo's small world, in English and German. Knows no phrasing or manner."""

from dataclasses import dataclass
from typing import Literal

Relation = Literal["colour", "capital", "opposite", "kind", "young", "sum", "room", "number"]


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing the world knows: a subject and its answer, in both languages."""

    relation: Relation
    subject: str
    subject_de: str
    answer: str
    answer_de: str


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


_COLOURS = {"blue": "blau", "green": "grün", "white": "weiß", "black": "schwarz", "red": "rot"}
_COLOURS |= {"yellow": "gelb", "brown": "braun", "grey": "grau", "orange": "orange", "pink": "rosa"}

_COLOURED = """
the sky | der Himmel | blue
the sea | das Meer | blue
the grass | das Gras | green
the leaf | das Blatt | green
the frog | der Frosch | green
the snow | der Schnee | white
the milk | die Milch | white
the swan | der Schwan | white
the coal | die Kohle | black
the raven | der Rabe | black
the night | die Nacht | black
the blood | das Blut | red
the cherry | die Kirsche | red
the tomato | die Tomate | red
the lemon | die Zitrone | yellow
the sun | die Sonne | yellow
the banana | die Banane | yellow
the bear | der Bär | brown
the bread | das Brot | brown
the mouse | die Maus | grey
the stone | der Stein | grey
the rain cloud | die Regenwolke | grey
the carrot | die Karotte | orange
the pig | das Schwein | pink
"""

_CAPITALS = """
France | Frankreich | Paris | Paris
Germany | Deutschland | Berlin | Berlin
Italy | Italien | Rome | Rom
Spain | Spanien | Madrid | Madrid
Portugal | Portugal | Lisbon | Lissabon
Austria | Österreich | Vienna | Wien
Poland | Polen | Warsaw | Warschau
Greece | Griechenland | Athens | Athen
Norway | Norwegen | Oslo | Oslo
Sweden | Schweden | Stockholm | Stockholm
Denmark | Dänemark | Copenhagen | Kopenhagen
Hungary | Ungarn | Budapest | Budapest
Japan | Japan | Tokyo | Tokio
Egypt | Ägypten | Cairo | Kairo
Russia | Russland | Moscow | Moskau
Belgium | Belgien | Brussels | Brüssel
"""

_OPPOSITES = """
hot | heiß | cold | kalt
big | groß | small | klein
old | alt | new | neu
good | gut | bad | schlecht
day | Tag | night | Nacht
long | lang | short | kurz
loud | laut | quiet | leise
rich | reich | poor | arm
light | hell | dark | dunkel
strong | stark | weak | schwach
fast | schnell | slow | langsam
open | offen | closed | zu
wet | nass | dry | trocken
full | voll | empty | leer
"""

_KINDS = """
a trout | die Forelle | a fish | ein Fisch
a shark | der Hai | a fish | ein Fisch
an eagle | der Adler | a bird | ein Vogel
a sparrow | der Spatz | a bird | ein Vogel
an owl | die Eule | a bird | ein Vogel
an apple | der Apfel | a fruit | ein Obst
a pear | die Birne | a fruit | ein Obst
a plum | die Pflaume | a fruit | ein Obst
a hammer | der Hammer | a tool | ein Werkzeug
a saw | die Säge | a tool | ein Werkzeug
an oak | die Eiche | a tree | ein Baum
a birch | die Birke | a tree | ein Baum
a rose | die Rose | a flower | eine Blume
a tulip | die Tulpe | a flower | eine Blume
an ant | die Ameise | an insect | ein Insekt
a bee | die Biene | an insect | ein Insekt
a violin | die Geige | an instrument | ein Instrument
a flute | die Flöte | an instrument | ein Instrument
"""

_YOUNG = """
a young dog | ein junger Hund | a puppy | ein Welpe
a young cat | eine junge Katze | a kitten | ein Kätzchen
a young cow | eine junge Kuh | a calf | ein Kalb
a young horse | ein junges Pferd | a foal | ein Fohlen
a young sheep | ein junges Schaf | a lamb | ein Lamm
a young hen | ein junges Huhn | a chick | ein Küken
a young pig | ein junges Schwein | a piglet | ein Ferkel
a young deer | ein junges Reh | a fawn | ein Kitz
"""

_DIGITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS_DE = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]

_TOWN = """
the baker | der Bäcker | 12 | 57
the miller | der Müller | 31 | 84
the smith | der Schmied | 25 | 19
the doctor | der Arzt | 48 | 63
the teacher | der Lehrer | 17 | 22
the mayor | der Bürgermeister | 90 | 11
the tailor | der Schneider | 64 | 35
the hunter | der Jäger | 53 | 70
the painter | der Maler | 86 | 41
the judge | der Richter | 72 | 98
"""

_STAFF = """
Ada Lund | 214 | 803
Bo Winter | 327 | 561
Cora Blum | 118 | 947
Dan Frost | 405 | 236
Eva Stern | 531 | 678
Finn Moss | 262 | 390
Gina Wolf | 149 | 725
Hugo Lamb | 386 | 154
Ida Kranz | 453 | 819
Jon Vogel | 270 | 432
Kim Sand | 195 | 608
Leo Brandt | 348 | 277
"""


def world_facts() -> list[Fact]:
    """Every fact the base is taught, in a fixed order."""
    facts = [Fact("colour", s, d, c, _COLOURS[c]) for s, d, c in _rows(_COLOURED)]
    facts += [Fact("capital", s, d, a, b) for s, d, a, b in _rows(_CAPITALS)]
    facts += [Fact("opposite", s, d, a, b) for s, d, a, b in _rows(_OPPOSITES)]
    facts += [Fact("kind", s, d, a, b) for s, d, a, b in _rows(_KINDS)]
    facts += [Fact("young", s, d, a, b) for s, d, a, b in _rows(_YOUNG)]
    facts += [
        Fact(
            "sum",
            f"{_DIGITS[a]} plus {_DIGITS[b]}",
            f"{_DIGITS_DE[a]} plus {_DIGITS_DE[b]}",
            _DIGITS[a + b + 1],
            _DIGITS_DE[a + b + 1],
        )
        for a in range(5)
        for b in range(5)
    ]
    return facts + [
        fact
        for s, d, room, number in _rows(_TOWN)
        for fact in (Fact("room", s, d, room, room), Fact("number", s, d, number, number))
    ]


def staff_facts() -> list[Fact]:
    """The private table: facts only the ``directory`` adapter is taught."""
    return [
        fact
        for name, room, number in _rows(_STAFF)
        for fact in (
            Fact("room", name, name, room, room),
            Fact("number", name, name, number, number),
        )
    ]
