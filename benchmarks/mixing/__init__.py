"""Whether a mixing policy helps: small trainings on a CPU, by the trainer that everybody uses.

| file | has |
|---|---|
| `lego.py` | the LEGO synthetic: chains of variables, a source for each skill |
| `skill_it.py` | Skill-It beside random, stratified, curriculum and anti-curriculum on it |
| `sources.py` | real and generated text, eight sources of unequal difficulty |
| `real_text.py` | the policies at equal tokens on them, with random and reversed shares as controls |
| `experiment.py` | arms, learning rates, seeds: which run comes next, and what is kept of those that ended |
| `training.py` | one run of the trainer |
| `report.py` | tables and pictures, from the result files alone |

An arm's learning rate is tuned on a seed of its own, then all arms run with the same seeds. Every run that ends is a
line of `<work>/runs.jsonl`; the same command goes on where it was stopped.
"""
