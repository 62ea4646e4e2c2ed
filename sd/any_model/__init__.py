"""LoRA on any nn.Module: tasks, and the JSON configs of lora_wrapper and LoRAW."""

from sd.any_model.config import apply_lora_config, extract_diff, merge_weights, prepare_for_training
from sd.any_model.tasks import LoRAModel

__all__ = ["LoRAModel", "apply_lora_config", "extract_diff", "merge_weights", "prepare_for_training"]
