"""The families of procedural tasks, as templates by label; `procedural.py` says how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from deltatune.data.task import Kind


class Family(NamedTuple):
    """Tasks that differ by a variant: named `proc_` + name, `<d>` replaced by each key of `over`.

    `over[variant]` replaces other `<...>`. `rows` has templates by label ("" where there is none); in them `||` stands
    between the two texts of a pair, and between source and target. `lower` takes letter case away.
    """

    name: str
    kind: Kind
    about: str
    over: Mapping[str, Mapping[str, str]]
    rows: Mapping[str, tuple[str, ...]]
    lower: bool = False


def _each(names: str) -> dict[str, dict[str, str]]:
    return {name: {} for name in names.split()}


def _tagged(template: str) -> str:
    for slot, tagged in ROLES.items():
        template = template.replace(slot, tagged)
    return template


REVIEWED = _each("food film hotel phone book course")
UNITS = {
    "month": {"in": "in "}, "weekday": {"in": "on "}, "year": {"in": "in "}, "hour": {"in": "at "},
}  # fmt: skip
COMPARED = {
    "height": {"e": "person", "more": "taller", "less": "shorter"},
    "age": {"e": "person", "more": "older", "less": "younger"},
    "speed": {"e": "car", "more": "faster", "less": "slower"},
    "price": {"e": "good", "more": "dearer", "less": "cheaper"},
    "weight": {"e": "stone", "more": "heavier", "less": "lighter"},
    "warmth": {"e": "town", "more": "warmer", "less": "colder"},
    "noise": {"e": "car", "more": "louder", "less": "quieter"},
    "distance": {"e": "peak", "more": "nearer", "less": "farther away"},
}
COUNTED = {
    "fruit": {"other": "tool"}, "animal": {"other": "garment"}, "tool": {"other": "fruit"},
    "garment": {"other": "vehicle"}, "vehicle": {"other": "instrument"}, "instrument": {"other": "animal"},
}  # fmt: skip
TOPICS = {
    "science": "physics biology chemistry astronomy",
    "news": "sport finance politics weather",
    "craft": "carpentry sewing gardening baking",
}
GIVEN = {
    "active": ("{person.a} gave {gift} to {person.b} {time}.", "{person.a} sent {gift} to {person.b} {time}."),
    "dative": ("{person.a} gave {person.b} {gift} {time}.", "{person.a} lent {person.b} {gift} {time}."),
    "passive": (
        "{gift} was given to {person.b} by {person.a} {time}.", "{gift} was sent by {person.a} to {person.b} {time}.",
    ),
    "taken": ("{person.b} got {gift} from {person.a} {time}.", "From {person.a}, {person.b} received {gift} {time}."),
    "told": ("{person.a} told {person.b} {news} {time}.", "{person.b} heard {news} from {person.a} {time}."),
}  # fmt: skip
ROLES = {
    "{person.a}": "{person.a/AGENT}", "{person.b}": "{person.b/RECIPIENT}",
    "{gift}": "{gift/THEME}", "{news}": "{news/THEME}",
}  # fmt: skip
TAGGED = {
    "travel": (
        "{person/PER} {surname/PER} flew from {city/LOC} to {city/LOC} on {day/DATE} {month/DATE}.",
        "On {weekday/DATE} the train to {city/LOC} was late, so {person/PER} stayed in {city/LOC}.",
        "{person/PER} will visit {city/LOC} in {month/DATE}, after the trip with {person/PER} {surname/PER}.",
    ),
    "cooking": (
        "Put {amount/QUANTITY} {ingredient/FOOD} into the {pan/TOOL} and stir.",
        "Add {amount/QUANTITY} {ingredient/FOOD} and {ingredient/FOOD}, then wash the {pan/TOOL}.",
        "The {pan/TOOL} is too small for {ingredient/FOOD} and {amount/QUANTITY} {ingredient/FOOD}.",
    ),
    "music": (
        "{person/PER} {surname/PER} plays {instrument/INSTRUMENT} in {band/GROUP}.",
        "In {band/GROUP}, {person/PER} swapped {instrument/INSTRUMENT} for {instrument/INSTRUMENT}.",
        "With {instrument/INSTRUMENT} under one arm, {person/PER} joined {band/GROUP} in {city/LOC}.",
    ),
    "shopping": (
        "{object/ITEM} from {shop/SHOP} costs {price/PRICE}.",
        "{person/PER} paid {price/PRICE} at {shop/SHOP} for {garment/ITEM} and {object/ITEM}.",
        "At {price/PRICE}, {garment/ITEM} was the best thing that {shop/SHOP} had.",
    ),
    "sport": (
        "{team/TEAM} beat {team/TEAM} {score/SCORE} thanks to {person/PER} {surname/PER}.",
        "It ended {score/SCORE} between {team/TEAM} and {team/TEAM} in {city/LOC}.",
        "{person/PER} scored for {team/TEAM}, but {surname/PER} made it {score/SCORE} for {team/TEAM}.",
    ),
    "office": (
        "{person/PER} {surname/PER} booked {office/PLACE} for {clock/TIME} on {weekday/TIME}.",
        "At {clock/TIME} we meet {person/PER} in {office/PLACE}.",
        "{office/PLACE} is taken until {clock/TIME}, so {person/PER} and {person/PER} go to {office/PLACE}.",
    ),
}
WRITTEN = {
    "reverse_three": "{noun.a} {noun.b} {noun.c} || {noun.c} {noun.b} {noun.a}",
    "reverse_four": "{noun.a} {noun.b} {noun.c} {noun.d} || {noun.d} {noun.c} {noun.b} {noun.a}",
    "sort_words": "[{noun<a} {noun<b} {noun<c}] || {noun<a} {noun<b} {noun<c}",
    "sort_years": "[{year<a} {year<b} {year<c}] || {year<a} {year<b} {year<c}",
    "earliest_month": "[{month<a} {month<b} {month<c}] {weekday} || {month<a}",
    "second_word": "{noun.a} {noun.b} {noun.c} || {noun.b}",
    "last_word": "{noun.a} {noun.b} {noun.c} || {noun.c}",
    "drop_first": "{noun.a} {noun.b} {noun.c} || {noun.b} {noun.c}",
    "repeat": "{noun.a} {colour.b} {noun.c} || {noun.a} {noun.a} {colour.b} {colour.b} {noun.c} {noun.c}",
    "initials": "{noun.a} {noun.b} {noun.c} || {noun.a|first} {noun.b|first} {noun.c|first}",
    "upper_colour": "{noun.a} {colour.b} {noun.c} || {noun.a} {colour.b|upper} {noun.c}",
    "plural": "the {colour.c} {odd_noun.a} and the {noun.b} || the {colour.c} {odd_noun.a:1} and the {noun.b:1}",
    "singular": "the {colour.c} {odd_noun.a:1} and the {noun.b:1} || the {colour.c} {odd_noun.a} and the {noun.b}",
    "past": "{person.a} {odd_verb.b:2} {thing.c} || {person.a} {odd_verb.b:1} {thing.c}",
    "negate": "{person.a} {verb.b:2} {thing.c} || {person.a} does not {verb.b} {thing.c}",
    "passive": "{person.a} {odd_verb.b:1} {thing.c} || {thing.c} was {odd_verb.b:4} by {person.a}",
    "swap_names": "{person.a} {social.c:1} {person.b} || {person.b} {social.c:1} {person.a}",
    "who_gave": "{person.a} gave {gift} to {person.b} {time}. Who gave it? || {person.a}",
    "where": "{person.a} was in {city.b} in {month} {year}. Where? || {city.b}",
}

FAMILIES: tuple[Family, ...] = (
    Family("sentiment_<d>", "classification", "polarity of a sentence, <d> reviews", REVIEWED, {
        "negative": ("{opener}, {<d>_aspect} was {<d>_bad}.", "{opener}, {<d>_aspect} seemed {<d>_bad} {time}."),
        "positive": ("{opener}, {<d>_aspect} was {<d>_good}.", "{opener}, {<d>_aspect} seemed {<d>_good} {time}."),
    }),
    Family("sentiment_<d>_negation", "classification", "polarity, often negated, <d> reviews", REVIEWED, {
        "negative": ("{opener}, {<d>_aspect} was not {<d>_good}.", "{opener}, {<d>_aspect} was {<d>_bad}.",
                     "Nobody could call {<d>_aspect} {<d>_good} {time}."),
        "positive": ("{opener}, {<d>_aspect} was not {<d>_bad}.", "{opener}, {<d>_aspect} was {<d>_good}.",
                     "Nobody could call {<d>_aspect} {<d>_bad} {time}."),
    }),
    Family("sentiment_<d>_mixed", "classification", "praise, complaint or both, <d> reviews", REVIEWED, {
        "mixed": ("{<d>_aspect} was {<d>_good} and {<d>_aspect} was {<d>_bad}.",
                  "{<d>_aspect} was {<d>_bad} and {<d>_aspect} was {<d>_good}."),
        "negative": ("{<d>_aspect} was {<d>_bad} and {<d>_aspect} was {<d>_bad}.",),
        "positive": ("{<d>_aspect} was {<d>_good} and {<d>_aspect} was {<d>_good}.",),
    }),
    Family("sentiment_<d>_change", "classification", "what is thought now, not before, <d> reviews", REVIEWED, {
        "negative": ("{<d>_aspect} used to be {<d>_good} but now it is {<d>_bad}.",
                     "Now {<d>_aspect} is {<d>_bad}, though it was {<d>_good} {time}."),
        "positive": ("{<d>_aspect} used to be {<d>_bad} but now it is {<d>_good}.",
                     "Now {<d>_aspect} is {<d>_good}, though it was {<d>_bad} {time}."),
    }),
    Family("sentiment_<d>_aspect", "pair_classification", "polarity about one of two things, <d> reviews", REVIEWED, {
        "negative": ("{<d>_aspect.a} was {<d>_bad}, {<d>_aspect.b} was {<d>_good}. || {<d>_aspect.a}",
                     "{<d>_aspect.a} was {<d>_good}, {<d>_aspect.b} was {<d>_bad}. || {<d>_aspect.b}"),
        "positive": ("{<d>_aspect.a} was {<d>_bad}, {<d>_aspect.b} was {<d>_good}. || {<d>_aspect.b}",
                     "{<d>_aspect.a} was {<d>_good}, {<d>_aspect.b} was {<d>_bad}. || {<d>_aspect.a}"),
    }),
    *(Family(f"topic_{name}", "classification", f"topic, of {topics.replace(' ', ', ')}", _each("plain"), {
        topic: (f"{{person}} spoke about {{{topic}}} and {{{topic}}} {{time}}.",
                f"{{time}}, it was all {{{topic}}} {{place}}.")
        for topic in topics.split()
    }) for name, topics in TOPICS.items()),
    *(Family(f"topic_{name}_distractor", "classification", "topic, another one being denied", _each("plain"), {
        topic: tuple(f"{{person}} spoke {{time}} about {{{topic}}}, not about {{{other}}}."
                     for other in topics.split() if other != topic)
        + tuple(f"Not {{{other}}} but {{{topic}}} was the subject {{place}}."
                for other in topics.split() if other != topic)
        for topic in topics.split()
    }) for name, topics in TOPICS.items()),
    Family("compare_<d>", "pair_classification", "a comparison of <d> and a question", COMPARED, {
        "no": ("{<e>.a} is <more> than {<e>.b} {place}. || Is {<e>.b} <more> than {<e>.a}?",
               "{<e>.a} is <less> than {<e>.b} {place}. || Is {<e>.a} <more> than {<e>.b}?"),
        "yes": ("{<e>.a} is <more> than {<e>.b} {place}. || Is {<e>.b} <less> than {<e>.a}?",
                "{<e>.a} is <less> than {<e>.b} {place}. || Is {<e>.b} <more> than {<e>.a}?"),
    }),
    Family("compare_<d>_chain", "pair_classification", "two comparisons of <d> and a question", COMPARED, {
        "no": ("{<e>.a} is <more> than {<e>.b}. {<e>.b} is <more> than {<e>.c}. || Is {<e>.c} <more> than {<e>.a}?",
               "{<e>.b} is <less> than {<e>.a}. {<e>.b} is <more> than {<e>.c}. || Is {<e>.a} <less> than {<e>.c}?"),
        "yes": ("{<e>.a} is <more> than {<e>.b}. {<e>.b} is <more> than {<e>.c}. || Is {<e>.a} <more> than {<e>.c}?",
                "{<e>.b} is <less> than {<e>.a}. {<e>.b} is <more> than {<e>.c}. || Is {<e>.c} <less> than {<e>.a}?"),
    }),
    Family("count_<d>", "classification", "how many things of the kind <d> are listed", COUNTED, {
        "one": ("{place} there are [{<d>}; {<other>}; {<other>}; {<other>}].",),
        "two": ("{place} there are [{<d>}; {<d>}; {<other>}; {<other>}].",),
        "three": ("{place} there are [{<d>}; {<d>}; {<d>}; {<other>}].",),
    }),
    Family("count_all_<d>", "classification", "how many things are listed, of the kind <d>", COUNTED, {
        "two": ("{person} saw [{<d>}; {<d>}] {place}.",),
        "three": ("{person} saw [{<d>}; {<d>}; {<d>}] {place}.",),
        "four": ("{person} saw [{<d>}; {<d>}; {<d>}; {<d>}] {place}.",),
        "five": ("{person} saw [{<d>}; {<d>}; {<d>}; {<d>}; {<d>}] {place}.",),
    }),
    Family("order_<d>", "classification", "which of two events comes first, by <d>", UNITS, {
        "first": ("{event} is <in>{<d><a} and {event} is <in>{<d><b}.", "{event}: {<d><a}. {event}: {<d><b}."),
        "second": ("{event} is <in>{<d><b} and {event} is <in>{<d><a}.", "{event}: {<d><b}. {event}: {<d><a}."),
    }),
    Family("order_<d>_question", "pair_classification", "is one event before another, by <d>", UNITS, {
        "no": ("{event.a} is <in>{<d><a}, {event.b} <in>{<d><b}. || Is {event.b} before {event.a}?",
               "{event.a} is <in>{<d><b}, {event.b} <in>{<d><a}. || Is {event.b} after {event.a}?"),
        "yes": ("{event.a} is <in>{<d><a}, {event.b} <in>{<d><b}. || Is {event.b} after {event.a}?",
                "{event.a} is <in>{<d><b}, {event.b} <in>{<d><a}. || Is {event.b} before {event.a}?"),
    }),
    *(Family(f"role_{name}", "pair_classification", "does a person give or receive?", _each("plain"), {
        "giver": tuple(f"{row} || {{person.a}}" for row in rows),
        "receiver": tuple(f"{row} || {{person.b}}" for row in rows),
    }) for name, rows in GIVEN.items()),
    *(Family(f"role_{name}_tags", "token_classification", "who gives what to whom", _each("plain"), {
        "": tuple(_tagged(row) for row in rows)
    }) for name, rows in GIVEN.items()),
    *(Family(f"tags_{name}", "token_classification", f"names, things: sentences on {name}", _each("plain"), {"": rows})
      for name, rows in TAGGED.items()),
    *(Family(f"tags_{name}_lower", "token_classification", f"sentences on {name} without capitals", _each("plain"),
             {"": rows}, lower=True)
      for name, rows in TAGGED.items()),
    Family("tense_<d>", "classification", "past, present or future, <d> verbs", {
        "regular": {"v": "verb"}, "irregular": {"v": "odd_verb"},
    }, {
        "future": ("{person} will {<v>} {thing} {place}.", "{person} is going to {<v>} {thing} {place}."),
        "past": ("{person} {<v>:1} {thing} {place}.", "{person} did not {<v>} {thing} {place}."),
        "present": ("{person} {<v>:2} {thing} {place}.", "{person} does not {<v>} {thing} {place}."),
    }),
    Family("aspect_verbs", "classification", "simple, progressive or perfect", _each("plain"), {
        "perfect": ("{person} has {odd_verb:4} {thing} {place}.", "{person} had {verb:4} {thing} {place}."),
        "progressive": ("{person} is {odd_verb:3} {thing} {place}.", "{person} was {verb:3} {thing} {place}."),
        "simple": ("{person} {odd_verb:1} {thing} {place}.", "{person} {verb:2} {thing} {place}."),
    }),
    Family("voice_verbs", "classification", "active or passive", _each("plain"), {
        "active": ("{person} {odd_verb:1} {thing} {place}.", "{person} was {verb:3} {thing} {time}."),
        "passive": ("{thing} was {odd_verb:4} {place}.", "{thing} was {verb:4} by {person} {time}."),
    }),
    Family("agreement_<d>", "classification", "is the verb's number right? (<d>)", {
        "adjacent": {"between": ""}, "attractor": {"between": " near {other}"},
        "relative": {"between": " that {other} liked"}, "with": {"between": " with {other}"},
    }, {
        "acceptable": tuple(f"The {{subject.a:{n}}}<between> {{act:{n}}} {{place}}." for n in "01"),
        "unacceptable": tuple(f"The {{subject.a:{n}}}<between> {{act:{m}}} {{place}}." for n, m in ("01", "10")),
    }),
    Family("reflexive_gender", "classification", "does the pronoun fit the name?", _each("plain"), {
        "acceptable": ("{woman} hurt herself {place} {time}.", "{man} hurt himself {place} {time}."),
        "unacceptable": ("{woman} hurt himself {place} {time}.", "{man} hurt herself {place} {time}."),
    }),
    Family("determiner_number", "classification", "does the determiner fit the noun?", _each("plain"), {
        "acceptable": ("{person} found this {noun} {place}.", "{person} found these {noun:1} {place}."),
        "unacceptable": ("{person} found these {noun} {place}.", "{person} found this {noun:1} {place}."),
    }),
    Family("entail_quantifier", "pair_classification", "all, some, no", _each("plain"), {
        "entailed": ("All {subject.a:1} {act.b:1} {place.c}. || Some {subject.a:1} {act.b:1} {place.c}.",
                     "No {subject.a} {act.b} {place.c}. || It is false that some {subject.a:1} {act.b:1} {place.c}."),
        "contradicted": ("All {subject.a:1} {act.b:1} {place.c}. || No {subject.a} {act.b} {place.c}.",
                         "Some {subject.a:1} {act.b:1} {place.c}. || No {subject.a} {act.b} {place.c}."),
        "open": ("Some {subject.a:1} {act.b:1} {place.c}. || All {subject.a:1} {act.b:1} {place.c}.",
                 "All {subject.a:1} {act.b:1} {place.c}. || Some {subject.d:1} {act.b:1} {place.c}."),
    }),
    Family("entail_conjunction", "pair_classification", "and, or", _each("plain"), {
        "entailed": ("{person.a} {doing.b} and {doing.c}. || {person.a} {doing.b}.",
                     "{person.a} {doing.b}. || {person.a} {doing.b} or {doing.c}."),
        "open": ("{person.a} {doing.b} or {doing.c}. || {person.a} {doing.b}.",
                 "{person.a} {doing.b}. || {person.a} {doing.b} and {doing.c}."),
    }),
    Family("entail_negation", "pair_classification", "a sentence and its denial", _each("plain"), {
        "contradicted": ("{person.a} {verb.b:1} {thing.c}. || {person.a} did not {verb.b} {thing.c}.",
                         "{person.a} never {verb.b:1} {thing.c}. || {person.a} {verb.b:1} {thing.c}."),
        "entailed": ("{person.a} did not {verb.b} {thing.c}. || It is not true that {person.a} {verb.b:1} {thing.c}.",
                     "It is true that {person.a} {verb.b:1} {thing.c}. || {person.a} {verb.b:1} {thing.c}."),
    }),
    Family("entail_kind_of", "pair_classification", "a thing and its kind", _each("plain"), {
        "entailed": ("{person.a} saw one {kind_of.b} {place.c}. || {person.a} saw one {kind_of.b:1} {place.c}.",),
        "open": ("{person.a} saw one {kind_of.b:1} {place.c}. || {person.a} saw one {kind_of.b} {place.c}.",),
    }),
    Family("entail_number", "pair_classification", "at least, at most", _each("plain"), {
        "entailed": ("{person.a} has {number<b} {noun.c:1}. || {person.a} has at least {number<a} {noun.c:1}.",
                     "{person.a} has {number<a} {noun.c:1}. || {person.a} has at most {number<b} {noun.c:1}."),
        "contradicted": ("{person.a} has {number<a} {noun.c:1}. || {person.a} has at least {number<b} {noun.c:1}.",
                         "{person.a} has {number<b} {noun.c:1}. || {person.a} has at most {number<a} {noun.c:1}."),
    }),
    Family("same_synonym", "pair_classification", "do two sentences mean the same? synonyms", _each("plain"), {
        "different": ("{person.a} is {synonym.b} {place.c}. || {person.a} is {synonym.d:1} {place.c}.",),
        "same": ("{person.a} is {synonym.b} {place.c}. || {person.a} is {synonym.b:1} {place.c}.",
                 "{person.a} is {synonym.b:1} {place.c}. || {person.a} is {synonym.b} {place.c}."),
    }),
    Family("same_voice", "pair_classification", "do two sentences mean the same? voice", _each("plain"), {
        "different": ("{person.a} {social.c:1} {person.b}. || {person.a} was {social.c:4} by {person.b}.",
                      "{person.a} was {social.c:4} by {person.b}. || {person.a} {social.c:1} {person.b}."),
        "same": ("{person.a} {social.c:1} {person.b}. || {person.b} was {social.c:4} by {person.a}.",
                 "{person.a} was {social.c:4} by {person.b}. || {person.b} {social.c:1} {person.a}."),
    }),
    Family("where_after_<d>", "pair_classification", "where is someone after <d> moves?", {
        "two": {"more": ""}, "three": {"more": " {person.b} went to the {room.y}."},
        "four": {"more": " {person.b} went to the {room.y}. {person.c} went to the {room.x}."},
    }, {room: (
        f"{{person.a}} went to the {{room.x}}.<more> {{person.a}} went to the {room}. || {{person.a}}",
        f"{{person.b}} went to the {{room.y}}. {{person.a}} went to the {room}.<more> || {{person.a}}",
    ) for room in ("attic", "cellar", "garden", "hall", "kitchen", "office")}),
    Family("mention_<d>", "classification", "is any <d> mentioned?", COUNTED, {
        "no": ("{person} bought [{<other>}; {object}] {place}.", "There was {<other>} and {object} {place} {time}."),
        "yes": ("{person} bought [{<d>}; {object}] {place}.", "There was {<d>} and {object} {place} {time}."),
    }),
    Family("speech_act", "classification", "statement, question or request", _each("plain"), {
        "question": ("did {person} {verb} {thing} {time}?", "who {odd_verb:1} {thing} {place}?"),
        "request": ("please {verb} {thing} {place}", "could you {odd_verb} {thing}, {person}?"),
        "statement": ("{person} {verb:1} {thing} {time}", "I wonder who {odd_verb:1} {thing} {place}"),
    }, lower=True),
    Family("formality", "classification", "formal or informal wording", _each("plain"), {
        "formal": ("I should be obliged if you could {verb} {thing}, {person}.", "{person}, kindly {verb} {thing}."),
        "informal": ("hey {person}, can you {verb} {thing}?", "{person}, go {verb} {thing} will ya"),
    }),
    *(Family(f"write_{name}", "generation", "rewrite: " + name.replace("_", " "), _each("plain"), {"": (row,)})
      for name, row in WRITTEN.items()),
)  # fmt: skip
