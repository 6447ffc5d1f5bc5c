"""Hugging Face directories in and out: llama.hf.model_config, checkpoint_reader, export, save_model; PEFT's adapters."""

from llama.hf.config import config_json, model_config
from llama.hf.export import export, save_model
from llama.hf.peft import adapter_reader, export_adapter
from llama.hf.weights import checkpoint_reader, hf_name, parameter_shapes

__all__ = [
    "adapter_reader",
    "checkpoint_reader",
    "config_json",
    "export",
    "export_adapter",
    "hf_name",
    "model_config",
    "parameter_shapes",
    "save_model",
]
