"""The result files of a training: a LoRA or a checkpoint, and one for each new word, with the options in their metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sd.adapters.quant import quantized_kinds
from sd.checkpoints.writer import save_checkpoint
from sd.model_loader import save_embedding, save_models_lora
from sd.models import Models
from sd.training.config import TrainConfig
from sd.training.new_words import word_files


def result_files(config: TrainConfig) -> list[str]:
    """Names of the result files in the run's folder."""
    main = {"lora": [f"{config.name}.safetensors"], "words": []}.get(config.train, ["model.safetensors"])
    return [*main, *word_files(config).values()]


def save_result(config: TrainConfig, models: Models, folder: Path, facts: dict, pictures: int) -> None:
    """Write the result files; `facts` and the number of `pictures` go into their metadata."""
    metadata = {"sdlora.training": json.dumps(facts), "sdlora.base_quantization": ",".join(quantized_kinds(models)) or "none"}
    words = word_files(config)
    if config.train in ("full", "vae"):
        models.source = None  # the models no longer match that file
        if config.zero_terminal_snr:
            models.config = replace(models.config, zero_terminal_snr=True)  # to be sampled as it was trained
        save_checkpoint(models, folder / "model.safetensors", metadata=metadata)
    for word, file in words.items():
        save_embedding(models, folder / file, word, metadata=metadata)
    if config.train != "lora":
        return
    kohya = {"ss_output_name": config.name, "ss_learning_rate": config.learning_rate, "ss_unet_lr": config.learning_rate,
             "ss_text_encoder_lr": config.text_learning_rate or config.learning_rate, "ss_max_train_steps": config.steps,
             "ss_steps": config.steps, "ss_seed": config.seed, "ss_batch_size_per_device": config.batch_size,
             "ss_gradient_accumulation_steps": config.accumulate, "ss_gradient_checkpointing": config.checkpointing,
             "ss_optimizer": config.optimizer, "ss_lr_scheduler": config.schedule, "ss_lr_warmup_steps": config.warmup,
             "ss_max_grad_norm": config.clip_norm, "ss_caption_dropout_rate": config.caption_dropout,
             "ss_network_dropout": config.dropout, "ss_num_train_images": pictures,
             "ss_scale_weight_norms": config.max_norm or None, "ss_zero_terminal_snr": config.zero_terminal_snr,
             "ss_mixed_precision": "no" if config.precision == "fp32" else config.precision}
    metadata |= {key: str(value) for key, value in kohya.items()}
    metadata |= {"modelspec.trigger_phrase": ", ".join(words)} if words else {}
    save_models_lora(models, folder / f"{config.name}.safetensors", config.name, metadata=metadata)
