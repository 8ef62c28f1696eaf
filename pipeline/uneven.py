"""Load a whole model whose blocks have widths of their own, which transformers' own loaders refuse.

    from pipeline.uneven import load
    model = load("runs/model")            # a transformers model: model(tokens), model.generate(...), …

What `{comp: {widths: per_block}}` writes is safetensors of the usual names, and a config.json that says how many
neurons each block has (`per_layer_config`). The model is built without weights, each block once more by its own class
at its own width, and then filled. Any other checkpoint that can be pruned loads as well, as it would by
`from_pretrained`. Custom code is never run, and no pickle is read.
"""

from contextlib import closing, suppress
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from pipeline.block_widths import settings_by_block
from pipeline.checkpoint import Checkpoint
from pipeline.skeleton import Skeleton


def load(
    directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Return the model of a directory, in evaluation mode; dtype: the one that its weights are stored in, if None.

    `save_pretrained` of it writes a directory that this loads again. Raises CheckpointError, UnsupportedCheckpoint and
    MalformedShard where the directory is not a whole model of a known kind, NumericsError where it holds NaN or Inf.
    """
    path = Path(directory)
    with closing(Checkpoint.open(path)) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.device(device), dtype or checkpoint.matrix_dtype())
        skeleton.fill(skeleton.model, skeleton.stored_name, checkpoint)
        model, use_cache = skeleton.model, checkpoint.model_config().use_cache
    for block in skeleton.blocks:
        for module in block.modules():
            if "config" in vars(module):  # a copy, which would not hear of another attention that is asked for later
                module.config = model.config
    model.tie_weights()
    model.requires_grad_(True)
    model.config.use_cache = use_cache
    if skeleton.widths is not None:
        model.config.per_layer_config = settings_by_block(skeleton.widths)
    with suppress(OSError):  # there may be none
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model
