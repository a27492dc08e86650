"""Teacher's work through Hugging Face transformers, as one writes it with its API.

usage: with_transformers.py MODEL float32|bfloat16 THREADS
"""

from answers import serve


def load(folder, dtype, threads):
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def score(request):
        logits_btv = model(torch.tensor(request["token_ids"]), use_cache=False).logits
        logprobs_btk, ids_btk = torch.log_softmax(logits_btv.float(), -1).topk(request["head"], -1)
        return ids_btk.shape[0] * ids_btk.shape[1]

    @torch.inference_mode()
    def generate(request):
        ids_bt, new = torch.tensor(request["token_ids"]), request["new_tokens"]
        written_bt = model.generate(
            ids_bt, attention_mask=torch.ones_like(ids_bt), do_sample=False, min_new_tokens=new, max_new_tokens=new,
        )  # fmt: skip
        if written_bt.shape[1] != ids_bt.shape[1] + new:
            raise ValueError(f"{written_bt.shape[1] - ids_bt.shape[1]} tokens a stream, {new} were asked for")
        return written_bt.shape[0] * new

    about = {
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    return about, {"score": score, "generate": generate}


if __name__ == "__main__":
    serve(load)
