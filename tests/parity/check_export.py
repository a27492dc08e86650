"""What transformers makes of an exported folder: the other half of `retort-student generate --json`.

Loads a Hugging Face folder in f32, answers each prompt greedily and prints one JSON object a prompt, with the
same fields: id, prompt_token_ids, token_ids (without the token that ended the answer), text.

    python check_export.py --model DIR --prompts prompts.jsonl --max-new-tokens 32 > theirs.jsonl
    retort-student generate --model DIR --prompts prompts.jsonl --max-new-tokens 32 --dtype f32 --json > ours.jsonl
    python check_export.py --compare ours.jsonl theirs.jsonl

With --compare, exits with 1 and names the first prompt that differs.
"""

import argparse
import json
import sys


def rows(path):
    """(id, messages) of each line; a line without an id is called row-N, as retort calls it."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = json.loads(line)
                yield row.get("id") or f"row-{number}", row["messages"]


def generate(options):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for name, messages in rows(options.prompts):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(
                **prompt,
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                pad_token_id=tokenizer.pad_token_id or next(iter(ends), 0) or 0,
            )
        new = out[0, prompt["input_ids"].shape[1] :].tolist()
        if new and new[-1] in ends:
            new.pop()
        answer = {
            "id": name,
            "prompt_token_ids": prompt["input_ids"][0].tolist(),
            "token_ids": new,
            "text": tokenizer.decode(new, skip_special_tokens=True),
        }
        print(json.dumps(answer, ensure_ascii=False), flush=True)


def compare(ours, theirs):
    def read(path):
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]

    ours, theirs = read(ours), read(theirs)
    if len(ours) != len(theirs) or not ours:
        sys.exit(f"{len(ours)} answers against {len(theirs)}")
    for a, b in zip(ours, theirs):
        for field in ("id", "prompt_token_ids", "token_ids"):
            if a[field] != b[field]:
                sys.exit(f"prompt {a['id']!r}: {field} differs\n  retort:       {a[field]}\n  transformers: {b[field]}")
    print(f"{len(ours)} answers are the same, token by token")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--prompts", help="JSONL in OpenAI messages form")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--compare", nargs=2, metavar=("OURS", "THEIRS"))
    options = parser.parse_args()
    if options.compare:
        compare(*options.compare)
    elif options.model and options.prompts:
        generate(options)
    else:
        parser.error("give --model and --prompts, or --compare")


if __name__ == "__main__":
    main()
