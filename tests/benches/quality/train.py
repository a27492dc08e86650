"""The PyTorch side: a student of the teacher's layers, trained on the teacher's full distributions.

The recipe is that of retort's trainer, written the plain way: all logits, KL over the whole vocabulary, autograd,
torch's AdamW and clipping.
"""

import math
import os
import time

import torch

import teacher

# Rows that go through the student at once; their gradients add up to the step's.
MICRO_ROWS = 2
SAVE_EVERY = 20


def kept_layers(layers, keep):
    """The first seven tenths of the kept layers from the front, the others from the end."""
    front = (7 * keep + 5) // 10
    return [*range(front), *range(layers - (keep - front), layers)]


def prune(model, keep):
    """A model of `keep` of its layers, in place."""
    kept = [model.model.layers[i] for i in kept_layers(len(model.model.layers), keep)]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = keep
    return model


def learning_rate(recipe, step, steps):
    """A linear rise to the peak, then half a cosine down."""
    warmup = math.ceil(steps * recipe["warmup_ratio"])
    if step < warmup:
        return recipe["learning_rate"] * (step + 1) / warmup
    return recipe["learning_rate"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def optimizer(model, recipe):
    """AdamW; norms do not decay. The head is the embeddings."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    embeddings = model.get_input_embeddings().weight
    matrices = [p for p in parameters if p.dim() > 1 and p is not embeddings]
    groups = [
        {"params": [embeddings] if embeddings.requires_grad else [], "weight_decay": recipe["weight_decay"],
         "eps": recipe["adam_embedding_epsilon"]},
        {"params": matrices, "weight_decay": recipe["weight_decay"]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


def step_loss(student, head_vh, rows, hidden, positions):
    """KL(teacher || student) over the whole vocabulary, summed over the rows' targets, over `positions`."""
    logits_mv = torch.nn.functional.linear(teacher.target_hidden(student, rows), student.lm_head.weight)
    with torch.no_grad():
        teacher_mv = torch.nn.functional.linear(torch.cat(hidden), head_vh).log_softmax(-1)
    kl = torch.nn.functional.kl_div(logits_mv.log_softmax(-1), teacher_mv, reduction="sum", log_target=True)
    return kl / positions


def run(model_folder, rows, order, cache, recipe, folder, say):
    """Trains on `rows` in the given order and saves the student in `folder`/student; goes on from its last checkpoint.
    Answers the loss of every step, nats a target."""
    whole = teacher.load(model_folder)
    head_vh = whole.lm_head.weight.detach().clone()
    student = prune(whole, recipe["layers"])
    if recipe["freeze_embeddings"]:
        student.lm_head.weight.requires_grad_(False)
        student.model.embed_tokens.weight.requires_grad_(False)
    adamw = optimizer(student, recipe)
    width = recipe["batch_rows"]
    steps = math.ceil(len(order) / width)
    checkpoint = os.path.join(folder, "checkpoint.pt")
    os.makedirs(folder, exist_ok=True)
    losses = []
    if os.path.exists(checkpoint):
        saved = torch.load(checkpoint)
        student.load_state_dict(saved["student"])
        adamw.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
    for step in range(len(losses), steps):
        started = time.perf_counter()
        numbers = sorted(order[step * width : (step + 1) * width], key=lambda i: -len(rows[i]["token_ids"]))
        positions = sum(teacher.targets(rows[i]) for i in numbers)
        loss = 0.0
        for start in range(0, len(numbers), MICRO_ROWS):
            micro = numbers[start : start + MICRO_ROWS]
            part = step_loss(student, head_vh, [rows[i] for i in micro], [cache.of(i) for i in micro], positions)
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), recipe["clip_norm"]).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise SystemExit(f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}")
        for group in adamw.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss)
        rate = positions / (time.perf_counter() - started)
        say(f"pytorch: step {step + 1} of {steps}, loss {loss:.4f}, norm {norm:.3f}, {rate:.0f} targets/s")
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
            state = {"student": student.state_dict(), "optimizer": adamw.state_dict(), "losses": losses}
            torch.save(state, checkpoint + ".part")
            os.replace(checkpoint + ".part", checkpoint)
    student.save_pretrained(os.path.join(folder, "student"))
    if os.path.exists(checkpoint):
        os.remove(checkpoint)
    return losses


@torch.no_grad()
def judge(student, head_vh, rows, cache):
    """Mean KL(teacher || student) in nats and top-1 agreement, over all targets of the rows, whole distributions."""
    student.eval()
    kl, agreed, count = 0.0, 0, 0
    for number, row in enumerate(rows):
        logits_mv = torch.nn.functional.linear(teacher.target_hidden(student, [row]), student.lm_head.weight)
        teacher_mv = torch.nn.functional.linear(cache.of(number), head_vh).log_softmax(-1)
        each_m = (teacher_mv.exp() * (teacher_mv - logits_mv.log_softmax(-1))).sum(-1)
        kl += each_m.double().sum().item()
        agreed += (teacher_mv.argmax(-1) == logits_mv.argmax(-1)).sum().item()
        count += teacher.targets(row)
    return {"kl": kl / count, "top1_agreement": agreed / count, "tokens": count}
