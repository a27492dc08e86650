"""What PEFT makes of a student's adapters: its logits, before and after it merges them, are retort's.

    python check_adapter.py --base DIR --adapter DIR --merged DIR --ours FILE

BASE is the student before training, ADAPTER its adapters, MERGED the folder that retort exported, FILE a safetensors
file with token ids `ids` [b, t] and retort's `logits` [b, t, v] on them, f32. Exits with 1 and says what differs.
"""

import argparse
import sys

# Of the largest number: both sides round sums of f32 products in their own order.
TOLERANCE = 1e-4


def check(what, ours, theirs):
    largest = theirs.abs().max().item()
    apart = (ours - theirs).abs().max().item()
    print(f"{what}: {apart:.2e} apart, the largest is {largest:.2e}")
    if not apart <= TOLERANCE * largest:
        sys.exit(f"{what} differs")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--base", "--adapter", "--merged", "--ours"):
        parser.add_argument(option, required=True)
    options = parser.parse_args()

    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    ours = load_file(options.ours)
    with torch.no_grad():
        plain = load(options.base)
        before = plain(ours["ids"]).logits
        if (before - ours["logits"]).abs().max() < 0.01:
            sys.exit("the adapters change nothing, so nothing was compared")
        model = PeftModel.from_pretrained(plain, options.adapter)
        check("logits with adapters", ours["logits"], model(ours["ids"]).logits)
        theirs = model.merge_and_unload()
        check("logits merged by PEFT", ours["logits"], theirs(ours["ids"]).logits)
        merged = load(options.merged)
        check("logits of the exported folder", ours["logits"], merged(ours["ids"]).logits)
        theirs = theirs.state_dict()
        for name, weight in merged.state_dict().items():
            apart = (weight - theirs[name]).abs().max().item()
            if not apart <= TOLERANCE * theirs[name].abs().max().item():
                sys.exit(f"{name}: merged weights {apart:.2e} apart")


if __name__ == "__main__":
    main()
