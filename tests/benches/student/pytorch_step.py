"""A distillation step as a user would write it in PyTorch: all logits, log-softmax over the vocabulary, the
entries gathered, autograd, AdamW. Prints one JSON object, as retort's kd_step does.

usage: pytorch_step.py --vocab 49152 --batch 4 --length 512 --k 64 --steps 6 --threads 2 [--bf16]
"""

import argparse
import json
import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
for name in ["vocab", "batch", "length", "k", "steps", "threads"]:
    parser.add_argument(f"--{name}", type=int, required=True)
parser.add_argument("--bf16", action="store_true")
args = parser.parse_args()

torch.set_num_threads(args.threads)
torch.manual_seed(0)
shape = LlamaConfig(
    vocab_size=args.vocab,
    hidden_size=320,
    intermediate_size=864,
    num_hidden_layers=8,
    num_attention_heads=5,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=2048,
    rope_theta=1e5,
    tie_word_embeddings=True,
)
student = LlamaForCausalLM(shape)
optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.01)
places = (args.batch, args.length, args.k)

rates = []
for _ in range(args.steps):
    token_ids = torch.randint(args.vocab, places[:2])
    entries = torch.randint(args.vocab, places)
    teacher = torch.full(places, 1 / args.k)
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        logits = student(token_ids, use_cache=False).logits
    log_q = torch.log_softmax(logits.float(), dim=-1).gather(-1, entries)
    loss = (teacher * (teacher.log() - log_q)).sum(-1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    rates.append(token_ids.numel() / (time.perf_counter() - started))

# The first step warms memory up.
warm = sorted(rates[1:])
print(json.dumps({
    "tokens_per_s": warm[len(warm) // 2],
    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    "params_m": sum(parameter.numel() for parameter in student.parameters()) / 1e6,
    "version": f"torch {torch.__version__}",
}))
