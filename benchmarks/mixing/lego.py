"""LEGO, the synthetic task of Skill-It: a chain of variables, of which one is asked for (Zhang et al. 2022, arXiv
2206.04301; the skills are those of arXiv 2307.14430, section 2.2).

    a = 1, b = not a, c = b, the clauses in any order:      c=b a=1 b=-a c?      answer 0
    skill_1    asks for a, which is given
    skill_2    asks for b: one step
    skill_3    asks for c: two steps, b first

A document of every skill is a whole chain of `links` variables; only the one asked for differs. A record is
`{"chain", "answer"}`: a source of the scheduler puts the chain before the answer as `prompt`, so that the loss is that
of the answer. A clause is one token of the tokenizer written beside them, so every document has `tokens(links)`: a
small model on a CPU would spend its run on learning to read clauses of five.

    write_lego(Path("lego"), links=3, documents=1000, held_out=100, seed=0)
    lego/skill_1/train.jsonl  lego/skill_1/held_out.jsonl  …  lego/tokenizer.json
"""

import json
import math
import random
import string
from pathlib import Path
from typing import NamedTuple

LETTERS = string.ascii_lowercase[:5]
"""Names of variables: few, so that a small model soon knows them; they make 46,080 chains of four."""


class Document(NamedTuple):
    """One chain and the value of the variable asked for."""

    chain: str
    answer: str


def skills(links: int) -> list[str]:
    """Names of the sources: skill_1 asks for the first variable of the chain, skill_2 for the second."""
    return [f"skill_{number}" for number in range(1, links + 1)]


def tokens(links: int) -> int:
    """Tokens of every document: the clauses, the variable asked for, the answer."""
    return links + 2


def number_of_documents(links: int) -> int:
    """Documents there are of each skill: names in their order, values, orders of the clauses."""
    return math.perm(len(LETTERS), links) * 2**links * math.factorial(links)


def make_document(links: int, skill: int, draw: random.Random) -> Document:
    """A chain of `links` variables of which the `skill`-th is asked for, 1 the first."""
    names = draw.sample(LETTERS, links)
    values = [draw.randrange(2) for _ in names]
    clauses = [f"{names[0]}={values[0]}"]
    for place in range(1, links):
        sign = "" if values[place] == values[place - 1] else "-"
        clauses.append(f"{names[place]}={sign}{names[place - 1]}")
    draw.shuffle(clauses)
    return Document(f"{' '.join(clauses)} {names[skill - 1]}?", str(values[skill - 1]))


def write_lego(out: Path, links: int, documents: int, held_out: int, seed: int) -> None:
    """Write a source of each skill with `documents` to train on and `held_out` others, no two alike, and the tokenizer.

    The same arguments give the same bytes. Raises ValueError when there are not as many documents.
    """
    if documents + held_out > number_of_documents(links):
        raise ValueError(f"there are {number_of_documents(links):,} chains of {links}, {documents + held_out:,} asked")
    for skill, name in enumerate(skills(links), 1):
        draw, seen = random.Random(f"lego {seed} {name}"), dict[Document, None]()
        while len(seen) < documents + held_out:
            seen[make_document(links, skill, draw)] = None
        lines = [json.dumps(document._asdict()) + "\n" for document in seen]
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "held_out.jsonl").write_text("".join(lines[:held_out]))
        (folder / "train.jsonl").write_text("".join(lines[held_out:]))
    _write_tokenizer(out / "tokenizer.json")


def _write_tokenizer(path: Path) -> None:
    """Words as tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    clauses = [f"{x}={sign}{y}" for x in LETTERS for sign in ("", "-") for y in LETTERS if x != y]
    words = ["<unknown>", "0", "1", *(f"{x}={value}" for x in LETTERS for value in (0, 1)), *clauses]
    words += [f"{x}?" for x in LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
