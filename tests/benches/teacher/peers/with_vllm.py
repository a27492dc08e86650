"""Teacher's work through vLLM's own Python API, on its CPU build, with the settings that are its fastest here.

usage: with_vllm.py MODEL float32|bfloat16 THREADS
"""

import os

from answers import serve

# Room for 64 streams of 136 tokens and 8 prompts of 512, with as much to spare; in GiB.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
# One process: the engine's own loop, no messages between two.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def load(folder, dtype, threads):
    # Without it, vLLM keeps a core for itself.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    import torch
    import vllm

    engine = vllm.LLM(
        folder, dtype=dtype, max_model_len=1024, max_num_seqs=64, max_logprobs=128, enable_prefix_caching=False,
        disable_log_stats=True,
    )  # fmt: skip

    def run(request, **how):
        # Nobody reads the text here, and turning ids to text costs time for every one of the likeliest.
        how = vllm.SamplingParams(temperature=0, detokenize=False, flat_logprobs=True, **how)
        prompts = [{"prompt_token_ids": ids} for ids in request["token_ids"]]
        return engine.generate(prompts, how, use_tqdm=False)

    def score(request):
        kept = [output.prompt_logprobs for output in run(request, max_tokens=1, prompt_logprobs=request["head"])]
        # The first token of a prompt has no distribution.
        return sum(end > start for of in kept for start, end in zip(of.start_indices, of.end_indices))

    def generate(request):
        new = request["new_tokens"]
        outputs = run(request, max_tokens=new, min_tokens=new, logprobs=request["head"] or None)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    about = {
        "version": f"vLLM {vllm.__version__}, torch {torch.__version__}",
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    return about, {"score": score, "generate": generate}


if __name__ == "__main__":
    serve(load)
