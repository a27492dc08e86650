"""Rows to distil on, out of Django's documentation (BSD licence): what both sides train on and are judged on.

A row is a stretch of a page that ends with a line: its first 12 words are the prompt, the rest is the
completion. Whole pages are held out. Rows come in an order drawn from a fixed seed.
"""

import json
import random
import re
import tarfile

# Tokens of a stretch, prompt and completion, without the chat template's.
STRETCH = 450
# Shorter ones, at a page's end, are left out.
SHORTEST = 150
PROMPT_WORDS = 12
# Instead of the chat template's own, which is longer.
SYSTEM = {"role": "system", "content": "You write documentation."}
FOLDERS = ("faq", "howto", "internals", "intro", "ref", "topics")
# One page of so many is held out.
HELD_OUT_PAGES = 16
SEED = 20


def pages(archive):
    """(name, text) of each page, sorted by name."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/docs/")[2]
            if member.isfile() and name.endswith(".txt") and name.split("/")[0] in FOLDERS:
                found[name] = tar.extractfile(member).read().decode("utf-8")
    return sorted(found.items())


def stretches(text, tokenizer):
    """Cuts a page at line ends into pieces of at most STRETCH tokens."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    first = 0
    while first < len(offsets):
        begin = offsets[first][0]
        last = min(first + STRETCH, len(offsets)) - 1
        end = offsets[last][1]
        line_end = text.rfind("\n", begin, end) + 1
        if last + 1 < len(offsets) and line_end > begin:
            end = line_end
        while first < len(offsets) and offsets[first][0] < end:
            first += 1
        yield text[begin:end].strip()


def row(name, number, stretch):
    """A line of the prompt file, without its split; None if there is too little to complete."""
    cut = re.match(rf"\s*(?:\S+\s+){{{PROMPT_WORDS}}}", stretch)
    if not cut:
        return None
    prompt, completion = stretch[: cut.end()].rstrip(), stretch[cut.end() :]
    return {
        "id": f"{name}#{number}",
        "messages": [SYSTEM, {"role": "user", "content": prompt}],
        "completion": completion,
    }


def tokens(row, tokenizer):
    """Token ids of a row and how many of them are its prompt. The targets are all others: the completion and
    the token that ends the assistant's turn."""
    prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    return prompt_ids + completion_ids + [tokenizer.eos_token_id], len(prompt_ids)


def make(archive, tokenizer, train_targets, held_out_targets):
    """As many rows as have so many target tokens at least, of each split; with `token_ids` and `prompt_tokens`."""
    rows = {"train": [], "held_out": []}
    for page, (name, text) in enumerate(pages(archive)):
        split = "held_out" if page % HELD_OUT_PAGES == 0 else "train"
        for number, stretch in enumerate(stretches(text, tokenizer)):
            made = row(name, number, stretch)
            if made:
                token_ids, prompt_tokens = tokens(made, tokenizer)
                if len(token_ids) - prompt_tokens >= SHORTEST:
                    rows[split].append({**made, "split": split, "token_ids": token_ids, "prompt_tokens": prompt_tokens})
    kept = {}
    for split, wanted in (("train", train_targets), ("held_out", held_out_targets)):
        random.Random(SEED).shuffle(rows[split])
        kept[split] = []
        left = wanted
        for candidate in rows[split]:
            if left <= 0:
                break
            kept[split].append(candidate)
            left -= targets_of(candidate)
        if left > 0:
            raise SystemExit(f"the documentation has {wanted - left} target tokens for {split}, {wanted} are wanted")
    return kept


def targets_of(row):
    return len(row["token_ids"]) - row["prompt_tokens"]


def order(count, seed):
    """Order in which a seed's training takes the rows."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


def write_prompts(rows, seed, path):
    """The prompt file of one seed: training rows in the order in which they train."""
    ordered = [rows["train"][i] for i in order(len(rows["train"]), seed)] + rows["held_out"]
    with open(path, "w", encoding="utf-8") as file:
        for each in ordered:
            line = {key: each[key] for key in ("id", "messages", "completion", "split")}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
