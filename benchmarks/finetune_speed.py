"""Fine-tuning speed and memory: ours, packed, against TRL's SFTTrainer, padded and packed, in one run.

    pip install --no-deps --target FOLDER trl datasets dill multiprocess pandas    # peft, accelerate: as for the tests
    python benchmarks/finetune_speed.py --extra FOLDER --data alpaca.json          # CPU: SmolLM2-135M, real weights
    python benchmarks/finetune_speed.py --extra FOLDER --data alpaca.json --model Llama-3.1-8B --seq-length 4096 \
        --records 1000 --cases lora qlora                                          # CUDA; without the weights:
        --shape llama3.1_8b --model DIR-WITH-TOKENIZER

Every step of every side reads the whole set once, so all train the same tokens and their losses can be compared step by
step; adapters start alike. TRL is given our token ids and labels, dynamic padding to the longest of a micro-batch of 8,
or its packing (bfd); logits never exist whole on either side; nothing is recomputed unless --remat. Without flash
attention TRL packs too, and transformers keeps the examples apart by a mask of S x S that it makes from positions.
Each side runs in a process of its own, one after the other, alternating for --rounds; the first step is left out. On a
CPU seconds are those that the process worked, of one thread with --threads 1, so that what else runs matters little.
How much padding there is depends on the records: `fill` is the share of the computed positions that are tokens. Few
records leave our last sequence half empty, which a real set does not; take 32 or more.

Memory is the peak of the process less what it held before the model was built (CPU), or of the device (CUDA). By
default glibc keeps freed blocks; --memory measures what is in use, as benchmarks/plan_check.py does: glibc gives every
freed block of 64 KiB and more back at once, on all sides, which costs time, so that no speed is told. What it is held
against is worked out by the formulas of `herd plan`.
Writes benchmarks/results/finetune_speed-DEVICE.json; with --add beside what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
SIDES = ("herd", "trl_padded", "trl_packed")
CASES = ("lora", "qlora", "full")
RANK, ALPHA, LR, BETAS, CLIP, SEED = 16, 32, 1e-4, (0.9, 0.999), 1.0, 1234


def recipe(options: argparse.Namespace, case: str, sequences: int = 1) -> Any:
    """Our recipe of a case; a step is `sequences` long, all that there are."""
    from llama.config import Recipe
    from llama.hf.config import model_config

    lora = {"rank": RANK, "alpha": ALPHA, "targets": ["all-linear"]} if case != "full" else {}
    return Recipe.model_validate(
        {
            "name": "speed",
            "run_dir": options.work,
            "model": model_config(Path(options.model)).model_dump(),
            "data": {
                "train": options.data, "seq_length": options.seq_length, "split": "1", "tokenizer": options.model,
            },
            "chat": {"truncation": "drop", "cache": f"{options.work}/cache"},
            "train": {
                "steps": options.steps, "global_batch_size": sequences, "micro_batch_size": 1, "seed": SEED,
                "precision": options.precision, "init_from": options.model,
                # A chunk's logits fit below glibc's largest threshold for blocks that it keeps: a tenth faster on CPUs.
                "loss_chunk": 256 if options.cpu else 1024,
                "activation_checkpointing": "full" if options.remat else "none",
            },
            "lora": lora | ({"quantize": "nf4"} if case == "qlora" else {}),
            "optimizer": {"lr": LR, "betas": BETAS, "weight_decay": 0.0, "clip_norm": CLIP},
            "schedule": {"kind": "constant"},
        }
    )  # fmt: skip


def held(device: Any) -> int:
    """Bytes that this process (CPU) or the device holds now."""
    if device.type == "cpu":
        import psutil

        return int(psutil.Process().memory_info().rss)
    import torch

    return int(torch.cuda.memory_allocated())


class Meter:
    """Seconds of each step and memory, the same for every side."""

    def __init__(self) -> None:
        from llama.device import find_device

        self.device = find_device()
        self.before = held(self.device)
        self.times: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def begin(self) -> None:
        self.device.synchronize()
        self.started, self.worked = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self.device.synchronize()
        now, work = time.perf_counter(), time.process_time()
        self.times.append(now - self.started)
        self.cpu.append(work - self.worked)
        self.started, self.worked = now, work

    def result(self, trained: int, real: int, computed: int) -> dict[str, Any]:
        """Of a step: labels that are trained, tokens that are no padding, positions that are computed."""
        import torch

        # Of a CPU that others use too, the seconds that were worked.
        seconds = statistics.median((self.cpu if self.device.type == "cpu" else self.times)[1:])
        return {
            "trained_per_second": trained / seconds, "tokens_per_second": real / seconds, "step_seconds": seconds,
            "wall_seconds": statistics.median(self.times[1:]),
            "trained": trained, "tokens": real, "fill": real / computed,
            "peak_memory": self.device.peak_memory() - self.before, "losses": self.losses,
            "threads": torch.get_num_threads(),
        }  # fmt: skip


def herd(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """The trainer's own step on our batches."""
    import torch
    import torch.distributed as dist

    from llama import hf
    from llama.chat.dataset import build_chat, chat_samples
    from llama.checkpoint_format import TrainState
    from llama.device import find_device
    from llama.layout import layout
    from llama.parallel.adapters import packed_size
    from llama.parallel.apply import parallelize
    from llama.parallel.mesh import build_mesh
    from llama.run_folder import RunFolder
    from llama.train.loop import Trainer
    from llama.train.optim import build_optimizer
    from llama.train.signals import StopRequest
    from llama.train.watchdog import Watchdog

    device = find_device()
    dist.init_process_group(device.communication, store=dist.HashStore(), rank=0, world_size=1)
    samples = chat_samples(recipe(options, case))[0]
    config = recipe(options, case, len(samples))
    batches = build_chat(config, 0, 1)[0]
    meter = Meter()
    mesh = build_mesh(layout(config, 1), device.type)
    read = hf.checkpoint_reader(Path(options.model), config.model)
    model = parallelize(config, mesh, device, read=read)
    trainer = Trainer(
        config, device, model, build_optimizer(model, config, device), SimpleNamespace(seconds=0.0), None, TrainState(),  # type: ignore[arg-type]
        StopRequest(), Watchdog(RunFolder(Path()), 0, 0, [], 0.0),
    )  # fmt: skip
    feed = batches.prefetch(0)
    meter.begin()
    for _ in range(options.steps):
        meter.losses.append(trainer.step(feed).loss)
        meter.end()
    feed.close()
    trained = trainer.state.trained_tokens // options.steps
    result = meter.result(trained, int(samples.positions.sum()), len(samples) * options.seq_length)
    parameters = {p for part in model.parts for p in (*part.parameters(), *part.buffers())}
    result["frozen_bytes"] = sum(p.nbytes for p in parameters if not p.requires_grad)
    result["trained_parameters"] = sum(p.numel() for p in parameters if p.requires_grad)
    if case == "qlora" and (options.memory or device.type == "cuda"):  # a process holds more than is in use
        result["arithmetic"] = arithmetic(config, *packed_size(config))
    torch.distributed.destroy_process_group()
    return result


def arithmetic(config: Any, weights: int, packed: int) -> dict[str, Any]:
    """QLoRA's memory worked out: what the formulas of `herd plan` foresee, and what its weights are made of."""
    from llama.parallel.adapters import adapter_shapes
    from llama.plan.analytic import foresee

    one = config.model_validate(config.model_dump() | {"train": config.train.model_dump() | {"global_batch_size": 1}})
    memory = foresee(one, 1, 0).memory
    return {
        "packed_weights": weights, "packed_bytes": packed, "bits": 8 * packed / weights,
        "adapter_bytes": 4 * sum(a * b for a, b in adapter_shapes(config).values()), **vars(memory), "peak": memory.peak,
    }  # fmt: skip


def trl(options: argparse.Namespace, case: str, packed: bool) -> dict[str, Any]:
    """SFTTrainer.train on the same ids and labels."""
    sys.path.append(options.extra)
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    from llama.chat.dataset import chat_samples

    transformers.utils.logging.set_verbosity_error()
    samples = chat_samples(recipe(options, case))[0]
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for example in samples.examples.tolist():
        ids, mask = (column.get(example).tolist() for column in (samples.encoded.tokens, samples.encoded.trained))
        rows["input_ids"].append(ids)
        rows["labels"].append([i if m else -100 for i, m in zip(ids, mask, strict=True)])
    data = Dataset.from_dict(rows)
    count = len(pack_dataset(data, options.seq_length + 1, "bfd")) if packed else len(data)
    micro = 1 if packed else options.padded_batch
    cuda, narrow = torch.cuda.is_available(), options.precision != "fp32"
    config = SFTConfig(
        output_dir=f"{options.work}/trl", per_device_train_batch_size=micro,
        gradient_accumulation_steps=-(-count // micro), max_steps=options.steps, learning_rate=LR,
        lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=0.0, max_grad_norm=CLIP,
        optim="adamw_torch_fused", bf16=narrow, use_cpu=not cuda, gradient_checkpointing=options.remat,
        logging_steps=1, report_to="none", save_strategy="no", max_length=options.seq_length + 1, packing=packed,
        disable_tqdm=True, seed=SEED, dataloader_pin_memory=cuda,
    )  # fmt: skip
    meter = Meter()
    # A frozen base is held as it is computed with, as ours is; trained weights in fp32.
    loading: dict[str, Any] = {"dtype": torch.bfloat16 if narrow and case != "full" else torch.float32}
    if case == "qlora":
        loading["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=loading["dtype"],
        )  # fmt: skip
    if packed and cuda and options.attention:
        loading["attn_implementation"] = options.attention
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, **loading)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end()

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                meter.losses.append(logs["loss"])

    computed = real = trained = 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Steps()],
        peft_config=None if case == "full" else lora,
    )  # fmt: skip
    if case != "full":
        start_alike(trainer.model)
    for batch in trainer.get_train_dataloader():
        computed += batch["input_ids"].numel()
        trained += int((batch["labels"][:, 1:] != -100).sum())
    real = sum(len(ids) - 1 for ids in rows["input_ids"])
    trainer.train()
    return meter.result(trained, real, computed)


def start_alike(model: Any) -> None:
    """Give PEFT's adapters the numbers that ours start from."""
    import torch

    from llama.model.lora import initial_a
    from llama.targets import HF_MODULES

    ours = {theirs: name for name, theirs in HF_MODULES.items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                layer, module = name.partition("layers.")[2].partition(".lora_A")[0].split(".", 1)
                p.copy_(initial_a(f"layers.{layer}.{ours[module]}.lora_a", SEED, *p.shape))


def child(options: argparse.Namespace, side: str, case: str) -> dict[str, Any]:
    """Run one side in this process."""
    return herd(options, case) if side == "herd" else trl(options, case, side == "trl_packed")


def run_child(options: argparse.Namespace, side: str, case: str) -> dict[str, Any]:
    """Run one side in a fresh process; {"error": last line} when it fails, out of memory for instance."""
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536"} if options.memory else {}
    environment = {**os.environ, **threads, **exact, "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}
    given = json.dumps(vars(options) | {"child": None, "to": None})
    done = subprocess.run(
        [sys.executable, __file__, "--child", side, case, given], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def random_model(name: str, tokenizer: Path, folder: Path) -> str:
    """A Hugging Face directory of the recipe's shape with random bf16 weights, a file a layer, and that tokenizer."""
    import torch
    from safetensors.torch import save_file

    from llama.freeze import hf_name, parameter_shapes
    from llama.hf.config import config_json
    from llama.recipe import load

    folder.mkdir()
    model = load(name).model
    (folder / "config.json").write_text(json.dumps(config_json(model, "bfloat16", None, None)))
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)
    for template in tokenizer.glob("*.jinja"):
        shutil.copy(template, folder)
    files: dict[str, dict[str, torch.Tensor]] = {}
    weight_map, generator = {}, torch.Generator().manual_seed(SEED)
    for ours, shape in parameter_shapes(model).items():
        file = f"model-{'.'.join(ours.split('.')[:2])}.safetensors"
        weight = torch.randn(shape, generator=generator).mul_(model.init_std).bfloat16()
        files.setdefault(file, {})[hf_name(ours)] = torch.ones_like(weight) if len(shape) == 1 else weight
        weight_map[hf_name(ours)] = file
    for file, tensors in files.items():
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for ts in files.values() for t in ts.values())}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": weight_map}))
    return str(folder)


def compare(options: argparse.Namespace, case: str, rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, ratios to each side of TRL, and the greatest distance of their losses from ours."""
    row: dict[str, Any] = {
        "case": case,
        "measured": "memory in use" if options.memory else "speed",
        "records": options.records,
        "seq_length": options.seq_length,
        "precision": options.precision,
    }
    for side, runs in rounds.items():
        good = [r for r in runs if "error" not in r]
        if not good:
            row[side] = {"error": runs[0]["error"]}
            continue
        numbers = {k for k, v in good[0].items() if isinstance(v, (int, float))}
        row[side] = good[0] | {k: statistics.median(r[k] for r in good) for k in numbers}
    ours = row.get("herd", {})
    for side, theirs in list(row.items()):
        if side.startswith("trl") and "losses" in theirs and "losses" in ours:
            speed = {
                "speed_by_wall": theirs["wall_seconds"] / ours["wall_seconds"],
                "speed": ours["trained_per_second"] / theirs["trained_per_second"],
            }
            row[f"against_{side}"] = ({} if options.memory else speed) | {
                "memory": ours["peak_memory"] / theirs["peak_memory"],
                "loss_gap": max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=False)),
            }
    if "arithmetic" in ours:
        worked_out = ours["arithmetic"]
        ours["frozen_over_arithmetic"] = ours["frozen_bytes"] / (worked_out["weights"] - worked_out["adapter_bytes"])
        ours["peak_over_arithmetic"] = ours["peak_memory"] / worked_out["peak"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--extra", default="", help="folder with TRL and what it needs; without it ours runs alone")
    parser.add_argument("--data", default="data/alpaca.json", help="conversations of any format")
    parser.add_argument("--records", type=int, default=64, help="how many of them; all are read in each step")
    parser.add_argument("--model", help="Hugging Face directory; SmolLM2-135M from the tests' material when not given")
    parser.add_argument("--shape", help="a recipe: random weights of its shape, and the tokenizer of --model")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--precision", choices=("bf16_mixed", "fp32"), default="bf16_mixed")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--padded-batch", type=int, default=8, help="examples of TRL's padded micro-batch (its default)"
    )
    parser.add_argument("--threads", type=int, help="of a child process; torch's choice when not given")
    parser.add_argument("--remat", action="store_true", help="recompute blocks on both sides")
    parser.add_argument("--attention", help="TRL's attention on CUDA, such as flash_attention_2 or kernels-community/…")
    parser.add_argument("--memory", action="store_true", help="measure the memory in use, and no speed (CPU)")
    parser.add_argument("--add", action="store_true", help="keep the results that the file has, but for those repeated")
    parser.add_argument("--to", type=Path, help="result file")
    options = parser.parse_args()
    if options.child:
        side, case, given = options.child
        print(json.dumps(child(argparse.Namespace(**json.loads(given)), side, case)))
        return

    import torch

    from llama.device import find_device

    sys.path.insert(0, str(HERE.parent))
    if options.model is None:
        from tests.material import smollm2_checkpoint

        options.model = str(smollm2_checkpoint())
    device = find_device()
    about = {
        "device": device.name, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    sides = [side for side in options.sides if side == "herd" or options.extra]
    options.cpu = device.type == "cpu"
    to = options.to or HERE / "results" / f"finetune_speed-{about['device'].replace(' ', '_')}.json"
    to.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = json.loads(to.read_text())["results"] if options.add and to.exists() else []
    with tempfile.TemporaryDirectory(prefix="finetune_speed-") as work:
        options.work = work
        if options.shape:
            options.model = random_model(options.shape, Path(options.model), Path(work) / "model")
        records = json.loads(Path(options.data).read_text(encoding="utf-8"))[: options.records]
        options.data = f"{work}/records.json"
        Path(options.data).write_text(json.dumps(records), encoding="utf-8")
        for case in options.cases:
            rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for i in range(options.rounds):
                for side in sides if i % 2 == 0 else sides[::-1]:
                    rounds[side].append(run_child(options, side, case))
            row = compare(options, case, rounds) | {"rounds": rounds, "command": sys.argv}
            same = ("case", "measured", "records", "seq_length", "precision")
            results = [old for old in results if any(old.get(key) != row[key] for key in same)] + [row]
            print(json.dumps({k: v for k, v in results[-1].items() if k != "rounds"}, indent=1), flush=True)
            to.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    print(f"written to {to}")


if __name__ == "__main__":
    main()
