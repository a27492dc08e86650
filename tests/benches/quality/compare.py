"""retort's job beside the same training in PyTorch with the teacher's full distributions, seed by seed.

    python compare.py --home DIR --retort BIN/retort --model TEACHER --archive django.tar.gz

A seed draws the order of the rows, and on retort's side the samples of the soft targets. Both sides start with the
same layers of the teacher and train on the same tokens in the same steps. One evaluator, in PyTorch, judges both
students on whole distributions. What is done is kept in --home: a comparison that was stopped goes on.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import teacher
import texts
import train

SETTINGS = {
    "threshold 0.025": {"codec": "threshold", "threshold": 0.025},
    "threshold 0.005": {"codec": "threshold", "threshold": 0.005},
    "threshold 0.001": {"codec": "threshold", "threshold": 0.001},
    "head_draws 32, 16": {"codec": "head_draws", "head": 32, "draws": 16},
    "full": {"codec": "full"},
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--home", required=True, help="folder of all that is made")
    parser.add_argument("--retort", required=True, help="the program, with its others beside it")
    parser.add_argument("--model", required=True, help="the teacher's Hugging Face folder")
    parser.add_argument("--archive", required=True, help="Django's source archive")
    parser.add_argument("--tokens", type=int, default=300_000, help="target tokens to train on")
    parser.add_argument("--held-out", type=int, default=20_000, help="target tokens to judge on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--soft-targets", nargs="+", choices=SETTINGS, default=["threshold 0.025"])
    parser.add_argument("--freeze-embeddings", action="store_true")
    parser.add_argument("--batch-rows", type=int, default=4, help="rows of a step: fewer, of few tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the highest")
    parser.add_argument("--embedding-epsilon", type=float, default=1e-6,
                        help="AdamW's epsilon for the embeddings and the head, on both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=["retort", "pytorch"], help="one side's trainings; without it both, and the table")
    parser.add_argument("--checkpoint-steps", type=int, default=50, help="retort: steps between checkpoints")
    return parser.parse_args()


def say(text):
    print(text, file=sys.stderr, flush=True)


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


class Comparison:
    def __init__(self, options):
        self.options = options
        self.recipe = {
            "layers": 10,
            "batch_rows": options.batch_rows,
            "learning_rate": options.learning_rate,
            "warmup_ratio": 0.05,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "freeze_embeddings": options.freeze_embeddings,
            "adam_embedding_epsilon": options.embedding_epsilon,
        }
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.rows = texts.make(options.archive, tokenizer, options.tokens, options.held_out)
        # What is kept of the teacher belongs to these rows; what is trained, to the recipe too.
        shared = os.path.join(options.home, digest([self.rows, os.path.realpath(options.model)]))
        self.caches = {split: teacher.Cache(os.path.join(shared, split), rows) for split, rows in self.rows.items()}
        self.store = os.path.join(shared, "retort")
        self.home = os.path.join(shared, digest(self.recipe))
        os.makedirs(self.home, exist_ok=True)
        counts = {split: sum(map(teacher.targets, rows)) for split, rows in self.rows.items()}
        self.train_targets, self.held_out_targets = counts["train"], counts["held_out"]
        say(f"{len(self.rows['train'])} rows of {self.train_targets} targets to train on, "
            f"{len(self.rows['held_out'])} of {self.held_out_targets} held out, in {self.home}")

    def kept(self, name, make):
        """The JSON of this name, made once."""
        path = os.path.join(self.home, name)
        if not os.path.exists(path):
            made = make()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path + ".part", "w") as file:
                json.dump(made, file, indent=1)
            os.replace(path + ".part", path)
        with open(path) as file:
            return json.load(file)

    def fill_caches(self):
        model = teacher.load(self.options.model)
        for cache in self.caches.values():
            cache.fill(model, say)

    def judged(self, student):
        head_vh = teacher.load(self.options.model).lm_head.weight.detach()
        return train.judge(student, head_vh, self.rows["held_out"], self.caches["held_out"])

    def before(self):
        return self.kept("before.json", lambda: self.judged(
            train.prune(teacher.load(self.options.model), self.recipe["layers"])))

    def judged_once(self, folder):
        """What the evaluator says of the student that a training left in the folder."""
        return self.kept(f"{folder}/judged.json", lambda: self.judged(
            teacher.load(os.path.join(self.home, folder, "student"))))

    def pytorch(self, seed):
        """The folder of the training, and the losses of its steps."""
        name = f"pytorch-seed-{seed}"
        order = texts.order(len(self.rows["train"]), seed)
        return name, self.kept(f"{name}/losses.json", lambda: train.run(
            self.options.model, self.rows["train"], order, self.caches["train"], self.recipe,
            os.path.join(self.home, name), say))

    def retort(self, seed, setting):
        """The folder of the job, and its report."""
        name = f"{setting.translate(str.maketrans(' ._', '---', ','))}-seed-{seed}"
        folder = os.path.join(self.home, name)

        def make():
            os.makedirs(folder, exist_ok=True)
            texts.write_prompts(self.rows, seed, os.path.join(folder, "prompts.jsonl"))
            with open(os.path.join(folder, "job.yaml"), "w") as file:
                # JSON is YAML.
                json.dump(self.spec(name, seed, setting), file, indent=1)
            return self.run_job(folder)["report"]

        report = self.kept(f"{name}/report.json", make)
        # Each side tokenizes for itself; the rows are the same only if both have as many targets.
        counted = (report["target_tokens"] - report["after"]["tokens"], report["after"]["tokens"])
        if counted != (self.train_targets, self.held_out_targets):
            raise SystemExit(f"retort counts {counted} targets, PyTorch {self.train_targets, self.held_out_targets}")
        return name, report

    def spec(self, name, seed, setting):
        recipe = {key: value for key, value in self.recipe.items() if key != "layers"}
        return {
            "name": name,
            "seed": seed,
            "prompts": {"path": "prompts.jsonl", "shard_rows": 2 if setting == "full" else 16},
            "teacher": {
                "model": os.path.realpath(self.options.model),
                "mode": "score",
                "soft_targets": SETTINGS[setting],
            },
            "student": {"init": {"prune": {"layers": self.recipe["layers"]}}},
            "train": {
                **recipe,
                "passes": 1,
                "checkpoint_steps": self.options.checkpoint_steps,
                # PyTorch's side has none.
                "guard": {"norm_ratio": 0, "loss_ratio": 0},
            },
        }

    def run_job(self, folder):
        command = [self.options.retort, "run", os.path.join(folder, "job.yaml"), "--json", "--dtype", "f32",
                   "--home", self.store, "--out", os.path.join(folder, "student")]
        environment = {**os.environ, "RETORT_THREADS": str(self.options.threads)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stdout:
                said = json.loads(line)
                if said["type"] == "result":
                    job = said["job"]
                elif said["type"] == "event" and said["event"]:
                    say(f"retort: {json.dumps(said['event'])}")
        if process.returncode != 0:
            raise SystemExit(f"retort run ended with {process.returncode}")
        return job


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    # Of pages longer than the context, and of every model that is loaded.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    comparison = Comparison(options)
    if options.only != "retort":
        comparison.fill_caches()
    if options.only != "pytorch":
        jobs = {(seed, setting): comparison.retort(seed, setting)
                for seed in options.seeds for setting in options.soft_targets}
    if options.only != "retort":
        trainings = {seed: comparison.pytorch(seed) for seed in options.seeds}
    if options.only:
        return
    before = comparison.before()["kl"]
    print(f"| soft targets | seed | before | PyTorch, full logits | retort | ratio | bytes a token |\n|{'---|' * 7}")
    for (seed, setting), (folder, report) in jobs.items():
        ours, theirs = (comparison.judged_once(of)["kl"] for of in (folder, trainings[seed][0]))
        print(f"| {setting} | {seed} | {before:.4f} | {theirs:.4f} | {ours:.4f} | {ours / theirs:.4f} "
              f"| {report['bytes_per_token']:.1f} |")


if __name__ == "__main__":
    main()
