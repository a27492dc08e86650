"""What others make of an exported GGUF file: the gguf package, which llama.cpp's own converter writes with, and
transformers.

    retort model export DIR --format gguf --type q8_0 --out model.gguf
    python check_gguf.py --model DIR --gguf model.gguf --type q8_0

compares names, shapes and bytes of every tensor with what the gguf package makes of the folder's weights, the metadata
with config.json, and in transformers the logits and the tokens of a few texts. Prints the figures as JSON; exits with 1
and says what differs.

    python check_gguf.py --make qwen2 --tokenizer DIR --model OUT

writes a small folder of random weights to export: qwen2, or llama3 (grouped queries, scaled rotary frequencies, an
untied head).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

TEXTS = [
    "Where is my parcel? I ordered it on 2024-03-15.",
    "Name a colour: \u00e9, \u65e5\u672c, \U0001f600\n\n  and   spaces\tand 12345.",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\r\n    return x ** 2  # it's",
]
# Largest mean KL(folder || file) over the positions of the texts, nats.
MOST_KL = {"f32": 1e-8, "f16": 1e-4, "bf16": 1e-3, "q8_0": 1e-2}


def check(condition, message):
    if not condition:
        sys.exit(message)


def interleave(weights, heads):
    """Rows of each head's two rotary halves, one of each in turn, as llama.cpp's converter has them."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def check_file(options, config):
    import gguf
    import numpy
    import torch
    from safetensors import safe_open

    wanted = getattr(gguf.GGMLQuantizationType, options.type.upper())
    reader = gguf.GGUFReader(options.gguf)

    def field(key):
        return reader.fields[key].contents()

    llama = config["architectures"][0] != "Qwen2ForCausalLM"
    arch = "llama" if llama else "qwen2"
    scaling = config.get("rope_scaling") or {}
    rope = config.get("rope_parameters") or {}
    expected = {
        "general.architecture": arch,
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm" if llama else "qwen2",
        "general.file_type": int(getattr(gguf.LlamaFileType, {
            "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[options.type])),
    }
    for key, value in expected.items():
        check(field(key) == value, f"{key} is {field(key)!r}, not {value!r}")
    theta = config.get("rope_theta") or rope["rope_theta"]
    check(abs(field(f"{arch}.rope.freq_base") / theta - 1) < 1e-6, "rope.freq_base differs")
    check(len(field("tokenizer.ggml.tokens")) == config["vocab_size"], "the number of tokens differs")

    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA if llama else gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    held = {tensor.name: tensor for tensor in reader.tensors}
    worst = 0.0
    with safe_open(Path(options.model) / "model.safetensors", "pt") as weights:
        for name in weights.keys():
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            check(theirs in held, f"tensor {theirs} ({name}) is missing")
            tensor = held.pop(theirs)
            values = weights.get_tensor(name).to(torch.float32).numpy()
            if llama and ".q_proj." in name:
                values = interleave(values, config["num_attention_heads"])
            if llama and ".k_proj." in name:
                values = interleave(values, config["num_key_value_heads"])
            check(list(reversed(tensor.shape.tolist())) == list(values.shape), f"{theirs} has shape {tensor.shape}")
            kind = wanted if values.ndim > 1 else gguf.GGMLQuantizationType.F32
            if kind == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
                kind = gguf.GGMLQuantizationType.F16
            check(tensor.tensor_type == kind, f"{theirs} is {tensor.tensor_type.name}, not {kind.name}")
            made = gguf.quants.quantize(values, kind)
            check(made.tobytes() == tensor.data.tobytes(), f"{theirs} is not what the gguf package makes of {name}")
            back = gguf.quants.dequantize(tensor.data, kind).reshape(values.shape)
            worst = max(worst, float(numpy.abs(back - values).max() / max(numpy.abs(values).max(), 1e-30)))
    if scaling.get("rope_type") == "llama3" or rope.get("rope_type") == "llama3":
        divisors = held.pop("rope_freqs.weight").data
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(options.model), "cpu")
        plain = theta ** -(numpy.arange(len(divisors)) / len(divisors))
        check(numpy.allclose(plain / scaled.numpy(), divisors, rtol=1e-4), "rope_freqs.weight differs")
    check(not held, f"tensors that the folder has not: {', '.join(held)}")
    return {"tensors": len(reader.tensors), "largest_error": worst}


def check_transformers(options):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(options.gguf)
    ours, theirs = (AutoTokenizer.from_pretrained(options.model),
                    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))
    for text in TEXTS:
        one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (ours, theirs))
        check(one == other, f"tokens of {text!r} differ:\n  folder: {one}\n  file:   {other}")
    messages = [{"role": "user", "content": "Hi"}]
    chats = [t.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) for t in (ours, theirs)]
    check(chats[0] == chats[1], f"the chat templates differ: {chats}")
    for role in ("bos_token_id", "eos_token_id"):
        check(getattr(ours, role) == getattr(theirs, role), f"{role} differs")
    folder = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    file = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    if getattr(folder.config, "rope_parameters", None) and folder.config.rope_parameters.get("rope_type") == "llama3":
        # transformers leaves rope_freqs.weight unread, which is compared above; llama.cpp reads it.
        file.model.rotary_emb = folder.model.rotary_emb
    total, positions, agreed, worst = 0.0, 0, 0, 0.0
    with torch.no_grad():
        for text in TEXTS:
            ids = ours(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            logits, others = folder(ids).logits[0], file(ids).logits[0]
            worst = max(worst, float((logits - others).abs().max()))
            one, other = logits.log_softmax(-1).double(), others.log_softmax(-1).double()
            total += float((one.exp() * (one - other)).sum())
            agreed += int((logits.argmax(-1) == others.argmax(-1)).sum())
            positions += len(logits)
    kl = total / positions
    figures = {"positions": positions, "kl": kl, "top1_agreement": agreed / positions, "largest_logit_error": worst}
    check(kl <= MOST_KL[options.type], f"the logits differ: {figures}")
    return figures


def make(options):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(7)
    tokenizer = Path(options.tokenizer)
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    shape = {"hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 3, "num_attention_heads": 6,
             "num_key_value_heads": 2, "vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2,
             "initializer_range": 0.3}
    if options.make == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    else:
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 1024, "rope_theta": 10000.0}
        model = LlamaForCausalLM(LlamaConfig(**shape, head_dim=16, rope_parameters=scaling, tie_word_embeddings=False))
    model.save_pretrained(options.model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, Path(options.model) / name)
    if options.make == "qwen2":
        # transformers takes the cut of a file from its architecture, so the folder's must be that one.
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

        path = Path(options.model) / "tokenizer.json"
        described = json.loads(path.read_text())
        described["normalizer"] = {"type": "NFC"}
        described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ]}
        path.write_text(json.dumps(described))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--gguf", help="what was exported of it")
    parser.add_argument("--type", choices=sorted(MOST_KL))
    parser.add_argument("--make", choices=["qwen2", "llama3"])
    parser.add_argument("--tokenizer", help="the folder whose tokenizer --make takes")
    options = parser.parse_args()
    if options.make:
        make(options)
    elif options.gguf and options.type:
        config = json.loads((Path(options.model) / "config.json").read_text())
        print(json.dumps({**check_file(options, config), **check_transformers(options)}))
    else:
        parser.error("give --gguf and --type, or --make")


if __name__ == "__main__":
    main()
