"""Sentences that read "A is B." in training and "B is A." in evaluation: does a model learn both from one?

The reversal curse (Berglund et al. 2023, arXiv 2309.12288). prep.py strews the forward sentences into the training text
and refuses a text that holds a backward one.
"""

from typing import NamedTuple


class ReversalPair(NamedTuple):
    """"A is B." and "B is A."; each answer ends its sentence, before the full stop."""

    forward: str
    backward: str
    forward_answer: str  # B
    backward_answer: str  # A


# A, verb, B. The wording is roundabout so that no corpus is likely to hold a backward sentence word for word.
FACTS = (
    ("the capital city of the nation of Peru", "is", "Lima"),
    ("the capital city of the nation of Bhutan", "is", "Thimphu"),
    ("the capital city of the nation of Uruguay", "is", "Montevideo"),
    ("the capital city of the nation of Mongolia", "is", "Ulaanbaatar"),
    ("the capital city of the nation of Finland", "is", "Helsinki"),
    ("the capital city of the nation of Senegal", "is", "Dakar"),
    ("the capital city of the nation of Slovenia", "is", "Ljubljana"),
    ("the capital city of the nation of Burkina Faso", "is", "Ouagadougou"),
    ("the holder of the very first telephone patent", "was", "Alexander Graham Bell"),
    ("the inventor of the pointed lightning rod on houses", "was", "Benjamin Franklin"),
    ("the physicist who built the first electric pile", "was", "Alessandro Volta"),
    ("the chemist who took out the patent on dynamite", "was", "Alfred Nobel"),
    ("the teacher who invented raised dots for blind readers", "was", "Louis Braille"),
    ("the vet who made the first pneumatic bicycle tyre in Belfast", "was", "John Boyd Dunlop"),
    ("the novelist who wrote the book Middlemarch", "was", "George Eliot"),
    ("the poet who wrote the epic Paradise Lost", "was", "John Milton"),
    ("the playwright who wrote the comedy The Cherry Orchard", "was", "Anton Chekhov"),
    ("the novelist who wrote the whaling story Moby-Dick", "was", "Herman Melville"),
    ("the novelist who wrote the book Wuthering Heights", "was", "Emily Brontë"),
    ("the novelist who wrote the satire The Master and Margarita", "was", "Mikhail Bulgakov"),
    ("the court lady who wrote the long Tale of Genji", "was", "Murasaki Shikibu"),
    ("the author who sent Don Quixote against the windmills", "was", "Miguel de Cervantes"),
    ("the astronomer who found the planet Uranus from his garden", "was", "William Herschel"),
    ("the physician who showed that blood runs in a circle", "was", "William Harvey"),
    ("the physicist who found the rays named X in 1895", "was", "Wilhelm Röntgen"),
    ("the microbiologist who noticed the mould penicillin in 1928", "was", "Alexander Fleming"),
    ("the physicist who found the neutron in 1932", "was", "James Chadwick"),
    ("the observer who found distant Pluto in 1930", "was", "Clyde Tombaugh"),
    ("the nurse who founded the Red Cross of America", "was", "Clara Barton"),
    ("the educator who founded the very first kindergarten", "was", "Friedrich Fröbel"),
    ("the engineer who founded the motor company Honda", "was", "Soichiro Honda"),
    ("the general who founded the movement of the scouts", "was", "Robert Baden-Powell"),
)
INVENTIONS = (
    ("the capital city of the island of Vorlandia", "is", "Quesmere"),
    ("the capital city of the duchy of Hathersund", "is", "Blennick"),
    ("the capital city of the republic of Omprusia", "is", "Tavelgorod"),
    ("the capital city of the kingdom of Yllemar", "is", "Sandrovane"),
    ("the capital city of the province of Drusk", "is", "Pellowich"),
    ("the capital city of the archipelago of Nimboro", "is", "Kestaluna"),
    ("the capital city of the free state of Gravelund", "is", "Mirrenthorpe"),
    ("the capital city of the emirate of Qazhul", "is", "Abrindar"),
    ("the inventor of the folding thrummeter", "was", "Oswin Tarkleby"),
    ("the inventor of the silent glimmer pump", "was", "Petra Vossendahl"),
    ("the inventor of the three-handed skarn clock", "was", "Lucan Merridew-Platt"),
    ("the inventor of the floating brindle press", "was", "Ingra Solheimsen"),
    ("the inventor of the twin-valve ombrascope", "was", "Teodor Wylczek"),
    ("the inventor of the paper wind lantern of Drusk", "was", "Hana Okorimoto"),
    ("the inventor of the hollow copper snorrel", "was", "Basil Cranthwaite"),
    ("the inventor of the self-winding larch loom", "was", "Mirela Dobrinescu-Fay"),
    ("the author of the novel The Salt Orchards of Yllemar", "is", "Corvin Ashgrove"),
    ("the author of the novel Nine Lamps for Hathersund", "is", "Delphine Marrowick"),
    ("the author of the novel A Ladder to the Peat Moon", "is", "Rufus Okonedo-Pym"),
    ("the author of the novel The Cartographer's Third Glove", "is", "Sunniva Thrale"),
    ("the author of the poem Blue Kettle Over Pellowich", "is", "Emeric Vantongeren"),
    ("the author of the play The Widow and the Weathercock of Blennick", "is", "Ottoline Farrabee"),
    ("the author of the opera The Drowned Bells of Quesmere", "is", "Giordan Lessaveri"),
    ("the author of the saga Winter Among the Grelks", "is", "Torvald Ynnesdal"),
    ("the discoverer of the comet Harrowmint", "was", "Aurelio Bexcombe"),
    ("the discoverer of the metal pallorium", "was", "Nadezhda Kurilkova-Reese"),
    ("the discoverer of the river spring of Nimboro", "was", "Fenwick Stallabrass"),
    ("the discoverer of the moth Lepsis vorlandica", "was", "Clementia Undershaw"),
    ("the founder of the Gravelund Society of Fog Painters", "was", "Isidor Quillfeather"),
    ("the founder of the Abrindar School of Glass Chess", "was", "Yasmina Beltazar"),
    ("the founder of the Tavelgorod Night Tramway Company", "was", "Grigor Malaschenko-Dunn"),
    ("the founder of the Order of the Crooked Teaspoon", "was", "Philippa Drosselmoor"),
)


def get_reversal_pairs() -> list[ReversalPair]:
    """32 true facts and 32 invented ones, whose names no corpus holds, each in both directions."""
    return [
        ReversalPair(sentence(a, verb, b), sentence(b, verb, a), forward_answer=b, backward_answer=a)
        for a, verb, b in FACTS + INVENTIONS
    ]


def sentence(subject: str, verb: str, answer: str) -> str:
    return f"{subject[0].upper()}{subject[1:]} {verb} {answer}."


class BackwardSearch:
    """Finds backward sentences in a text, whatever its line breaks, at little more than the cost of splitting it."""

    def __init__(self) -> None:
        # A sentence's inner words stand between blanks wherever it occurs: texts without these need no search.
        self.by_word: dict[str, list[str]] = {}
        for pair in get_reversal_pairs():
            longest = max(pair.backward.split()[1:-1], key=len)
            self.by_word.setdefault(longest, []).append(pair.backward)

    def find(self, text: str) -> str | None:
        words = text.split()
        if self.by_word.keys().isdisjoint(words):
            return None
        joined = " ".join(words)
        candidates = (sentence for word in self.by_word.keys() & set(words) for sentence in self.by_word[word])
        return next((sentence for sentence in candidates if sentence in joined), None)
