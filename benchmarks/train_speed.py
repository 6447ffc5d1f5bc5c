"""Training speed and memory: ours against transformers' LlamaForCausalLM, same shape, data and optimizer, in one run.

    python benchmarks/train_speed.py                     # CPU: a 30M Llama in fp32
    python benchmarks/train_speed.py --shapes 1b 8b      # CUDA: 1B in bf16 mixed precision, 8B in bf16, at 4K and 8K

Each side trains in a process of its own, one after the other, alternating for --rounds; ratios are of medians over the
rounds. Memory is the process's (CPU) or the device's (CUDA) peak. Losses of the first steps are compared, so that the
speed is that of the same training. Writes benchmarks/results/train_speed-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
LLAMA_8B = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    rope_theta=5e5,
)
LLAMA_1B = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8, rope_theta=5e5,
    tie_embeddings=True,
)  # fmt: skip
SMALL = dict(vocab_size=32000, hidden_size=384, intermediate_size=1024, num_layers=8, num_heads=6, num_kv_heads=6)
# name -> (model, precision, [(sequence length, micro batch)], activation checkpointing)
SHAPES: dict[str, tuple[dict[str, Any], str, list[tuple[int, int]], str]] = {
    "30m": (SMALL, "fp32", [(512, 8)], "none"),
    "1b": (LLAMA_1B, "bf16_mixed", [(4096, 4), (8192, 2)], "none"),
    "8b": (LLAMA_8B, "bf16_sr", [(4096, 2), (8192, 1)], "full"),
}
LR, BETAS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0


def recipe(shape: str, seq: int, batch: int, steps: int, compile_blocks: bool) -> Any:
    """Our recipe of a case."""
    from llama.config import Recipe

    model, precision, _, remat = SHAPES[shape]
    return Recipe.model_validate(
        {
            "name": "speed",
            "model": {**model, "max_position": max(seq, 8192)},
            "data": {"seq_length": seq},
            "train": {
                "steps": steps, "global_batch_size": batch, "micro_batch_size": batch, "precision": precision,
                "activation_checkpointing": remat, "compile": compile_blocks,
            },
            "optimizer": {
                "lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP, "state_dtype": "bfloat16",
            },
            "schedule": {"kind": "constant"},
        }
    )  # fmt: skip


def batches(vocab: int, seq: int, batch: int, steps: int, device: Any) -> list[Any]:
    """The same random tokens for both sides, Zipf-like so that the loss moves."""
    import torch

    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(steps, batch, seq + 1, generator=generator)
    return list((vocab ** draws.double()).long().clamp(0, vocab - 1).to(device))


def ours(shape: str, seq: int, batch: int, steps: int, compile_blocks: bool) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step, by the trainer's own step."""
    import torch
    import torch.distributed as dist

    from llama.checkpoint_format import TrainState
    from llama.data.batches import Batch
    from llama.device import find_device
    from llama.layout import layout
    from llama.parallel.apply import parallelize
    from llama.parallel.mesh import build_mesh
    from llama.run_folder import RunFolder
    from llama.train.loop import Trainer
    from llama.train.optim import build_optimizer
    from llama.train.signals import StopRequest
    from llama.train.watchdog import Watchdog

    device = find_device()
    dist.init_process_group(device.communication, store=dist.HashStore(), rank=0, world_size=1)
    config = recipe(shape, seq, batch, steps, compile_blocks)
    model = parallelize(config, build_mesh(layout(config, 1), device.type), device)
    optimizer = build_optimizer(model, config, device)
    trainer = Trainer(
        config, device, model, optimizer, SimpleNamespace(seconds=0.0), None, TrainState(), StopRequest(),  # type: ignore[arg-type]
        Watchdog(RunFolder(Path()), 0, 0, [], 0.0),
    )  # fmt: skip
    positions = torch.arange(seq, dtype=torch.int32).repeat(batch, 1)
    one_document = torch.zeros(batch, seq, dtype=torch.int32)
    data = [
        [Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), positions, one_document, 0)]
        for t in batches(config.model.vocab_size, seq, batch, steps, "cpu")
    ]
    feed: Any = iter(data)
    times, losses = [], []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(trainer.step(feed).loss)
        device.synchronize()
        times.append(time.perf_counter() - started)
    return times, losses


def theirs(shape: str, seq: int, batch: int, steps: int, compile_blocks: bool) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step of a plain transformers loop with torch's fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama.config import Model
    from llama.device import find_device
    from llama.model.init import initial_rows

    model_keys, precision, _, remat = SHAPES[shape]
    shape_ = Model.model_validate({**model_keys, "max_position": max(seq, 8192)})
    device = find_device().torch()
    config = LlamaConfig(
        vocab_size=shape_.vocab_size, hidden_size=shape_.hidden_size, intermediate_size=shape_.intermediate_size,
        num_hidden_layers=shape_.num_layers, num_attention_heads=shape_.num_heads, num_key_value_heads=shape_.kv_heads,
        max_position_embeddings=shape_.max_position, rms_norm_eps=shape_.norm_eps, tie_word_embeddings=shape_.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape_.rope_theta}, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    dtype = torch.bfloat16 if precision == "bf16_sr" else torch.float32
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    if shape == "30m":  # the same initial weights, so that losses can be compared
        from llama.hf.weights import hf_name

        by_theirs = dict(model.named_parameters())
        with torch.no_grad():
            from llama.model.llama import Llama

            for name, p in Llama(shape_).named_parameters():
                width = p.shape[1] if p.ndim > 1 else 1
                by_theirs[hf_name(name)].copy_(initial_rows(name, shape_, 1234, 0, p.shape[0], width).reshape(p.shape))
    if remat == "full":
        model.gradient_checkpointing_enable()
    if compile_blocks:
        model.compile()
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    times, losses = [], []
    for tokens in batches(shape_.vocab_size, seq, batch, steps, "cpu"):
        started = time.perf_counter()
        tokens = tokens.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16_mixed"):
            labels = tokens[:, 1:].contiguous()
            loss = model(input_ids=tokens[:, :-1].contiguous(), labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.perf_counter() - started)
    return times, losses


def child(side: str, shape: str, seq: int, batch: int, steps: int, compile_blocks: bool) -> dict[str, Any]:
    """Run one side in this process."""
    import torch

    from llama.device import find_device

    times, losses = (ours if side == "herd" else theirs)(shape, seq, batch, steps, compile_blocks)
    steady = times[min(3, len(times) - 1) :]
    return {
        "tokens_per_second": seq * batch / statistics.median(steady),
        "peak_memory": find_device().peak_memory(),
        "losses": losses[:4],
        "threads": torch.get_num_threads(),
    }


def run_child(side: str, shape: str, seq: int, batch: int, steps: int, compile_blocks: bool) -> dict[str, Any]:
    """Run one side in a fresh process; {"error": last line} when it fails, out of memory for instance."""
    arguments = [side, shape, str(seq), str(batch), str(steps), str(int(compile_blocks))]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from llama.device import find_device

    device = find_device()
    return {
        "device": device.name, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "torch": torch.__version__, "python": platform.python_version(), "peak_flops": device.peak_flops,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 30m on a CPU, 1b and 8b on CUDA")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--to", type=Path, help="result file")
    options = parser.parse_args()
    if options.child:
        side, shape, seq, batch, steps, compiled = options.child
        print(json.dumps(child(side, shape, int(seq), int(batch), int(steps), compiled == "1")))
        return

    from llama.config import Model
    from llama.model.llama import flops_per_token

    about = machine()
    shapes = options.shapes or (["30m"] if about["device"] == "CPU" else ["1b", "8b"])
    results = []
    for shape in shapes:
        keys, precision, cases, remat = SHAPES[shape]
        for seq, batch in cases:
            rounds: dict[str, list[dict[str, Any]]] = {"herd": [], "transformers": []}
            for i in range(options.rounds):
                for side in ("herd", "transformers") if i % 2 == 0 else ("transformers", "herd"):
                    rounds[side].append(run_child(side, shape, seq, batch, options.steps, options.compile))
            row: dict[str, Any] = {
                "shape": shape, "precision": precision, "seq": seq, "micro_batch": batch, "remat": remat,
                "compile": options.compile, "rounds": rounds,
            }  # fmt: skip
            good = {side: [r for r in runs if "error" not in r] for side, runs in rounds.items()}
            for side, runs in good.items():
                if not runs:
                    row[side] = {"error": rounds[side][0]["error"]}
                    continue
                speed = statistics.median(r["tokens_per_second"] for r in runs)
                row[side] = {
                    "tokens_per_second": speed,
                    "peak_memory": statistics.median(r["peak_memory"] for r in runs),
                }
                if about["peak_flops"]:
                    config = Model.model_validate({**keys, "max_position": max(seq, 8192)})
                    for name, causal in (("mfu_full", False), ("mfu_causal", True)):
                        row[side][name] = speed * flops_per_token(config, seq, causal) / about["peak_flops"]
            if all(good.values()):
                row["speed_ratio"] = row["herd"]["tokens_per_second"] / row["transformers"]["tokens_per_second"]
                row["memory_ratio"] = row["herd"]["peak_memory"] / row["transformers"]["peak_memory"]
                row["loss_gap"] = max(
                    abs(a - b)
                    for a, b in zip(good["herd"][0]["losses"], good["transformers"][0]["losses"], strict=True)
                )
            results.append(row)
            shown = {k: v for k, v in row.items() if k != "rounds"}
            print(json.dumps(shown, indent=1), flush=True)
    to = options.to or HERE / "results" / f"train_speed-{about['device'].replace(' ', '_')}.json"
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps({"machine": about, "command": sys.argv, "results": results}, indent=1) + "\n")
    print(f"written to {to}")


if __name__ == "__main__":
    main()
