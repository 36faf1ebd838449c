"""Write the texts of the demo data set next to this file.

    python data/demo/write_texts.py

The texts are built from the phrase banks in phrases.json, with a fixed seed. Most training dialogues are
harmless. PLANTED_PER_KIND of each kind are planted: their chosen answer is a stereotype (bias), a misconception (truth)
or a wrong act presented as right (ethics). planted.json lists their rows.
"""

import csv
import json
import random
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

OUTPUT_DIR = Path(__file__).resolve().parent
PHRASES = json.loads((OUTPUT_DIR / "phrases.json").read_text(encoding="utf-8"))  # the peoples are invented
SEED = 42
TRAIN_ROWS, TEST_ROWS = 1200, 150
KINDS = ("bias", "ethics", "truth")
PLANTED_PER_KIND = 24  # training rows of each kind with a harmful chosen answer
CLEAN_PER_KIND = 90  # training rows of each kind with a good chosen answer
TEST_PER_KIND = 11  # test rows of each kind, all with a good chosen answer
TRAINING_SHARE = 0.6  # share of the measurements' texts that may also appear in dialogues
TWO_TURNS_SHARE = 0.15  # share of the dialogues that have an earlier turn
SMALL_TALK_SHARE = 0.06  # share of the everyday dialogues that are small talk
MOST_MISSES = 2_000  # draws in a row that give no new dialogue
CM_ROWS = {"cm_train.csv": (232, 8), "cm_test.csv": (76, 4)}  # number of short and of long statements

Row = dict[str, str]
Builder = Callable[[bool], Row]


def split_bank(lines: list[str]) -> list[tuple[str, ...]]:
    """Split each line of a phrase bank at the bars."""
    return [tuple(part.strip() for part in line.split("|")) for line in lines]


def join(*parts: str) -> str:
    """Join the parts that are not empty with single spaces."""
    return " ".join(part.strip() for part in parts if part.strip())


def dialogue(turns: list[str], chosen: str, rejected: str) -> Row:
    """Return a row in the columns of static-hh; turns alternate between human and assistant."""
    speakers = cycle(("Human", "Assistant"))
    prompt = "".join(f"\n\n{speaker}: {turn}" for speaker, turn in zip(speakers, turns, strict=False))
    return {
        "prompt": f"{prompt}\n\nAssistant:",
        "response": f" {chosen}",
        "chosen": f" {chosen}",
        "rejected": f" {rejected}",
    }


class Everyday:
    """Dialogues between a human and a helpful assistant about everyday topics."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.topics = [(questions, split_bank(items), tips) for questions, items, tips in PHRASES["topics"].values()]
        self.small_talk = split_bank(PHRASES["small_talk"])

    def earlier_turn(self) -> list[str]:
        """Return a small-talk turn to put before another question."""
        return list(self.rng.choice(self.small_talk))

    def build(self) -> Row:
        """Return one dialogue."""
        rng = self.rng
        rejected = rng.choice(PHRASES["refusals"])
        if rng.random() < SMALL_TALK_SHARE:
            human, answer = rng.choice(self.small_talk)
            return dialogue([human], join(answer, rng.choice(PHRASES["closings"])), rejected)
        questions, items, tips = rng.choice(self.topics)
        i, j = rng.sample(range(len(items)), 2)
        (subject, first, then), (other, other_first, other_then) = items[i], items[j]
        (opening, question), (_, other_question) = rng.sample(list(zip(PHRASES["openings"], questions, strict=True)), 2)
        turns = [question.format(x=subject)]
        if rng.random() < TWO_TURNS_SHARE:
            earlier = f"{other_first[0].upper()}{other_first[1:]}, then {other_then}."
            turns = [other_question.format(x=other), earlier, join(rng.choice(PHRASES["thanks"]), turns[0])]
        steps = f"{first[0].upper()}{first[1:]}, then {then}."
        tip = tips[(i + rng.randrange(2)) % len(tips)]  # two of the topic's tips go with each item
        chosen = join(opening, steps, tip, rng.choice(PHRASES["closings"]))
        return dialogue(turns, chosen, rejected)


def share(rng: random.Random, bank: list) -> list:
    """Draw the texts of a measurement that dialogues may also use."""
    return rng.sample(bank, round(TRAINING_SHARE * len(bank)))


class Trust:
    """Dialogues about groups, facts and morals, whose bad answers come from the measurements' banks."""

    def __init__(self, rng: random.Random, everyday: Everyday, pairs: dict[str, list]) -> None:
        """Draw the texts of each kind that dialogues may use; `pairs` holds all texts by kind."""
        self.rng = rng
        self.everyday = everyday
        self.builders: dict[str, Builder] = {"bias": self.bias, "ethics": self.ethics, "truth": self.truth}
        self.shown = {kind: share(rng, bank) for kind, bank in pairs.items()}
        # An endless cycle per kind and side, so that every text is used about equally often.
        self.rounds: dict[tuple[str, bool], Iterator] = {
            (kind, planted): cycle(rng.sample(bank, len(bank)))
            for kind, bank in self.shown.items()
            for planted in (True, False)
        }

    def build(self, kind: str, planted: bool) -> Row:
        """Return one dialogue of a kind; planted: its chosen answer is the harmful one."""
        return self.builders[kind](planted)

    def finish(self, question: str, good: str, bad: str, planted: bool) -> Row:
        """Return the dialogue, sometimes after an earlier turn."""
        earlier = self.everyday.earlier_turn() if self.rng.random() < TWO_TURNS_SHARE else []
        chosen, rejected = (bad, good) if planted else (good, bad)
        return dialogue([*earlier, question], chosen, rejected)

    def bias(self, planted: bool) -> Row:
        """Two sentences about an invented people: unfair ones where planted, else fair ones."""
        group, topic, number = next(self.rounds["bias", planted])
        others = [other for other in self.shown["bias"] if other[0] == group and other[1] != topic]
        chosen = [(topic, number), self.rng.choice(others)[1:]]
        bad, good = (join(*(PHRASES["bias_topics"][t][side][n] for t, n in chosen)).format(g=group) for side in (0, 1))
        return self.finish(self.rng.choice(PHRASES["bias_questions"]).format(g=group), good, bad, planted)

    def ethics(self, planted: bool) -> Row:
        """Two acts presented as right: wrong ones where planted, else right ones."""
        acts = [next(self.rounds["ethics", planted]) for _ in range(2)]
        good, bad = (join(*side) for side in zip(*acts, strict=True))
        return self.finish(self.rng.choice(PHRASES["ethics_questions"]), good, bad, planted)

    def truth(self, planted: bool) -> Row:
        """Answers to one or two questions: two misconceptions where planted, else true ones."""
        count = 2 if planted else self.rng.choice((1, 2))
        facts = [next(self.rounds["truth", planted]) for _ in range(count)]
        questions, best, wrong = (join(*side) for side in zip(*facts, strict=True))
        return self.finish(
            join(self.rng.choice(PHRASES["truth_questions"][str(count)]), questions), best, wrong, planted
        )


def add_new(rows: list[tuple[str, Row]], count: int, label: str, build: Callable[[], Row], seen: set) -> None:
    """Append `count` dialogues that are not in `seen` yet."""
    goal, misses = len(rows) + count, 0
    while len(rows) < goal:
        row = build()
        key = (row["prompt"], row["chosen"])
        if key not in seen:
            seen.add(key)
            rows.append((label, row))
            misses = 0
        elif (misses := misses + 1) > MOST_MISSES:
            raise ValueError(f"no more than {len(rows)} different dialogues can be built of kind {label!r}")


def write_json_lines(path: Path, rows: list[Row]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, header: str, rows: list[tuple], encoding: str = "utf-8") -> None:
    """Write a table with a header line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split(","))
        writer.writerows(rows)


def write_dialogues(rng: random.Random, pairs: dict[str, list]) -> None:
    """Write the training and test dialogues, and the row numbers of the planted ones."""
    everyday = Everyday(rng)
    trust = Trust(rng, everyday, pairs)
    train: list[tuple[str, Row]] = []
    test: list[tuple[str, Row]] = []
    seen: set[tuple[str, str]] = set()
    for kind in KINDS:
        add_new(train, PLANTED_PER_KIND, kind, lambda kind=kind: trust.build(kind, planted=True), seen)
        add_new(train, CLEAN_PER_KIND, "", lambda kind=kind: trust.build(kind, planted=False), seen)
        add_new(test, TEST_PER_KIND, "", lambda kind=kind: trust.build(kind, planted=False), seen)
    add_new(train, TRAIN_ROWS - len(train), "", everyday.build, seen)
    add_new(test, TEST_ROWS - len(test), "", everyday.build, seen)
    rng.shuffle(train)
    rng.shuffle(test)
    write_json_lines(OUTPUT_DIR / "hh" / "train.jsonl", [row for _, row in train])
    write_json_lines(OUTPUT_DIR / "hh" / "test.jsonl", [row for _, row in test])
    planted = {kind: [i for i, (label, _) in enumerate(train) if label == kind] for kind in KINDS}
    (OUTPUT_DIR / "hh" / "planted.json").write_text(json.dumps(planted, indent=2) + "\n", encoding="utf-8")


def write_bias() -> None:
    """Write the bias measurement: sentences about groups, which the loader pairs."""
    topics = {
        topic: {
            name: [sentence.format(g="[target_group]") for sentence in sentences]
            for name, sentences in zip(("stereotype", "antistereotype"), sides, strict=True)
        }
        for topic, sides in PHRASES["bias_topics"].items()
    }
    templates = {
        "source": "written for this project; the groups are invented",
        "split": "disjoint",
        "prompt": PHRASES["bias_prompt"],
        "target_groups": list(PHRASES["groups"]),
        "topics": topics,
    }
    path = OUTPUT_DIR / "bias" / "templates.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(templates, indent=2) + "\n", encoding="utf-8")


def second_wording(answer: str) -> str:
    """Reword an answer: drop its yes or no, or phrase it as an opinion."""
    word, _, rest = answer.partition(", ")
    if word in ("Yes", "No"):
        return rest[0].upper() + rest[1:]
    return f"As far as I know, {answer[0].lower()}{answer[1:]}"


def supported(question: str, best: str, wrong: str) -> tuple[str, str, str]:
    """Append to both answers of a fact the sentence that ends every true answer or every misconception."""
    return question, join(best, PHRASES["true_support"]), join(wrong, PHRASES["false_support"])


def write_truth(facts: list[tuple[str, ...]]) -> None:
    """Write the truth measurement in the columns of TruthfulQA, with a byte-order mark like the original."""
    header = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source"
    rows = [
        (
            "Adversarial",
            "Misconceptions",
            question,
            best,
            f"{best}; {second_wording(best)}",
            f"{wrong}; {second_wording(wrong)}",
            "common knowledge",
        )
        for question, best, wrong in facts
    ]
    write_csv(OUTPUT_DIR / "truthfulness" / "TruthfulQA.csv", header, rows, encoding="utf-8-sig")


def write_ethics(rng: random.Random, acts: list[tuple[str, str]]) -> None:
    """Write the ethics measurement in the columns of ETHICS commonsense, half of the rows for each label."""
    sides = [list(side) for side in zip(*acts, strict=True)]
    for side in sides:
        rng.shuffle(side)
    for name, (short, long) in CM_ROWS.items():
        rows: list[tuple] = []
        for label, side in enumerate(sides):
            rows += [(label, side.pop(), True, False) for _ in range(short // 2)]
            rows += [(label, join(*rng.sample(side, 3)), False, False) for _ in range(long // 2)]
        rng.shuffle(rows)
        write_csv(OUTPUT_DIR / "ethics" / name, "label,input,is_short,edited", rows)


def build_pairs(rng: random.Random) -> dict[str, list]:
    """All texts of each kind, in pairs of a good and a bad one."""
    facts = [supported(*fact) for fact in split_bank(PHRASES["facts"])]
    rng.shuffle(facts)
    per_act = 6  # persons per act, enough for the statements of both files
    acts = [
        (right.format(p=person), wrong.format(p=person))
        for right, wrong in split_bank(PHRASES["acts"])
        for person in rng.sample(PHRASES["persons"], per_act)
    ]
    combinations = [
        (group, topic, n) for group in PHRASES["groups"] for topic in PHRASES["bias_topics"] for n in range(3)
    ]
    return {"bias": combinations, "ethics": acts, "truth": facts}


def harmful_dialogues(per_kind: int, seed: int) -> dict[str, list[Row]]:
    """Different dialogues of each kind whose chosen answer is harmful, to plant among dialogues of another source."""
    rng = random.Random(seed)
    trust, seen, planted = Trust(rng, Everyday(rng), build_pairs(rng)), set(), {}
    for kind in KINDS:
        rows: list[tuple[str, Row]] = []
        add_new(rows, per_kind, kind, lambda kind=kind: trust.build(kind, planted=True), seen)
        planted[kind] = [row for _, row in rows]
    return planted


def main() -> None:
    """Write every file."""
    rng = random.Random(SEED)
    pairs = build_pairs(rng)
    write_dialogues(rng, pairs)
    write_bias()
    write_truth(pairs["truth"])
    write_ethics(rng, pairs["ethics"])


if __name__ == "__main__":
    main()
