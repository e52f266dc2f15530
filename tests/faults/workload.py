"""What is asked while things break: short prompts with short answers of unequal lengths, all of them greedy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

SUBJECTS = (
    "cat", "river", "poet", "engine", "garden", "king", "planet", "cook", "bridge", "clock", "sailor",
    "forest", "teacher", "violin", "desert", "letter", "doctor", "island", "winter", "candle",
)  # fmt: skip
BEGINNINGS = (
    "The {} was",
    "Once upon a time there was a {} who",
    "Why is a {} called",
    "My favourite {} is the one that",
    "Question: what does a {} need most? Answer:",
    "A {} and a",
    "In the year 1900 every {} in the city",
    "Nobody believed what the {} had",
    "The opposite of a {} is",
    "If I were a {}, then",
    "List three words about a {}:",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a job."""

    #: Text, or token ids.
    prompt: str | tuple[int, ...]
    max_tokens: int


#: 220 questions; the name says which answer belongs to it.
SHORT: dict[str, Question] = {
    f"q{i:03}": Question(BEGINNINGS[i % len(BEGINNINGS)].format(SUBJECTS[i // len(BEGINNINGS)]), 1 + i * 7 % 4)
    for i in range(len(BEGINNINGS) * len(SUBJECTS))
}
#: Answers that take long, so that checkpoints are worth something.
LONG: dict[str, Question] = {
    f"long{i:02}": Question(f"{i}. A long story about a {SUBJECTS[i]}.", 100) for i in range(12)
}


def repeated(questions: dict[str, Question], times: int) -> dict[str, Question]:
    """As many lines more, each with an id of its own; `original` leads back to the question."""
    return {f"{name}x{turn}": question for turn in range(times) for name, question in questions.items()}


def original(custom_id: str) -> str:
    """The name of the question behind a line."""
    return custom_id.partition("x")[0]


def write(questions: dict[str, Question], file: Path, *, ignore_eos: bool = False) -> None:
    """As a job's prompts, in the short form."""
    lines = [
        {"custom_id": name, "prompt": question.prompt, "max_tokens": question.max_tokens, "temperature": 0}
        | ({"ignore_eos": True} if ignore_eos else {})
        for name, question in questions.items()
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
