"""A pipeline folder of diffusers, small, written without diffusers."""

import json
import shutil
from pathlib import Path

from helpers.tiny_sana import STUDENT
from helpers.workdirs import random_params

from sprint_jax.interop.diffusers import save_transformer

STORED = Path(__file__).parents[1] / "parity" / "stored"
FIELDS = STUDENT | dict(in_channels=4, out_channels=4, sample_size=4, num_layers=2, logvar=False)
INDEX = "model_index.json"


def write_pipeline(folder: Path, student: bool = True) -> Path:
    """A pipeline of a random transformer and of the stored autoencoder, text encoder and tokenizer."""
    shutil.copytree(STORED / "dc_ae", folder / "vae")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(STORED / "gemma2" / part, folder / part)
    width = json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_size"]
    fields = FIELDS | dict(guidance_embeds=student, caption_channels=width)
    save_transformer(folder / "transformer", fields, random_params(fields, 0))
    scheduler = {"sigma_data": 0.5} if student else {"flow_shift": 2.5}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    name = "SanaSprintPipeline" if student else "SanaPipeline"
    (folder / INDEX).write_text(json.dumps({"_class_name": name}))
    return folder
