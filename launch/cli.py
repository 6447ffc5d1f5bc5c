"""The `herd` command: one verb a module in launch/, imported only when it is called, so that --help stays fast."""

from __future__ import annotations

import importlib
import sys

import click

from data_prep.errors import UserError

# verb -> (module that defines a click command named `command`, one line of help)
VERBS = {
    "train": ("launch.train", "Train a recipe: herd train tiny_cpu --processes 4 train.steps=20"),
    "preview": (
        "launch.preview",
        "What the model will see of conversations: herd preview smollm2_chat data.train=chats.json",
    ),
    "sweep": (
        "launch.sweep",
        "A run for each combination of values, compared: herd sweep smollm2_chat lora.rank=8,16 optimizer.lr=1e-5,1e-4",
    ),
    "plan": (
        "launch.plan",
        "Does it fit, how long does it take, what is best: herd plan llama3.1_8b_trn2 --nodes 4 --node-type trn2.48xlarge",
    ),
    "compile": ("launch.compile", "Compile a recipe's graphs ahead of its run: herd compile tiny_cpu --processes 4"),
    "prep": (
        "launch.prep",
        "Text in, token files out: herd prep tokenize corpus.jsonl.gz --tokenizer tokenizer.model --output data/corpus",
    ),
    "export": ("launch.export", "Checkpoint to a Hugging Face directory: herd export runs/tiny --to exported"),
    "merge": ("launch.merge", "Fold an adapter into its base: herd merge SmolLM2-135M runs/lora --to merged"),
    "chat": ("launch.chat", 'Talk with a model: herd chat merged, or herd chat merged "What is a llama?"'),
    "generate": ("launch.generate", 'Continue a prompt: herd generate exported "Once upon a time"'),
    "submit": ("launch.submit", "Check a recipe and submit it to Slurm: herd submit ./llama_7b.sh --nodes 4"),
    "status": ("launch.status", "How runs stand, in words: herd status, or herd status runs/llama2_7b_gpu"),
    "tail": ("launch.tail", "Follow what a node of a run prints: herd tail runs/llama2_7b_gpu --node 1"),
    "stop": ("launch.stop", "A run saves and ends: herd stop runs/llama2_7b_gpu"),
    "resume": (
        "launch.resume",
        "Submit a run again, on other nodes if asked: herd resume runs/llama2_7b_gpu --nodes 8",
    ),
    "doctor": (
        "launch.doctor",
        "What this machine or allocation is, and is it fit: herd doctor, or herd doctor --nodes 4",
    ),
    "lab": ("launch.lab", "A real Slurm of virtual nodes on this machine, to try sbatch at home: herd lab up"),
    "compare": (
        "launch.compare",
        "Whether runs are equal by their curves, and which faults that shows: herd compare runs/gpu runs/trn",
    ),
    "parity": (
        "launch.parity",
        "Train a pair of recipes and compare them: herd parity tiny_cpu --reference fp32.yaml --candidate bf16.yaml",
    ),
    "plot": ("launch.plot", "Draw loss curves of runs: herd plot runs/a runs/b --to curves.png"),
}


class Verbs(click.Group):
    """Loads a verb's module when it is used; suggests a near name when it does not exist."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(VERBS[name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS:
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, 1)
            hint = f"did you mean {near[0]}?" if near else "herd --help lists the verbs"
            raise click.UsageError(f"no verb {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
def herd() -> None:
    """Train Llama models: raw text in, Hugging Face checkpoint out; on Trainium, GPU or any CPU."""


def main() -> None:
    """Run the command; a UserError becomes one line and its exit code."""
    try:
        herd(standalone_mode=True)
    except UserError as error:
        click.echo(f"herd: {error}", err=True)
        sys.exit(error.code)
    except BrokenPipeError:  # `herd ... | head`
        sys.exit(1)


if __name__ == "__main__":
    main()
